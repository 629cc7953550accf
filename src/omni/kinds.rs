//! The kinds of resources that we read and write, in one table, and their specs as plain structs.
//!
//! *Guarantees*: a spec that was not changed goes back byte for byte as it came; in a changed one the fields
//! that we do not know are kept. Omni compares the bytes of what we may not change, and refuses a copy that
//! lost a newer field.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};
use serde::{Deserialize, Serialize};

use super::wire::specs as wire;
use crate::cloud::Timestamp;

/// The label that says which provider a resource belongs to. Omni forces it onto everything that we create.
pub const LABEL_PROVIDER: &str = "omni.sidero.dev/infra-provider-id";
/// The label that names the machine request.
pub const LABEL_REQUEST: &str = "omni.sidero.dev/machine-request";
/// The label that names the machine request set.
pub const LABEL_REQUEST_SET: &str = "omni.sidero.dev/machine-request-set";

/// The namespace that all providers share.
pub const NAMESPACE: &str = "infra-provider";
/// The namespace of heartbeats, in Omni's memory.
pub const NAMESPACE_EPHEMERAL: &str = "infra-provider-ephemeral";

/// One kind of resource.
pub trait Kind: Debug + Clone + Send + Sync + 'static {
    /// Its decoded spec.
    type Spec: Debug + Clone + PartialEq + Send + Sync + 'static;
    /// A name for people, in logs and errors: "machine request".
    const NAME: &'static str;
    /// Whether it lives in a namespace that all providers share: what lacks our label there is not ours,
    /// whatever a read says.
    const SHARED: bool;
    /// Whether we may change nothing but finalizers. Omni then answers a stale copy with "denied", not with
    /// "conflict".
    const FINALIZERS_ONLY: bool;
    /// The COSI type. Provider-specific kinds depend on the provider ID.
    fn type_name(provider: &str) -> String;
    /// The COSI namespace.
    fn namespace(provider: &str) -> String;
    /// Decodes spec bytes.
    ///
    /// # Errors
    ///
    /// Says what is wrong with the bytes, without showing them.
    fn decode(raw: &[u8]) -> Result<Self::Spec, String>;
    /// Encodes a spec; fields of `raw` that we do not know are kept.
    fn encode(spec: &Self::Spec, raw: &[u8]) -> Vec<u8>;
    /// Lets a spec share memory with one that is kept already, where it says the same.
    fn share(_spec: &mut Self::Spec, _kept: &Self::Spec) {}
}

/// Whether the machine talks to Omni through a gRPC tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GrpcTunnel {
    /// As Omni likes; on the wire the same as disabled.
    #[default]
    Unset,
    /// Through the tunnel.
    Enabled,
    /// Not through the tunnel.
    Disabled,
}

/// Omni's immutable wish for one machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct MachineRequestSpec {
    /// Usually without a leading "v".
    pub talos_version: String,
    /// Name and image of the overlay, for single-board computers.
    pub overlay: Option<(String, String)>,
    /// Official extensions.
    pub extensions: Vec<String>,
    /// Kernel arguments.
    pub kernel_args: Vec<String>,
    /// META values.
    pub meta_values: Vec<(u32, String)>,
    /// YAML, may be empty: ours to parse as a class.
    pub provider_data: String,
    /// Whether the machine uses the gRPC tunnel.
    pub grpc_tunnel: GrpcTunnel,
}

/// What Omni's screen shows of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Stage {
    /// Nothing said yet.
    #[default]
    Unknown,
    /// Under way.
    Provisioning,
    /// The instance runs.
    Provisioned,
    /// A person or a change is needed, or the machine did not join.
    Failed,
}

/// Our answer to a machine request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineRequestStatusSpec {
    /// The machine's UUID as Talos reports it; empty until known.
    pub id: String,
    /// What Omni's screen shows.
    pub stage: Stage,
    /// Shown while the stage is FAILED.
    pub error: String,
    /// Shown while the stage is PROVISIONING.
    pub status: String,
}

/// A Talos config patch for one machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigPatchRequestSpec {
    /// YAML. `None`: another program wrote it compressed, and it cannot be read back.
    pub data: Option<String>,
}

/// Registration of a provider.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InfraProviderStatusSpec {
    /// JSON schema of the provider data.
    pub schema: String,
    /// Name in Omni's screens.
    pub name: String,
    /// Description in Omni's screens.
    pub description: String,
    /// Base64 of an SVG.
    pub icon: String,
    /// Version of the provider.
    pub version: String,
}

