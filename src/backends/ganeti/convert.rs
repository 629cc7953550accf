//! Turns our words into Ganeti's, and Ganeti's into ours. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::class::{DiskTemplate, GanetiClass, Nic, NicMode, Parameter};
use super::mark::Owner;
use super::{Group, KIND};
use crate::cloud::{ImageRef, Instance, InstanceSpec, InstanceState, Timestamp};

/// Longest instance name: KVM's control sockets, `/var/run/ganeti/kvm-hypervisor/ctrl/<name>.monitor`, have to fit into the 107
/// bytes of a socket's address.
pub(super) const MAX_NAME: usize = 60;
/// Ganeti sees no user data; this bounds what is kept until the machine has read it.
pub(super) const MAX_USER_DATA: usize = 256 * 1024;
/// The hypervisor parameter of the CD.
pub(super) const CDROM: &str = "cdrom_image_path";
/// The hypervisor parameter of more words for QEMU's command line.
const EXTRA: &str = "kvm_extra";
/// The OS parameter of a raw image that Ganeti itself copies to the first disk.
pub(super) const OS_IMAGE: &str = "os-image";
/// What the ID of a creation in flight begins with: there is no instance yet, and so no UUID.
const JOB: &str = "job-";

/// An instance, as RAPI shows it; of each field what we need.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Theirs {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) tags: Vec<String>,
    pub(super) status: String,
    /// Seconds since the epoch, by the master's clock.
    pub(super) ctime: f64,
    pub(super) mtime: f64,
    pub(super) serial_no: u64,
    /// What it was given itself. A query does not ask for it.
    #[serde(default)]
    pub(super) custom_hvparams: Map<String, Value>,
}

/// The fields of a query, in the order of [`Theirs`].
pub(super) const FIELDS: [&str; 7] = ["name", "uuid", "tags", "status", "ctime", "mtime", "serial_no"];

impl Theirs {
    /// A row of a query for [`FIELDS`].
    pub(super) fn of_row(row: Vec<Value>) -> Option<Self> {
        let fields: Map<String, Value> = FIELDS.iter().map(ToString::to_string).zip(row).collect();
        serde_json::from_value(Value::Object(fields)).ok()
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        Owner::read(self.tags.iter().map(String::as_str))
    }

    /// The path or address of its CD, empty where it has none.
    pub(super) fn cdrom(&self) -> &str {
        let path = self.custom_hvparams.get(CDROM).and_then(Value::as_str);
        path.unwrap_or_default()
    }

    /// More words for QEMU's command line, empty where it has none. They hold the address of its seed, where it has one.
    pub(super) fn extra(&self) -> &str {
        let words = self.custom_hvparams.get(EXTRA).and_then(Value::as_str);
        words.unwrap_or_default()
    }

    /// In our words.
    pub(super) fn show(&self, owner: Owner, state: InstanceState) -> Instance {
        Instance {
            name: self.name.clone(),
            id: self.uuid.clone(),
            // KVM hands it to the guest as it is.
            uuid: Some(self.uuid.clone()),
            node_provider_id: Some(format!("{KIND}://{}", self.uuid)),
            // To start it is the last that is done to it as a rule.
            started: (state == InstanceState::Running).then(|| timestamp(self.mtime)),
            state,
            mark: Some(owner.mark),
        }
    }
}

/// A creation of a simple disk template writes the instance's record so often; to start it, or to change it, writes it once more.
const UNTOUCHED: u64 = 2;

impl Theirs {
    /// Its state, if nothing is under way (`INSTST_*`).
    pub(super) fn at_rest(&self) -> InstanceState {
        match self.status.as_str() {
            // The second should be down, and is not.
            "running" | "ERROR_up" => InstanceState::Running,
            // The second should be up, and is not: it was complete when somebody started it.
            "ADMIN_down" | "ERROR_down" | "USER_down" => InstanceState::Stopped,
            word => InstanceState::Broken(word.to_owned()),
        }
    }

    /// Whether it may be what a failed creation left behind: nobody wants it up.
    pub(super) fn is_doubtful(&self) -> bool {
        self.status == "ADMIN_down"
    }

    /// Whether anybody did anything to it since it was made, as far as its record shows.
    pub(super) fn was_touched(&self) -> bool {
        self.serial_no > UNTOUCHED
    }
}

/// A creation whose instance does not exist yet.
pub(super) fn in_flight(name: &str, job: u64, owner: Owner) -> Instance {
    Instance {
        name: name.to_owned(),
        id: format!("{JOB}{job}"),
        uuid: None,
        node_provider_id: None,
        state: InstanceState::Starting,
        started: None,
        mark: Some(owner.mark),
    }
}

