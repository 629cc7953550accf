//! Translates between Oxide's words and ours: states, instances, and the body of a create.
//!
//! Pure: nothing here waits or asks. The rules are nexus's own, read in its source.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oxide::types;

use super::Project;
use super::class::{AutoRestart, CpuPlatform, DataDisk, DiskKind, Interface, IpConfig, MAX_NAME, OxideClass};
use super::mark::{data_disk_name, describe, interface_name};
use crate::cloud::{Instance, InstanceSpec, InstanceState, Mark, Timestamp};

/// Metric label, scheme of the node provider ID, feature name.
pub(super) const KIND: &str = "oxide";
/// Longest name of an instance: the longest name derived from it, `iface-NN-<name>`, has to fit as well.
pub(super) const MAX_INSTANCE_NAME: usize = MAX_NAME - "iface-NN-".len();
/// Most bytes of user data before base64 (nexus: `MAX_USER_DATA_BYTES`).
pub(super) const MAX_USER_DATA: usize = 32 * 1024;
/// The API counts bytes, classes count GiB.
pub(super) const GIB: u64 = 1024 * 1024 * 1024;
/// Block size of blank data disks, the one that the Go provider gives them.
const DATA_DISK_BLOCK: i64 = 4096;

/// What a state of Oxide's means to the planner. `None`: it is gone.
pub(super) fn state(state: types::InstanceState) -> Option<InstanceState> {
    use types::InstanceState as Theirs;
    Some(match state {
        Theirs::Creating
        | Theirs::Starting
        | Theirs::Stopping
        | Theirs::Rebooting
        | Theirs::Migrating
        | Theirs::Repairing => InstanceState::Starting,
        Theirs::Running => InstanceState::Running,
        Theirs::Stopped => InstanceState::Stopped,
        Theirs::Failed => InstanceState::Broken(state.to_string()),
        Theirs::Destroyed => return None,
    })
}

/// The next step on the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask it to stop.
    Stop,
    /// Nothing can be asked of it right now.
    Wait,
    /// Delete it.
    Delete,
}

/// What brings an instance in this state closer to nothing.
pub(super) fn step_down(state: types::InstanceState) -> Step {
    use types::InstanceState as Theirs;
    match state {
        // A failed instance could be deleted at once, but only a stop records that nobody wants it to run:
        // without it the rack's auto-restart may bring it back in between.
        Theirs::Running | Theirs::Starting | Theirs::Rebooting | Theirs::Migrating | Theirs::Failed => {
            Step::Stop
        }
        // Nexus refuses to change the state of an instance that is being created or repaired.
        Theirs::Creating | Theirs::Repairing | Theirs::Stopping => Step::Wait,
        Theirs::Stopped | Theirs::Destroyed => Step::Delete,
    }
}

/// Whether nexus deletes a disk in this state: its deletion saga takes these two alone.
pub(super) fn deletable(state: &types::DiskState) -> bool {
    matches!(state, types::DiskState::Detached | types::DiskState::Faulted)
}

/// A disk's state in a word, for a person.
pub(super) fn disk_state(state: &types::DiskState) -> String {
    use types::DiskState as State;
    match state {
        State::Attaching(instance) => format!("attaching to instance {instance}"),
        State::Attached(instance) => format!("attached to instance {instance}"),
        State::Detaching(instance) => format!("detaching from instance {instance}"),
        State::Creating => "being created".to_owned(),
        State::Detached => "detached".to_owned(),
        State::Finalizing => "finalizing".to_owned(),
        State::ImportReady | State::ImportingFromUrl | State::ImportingFromBulkWrites => {
            "in the middle of an import".to_owned()
        }
        State::Maintenance => "in maintenance".to_owned(),
        State::Destroyed => "destroyed".to_owned(),
        State::Faulted => "faulted".to_owned(),
    }
}

