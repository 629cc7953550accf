//! Decides what a user may write in a machine class for Oxide, and what is wrong with what they wrote.
//!
//! The fields and their spelling are those of the Go provider's machine class, so that a live installation's
//! classes keep working; the limits are nexus's own. Omni fills in no defaults, so we do.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::cloud::Replace;

/// Most vCPUs of an instance (nexus: `MAX_VCPU_PER_INSTANCE`).
const MAX_CPUS: u32 = 254;
/// Most memory of an instance, in GiB (nexus: `MAX_MEMORY_BYTES_PER_INSTANCE`, 1.5 TiB).
const MAX_MEMORY: u32 = 1536;
/// The Talos image takes 1246 MiB and a disk is whole GiB.
const MIN_BOOT_DISK: u32 = 2;
/// Most GiB of a distributed disk (nexus: `MAX_DISK_SIZE_BYTES`).
const MAX_DISTRIBUTED_DISK: u32 = 1023;
/// Most data disks: an instance has at most twelve disks, the boot disk among them (nexus:
/// `MAX_DISKS_PER_INSTANCE`).
const MAX_DATA_DISKS: usize = 11;
/// Most network interfaces of an instance (nexus: `MAX_NICS_PER_INSTANCE`).
const MAX_INTERFACES: usize = 8;
/// Longest name of anything on Oxide, in bytes.
pub(super) const MAX_NAME: usize = 63;
/// A name, as far as a pattern can tell: that it is no ID is checked here alone. Go's expressions have no look-ahead.
const NAME: &str = "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$";
/// A name or an ID.
const NAME_OR_ID: &str =
    "^([a-z]([a-z0-9-]{0,61}[a-z0-9])?|[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})$";

/// A machine class: the provider data of one kind of instance.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OxideClass {
    /// Oxide project where machines are created: its name or ID.
    #[schemars(regex(pattern = NAME_OR_ID))]
    pub project: String,
    /// Number of vCPUs of the machine.
    #[serde(default = "default_cpus")]
    #[schemars(range(min = 1, max = MAX_CPUS))]
    pub cpus: u32,
    /// Memory of the machine, in GiB.
    #[serde(default = "default_memory")]
    #[schemars(range(min = 1, max = MAX_MEMORY))]
    pub memory: u32,
    /// Size of the boot disk, in GiB.
    #[serde(default = "default_boot_disk_size")]
    #[schemars(range(min = MIN_BOOT_DISK, max = MAX_DISTRIBUTED_DISK))]
    pub boot_disk_size: u32,
    /// Additional disks, created blank and attached before the machine starts.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(length(max = MAX_DATA_DISKS))]
    pub disks: Vec<DataDisk>,
    /// Network interfaces of the machine, all in one VPC. The first is the primary one.
    #[schemars(length(min = 1, max = MAX_INTERFACES))]
    pub network_interfaces: Vec<Interface>,
    /// What the rack does when the machine fails: start it again, or not.
    #[serde(default)]
    pub auto_restart_policy: AutoRestart,
    /// CPU platform that the machine needs.
    #[serde(default)]
    pub cpu_platform: CpuPlatform,
    /// Anti-affinity groups that the machine joins: names or IDs. They must exist.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(inner(regex(pattern = NAME_OR_ID)))]
    pub anti_affinity_groups: Vec<String>,
    /// Jumbo frames on the primary network interface. The rack's operator must have allowed them.
    #[serde(default, deserialize_with = "null_is_default")]
    pub enable_jumbo_frames: bool,
    /// IP addresses of the nameservers that the machine uses. Empty: those of the provider, if it has any.
    #[serde(default, deserialize_with = "null_is_default")]
    pub nameservers: Vec<IpAddr>,
    /// Which lost machines the provider replaces by itself. Absent: none.
    #[serde(default, deserialize_with = "null_is_default")]
    pub replace: Replace,
}

/// One additional disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataDisk {
    /// Where the disk lives: "distributed" across the rack, or "local" on the machine's own sled.
    #[serde(rename = "type")]
    pub kind: DiskKind,
    /// Size of the disk, in GiB. A distributed disk has at most 1023.
    #[schemars(range(min = 1))]
    pub size: u32,
}

/// Where a disk lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// Replicated across the rack.
    Distributed,
    /// On the sled of the instance, which it pins there.
    Local,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Which kinds of IP address the interface gets.
    pub ip_config: IpConfig,
    /// Name of the VPC subnet.
    #[schemars(regex(pattern = NAME))]
    pub subnet_name: String,
    /// Name of the VPC, the same for all interfaces.
    #[schemars(regex(pattern = NAME))]
    pub vpc_name: String,
}