/// The heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InfraProviderHealthStatusSpec {
    /// By our own clock.
    pub last_heartbeat: Timestamp,
    /// Empty when healthy.
    pub error: String,
}

/// The provider's join token and ready-made join config.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ProviderJoinConfigSpec {
    /// A secret.
    pub join_token: String,
}

impl Debug for ProviderJoinConfigSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProviderJoinConfigSpec(<redacted>)")
    }
}

/// How machines reach Omni.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SiderolinkApiConfigSpec {
    /// For example `https://omni.example.com:8090/`.
    pub machine_api_advertised_url: String,
    /// Port of the event sink.
    pub events_port: i32,
    /// Port of the kernel log receiver.
    pub logs_port: i32,
}

/// Join parameters of Omni before 1.0.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ConnectionParamsSpec {
    /// For example `https://omni.example.com:8090/`.
    pub api_endpoint: String,
    /// A secret.
    pub join_token: String,
    /// Port of the event sink.
    pub events_port: i32,
    /// Port of the kernel log receiver.
    pub logs_port: i32,
}

impl Debug for ConnectionParamsSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectionParamsSpec(<redacted>)")
    }
}

/// Where Omni's image factory is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FeaturesConfigSpec {
    /// Empty: the public one.
    pub image_factory_base_url: String,
    /// Empty: there is none.
    pub secondary_image_factory_base_url: String,
}

/// What Omni knows of one Talos version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TalosVersionSpec {
    /// The factory that has it; empty: the first.
    pub image_factory_url: String,
}

/// Who Omni thinks we are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CurrentUserSpec {
    /// `<provider>@infra-provider.serviceaccount.omni.sidero.dev` for us.
    pub identity: String,
    /// `InfraProvider` for us.
    pub role: String,
}

/// Which of several daemons of one provider is active.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaseSpec {
    /// The process that holds it; empty when it was let go.
    pub holder: String,
    /// Counts the holders.
    pub term: u64,
    /// Counts the writes, so that none of them changes nothing.
    pub writes: u64,
    /// How long the lease lasts, in milliseconds after its last change.
    pub duration_ms: u64,
}

/// How a spec of ours reads and writes its wire message.
trait Words<W>: Sized {
    /// The spec in a message.
    fn read(wire: W) -> Self;
    /// Puts the spec into the message that it came with; what we have no word for stays.
    fn write(&self, wire: &mut W);
    /// As [`Kind::share`].
    fn share(&mut self, _kept: &Self) {}
}

/// Requests of one set are written alike.
impl Words<wire::MachineRequestSpec> for Arc<MachineRequestSpec> {
    fn read(wire: wire::MachineRequestSpec) -> Self {
        Self::new(Words::read(wire))
    }

    fn write(&self, wire: &mut wire::MachineRequestSpec) {
        self.as_ref().write(wire);
    }

    fn share(&mut self, kept: &Self) {
        if self == kept {
            self.clone_from(kept);
        }
    }
}

impl Words<wire::MachineRequestSpec> for MachineRequestSpec {
    fn read(wire: wire::MachineRequestSpec) -> Self {
        let grpc_tunnel = match wire.grpc_tunnel() {
            wire::GrpcTunnelMode::Unset => GrpcTunnel::Unset,
            wire::GrpcTunnelMode::Enabled => GrpcTunnel::Enabled,
            wire::GrpcTunnelMode::Disabled => GrpcTunnel::Disabled,
        };
        Self {
            talos_version: wire.talos_version,
            overlay: wire.overlay.map(|overlay| (overlay.name, overlay.image)),
            extensions: wire.extensions,
            kernel_args: wire.kernel_args,
            meta_values: wire
                .meta_values
                .into_iter()
                .map(|meta| (meta.key, meta.value))
                .collect(),
            provider_data: wire.provider_data,
            grpc_tunnel,
        }
    }