/// A time of the rack's clock.
pub(super) fn timestamp(time: chrono::DateTime<chrono::Utc>) -> Timestamp {
    Timestamp(u64::try_from(time.timestamp_millis()).unwrap_or(0))
}

/// An instance of ours as the engine sees it. `None`: it is gone.
pub(super) fn instance(theirs: &types::Instance, mark: Option<Mark>) -> Option<Instance> {
    let state = state(theirs.run_state)?;
    // Propolis gives the guest the instance's ID as its SMBIOS UUID.
    let id = theirs.id.to_string();
    Some(Instance {
        name: theirs.name.to_string(),
        uuid: Some(id.clone()),
        node_provider_id: Some(format!("{KIND}://{id}")),
        // The only time that nexus keeps; it means a start while the instance runs, and something else
        // otherwise.
        started: (state == InstanceState::Running).then(|| timestamp(theirs.time_run_state_updated)),
        state,
        id,
        mark,
    })
}

/// The create request of an instance: stopped, with everything it needs made along with it. `Err` says what
/// cannot be sent.
///
/// Holds the join token in `user_data`: it must not be printed.
pub(super) fn instance_create(
    spec: &InstanceSpec<Project, OxideClass>,
) -> Result<types::InstanceCreate, String> {
    let InstanceSpec {
        instance,
        class,
        image,
        user_data,
    } = spec;
    let description = describe(&instance.mark);
    if user_data.0.len() > MAX_USER_DATA {
        return Err(format!(
            "user data of {} bytes is longer than the {MAX_USER_DATA} that Oxide takes",
            user_data.0.len()
        ));
    }
    let image_id = image
        .id
        .parse()
        .map_err(|_| format!("{:?} is not the ID of an image", image.id))?;
    Ok(types::InstanceCreate {
        anti_affinity_groups: class
            .anti_affinity_groups
            .iter()
            .map(|group| {
                group
                    .parse()
                    .map_err(|fault| told("anti_affinity_groups", group, fault))
            })
            .collect::<Result<_, _>>()?,
        auto_restart_policy: Some(match class.auto_restart_policy {
            AutoRestart::Never => types::InstanceAutoRestartPolicy::Never,
            AutoRestart::BestEffort => types::InstanceAutoRestartPolicy::BestEffort,
        }),
        boot_disk: Some(types::InstanceDiskAttachment::Create {
            description: description.clone(),
            disk_backend: types::DiskBackend::Distributed(types::DiskSource::Image {
                image_id,
                read_only: false,
            }),
            name: name(&instance.name)?,
            size: types::ByteCount(u64::from(class.boot_disk_size) * GIB),
        }),
        cpu_platform: Some(match class.cpu_platform {
            CpuPlatform::AmdMilan => types::InstanceCpuPlatform::AmdMilan,
            CpuPlatform::AmdTurin => types::InstanceCpuPlatform::AmdTurin,
            CpuPlatform::AmdTurinV2 => types::InstanceCpuPlatform::AmdTurinV2,
        }),
        disks: class
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| data_disk(index, disk, &instance.name, &description))
            .collect::<Result<_, _>>()?,
        enable_jumbo_frames: class.enable_jumbo_frames,
        external_ips: Vec::new(),
        hostname: instance
            .name
            .parse()
            .map_err(|fault| told("hostname", &instance.name, fault))?,
        memory: types::ByteCount(u64::from(class.memory) * GIB),
        multicast_groups: Vec::new(),
        name: name(&instance.name)?,
        ncpus: types::InstanceCpuCount(
            u16::try_from(class.cpus).map_err(|fault| told("cpus", class.cpus, fault))?,
        ),
        network_interfaces: types::InstanceNetworkInterfaceAttachment::Create(
            class
                .network_interfaces
                .iter()
                .enumerate()
                .map(|(index, interface)| network_interface(index, interface, &instance.name, &description))
                .collect::<Result<_, _>>()?,
        ),
        // Absent would mean all keys of whoever owns the token; Talos has no use for any.
        ssh_public_keys: Some(Vec::new()),
        // A start along with the create would hide its failure: nexus logs it and answers 201 all the same.
        start: false,
        user_data: BASE64.encode(&user_data.0),
        description,
    })
}