/// The job of an ID that [`in_flight`] gave.
pub(super) fn job_of_id(id: &str) -> Option<u64> {
    id.strip_prefix(JOB)?.parse().ok()
}

pub(super) fn timestamp(seconds: f64) -> Timestamp {
    // Milliseconds since 1970 fit for a long time; below zero there is nothing.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to what fits"
    )]
    Timestamp((seconds.max(0.0) * 1000.0) as u64)
}

/// Replaces what a path or URL of a class names.
fn expand(template: &str, image: &ImageRef) -> String {
    let (schematic, version) = image.id.split_once('/').unwrap_or((image.id.as_str(), ""));
    let version = version.split('/').next().unwrap_or_default();
    template
        .replace("{schematic}", schematic)
        .replace("{version}", version.trim_start_matches('v'))
}

/// The path or address of the ISO that a class names, empty where it names none.
pub(super) fn named_iso(spec: &InstanceSpec<Group, GanetiClass>) -> String {
    expand(&spec.class.boot_iso, &spec.image)
}

/// What a machine boots.
pub(super) enum Boot {
    /// An ISO of this path or address; none where it is empty.
    Iso(String),
    /// The image that its class names, with a seed at this address.
    Image { seed: String },
}

/// The body of a creation: stopped, without questions to DNS, with our tags and comment.
pub(super) fn create(spec: &InstanceSpec<Group, GanetiClass>, boot: &Boot) -> Value {
    let class = &spec.class;
    let owner = Owner::of(&spec.instance);
    let mut tags = owner.tags();
    tags.extend(class.tags.iter().cloned());
    let mut body = json!({
        "__version__": 1,
        "mode": "create",
        "instance_name": spec.instance.name,
        "comment": owner.comment(),
        "tags": tags,
        "os_type": class.os_type,
        "hypervisor": class.hypervisor,
        "beparams": {"minmem": class.memory, "maxmem": class.memory, "vcpus": class.vcpus},
        "disk_template": class.disk_template,
        "disks": disks(class),
        "nics": class.nics.iter().map(nic).collect::<Vec<_>>(),
        // Both would ask DNS for the name and answer no; their default differs between versions.
        "ip_check": false,
        "name_check": false,
        // A network of the class may hold addresses that Ganeti does not know of; it was told which by its operator.
        "conflicts_check": false,
        "start": false,
        "wait_for_sync": false,
    });
    let mut set = |name: &str, value: Value| {
        if let Value::Object(body) = &mut body {
            body.insert(name.to_owned(), value);
        }
    };
    if class.primary_node.is_empty() {
        set("group_name", json!(spec.instance.scope.0));
        if !class.iallocator.is_empty() {
            set("iallocator", json!(class.iallocator));
        }
        if class.opportunistic_locking {
            set("opportunistic_locking", json!(true));
        }
    } else {
        set("pnode", json!(class.primary_node));
        if !class.secondary_node.is_empty() {
            set("snode", json!(class.secondary_node));
        }
    }
    let mut os_params = parameters(&class.os_params);
    if let Boot::Image { .. } = boot {
        os_params.insert(OS_IMAGE.to_owned(), json!(expand(&class.boot_image, &spec.image)));
    }
    if !os_params.is_empty() {
        set("osparams", Value::Object(os_params));
    }
    let mut hypervisor_params = match boot {
        Boot::Iso(iso) => booting_iso(iso),
        Boot::Image { .. } => booting_disk(),
    };
    // What the operator says goes first: a cluster may need it so.
    hypervisor_params.extend(parameters(&class.hypervisor_params));
    if let Boot::Image { seed } = boot {
        let theirs = hypervisor_params.get(EXTRA).and_then(Value::as_str);
        let words = [theirs.unwrap_or_default().trim(), &smbios(seed)].join(" ");
        hypervisor_params.insert(EXTRA.to_owned(), json!(words.trim()));
    }
    if !hypervisor_params.is_empty() {
        set("hvparams", Value::Object(hypervisor_params));
    }
    body
}

fn disks(class: &GanetiClass) -> Vec<Value> {
    let boot = (class.disk_size, class.disk_vg.as_str());
    let more = class.disks.iter().map(|disk| (disk.size, disk.vg.as_str()));
    std::iter::once(boot)
        .chain(more)
        .map(|(size, vg)| {
            let mut disk = Map::new();
            disk.insert("size".to_owned(), json!(size));
            if !vg.is_empty() {
                disk.insert("vg".to_owned(), json!(vg));
            }
            if class.disk_template == DiskTemplate::Ext {
                disk.insert("provider".to_owned(), json!(class.disk_provider));
            }
            Value::Object(disk)
        })
        .collect()
}

