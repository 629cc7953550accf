//! Decides what a user may write in a machine class for Ganeti, and what is wrong with what they wrote.
//!
//! Names and units are Ganeti's own; the cluster's instance policy has the last word on sizes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{convert, mark};
use crate::cloud::Replace;

/// Least memory that Talos boots with, in MiB (Talos: "System requirements").
const MIN_MEMORY: u32 = 64;
/// Most network interfaces and disks of an instance (Ganeti: `MAX_NICS`, `MAX_DISKS`).
const MAX_NICS: usize = 8;
const MAX_DATA_DISKS: usize = 15;
/// A name of a group, network, node or the like. It becomes part of a path or of a tag.
const NAME: &str = "^[A-Za-z0-9._-]+$";
/// Longest tag (Ganeti: `MAX_TAG_LEN`).
const MAX_TAG: usize = 128;

/// A machine class: the provider data of one kind of instance.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GanetiClass {
    /// Node groups that the machine may be made in, in the order to try.
    #[serde(default = "default_groups")]
    #[schemars(length(min = 1), inner(regex(pattern = NAME)))]
    pub node_groups: Vec<String>,
    /// Number of virtual CPUs.
    #[serde(default = "default_vcpus")]
    #[schemars(range(min = 1))]
    pub vcpus: u32,
    /// Memory, in MiB.
    #[serde(default = "default_memory")]
    #[schemars(range(min = MIN_MEMORY))]
    pub memory: u32,
    /// How disks are stored: plain, drbd, file, sharedfile, rbd, gluster, ext.
    pub disk_template: DiskTemplate,
    /// Size of the boot disk, in MiB.
    #[serde(default = "default_disk_size")]
    #[schemars(range(min = 1))]
    pub disk_size: u32,
    /// Volume group of the boot disk, for plain and drbd. Empty: the cluster's own.
    #[serde(default)]
    pub disk_vg: String,
    /// Provider of all disks, for ext.
    #[serde(default)]
    pub disk_provider: String,
    /// Additional disks, created blank.
    #[serde(default)]
    #[schemars(length(max = MAX_DATA_DISKS))]
    pub disks: Vec<DataDisk>,
    /// Network interfaces, in order.
    #[schemars(length(min = 1, max = MAX_NICS))]
    pub nics: Vec<Nic>,
    /// OS definition on the nodes. To boot an ISO it has to be one that installs nothing.
    #[serde(default = "default_os")]
    #[schemars(length(min = 1))]
    pub os_type: String,
    /// Parameters of the OS definition, by name, beside the one that names boot_image.
    #[serde(default)]
    pub os_params: BTreeMap<String, Parameter>,
    /// Hypervisor. To boot an ISO it has to be kvm.
    #[serde(default = "default_hypervisor")]
    #[schemars(regex(pattern = "^[a-z-]+$"))]
    pub hypervisor: String,
    /// Hypervisor parameters, by name, beside those that the ISO needs. Talos needs a cpu_type of x86-64-v2 at least.
    #[serde(default)]
    pub hypervisor_params: BTreeMap<String, Parameter>,
    /// Metal ISO of Talos: a path that every node has, or the URL of a mirror that answers ranges. {schematic} and {version}
    /// are replaced. Empty, and no boot_image: with kvm, the provider serves it itself, where it is told to.
    #[serde(default)]
    #[schemars(regex(pattern = "^(/|https?://)?[^\\s]*$"))]
    pub boot_iso: String,
    /// Raw nocloud image of Talos, in place of an ISO: a path that every node has. {schematic} and {version} are replaced.
    /// Ganeti copies it to the boot disk, and cuts off without a word what does not fit: disk_size must be larger. The machine
    /// reads its configuration from the provider, which has to be told to serve it.
    #[serde(default)]
    #[schemars(regex(pattern = "^(/[^\\s]*)?$"))]
    pub boot_image: String,
    /// Node that the machine is made on, in place of an allocator.
    #[serde(default)]
    pub primary_node: String,
    /// Second node of a drbd disk, where primary_node is given.
    #[serde(default)]
    pub secondary_node: String,
    /// Allocator that chooses the nodes. Empty: the cluster's own.
    #[serde(default)]
    pub iallocator: String,
    /// Whether the allocator considers only nodes that are free at this moment: faster, and less balanced.
    #[serde(default)]
    pub opportunistic_locking: bool,
    /// Tags of the machine, beside those of the provider.
    #[serde(default)]
    #[schemars(inner(regex(pattern = "^[A-Za-z0-9.+*/:@_-]{1,128}$")))]
    pub tags: Vec<String>,
    /// IP addresses of the nameservers that the machine uses. Empty: those of the provider, if it has any.
    #[serde(default)]
    pub nameservers: Vec<IpAddr>,
    /// Which lost machines the provider replaces by itself. Absent: none.
    #[serde(default)]
    pub replace: Replace,
}