    fn write(&self, wire: &mut wire::MachineRequestSpec) {
        wire.talos_version.clone_from(&self.talos_version);
        wire.overlay = self
            .overlay
            .clone()
            .map(|(name, image)| wire::Overlay { name, image });
        wire.extensions.clone_from(&self.extensions);
        wire.kernel_args.clone_from(&self.kernel_args);
        wire.meta_values = self
            .meta_values
            .iter()
            .map(|(key, value)| wire::MetaValue {
                key: *key,
                value: value.clone(),
            })
            .collect();
        wire.provider_data.clone_from(&self.provider_data);
        wire.set_grpc_tunnel(match self.grpc_tunnel {
            GrpcTunnel::Unset => wire::GrpcTunnelMode::Unset,
            GrpcTunnel::Enabled => wire::GrpcTunnelMode::Enabled,
            GrpcTunnel::Disabled => wire::GrpcTunnelMode::Disabled,
        });
    }
}

impl Words<wire::MachineRequestStatusSpec> for MachineRequestStatusSpec {
    fn read(wire: wire::MachineRequestStatusSpec) -> Self {
        use wire::machine_request_status_spec::Stage as Wire;
        let stage = match wire.stage() {
            Wire::Unknown => Stage::Unknown,
            Wire::Provisioning => Stage::Provisioning,
            Wire::Provisioned => Stage::Provisioned,
            Wire::Failed => Stage::Failed,
        };
        Self {
            id: wire.id,
            stage,
            error: wire.error,
            status: wire.status,
        }
    }

    fn write(&self, wire: &mut wire::MachineRequestStatusSpec) {
        use wire::machine_request_status_spec::Stage as Wire;
        wire.id.clone_from(&self.id);
        wire.set_stage(match self.stage {
            Stage::Unknown => Wire::Unknown,
            Stage::Provisioning => Wire::Provisioning,
            Stage::Provisioned => Wire::Provisioned,
            Stage::Failed => Wire::Failed,
        });
        wire.error.clone_from(&self.error);
        wire.status.clone_from(&self.status);
    }
}

impl Words<wire::ConfigPatchRequestSpec> for ConfigPatchRequestSpec {
    fn read(wire: wire::ConfigPatchRequestSpec) -> Self {
        // Readers look at the compressed form first; it needs a dictionary that we do not have.
        Self {
            data: wire.compressed_data.is_empty().then_some(wire.data),
        }
    }

    fn write(&self, wire: &mut wire::ConfigPatchRequestSpec) {
        if let Some(data) = &self.data {
            wire.data.clone_from(data);
            wire.compressed_data.clear();
        }
    }
}

impl Words<wire::InfraProviderStatusSpec> for InfraProviderStatusSpec {
    fn read(wire: wire::InfraProviderStatusSpec) -> Self {
        Self {
            schema: wire.schema,
            name: wire.name,
            description: wire.description,
            icon: wire.icon,
            version: wire.version,
        }
    }

    fn write(&self, wire: &mut wire::InfraProviderStatusSpec) {
        wire.schema.clone_from(&self.schema);
        wire.name.clone_from(&self.name);
        wire.description.clone_from(&self.description);
        wire.icon.clone_from(&self.icon);
        wire.version.clone_from(&self.version);
    }
}

impl Words<wire::InfraProviderHealthStatusSpec> for InfraProviderHealthStatusSpec {
    fn read(wire: wire::InfraProviderHealthStatusSpec) -> Self {
        Self {
            last_heartbeat: wire
                .last_heartbeat_timestamp
                .as_ref()
                .map(moment)
                .unwrap_or_default(),
            error: wire.error,
        }
    }

    fn write(&self, wire: &mut wire::InfraProviderHealthStatusSpec) {
        wire.last_heartbeat_timestamp = Some(wire_moment(self.last_heartbeat));
        wire.error.clone_from(&self.error);
    }
}

impl Words<wire::ProviderJoinConfigSpec> for ProviderJoinConfigSpec {
    fn read(wire: wire::ProviderJoinConfigSpec) -> Self {
        Self {
            join_token: wire.join_token,
        }
    }

    fn write(&self, wire: &mut wire::ProviderJoinConfigSpec) {
        wire.join_token.clone_from(&self.join_token);
    }
}

impl Words<wire::SiderolinkApiConfigSpec> for SiderolinkApiConfigSpec {
    fn read(wire: wire::SiderolinkApiConfigSpec) -> Self {
        Self {
            machine_api_advertised_url: wire.machine_api_advertised_url,
            events_port: wire.events_port,
            logs_port: wire.logs_port,
        }
    }