fn data_disk(
    index: usize,
    disk: &DataDisk,
    instance: &str,
    description: &str,
) -> Result<types::InstanceDiskAttachment, String> {
    Ok(types::InstanceDiskAttachment::Create {
        description: description.to_owned(),
        disk_backend: match disk.kind {
            DiskKind::Local => types::DiskBackend::Local,
            DiskKind::Distributed => types::DiskBackend::Distributed(types::DiskSource::Blank {
                block_size: block_size(DATA_DISK_BLOCK)?,
            }),
        },
        name: name(&data_disk_name(index, instance))?,
        size: types::ByteCount(u64::from(disk.size) * GIB),
    })
}

fn network_interface(
    index: usize,
    interface: &Interface,
    instance: &str,
    description: &str,
) -> Result<types::InstanceNetworkInterfaceCreate, String> {
    let v4 = || types::PrivateIpv4StackCreate {
        ip: types::Ipv4Assignment::Auto,
        transit_ips: Vec::new(),
    };
    let v6 = || types::PrivateIpv6StackCreate {
        ip: types::Ipv6Assignment::Auto,
        transit_ips: Vec::new(),
    };
    Ok(types::InstanceNetworkInterfaceCreate {
        description: description.to_owned(),
        ip_config: match interface.ip_config {
            IpConfig::V4 => types::PrivateIpStackCreate::V4(v4()),
            IpConfig::V6 => types::PrivateIpStackCreate::V6(v6()),
            IpConfig::DualStack => types::PrivateIpStackCreate::DualStack { v4: v4(), v6: v6() },
        },
        name: name(&interface_name(index, instance))?,
        subnet_name: name(&interface.subnet_name)?,
        vpc_name: name(&interface.vpc_name)?,
    })
}

/// A name in the API's type.
pub(super) fn name(name: &str) -> Result<types::Name, String> {
    name.parse().map_err(|fault| told("name", name, fault))
}

/// A name or ID in the API's type.
pub(super) fn name_or_id(value: &str) -> Result<types::NameOrId, String> {
    value
        .parse()
        .map_err(|_| format!("{value:?} is neither a name nor an ID"))
}

/// A block size in the API's type.
pub(super) fn block_size(bytes: i64) -> Result<types::BlockSize, String> {
    bytes.try_into().map_err(|fault| told("block size", bytes, fault))
}