fn nic(nic: &Nic) -> Value {
    let mut fields = Map::new();
    let mode = match nic.mode {
        NicMode::Default => "",
        NicMode::Bridged => "bridged",
        NicMode::Routed => "routed",
        NicMode::Openvswitch => "openvswitch",
    };
    for (name, value) in [
        ("network", nic.network.as_str()),
        ("ip", &nic.ip),
        ("mode", mode),
        ("link", &nic.link),
        ("vlan", &nic.vlan),
    ] {
        if !value.is_empty() {
            fields.insert(name.to_owned(), json!(value));
        }
    }
    Value::Object(fields)
}

fn parameters(given: &BTreeMap<String, Parameter>) -> Map<String, Value> {
    given
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect()
}

/// The hypervisor parameters that boot the disk as it is.
fn booting_disk() -> Map<String, Value> {
    // The default boots a kernel of the node.
    let params = [("kernel_path", ""), ("boot_order", "disk")];
    params
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .into_iter()
        .collect()
}

/// The words for QEMU that tell a machine where its seed is: Talos reads the serial number of its SMBIOS (`nocloud.acquireConfig`,
/// which wants `nocloud-net`). Ganeti 3.0 splits them at blanks, 3.1 as a shell would, but neither gives them to a shell: the
/// semicolon needs no quotes and may have none. QEMU wants a comma twice.
fn smbios(seed: &str) -> String {
    let mut url = String::new();
    for letter in seed.chars() {
        match letter {
            ',' => url.push_str(",,"),
            // Talos would end the address there; a shell's splitting would take the others away.
            ';' | '\'' | '"' | '\\' => url.extend(url::form_urlencoded::byte_serialize(&[letter as u8])),
            letter => url.push(letter),
        }
    }
    format!("-smbios type=1,serial=ds=nocloud-net;s={url}")
}