impl GanetiClass {
    /// Whether its machines boot the ISO that the provider serves.
    pub(super) fn boots_from_provider(&self) -> bool {
        self.hypervisor == "kvm" && self.boot_iso.is_empty() && self.boot_image.is_empty()
    }

    /// Whether its machines boot an image of the operator's, and read what the provider serves.
    pub(super) fn reads_seed(&self) -> bool {
        !self.boot_image.is_empty()
    }
}

/// How disks are stored (Ganeti: `DT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskTemplate {
    /// A logical volume on the node.
    Plain,
    /// A logical volume on two nodes.
    Drbd,
    /// A file on the node.
    File,
    /// A file on storage that all nodes share.
    Sharedfile,
    /// A volume of a Ceph cluster.
    Rbd,
    /// A file on GlusterFS.
    Gluster,
    /// A volume of an external provider.
    Ext,
}

/// One additional disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataDisk {
    /// Size of the disk, in MiB.
    #[schemars(range(min = 1))]
    pub size: u32,
    /// Volume group, for plain and drbd. Empty: the cluster's own.
    #[serde(default)]
    pub vg: String,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Network of the cluster, which says mode and link.
    #[serde(default)]
    #[schemars(regex(pattern = "^[A-Za-z0-9._-]*$"))]
    pub network: String,
    /// An address, or "pool" for one of the network's own. The machine learns it from whatever serves DHCP there.
    #[serde(default)]
    #[schemars(regex(pattern = "^(pool|[0-9a-fA-F.:]*)$"))]
    pub ip: String,
    /// How the interface is connected, where no network is given. Empty: the cluster's default.
    #[serde(default)]
    pub mode: NicMode,
    /// Bridge, routing table or switch, where no network is given. Empty: the cluster's default.
    #[serde(default)]
    pub link: String,
    /// VLAN, for openvswitch.
    #[serde(default)]
    pub vlan: String,
}

/// How an interface is connected (Ganeti: `NIC_MODE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NicMode {
    /// As the cluster, or the network, says.
    #[default]
    Default,
    /// To a bridge.
    Bridged,
    /// By the node's routing.
    Routed,
    /// To an Open vSwitch.
    Openvswitch,
}

/// A parameter of an OS or a hypervisor. Ganeti turns text into what it needs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Parameter {
    /// A switch.
    Switch(bool),
    /// A number.
    Number(i64),
    /// Anything else.
    Text(String),
}

impl JsonSchema for Parameter {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Parameter".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": ["string", "integer", "boolean"]})
    }
}

fn default_groups() -> Vec<String> {
    // What `gnt-cluster init` calls the first one.
    vec!["default".to_owned()]
}

fn default_vcpus() -> u32 {
    2
}

fn default_memory() -> u32 {
    4096
}

fn default_disk_size() -> u32 {
    10_240
}

fn default_os() -> String {
    "noop".to_owned()
}

fn default_hypervisor() -> String {
    "kvm".to_owned()
}