fn told(field: &str, value: impl fmt::Display, fault: impl fmt::Display) -> String {
    format!("{field} {value} is refused: {fault}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cloud::{ImageRef, InstanceRef, UserData};

    fn mark() -> Mark {
        Mark {
            provider: "oxide".to_owned(),
            request: "web-x7k".to_owned(),
            installation: "0b6ff3a2-0000-4000-8000-000000000001".to_owned(),
        }
    }

    fn asked() -> InstanceRef<Project> {
        InstanceRef {
            scope: Project("prod".to_owned()),
            name: "web-x7k".to_owned(),
            id: None,
            mark: mark(),
            adopt_bare: false,
        }
    }

    #[test]
    fn every_state_has_a_meaning_and_a_step_down() {
        use types::InstanceState as Theirs;
        for (theirs, meaning, step) in [
            (Theirs::Creating, Some(InstanceState::Starting), Step::Wait),
            (Theirs::Starting, Some(InstanceState::Starting), Step::Stop),
            (Theirs::Running, Some(InstanceState::Running), Step::Stop),
            (Theirs::Stopping, Some(InstanceState::Starting), Step::Wait),
            (Theirs::Stopped, Some(InstanceState::Stopped), Step::Delete),
            (Theirs::Rebooting, Some(InstanceState::Starting), Step::Stop),
            (Theirs::Migrating, Some(InstanceState::Starting), Step::Stop),
            (Theirs::Repairing, Some(InstanceState::Starting), Step::Wait),
            (
                Theirs::Failed,
                Some(InstanceState::Broken("failed".to_owned())),
                Step::Stop,
            ),
            (Theirs::Destroyed, None, Step::Delete),
        ] {
            assert_eq!(state(theirs), meaning, "{theirs}");
            assert_eq!(step_down(theirs), step, "{theirs}");
        }
    }

    fn spec(class: Value) -> InstanceSpec<Project, OxideClass> {
        InstanceSpec {
            instance: asked(),
            class: serde_json::from_value(class).unwrap(),
            image: ImageRef {
                id: "3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11".to_owned(),
                name: "talos".to_owned(),
            },
            user_data: UserData(b"apiVersion: v1alpha1\n".to_vec()),
        }
    }

    #[test]
    fn a_create_request_says_everything_the_class_says() {
        let body = instance_create(&spec(json!({
            "project": "prod",
            "cpus": 2,
            "disks": [{"type": "distributed", "size": 5}, {"type": "local", "size": 7}],
            "network_interfaces": [
                {"ip_config": "v4", "subnet_name": "s", "vpc_name": "v"},
                {"ip_config": "dual_stack", "subnet_name": "s", "vpc_name": "v"},
            ],
            "anti_affinity_groups": ["spread"],
        })))
        .unwrap();
        let description = describe(&mark());
        let gib = |size: u64| size * GIB;
        assert_eq!(
            serde_json::to_value(body).unwrap(),
            json!({
                "anti_affinity_groups": ["spread"],
                "auto_restart_policy": "best_effort",
                "boot_disk": {
                    "type": "create", "description": description, "name": "web-x7k", "size": gib(10),
                    "disk_backend": {"type": "distributed", "disk_source": {
                        "type": "image", "read_only": false,
                        "image_id": "3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11",
                    }},
                },
                "cpu_platform": "amd_milan",
                "description": description,
                "disks": [
                    {"type": "create", "description": description, "name": "disk-00-web-x7k", "size": gib(5),
                     "disk_backend": {"type": "distributed",
                                      "disk_source": {"type": "blank", "block_size": 4096}}},
                    {"type": "create", "description": description, "name": "disk-01-web-x7k", "size": gib(7),
                     "disk_backend": {"type": "local"}},
                ],
                "enable_jumbo_frames": false,
                "hostname": "web-x7k",
                "memory": gib(4),
                "name": "web-x7k",
                "ncpus": 2,
                "network_interfaces": {"type": "create", "params": [
                    {"name": "iface-00-web-x7k", "description": description,
                     "subnet_name": "s", "vpc_name": "v",
                     "ip_config": {"type": "v4", "value": {"ip": {"type": "auto"}}}},
                    {"name": "iface-01-web-x7k", "description": description,
                     "subnet_name": "s", "vpc_name": "v",
                     "ip_config": {"type": "dual_stack", "value": {
                        "v4": {"ip": {"type": "auto"}}, "v6": {"ip": {"type": "auto"}}}}},
                ]},
                "ssh_public_keys": [],
                "start": false,
                "user_data": "YXBpVmVyc2lvbjogdjFhbHBoYTEK",
            })
        );
    }

    #[test]
    fn user_data_beyond_the_limit_is_refused_before_it_is_sent() {
        let mut spec = spec(json!({"project": "prod", "network_interfaces": []}));
        spec.user_data = UserData(vec![b'x'; MAX_USER_DATA]);
        assert!(instance_create(&spec).is_ok());
        spec.user_data = UserData(vec![b'x'; MAX_USER_DATA + 1]);
        assert!(
            instance_create(&spec)
                .expect_err("it must fail")
                .contains("32769 bytes")
        );
    }
}