/// The hypervisor parameters that boot an ISO, if there is one.
fn booting_iso(iso: &str) -> Map<String, Value> {
    let mut params = Map::new();
    if iso.is_empty() {
        return params;
    }
    // A blank disk falls through to the CD; an installed one wins, so nothing has to be changed later.
    params.extend(booting_disk());
    for (name, value) in [
        (CDROM, iso),
        // Otherwise it follows the disks, and is one to the guest.
        ("cdrom_disk_type", "ide"),
    ] {
        params.insert(name.to_owned(), json!(value));
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::{InstanceRef, Mark, UserData};

    fn spec(class: &str) -> InstanceSpec<Group, GanetiClass> {
        InstanceSpec {
            instance: InstanceRef {
                scope: Group("rack1".to_owned()),
                name: "web".to_owned(),
                id: None,
                mark: Mark {
                    provider: "ganeti".to_owned(),
                    request: "web".to_owned(),
                    installation: "i".to_owned(),
                },
                adopt_bare: false,
            },
            class: crate::cloud::class::parse_class(class).unwrap(),
            image: ImageRef {
                id: "abc/v1.12.0/metal-amd64".to_owned(),
                name: String::new(),
            },
            user_data: UserData(Vec::new()),
        }
    }

    #[test]
    fn a_class_becomes_a_creation() {
        let spec = spec(
            "disk_template: drbd\ndisk_size: 20480\ndisk_vg: fast\ndisks: [{size: 5, vg: slow}]\nvcpus: 4\nmemory: 8192\n\
             nics: [{network: net1, ip: pool}, {mode: routed, link: '100', ip: 10.0.0.1}, {mode: openvswitch, vlan: '7'}]\n\
             os_type: talos\nos_params: {a: b}\nhypervisor_params: {cpu_type: host, vhost_net: true, boot_order: cdrom}\n\
             iallocator: hail\nopportunistic_locking: true\ntags: [mine]\nboot_iso: '/iso/{schematic}-{version}.iso'",
        );
        expect_test::expect![[r#"
            {
              "__version__": 1,
              "mode": "create",
              "instance_name": "web",
              "comment": "omni:provider:ganeti omni:request:web omni:installation:i omni:group:rack1",
              "tags": [
                "omni:provider:ganeti",
                "omni:request:web",
                "omni:installation:i",
                "omni:group:rack1",
                "mine"
              ],
              "os_type": "talos",
              "hypervisor": "kvm",
              "beparams": {
                "minmem": 8192,
                "maxmem": 8192,
                "vcpus": 4
              },
              "disk_template": "drbd",
              "disks": [
                {
                  "size": 20480,
                  "vg": "fast"
                },
                {
                  "size": 5,
                  "vg": "slow"
                }
              ],
              "nics": [
                {
                  "network": "net1",
                  "ip": "pool"
                },
                {
                  "ip": "10.0.0.1",
                  "mode": "routed",
                  "link": "100"
                },
                {
                  "mode": "openvswitch",
                  "vlan": "7"
                }
              ],
              "ip_check": false,
              "name_check": false,
              "conflicts_check": false,
              "start": false,
              "wait_for_sync": false,
              "group_name": "rack1",
              "iallocator": "hail",
              "opportunistic_locking": true,
              "osparams": {
                "a": "b"
              },
              "hvparams": {
                "kernel_path": "",
                "boot_order": "cdrom",
                "cdrom_image_path": "/iso/abc-1.12.0.iso",
                "cdrom_disk_type": "ide",
                "cpu_type": "host",
                "vhost_net": true
              }
            }"#]]
        .assert_eq(&format!("{:#}", create(&spec, &Boot::Iso(named_iso(&spec)))));
    }

    #[test]
    fn an_image_is_copied_and_its_machine_told_where_its_seed_is() {
        let spec = spec(
            "disk_template: plain\nnics: [{}]\nboot_image: '/srv/{schematic}-{version}.raw'\nos_params: {a: b}\n\
             hypervisor_params: {kvm_extra: '-smbios type=1,manufacturer=Us', boot_order: disk}",
        );
        let seed = "http://10.0.0.1:8080/a,b;c'd/seed-0/".to_owned();
        let body = create(&spec, &Boot::Image { seed });
        assert_eq!(body["os_type"], "noop");
        assert_eq!(
            body["osparams"],
            json!({"a": "b", "os-image": "/srv/abc-1.12.0.raw"})
        );
        assert_eq!(
            body["hvparams"],
            json!({
                "kernel_path": "",
                "boot_order": "disk",
                "kvm_extra": "-smbios type=1,manufacturer=Us \
                              -smbios type=1,serial=ds=nocloud-net;s=http://10.0.0.1:8080/a,,b%3Bc%27d/seed-0/",
            })
        );
    }

    #[test]
    fn named_nodes_replace_the_allocator() {
        let spec = spec(
            "disk_template: ext\ndisk_provider: san\nnics: [{}]\nhypervisor: xen-hvm\n\
             primary_node: n1\nsecondary_node: n2\n",
        );
        let body = create(&spec, &Boot::Iso(named_iso(&spec)));
        assert_eq!((&body["pnode"], &body["snode"]), (&json!("n1"), &json!("n2")));
        assert_eq!(
            (&body["group_name"], &body["iallocator"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(body["disks"], json!([{"size": 10240, "provider": "san"}]));
        assert_eq!(body["nics"], json!([{}]));
        assert_eq!(body["hvparams"], Value::Null);
    }

    #[test]
    fn states_are_read() {
        let broken = |word: &str| InstanceState::Broken(word.to_owned());
        for (status, expected, doubtful) in [
            ("running", InstanceState::Running, false),
            ("ERROR_up", InstanceState::Running, false),
            ("ADMIN_down", InstanceState::Stopped, true),
            ("ERROR_down", InstanceState::Stopped, false),
            ("USER_down", InstanceState::Stopped, false),
            ("ERROR_nodedown", broken("ERROR_nodedown"), false),
            ("ADMIN_offline", broken("ADMIN_offline"), false),
        ] {
            let theirs = Theirs {
                name: String::new(),
                uuid: String::new(),
                tags: Vec::new(),
                status: status.to_owned(),
                ctime: 0.0,
                mtime: 0.0,
                serial_no: 2,
                custom_hvparams: Map::new(),
            };
            assert_eq!(
                (theirs.at_rest(), theirs.is_doubtful()),
                (expected, doubtful),
                "{status}"
            );
        }
    }

    #[test]
    fn a_creation_in_flight_is_known_by_its_job() {
        let spec = spec("disk_template: plain\nnics: [{}]");
        let instance = in_flight("web", 17, Owner::of(&spec.instance));
        assert_eq!(job_of_id(&instance.id), Some(17));
        assert_eq!(job_of_id("0b6ff3a2-0000-4000-8000-000000000001"), None);
        assert_eq!(instance.state, InstanceState::Starting);
    }
}