/// Which kinds of private address an interface gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IpConfig {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    DualStack,
}

/// What the rack does about a failed instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoRestart {
    /// Leaves it failed.
    Never,
    /// Starts it again after a while.
    #[default]
    BestEffort,
}

/// The CPU platform that an instance needs. The wire's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CpuPlatform {
    /// AMD EPYC 7003: runs on every sled.
    #[default]
    AmdMilan,
    /// AMD EPYC 9005.
    AmdTurin,
    /// AMD EPYC 9005, with more of its features shown to the guest.
    // The Go provider's schema offers the alias's spelling, and its own check then refuses it.
    #[serde(rename = "amd_turin_v2", alias = "amd_turinv2")]
    AmdTurinV2,
}

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> u32 {
    4
}

fn default_boot_disk_size() -> u32 {
    10
}

/// A field that is written but left empty (`disks:`) counts as absent, as it does in the Go provider.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The faults that the schema cannot express, or that a class written before the schema may have: one
/// sentence for each.
pub(super) fn validate(class: &OxideClass) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |field: &dyn fmt::Display, fault: Option<String>| {
        if let Some(fault) = fault {
            faults.push(format!("{field} {fault}."));
        }
    };
    check(&"project", name_or_id_fault(&class.project));
    check(&"cpus", range_fault(class.cpus, 1, MAX_CPUS, ""));
    check(&"memory", range_fault(class.memory, 1, MAX_MEMORY, " GiB"));
    check(
        &"boot_disk_size",
        range_fault(class.boot_disk_size, MIN_BOOT_DISK, MAX_DISTRIBUTED_DISK, " GiB"),
    );
    check(&"disks", length_fault(class.disks.len(), 0, MAX_DATA_DISKS));
    for (i, disk) in class.disks.iter().enumerate() {
        let most = match disk.kind {
            DiskKind::Distributed => MAX_DISTRIBUTED_DISK,
            DiskKind::Local => u32::MAX,
        };
        check(
            &format_args!("disks[{i}].size"),
            range_fault(disk.size, 1, most, " GiB"),
        );
    }
    check(
        &"network_interfaces",
        length_fault(class.network_interfaces.len(), 1, MAX_INTERFACES),
    );
    let vpc = class
        .network_interfaces
        .first()
        .map_or("", |first| first.vpc_name.as_str());
    for (i, interface) in class.network_interfaces.iter().enumerate() {
        check(
            &format_args!("network_interfaces[{i}].subnet_name"),
            name_fault(&interface.subnet_name),
        );
        check(
            &format_args!("network_interfaces[{i}].vpc_name"),
            name_fault(&interface.vpc_name).or_else(|| {
                (interface.vpc_name != vpc).then(|| {
                    format!(
                        "is {:?}, but all interfaces of a machine must be in one VPC, here {vpc:?}",
                        interface.vpc_name
                    )
                })
            }),
        );
    }
    for (i, group) in class.anti_affinity_groups.iter().enumerate() {
        check(
            &format_args!("anti_affinity_groups[{i}]"),
            name_or_id_fault(group),
        );
    }
    faults.extend(class.replace.fault().map(|fault| format!("{fault}.")));
    faults
}

fn range_fault(value: u32, least: u32, most: u32, unit: &str) -> Option<String> {
    if most == u32::MAX {
        return (value < least).then(|| format!("must be at least {least}{unit}, not {value}"));
    }
    (value < least || value > most).then(|| format!("must be between {least} and {most}{unit}, not {value}"))
}

fn length_fault(length: usize, least: usize, most: usize) -> Option<String> {
    if length < least {
        return Some(format!("must have at least {least} entry"));
    }
    (length > most).then(|| format!("must have at most {most} entries, not {length}"))
}

/// Nexus takes an ID wherever it takes a name here.
fn name_or_id_fault(value: &str) -> Option<String> {
    if Uuid::parse_str(value).is_ok() {
        return None;
    }
    name_fault(value).map(|fault| format!("{fault}, or an ID must be given"))
}