    fn write(&self, wire: &mut wire::SiderolinkApiConfigSpec) {
        wire.machine_api_advertised_url
            .clone_from(&self.machine_api_advertised_url);
        wire.events_port = self.events_port;
        wire.logs_port = self.logs_port;
    }
}

impl Words<wire::ConnectionParamsSpec> for ConnectionParamsSpec {
    fn read(wire: wire::ConnectionParamsSpec) -> Self {
        Self {
            api_endpoint: wire.api_endpoint,
            join_token: wire.join_token,
            events_port: wire.events_port,
            logs_port: wire.logs_port,
        }
    }

    fn write(&self, wire: &mut wire::ConnectionParamsSpec) {
        wire.api_endpoint.clone_from(&self.api_endpoint);
        wire.join_token.clone_from(&self.join_token);
        wire.events_port = self.events_port;
        wire.logs_port = self.logs_port;
    }
}

impl Words<wire::FeaturesConfigSpec> for FeaturesConfigSpec {
    fn read(wire: wire::FeaturesConfigSpec) -> Self {
        Self {
            image_factory_base_url: wire.image_factory_base_url,
            secondary_image_factory_base_url: wire.secondary_image_factory_base_url,
        }
    }

    fn write(&self, wire: &mut wire::FeaturesConfigSpec) {
        wire.image_factory_base_url
            .clone_from(&self.image_factory_base_url);
        wire.secondary_image_factory_base_url
            .clone_from(&self.secondary_image_factory_base_url);
    }
}

impl Words<wire::TalosVersionSpec> for TalosVersionSpec {
    fn read(wire: wire::TalosVersionSpec) -> Self {
        Self {
            image_factory_url: wire.image_factory_url,
        }
    }

    fn write(&self, wire: &mut wire::TalosVersionSpec) {
        wire.image_factory_url.clone_from(&self.image_factory_url);
    }
}

impl Words<wire::CurrentUserSpec> for CurrentUserSpec {
    fn read(wire: wire::CurrentUserSpec) -> Self {
        Self {
            identity: wire.identity,
            role: wire.role,
        }
    }

    fn write(&self, wire: &mut wire::CurrentUserSpec) {
        wire.identity.clone_from(&self.identity);
        wire.role.clone_from(&self.role);
    }
}

/// A moment on the wire, in our milliseconds; what lies before the epoch is the epoch.
pub(super) fn moment(wire: &prost_types::Timestamp) -> Timestamp {
    let seconds = u64::try_from(wire.seconds).unwrap_or_default();
    let nanos = u64::try_from(wire.nanos).unwrap_or_default();
    Timestamp(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000))
}

/// A moment of ours, as the wire writes it.
pub(super) fn wire_moment(moment: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(moment.0 / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(moment.0 % 1000 * 1_000_000).unwrap_or_default(),
    }
}

fn decode<W: Message + Default, S: Words<W>>(raw: &[u8]) -> Result<S, String> {
    // prost names the message and the field in its errors, never the bytes.
    W::decode(raw).map(S::read).map_err(|error| error.to_string())
}

fn encode<W: Message + Default, S: Words<W> + PartialEq>(spec: &S, raw: &[u8], known: &[u32]) -> Vec<u8> {
    if decode::<W, S>(raw).is_ok_and(|unchanged| unchanged == *spec) {
        return raw.to_vec();
    }
    let mut wire = W::decode(raw).unwrap_or_default();
    spec.write(&mut wire);
    let mut bytes = wire.encode_to_vec();
    copy_unknown(raw, known, &mut bytes);
    bytes
}

/// Appends the fields of `raw` whose numbers are not `known`. Bytes that are no message end the copy.
fn copy_unknown(raw: &[u8], known: &[u32], out: &mut Vec<u8>) {
    let mut rest = raw;
    while !rest.is_empty() {
        let field = rest;
        let Ok((number, wire_type)) = decode_key(&mut rest) else {
            return;
        };
        if skip_field(wire_type, number, &mut rest, DecodeContext::default()).is_err() {
            return;
        }
        if !known.contains(&number)
            && let Some(bytes) = field.get(..field.len().saturating_sub(rest.len()))
        {
            out.extend_from_slice(bytes);
        }
    }
}

/// The namespace of ordinary resources.
const DEFAULT: &str = "default";