/// The faults that the schema cannot express, or that a class written before the schema may have: one sentence for each.
pub(super) fn validate(class: &GanetiClass) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |wrong: bool, fault: &str| {
        if wrong {
            faults.push(fault.to_owned());
        }
    };
    check(
        class.node_groups.is_empty(),
        "node_groups must name at least one node group.",
    );
    check(
        !class.node_groups.iter().all(|group| is_name(group)),
        "node_groups must have names of letters, digits, `.`, `_` and `-`.",
    );
    check(class.vcpus == 0, "vcpus must be at least 1.");
    check(
        class.memory < MIN_MEMORY,
        &format!("memory must be at least {MIN_MEMORY} MiB."),
    );
    check(
        class.disk_size == 0 || class.disks.iter().any(|disk| disk.size == 0),
        "disk_size and the size of every disk must be at least 1 MiB.",
    );
    check(
        class.disks.len() > MAX_DATA_DISKS,
        "disks must have at most 15 entries.",
    );
    let volumes = matches!(class.disk_template, DiskTemplate::Plain | DiskTemplate::Drbd);
    check(
        !volumes && (!class.disk_vg.is_empty() || class.disks.iter().any(|disk| !disk.vg.is_empty())),
        "disk_vg and vg are for the disk templates plain and drbd.",
    );
    let external = class.disk_template == DiskTemplate::Ext;
    check(
        external && class.disk_provider.is_empty(),
        "disk_provider is needed for the disk template ext.",
    );
    check(
        !external && !class.disk_provider.is_empty(),
        "disk_provider is for the disk template ext.",
    );
    check(
        class.nics.is_empty() || class.nics.len() > MAX_NICS,
        "nics must have between 1 and 8 entries.",
    );
    for (index, nic) in class.nics.iter().enumerate() {
        if let Some(fault) = nic_fault(nic) {
            check(true, &format!("nics[{index}] {fault}."));
        }
    }
    check(
        class.os_type.is_empty(),
        "os_type must not be empty: noop installs nothing.",
    );
    check(class.hypervisor.is_empty(), "hypervisor must not be empty.");
    check(
        !class.boot_iso.is_empty() && class.hypervisor != "kvm",
        "boot_iso is for the hypervisor kvm: another one's parameters go into hypervisor_params.",
    );
    check(
        !class.boot_iso.is_empty()
            && !["/", "http://", "https://"]
                .iter()
                .any(|start| class.boot_iso.starts_with(start)),
        "boot_iso must be a path from the root, or an http or https URL.",
    );
    check(
        class.boot_iso.contains("..") || class.boot_iso.contains(char::is_whitespace),
        "boot_iso must have neither `..` nor blanks.",
    );
    let image = &class.boot_image;
    check(
        !image.is_empty() && class.hypervisor != "kvm",
        "boot_image is for the hypervisor kvm: another one cannot tell the machine where its configuration is.",
    );
    check(
        !image.is_empty() && !class.boot_iso.is_empty(),
        "boot_image and boot_iso exclude each other.",
    );
    check(
        !image.is_empty()
            && (!image.starts_with('/') || image.contains("..") || image.contains(char::is_whitespace)),
        "boot_image must be a path from the root, with neither `..` nor blanks.",
    );
    check(
        !image.is_empty() && class.os_params.contains_key(convert::OS_IMAGE),
        "os_params must not name an os-image beside boot_image.",
    );
    let by_node = !class.primary_node.is_empty();
    check(
        by_node && !class.iallocator.is_empty(),
        "primary_node and iallocator exclude each other.",
    );
    check(
        by_node && class.node_groups.len() > 1,
        "primary_node allows one of node_groups alone, its own.",
    );
    check(
        !by_node && !class.secondary_node.is_empty(),
        "secondary_node needs a primary_node.",
    );
    check(
        by_node && class.disk_template == DiskTemplate::Drbd && class.secondary_node.is_empty(),
        "secondary_node is needed for the disk template drbd with a primary_node.",
    );
    check(
        by_node && class.opportunistic_locking,
        "opportunistic_locking is for an allocator, and primary_node is given.",
    );
    let good_tag = |tag: &String| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b".+*/:@_-".contains(&byte);
        (1..=MAX_TAG).contains(&tag.len()) && tag.bytes().all(good)
    };
    check(
        !class.tags.iter().all(good_tag),
        "tags must have at most 128 letters, digits and `.+*/:@_-`.",
    );
    check(
        class.tags.iter().any(|tag| tag.starts_with(mark::PREFIX)),
        "tags must not begin with `omni:`: those are the provider's.",
    );
    faults.extend(class.replace.fault().map(|fault| format!("{fault}.")));
    faults
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

