//! The COSI types and namespaces that this Omni knows, by name.

/// The namespace of ordinary resources.
pub const DEFAULT: &str = "default";
/// In Omni's memory.
pub const EPHEMERAL: &str = "ephemeral";
/// Shared by all providers.
pub const INFRA: &str = "infra-provider";
/// Heartbeats, in Omni's memory.
pub const INFRA_EPHEMERAL: &str = "infra-provider-ephemeral";
/// What comes before a provider ID in the name of that provider's own namespace.
pub const INFRA_OWN_PREFIX: &str = "infra-provider:";
/// Definitions of types and namespaces.
pub const META: &str = "meta";
/// Computed on the fly, for whoever asks.
pub const VIRTUAL: &str = "virtual";

/// Machine requests.
pub const MACHINE_REQUESTS: &str = "MachineRequests.omni.sidero.dev";
/// Answers to them.
pub const MACHINE_REQUEST_STATUSES: &str = "MachineRequestStatuses.omni.sidero.dev";
/// Sets of machine requests, what an operator scales.
pub const MACHINE_REQUEST_SETS: &str = "MachineRequestSets.omni.sidero.dev";
/// Patches that a provider asks for.
pub const CONFIG_PATCH_REQUESTS: &str = "ConfigPatchRequests.omni.sidero.dev";
/// What Omni makes of them.
pub const CONFIG_PATCHES: &str = "ConfigPatches.omni.sidero.dev";
/// What a provider sees of a machine that joined.
pub const REGISTRATIONS: &str = "InfraMachineRegistrations.omni.sidero.dev";
/// Providers that an administrator made.
pub const INFRA_PROVIDERS: &str = "InfraProviders.omni.sidero.dev";
/// A provider's own registration.
pub const INFRA_PROVIDER_STATUSES: &str = "InfraProviderStatuses.omni.sidero.dev";
/// A provider's heartbeat.
pub const INFRA_PROVIDER_HEALTH: &str = "InfraProviderHealthStatuses.omni.sidero.dev";
/// Join tokens of providers.
pub const PROVIDER_JOIN_CONFIGS: &str = "ProviderJoinConfigs.omni.sidero.dev";
/// How machines reach Omni.
pub const API_CONFIGS: &str = "SiderolinkAPIConfigs.omni.sidero.dev";
/// The same, for providers of Omni before 1.0.
pub const CONNECTION_PARAMS: &str = "ConnectionParams.omni.sidero.dev";
/// SideroLink tunnels, one for each machine that joined.
pub const LINKS: &str = "Links.omni.sidero.dev";
/// Machines that Omni accepted.
pub const MACHINES: &str = "Machines.omni.sidero.dev";
/// Omni's features, among them its image factory.
pub const FEATURES_CONFIGS: &str = "FeaturesConfigs.omni.sidero.dev";
/// Talos versions.
pub const TALOS_VERSIONS: &str = "TalosVersions.omni.sidero.dev";
/// Omni's own version.
pub const SYS_VERSIONS: &str = "SysVersions.system.sidero.dev";
/// Who is asking.
pub const CURRENT_USERS: &str = "CurrentUsers.omni.sidero.dev";
/// The types that this Omni knows.
pub const RESOURCE_DEFINITIONS: &str = "ResourceDefinitions.meta.cosi.dev";
/// The namespaces that this Omni knows.
pub const NAMESPACES: &str = "Namespaces.meta.cosi.dev";

/// What every own type of a provider ends with, after a dot and the provider ID.
pub const OWN_TYPE_SUFFIX: &str = ".infraprovider.sidero.dev";

/// The ID of the two SideroLink configs.
pub const SIDEROLINK_CONFIG_ID: &str = "siderolink-config";
/// The ID of the features config.
pub const FEATURES_CONFIG_ID: &str = "features-config";
/// The ID of everything that there is one of.
pub const CURRENT_ID: &str = "current";

/// Whose resource it is.
pub const LABEL_PROVIDER: &str = "omni.sidero.dev/infra-provider-id";
/// The machine request.
pub const LABEL_REQUEST: &str = "omni.sidero.dev/machine-request";
/// The machine request set.
pub const LABEL_SET: &str = "omni.sidero.dev/machine-request-set";
/// The machine, on a config patch.
pub const LABEL_MACHINE: &str = "omni.sidero.dev/machine";
/// Not for users to edit, on a config patch.
pub const LABEL_SYSTEM_PATCH: &str = "omni.sidero.dev/system-patch";
/// A provider of machines that stand in a rack already.
pub const LABEL_STATIC: &str = "omni.sidero.dev/is-static-infra-provider";

/// Omni's finalizer on machine requests.
pub const REQUEST_FINALIZER: &str = "ClusterMachineRequestStatusController";
/// Omni's finalizer on machine request statuses: the drain.
pub const STATUS_FINALIZER: &str = "MachineRequestStatusCleanupController";
/// Omni's finalizer on config patch requests, and the owner of the patches made of them.
pub const PATCH_FINALIZER: &str = "ConfigPatchRequestController";

/// Every type with a definition, in the spelling that Omni lists.
pub(super) const DEFINED: &[&str] = &[
    MACHINE_REQUESTS,
    MACHINE_REQUEST_STATUSES,
    MACHINE_REQUEST_SETS,
    CONFIG_PATCH_REQUESTS,
    CONFIG_PATCHES,
    REGISTRATIONS,
    INFRA_PROVIDERS,
    INFRA_PROVIDER_STATUSES,
    INFRA_PROVIDER_HEALTH,
    PROVIDER_JOIN_CONFIGS,
    API_CONFIGS,
    CONNECTION_PARAMS,
    LINKS,
    MACHINES,
    FEATURES_CONFIGS,
    TALOS_VERSIONS,
    SYS_VERSIONS,
    CURRENT_USERS,
    RESOURCE_DEFINITIONS,
    NAMESPACES,
];

/// Whether resources of that type and namespace live in Omni's memory, and die with it.
pub(super) fn in_memory(namespace: &str, kind: &str) -> bool {
    namespace == EPHEMERAL || (namespace == INFRA_EPHEMERAL && kind == INFRA_PROVIDER_HEALTH)
}

/// The short name of a type: what stands before the first dot.
pub(super) fn short(kind: &str) -> &str {
    kind.split('.').next().unwrap_or(kind)
}