macro_rules! kinds {
    ($(
        $(#[$doc:meta])*
        $kind:ident, $name:literal, $type:literal in $namespace:expr, $access:ident,
        $wire:ident [$($number:literal),*] => $spec:ty;
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone)]
            pub struct $kind;
            impl Kind for $kind {
                type Spec = $spec;
                const NAME: &'static str = $name;
                const SHARED: bool = Access::$access.shared();
                const FINALIZERS_ONLY: bool = Access::$access.finalizers_only();
                fn type_name(_: &str) -> String {
                    $type.to_owned()
                }
                fn namespace(_: &str) -> String {
                    $namespace.to_owned()
                }
                fn decode(raw: &[u8]) -> Result<Self::Spec, String> {
                    decode::<wire::$wire, $spec>(raw)
                }
                fn encode(spec: &Self::Spec, raw: &[u8]) -> Vec<u8> {
                    if Self::FINALIZERS_ONLY && !raw.is_empty() {
                        return raw.to_vec();
                    }
                    encode::<wire::$wire, $spec>(spec, raw, &[$($number),*])
                }
                fn share(spec: &mut Self::Spec, kept: &Self::Spec) {
                    Words::<wire::$wire>::share(spec, kept);
                }
            }
        )*
        /// Wire message and field numbers of every kind in the table, for the test that compares them with
        /// the proto.
        #[cfg(test)]
        const FIELDS: &[(&str, &[u32])] = &[$((stringify!($wire), &[$($number),*])),*];
    };
}

/// What Omni lets an infrastructure provider do with a kind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Read, in a namespace where everybody sees the same.
    Global,
    /// Read, and keep with a finalizer, what carries our label.
    Theirs,
    /// Everything, on what carries our label.
    Ours,
}

impl Access {
    const fn shared(self) -> bool {
        !matches!(self, Self::Global)
    }

    const fn finalizers_only(self) -> bool {
        matches!(self, Self::Theirs)
    }
}

kinds! {
    /// Machine requests.
    MachineRequests, "machine request", "MachineRequests.omni.sidero.dev" in NAMESPACE, Theirs,
    MachineRequestSpec [1, 2, 3, 4, 5, 6, 7] => Arc<MachineRequestSpec>;
    /// Our answers to them.
    MachineRequestStatuses, "machine request status", "MachineRequestStatuses.omni.sidero.dev"
    in NAMESPACE, Ours,
    MachineRequestStatusSpec [1, 2, 3, 4] => MachineRequestStatusSpec;
    /// Config patches for their machines.
    ConfigPatchRequests, "config patch request", "ConfigPatchRequests.omni.sidero.dev" in NAMESPACE, Ours,
    ConfigPatchRequestSpec [1, 2] => ConfigPatchRequestSpec;
    /// Registration of the provider.
    InfraProviderStatuses, "infra provider status", "InfraProviderStatuses.omni.sidero.dev"
    in NAMESPACE, Ours,
    InfraProviderStatusSpec [1, 2, 3, 4, 5] => InfraProviderStatusSpec;
    /// Its heartbeat.
    InfraProviderHealthStatuses, "infra provider health status", "InfraProviderHealthStatuses.omni.sidero.dev"
    in NAMESPACE_EPHEMERAL, Ours,
    InfraProviderHealthStatusSpec [1, 2] => InfraProviderHealthStatusSpec;
    /// Join tokens.
    ProviderJoinConfigs, "provider join config", "ProviderJoinConfigs.omni.sidero.dev" in NAMESPACE, Theirs,
    ProviderJoinConfigSpec [1, 2] => ProviderJoinConfigSpec;
    /// How machines reach Omni.
    SiderolinkApiConfigs, "SideroLink API config", "SiderolinkAPIConfigs.omni.sidero.dev" in DEFAULT, Global,
    SiderolinkApiConfigSpec [1, 2, 3, 4, 5] => SiderolinkApiConfigSpec;
    /// Join parameters of Omni before 1.0.
    ConnectionParams, "connection parameters", "ConnectionParams.omni.sidero.dev" in DEFAULT, Global,
    ConnectionParamsSpec [1, 2, 3, 4, 5, 9, 10] => ConnectionParamsSpec;
    /// Omni's features.
    FeaturesConfigs, "features config", "FeaturesConfigs.omni.sidero.dev" in DEFAULT, Global,
    FeaturesConfigSpec [5, 9, 11, 13, 14] => FeaturesConfigSpec;
    /// Talos versions.
    TalosVersions, "Talos version", "TalosVersions.omni.sidero.dev" in DEFAULT, Global,
    TalosVersionSpec [1, 6] => TalosVersionSpec;
    /// Who we are.
    CurrentUsers, "current user", "CurrentUsers.omni.sidero.dev" in "virtual", Global,
    CurrentUserSpec [1, 3] => CurrentUserSpec;
}