fn nic_fault(nic: &Nic) -> Option<&'static str> {
    let has_network = !nic.network.is_empty();
    if has_network && (nic.mode != NicMode::Default || !nic.link.is_empty() || !nic.vlan.is_empty()) {
        return Some("names a network, which says mode, link and vlan itself");
    }
    if nic.ip == "pool" && !has_network {
        return Some("asks for an address of the pool, and names no network");
    }
    if !nic.ip.is_empty() && nic.ip != "pool" && nic.ip.parse::<IpAddr>().is_err() {
        return Some("has an ip that is neither an address nor \"pool\"");
    }
    if nic.mode == NicMode::Routed && nic.ip.is_empty() {
        return Some("is routed and needs an ip");
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cloud::schema::class_schema;

    fn class(changes: Value) -> Value {
        let mut class = json!({
            "disk_template": "plain",
            "nics": [{"network": "net1", "ip": "pool"}],
            "boot_iso": "/srv/iso/{schematic}-{version}.iso",
        });
        for (name, value) in changes.as_object().unwrap() {
            class[name] = value.clone();
        }
        class
    }

    fn faults(changes: Value) -> Vec<String> {
        validate(&serde_json::from_value(class(changes)).unwrap())
    }

    #[test]
    fn the_schema_is_what_omnis_form_can_draw() {
        let schema = class_schema::<GanetiClass>();
        let text = schema.to_string();
        for word in ["$ref", "$defs", "null", "oneOf", "anyOf", "allOf", "format"] {
            assert!(!text.contains(&format!("\"{word}\"")), "{word} in {text}");
        }
        assert_eq!(schema["required"], json!(["disk_template", "nics"]));
        assert_eq!(
            schema["properties"]["nics"]["items"]["properties"]["mode"]["enum"][0],
            "default"
        );
        for (name, property) in schema["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{name}");
        }
    }

    #[test]
    fn schema_and_type_accept_the_same_classes() {
        let schema = jsonschema::validator_for(&class_schema::<GanetiClass>()).unwrap();
        for (changes, good) in [
            (json!({}), true),
            (
                json!({"hypervisor_params": {"vhost_net": true, "cpu_type": "host", "cpu_cores": 2}}),
                true,
            ),
            (json!({"hypervisor_params": {"cpu_type": ["host"]}}), false),
            (json!({"os_params": {"a": "b"}}), true),
            (json!({"disk_template": "tape"}), false),
            (json!({"nics": [{"mode": "openvswitch", "vlan": "7"}]}), true),
            (json!({"nics": [{"mode": "wireless"}]}), false),
            (json!({"disks": [{"size": 5, "vg": "fast"}]}), true),
            (json!({"surprise": 1}), false),
        ] {
            let class = class(changes);
            assert_eq!(schema.is_valid(&class), good, "{class}");
            let parsed: Result<GanetiClass, _> = serde_json::from_value(class.clone());
            assert_eq!(parsed.is_ok(), good, "{class}");
        }
    }

    #[test]
    fn what_the_schema_cannot_say_is_checked() {
        assert_eq!(faults(json!({})), [""; 0]);
        assert_eq!(faults(json!({"boot_iso": ""})), [""; 0]);
        let image = json!({"boot_iso": "", "boot_image": "/srv/{schematic}-{version}.raw"});
        assert_eq!(faults(image), [""; 0]);
        for (changes, field) in [
            (json!({"node_groups": []}), "node_groups"),
            (json!({"node_groups": ["a/b"]}), "node_groups"),
            (json!({"vcpus": 0}), "vcpus"),
            (json!({"memory": 1}), "memory"),
            (json!({"disk_size": 0}), "disk_size"),
            (json!({"disk_template": "file", "disk_vg": "x"}), "disk_vg"),
            (json!({"disk_template": "ext"}), "disk_provider"),
            (json!({"disk_provider": "san"}), "disk_provider"),
            (json!({"nics": []}), "nics"),
            (json!({"nics": [{"network": "n", "link": "br0"}]}), "nics[0]"),
            (json!({"nics": [{"ip": "pool"}]}), "nics[0]"),
            (json!({"nics": [{"ip": "1.2.3"}]}), "nics[0]"),
            (json!({"nics": [{"mode": "routed"}]}), "nics[0]"),
            (json!({"boot_iso": "iso/talos.iso"}), "boot_iso"),
            (json!({"boot_iso": "/srv/../etc/shadow"}), "boot_iso"),
            (json!({"hypervisor": "fake"}), "boot_iso"),
            (json!({"boot_image": "/a"}), "boot_image"),
            (json!({"boot_iso": "", "boot_image": "a"}), "boot_image"),
            (json!({"boot_iso": "", "boot_image": "/a b"}), "boot_image"),
            (
                json!({"boot_iso": "", "boot_image": "http://mirror/a"}),
                "boot_image",
            ),
            (
                json!({"boot_iso": "", "boot_image": "/a", "hypervisor": "fake"}),
                "boot_image",
            ),
            (
                json!({"boot_iso": "", "boot_image": "/a", "os_params": {"os-image": "/b"}}),
                "os_params",
            ),
            (
                json!({"primary_node": "n1", "iallocator": "hail"}),
                "primary_node",
            ),
            (
                json!({"primary_node": "n1", "node_groups": ["a", "b"]}),
                "primary_node",
            ),
            (json!({"secondary_node": "n2"}), "secondary_node"),
            (
                json!({"primary_node": "n1", "disk_template": "drbd"}),
                "secondary_node",
            ),
            (
                json!({"primary_node": "n1", "opportunistic_locking": true}),
                "opportunistic_locking",
            ),
            (json!({"tags": ["a b"]}), "tags"),
            (json!({"tags": ["omni:request:x"]}), "tags"),
        ] {
            let faults = faults(changes.clone());
            assert_eq!(faults.len(), 1, "{changes}: {faults:?}");
            assert!(faults[0].starts_with(field), "{changes}: {faults:?}");
        }
    }
}