/// The rules of nexus for a name, which are stricter than those of the crate's `Name`.
pub(super) fn name_fault(name: &str) -> Option<String> {
    let rule = if name.is_empty() {
        "must not be empty".to_owned()
    } else if name.len() > MAX_NAME {
        format!("must have at most {MAX_NAME} characters, not {}", name.len())
    } else if Uuid::parse_str(name).is_ok() {
        "must be a name, not an ID".to_owned()
    } else if !name.starts_with(|first: char| first.is_ascii_lowercase()) {
        "must start with a lower-case letter".to_owned()
    } else if name.ends_with('-') {
        "must not end with a dash".to_owned()
    } else if !name
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        "must consist of lower-case letters, digits and dashes".to_owned()
    } else {
        return None;
    };
    if name.is_empty() {
        return Some(rule);
    }
    Some(format!(
        "is {name:?}, but {}",
        rule.replacen("must", "it must", 1)
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cloud::schema::class_schema;

    fn least() -> Value {
        json!({
            "project": "prod",
            "network_interfaces": [{"ip_config": "v4", "subnet_name": "default", "vpc_name": "default"}],
        })
    }

    fn with(field: &str, value: Value) -> Value {
        let mut class = least();
        class[field] = value;
        class
    }

    fn parse(class: Value) -> Result<OxideClass, String> {
        serde_json::from_value(class).map_err(|error| error.to_string())
    }

    fn faults(class: Value) -> Vec<String> {
        validate(&parse(class).expect("it parses"))
    }

    #[test]
    fn the_schema_is_what_omnis_form_can_draw() {
        let schema = class_schema::<OxideClass>();
        let text = schema.to_string();
        for word in ["$ref", "$defs", "null", "oneOf", "anyOf", "allOf", "format"] {
            assert!(!text.contains(&format!("\"{word}\"")), "{word} in {text}");
        }
        let fields: Vec<_> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(
            fields,
            [
                "project",
                "cpus",
                "memory",
                "boot_disk_size",
                "disks",
                "network_interfaces",
                "auto_restart_policy",
                "cpu_platform",
                "anti_affinity_groups",
                "enable_jumbo_frames",
                "nameservers",
                "replace"
            ]
        );
        assert_eq!(schema["required"], json!(["project", "network_interfaces"]));
        assert_eq!(schema["additionalProperties"], json!(false));
        for (field, word, value) in [
            ("cpus", "minimum", json!(1)),
            ("cpus", "maximum", json!(254)),
            ("cpus", "default", json!(1)),
            ("memory", "maximum", json!(1536)),
            ("memory", "default", json!(4)),
            ("boot_disk_size", "minimum", json!(2)),
            ("boot_disk_size", "maximum", json!(1023)),
            ("boot_disk_size", "default", json!(10)),
            ("disks", "maxItems", json!(11)),
            ("network_interfaces", "minItems", json!(1)),
            ("network_interfaces", "maxItems", json!(8)),
            ("auto_restart_policy", "enum", json!(["never", "best_effort"])),
            ("auto_restart_policy", "default", json!("best_effort")),
            (
                "cpu_platform",
                "enum",
                json!(["amd_milan", "amd_turin", "amd_turin_v2"]),
            ),
            ("cpu_platform", "default", json!("amd_milan")),
            ("enable_jumbo_frames", "type", json!("boolean")),
        ] {
            assert_eq!(schema["properties"][field][word], value, "{field}.{word}");
            assert!(schema["properties"][field]["description"].is_string(), "{field}");
        }
        let disk = &schema["properties"]["disks"]["items"];
        assert_eq!(
            disk["properties"]["type"]["enum"],
            json!(["distributed", "local"])
        );
        assert_eq!(disk["required"], json!(["type", "size"]));
        assert_eq!(disk["additionalProperties"], json!(false));
        let interface = &schema["properties"]["network_interfaces"]["items"];
        assert_eq!(
            interface["properties"]["ip_config"]["enum"],
            json!(["v4", "v6", "dual_stack"])
        );
        assert_eq!(
            interface["required"],
            json!(["ip_config", "subnet_name", "vpc_name"])
        );
    }

    #[test]
    fn schema_and_type_accept_the_same_classes() {
        let schema = jsonschema::validator_for(&class_schema::<OxideClass>()).unwrap();
        for (class, good) in [
            (least(), true),
            (with("cpus", json!(254)), true),
            (with("cpus", json!("2")), false),
            (with("cpus", json!(1.5)), false),
            (with("disks", json!([{"type": "local", "size": 1}])), true),
            (with("disks", json!([{"type": "local"}])), false),
            (with("disks", json!([{"type": "tape", "size": 1}])), false),
            (with("nameservers", json!(["1.1.1.1"])), true),
            (with("replace", json!({"vanished": true, "per_hour": 2})), true),
            (with("replace", json!({"lost": true})), false),
            (with("cpu_platform", json!("amd_turin_v2")), true),
            (with("surprise", json!(1)), false),
            (json!({"project": "p"}), false),
        ] {
            assert_eq!(schema.is_valid(&class), good, "{class}");
            assert_eq!(parse(class.clone()).is_ok(), good, "{class}");
        }
    }

    #[test]
    fn what_is_left_out_has_the_defaults_of_the_schema() {
        let class = parse(least()).unwrap();
        let schema = class_schema::<OxideClass>();
        let value = serde_json::to_value(&class).unwrap();
        let mut defaults = 0;
        for (field, property) in schema["properties"].as_object().unwrap() {
            if let Some(default) = property.get("default") {
                assert_eq!(&value[field], default, "{field}");
                defaults += 1;
            }
        }
        assert_eq!(defaults, 10);
        assert_eq!(validate(&class), Vec::<String>::new());
    }

    #[test]
    fn a_class_of_the_go_provider_parses() {
        let class = parse(json!({
            "project": "3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11",
            "cpus": 4,
            "memory": 8,
            "boot_disk_size": 20,
            "disks": null,
            "network_interfaces": [
                {"ip_config": "dual_stack", "subnet_name": "default", "vpc_name": "default"}
            ],
            "auto_restart_policy": "never",
            "cpu_platform": "amd_turinv2",
            "anti_affinity_groups": null,
            "enable_jumbo_frames": null,
        }))
        .unwrap();
        assert_eq!(class.cpu_platform, CpuPlatform::AmdTurinV2);
        assert!(
            class.disks.is_empty() && class.anti_affinity_groups.is_empty() && !class.enable_jumbo_frames
        );
        assert_eq!(validate(&class), Vec::<String>::new());
    }

    #[test]
    fn an_unknown_field_is_named_along_with_the_known_ones() {
        let top = parse(with("memmory", json!(1))).expect_err("it must fail");
        assert!(
            top.starts_with("unknown field `memmory`, expected one of `project`, `cpus`"),
            "{top}"
        );
        let inner = parse(with("disks", json!([{"type": "local", "size": 1, "sice": 2}])));
        let inner = inner.expect_err("it must fail");
        assert!(
            inner.starts_with("unknown field `sice`, expected `type` or `size`"),
            "{inner}"
        );
    }

    #[test]
    fn every_fault_is_one_sentence_that_names_its_field() {
        let interface = |vpc: &str| json!({"ip_config": "v4", "subnet_name": "default", "vpc_name": vpc});
        let disk = |kind: &str, size: u32| json!({"type": kind, "size": size});
        let long = "a".repeat(64);
        for (field, value, fault) in [
            (
                "project",
                json!(""),
                "project must not be empty, or an ID must be given.",
            ),
            (
                "project",
                json!("Prod"),
                "project is \"Prod\", but it must start with a lower-case letter, or an ID must be given.",
            ),
            (
                "project",
                json!("pr od"),
                "project is \"pr od\", but it must consist of lower-case letters, digits and dashes, \
                 or an ID must be given.",
            ),
            (
                "project",
                json!("prod-"),
                "project is \"prod-\", but it must not end with a dash, or an ID must be given.",
            ),
            ("cpus", json!(0), "cpus must be between 1 and 254, not 0."),
            ("cpus", json!(255), "cpus must be between 1 and 254, not 255."),
            (
                "memory",
                json!(1537),
                "memory must be between 1 and 1536 GiB, not 1537.",
            ),
            (
                "boot_disk_size",
                json!(1),
                "boot_disk_size must be between 2 and 1023 GiB, not 1.",
            ),
            (
                "disks",
                json!(vec![disk("local", 1); 12]),
                "disks must have at most 11 entries, not 12.",
            ),
            (
                "disks",
                json!([disk("local", 5000), disk("distributed", 1024)]),
                "disks[1].size must be between 1 and 1023 GiB, not 1024.",
            ),
            (
                "disks",
                json!([disk("local", 0)]),
                "disks[0].size must be at least 1 GiB, not 0.",
            ),
            (
                "network_interfaces",
                json!([]),
                "network_interfaces must have at least 1 entry.",
            ),
            (
                "network_interfaces",
                json!(vec![interface("a"); 9]),
                "network_interfaces must have at most 8 entries, not 9.",
            ),
            (
                "network_interfaces",
                json!([interface("a"), interface("b")]),
                "network_interfaces[1].vpc_name is \"b\", but all interfaces of a machine must be in one \
                 VPC, here \"a\".",
            ),
            (
                "network_interfaces",
                json!([interface("3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11")]),
                "network_interfaces[0].vpc_name is \"3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11\", but it must be \
                 a name, not an ID.",
            ),
            (
                "anti_affinity_groups",
                json!(["ok", long]),
                "anti_affinity_groups[1] is \
                 \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\", \
                 but it must have at most 63 characters, not 64, or an ID must be given.",
            ),
        ] {
            assert_eq!(faults(with(field, value)), [fault]);
        }
    }
}