macro_rules! labels_only_kinds {
    ($($(#[$doc:meta])* $kind:ident, $name:literal, $type:literal in $namespace:expr, $access:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $kind;
        impl Kind for $kind {
            type Spec = ();
            const NAME: &'static str = $name;
            const SHARED: bool = Access::$access.shared();
            const FINALIZERS_ONLY: bool = Access::$access.finalizers_only();
            fn type_name(_: &str) -> String {
                $type.to_owned()
            }
            fn namespace(_: &str) -> String {
                $namespace.to_owned()
            }
            fn decode(_: &[u8]) -> Result<(), String> {
                Ok(())
            }
            fn encode((): &(), raw: &[u8]) -> Vec<u8> {
                raw.to_vec()
            }
        }
    )*};
}

labels_only_kinds! {
    /// Machines that joined; all there is to know is in the ID (the UUID) and the labels.
    MachineRegistrations, "machine registration", "InfraMachineRegistrations.omni.sidero.dev"
    in NAMESPACE, Theirs;
    /// Machines as Omni sees them, with the UUID for ID. Everybody's: Omni shows a provider all of them.
    Machines, "machine", "Machines.omni.sidero.dev" in "default", Global;
    /// The kinds that this Omni knows, by their lower-case names.
    ResourceDefinitions, "resource definition", "ResourceDefinitions.meta.cosi.dev" in "meta", Global;
}

/// The Go library's records; their bytes are the cloud's to read.
#[derive(Debug, Clone)]
pub struct MachineResources;

impl Kind for MachineResources {
    type Spec = Bytes;
    const NAME: &'static str = "machine resource";
    // The namespace is the provider's own, and nothing there carries a label of its own accord.
    const SHARED: bool = false;
    const FINALIZERS_ONLY: bool = false;

    fn type_name(provider: &str) -> String {
        format!("Machine.{provider}.infraprovider.sidero.dev")
    }

    fn namespace(provider: &str) -> String {
        format!("infra-provider:{provider}")
    }

    fn decode(raw: &[u8]) -> Result<Bytes, String> {
        Ok(Bytes::copy_from_slice(raw))
    }

    fn encode(spec: &Bytes, _: &[u8]) -> Vec<u8> {
        spec.to_vec()
    }
}

/// The lease: a type of our own. Omni keeps what is in a provider's own namespace as it is sent, so its words are JSON, which a
/// person can read.
#[derive(Debug, Clone)]
pub struct Leases;

impl Kind for Leases {
    type Spec = LeaseSpec;
    const NAME: &'static str = "lease";
    const SHARED: bool = false;
    const FINALIZERS_ONLY: bool = false;

    fn type_name(provider: &str) -> String {
        format!("Lease.{provider}.infraprovider.sidero.dev")
    }

    fn namespace(provider: &str) -> String {
        MachineResources::namespace(provider)
    }

    fn decode(raw: &[u8]) -> Result<LeaseSpec, String> {
        serde_json::from_slice(raw).map_err(|error| error.to_string())
    }

    fn encode(spec: &LeaseSpec, _: &[u8]) -> Vec<u8> {
        // Texts and numbers always serialise.
        serde_json::to_vec(spec).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field 99, length-delimited, "new": what a newer Omni may have added.
    const NEWER: &[u8] = &[0x9a, 0x06, 0x03, b'n', b'e', b'w'];

    #[test]
    fn the_table_knows_every_field_of_its_message() {
        let proto = include_str!("../../proto/specs.proto");
        for (message, known) in FIELDS {
            // prost writes `Api` where the proto says `API`.
            let name = message.replace("Api", "API");
            let body = proto.split(&format!("message {name} {{\n")).nth(1).unwrap();
            let mut numbers = Vec::new();
            let mut depth = 0;
            for line in body.lines() {
                let line = line.trim();
                if line == "}" && depth == 0 {
                    break;
                }
                match line {
                    "}" => depth -= 1,
                    _ if line.ends_with('{') => depth += 1,
                    _ if depth == 0 && !line.starts_with("//") => {
                        if let Some((_, number)) = line.rsplit_once("= ") {
                            numbers.push(number.trim_end_matches(';').parse::<u32>().unwrap());
                        }
                    }
                    _ => {}
                }
            }
            assert_eq!(&numbers, known, "{message}");
        }
    }

    #[test]
    fn an_unchanged_spec_goes_back_byte_for_byte() {
        // Fields out of order and an explicit default: both are lost when a message is decoded and encoded
        // again.
        let mut raw = vec![0x1a, 0x01, b'e', 0x0a, 0x01, b'i', 0x22, 0x00];
        raw.extend_from_slice(NEWER);
        let spec = MachineRequestStatuses::decode(&raw).unwrap();
        assert_eq!((spec.id.as_str(), spec.error.as_str()), ("i", "e"));
        assert_eq!(MachineRequestStatuses::encode(&spec, &raw), raw);
    }

    #[test]
    fn a_changed_spec_keeps_the_fields_of_newer_programs() {
        let mut raw = vec![0x0a, 0x01, b'i'];
        raw.extend_from_slice(NEWER);
        let mut spec = MachineRequestStatuses::decode(&raw).unwrap();
        spec.id.clear();
        spec.stage = Stage::Failed;
        let bytes = MachineRequestStatuses::encode(&spec, &raw);
        assert_eq!(bytes, [&[0x10, 0x03], NEWER].concat());
        assert_eq!(MachineRequestStatuses::decode(&bytes).unwrap(), spec);
    }

    #[test]
    fn a_machine_request_is_always_resent_as_it_came() {
        let raw = [&[0x0a, 0x01, b'1'], NEWER].concat();
        let other = MachineRequestSpec {
            talos_version: "2".into(),
            ..MachineRequestSpec::default()
        };
        assert_eq!(MachineRequests::encode(&other.into(), &raw), raw);
    }

    #[test]
    fn a_compressed_patch_is_not_readable_and_not_lost() {
        let raw = wire::ConfigPatchRequestSpec {
            data: String::new(),
            compressed_data: vec![1, 2, 3],
        }
        .encode_to_vec();
        let spec = ConfigPatchRequests::decode(&raw).unwrap();
        assert_eq!(spec.data, None);
        assert_eq!(ConfigPatchRequests::encode(&spec, &raw), raw);
        let plain = ConfigPatchRequestSpec {
            data: Some("machine: {}".into()),
        };
        let bytes = ConfigPatchRequests::encode(&plain, &raw);
        assert_eq!(ConfigPatchRequests::decode(&bytes).unwrap(), plain);
    }

    #[test]
    fn a_field_we_have_no_word_for_survives_a_change() {
        let raw = wire::SiderolinkApiConfigSpec {
            wireguard_advertised_endpoint: "w".into(),
            ..wire::SiderolinkApiConfigSpec::default()
        }
        .encode_to_vec();
        let mut spec = SiderolinkApiConfigs::decode(&raw).unwrap();
        spec.events_port = 8090;
        let bytes = SiderolinkApiConfigs::encode(&spec, &raw);
        let wire = wire::SiderolinkApiConfigSpec::decode(bytes.as_slice()).unwrap();
        assert_eq!(
            (wire.wireguard_advertised_endpoint.as_str(), wire.events_port),
            ("w", 8090)
        );
    }

    #[test]
    fn provider_specific_names_hold_the_provider_id() {
        assert_eq!(
            MachineResources::type_name("oxide"),
            "Machine.oxide.infraprovider.sidero.dev"
        );
        assert_eq!(MachineResources::namespace("oxide"), "infra-provider:oxide");
        assert_eq!(
            InfraProviderHealthStatuses::namespace("oxide"),
            "infra-provider-ephemeral"
        );
    }

    #[test]
    fn moments_survive_the_wire_in_milliseconds() {
        let now = Timestamp(1_700_000_000_123);
        assert_eq!(moment(&wire_moment(now)), now);
        let early = prost_types::Timestamp {
            seconds: -1,
            nanos: 5,
        };
        assert_eq!(moment(&early), Timestamp(0));
    }

    #[test]
    fn garbage_is_refused_without_being_shown() {
        let error = ProviderJoinConfigs::decode(b"\x12\x40secret").unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
}
