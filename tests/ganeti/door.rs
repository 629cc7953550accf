//! Ganeti's door for the conformance suite: its own command line.

use omni_infra_provider::backends::ganeti::{Ganeti, GanetiClass, Group, Settings};
use omni_infra_provider::cloud::ImageKey;
use omni_infra_provider::secret::Secret;
use serde_json::{Value, json};

use super::cluster::Cluster;
use crate::conformance::{Door, Spec, conformance};

pub(crate) struct GanetiDoor {
    cluster: Cluster,
    ganeti: Ganeti,
}

/// A small class that works on the test's cluster.
pub(crate) fn class(change: impl FnOnce(&mut Value)) -> GanetiClass {
    let mut class = json!({
        "node_groups": ["default", "spare"],
        "vcpus": 2,
        "memory": 64,
        "disk_template": "file",
        "disk_size": 16,
        "disks": [{"size": 8}],
        "nics": [{"network": "net1", "ip": "pool"}],
        "hypervisor": "fake",
        "iallocator": "hail",
        "tags": ["mine"],
    });
    change(&mut class);
    serde_json::from_value(class).unwrap()
}

impl Door for GanetiDoor {
    type Cloud = Ganeti;

    async fn open() -> Option<Self> {
        let cluster = Cluster::find()?;
        Some(Self {
            ganeti: cluster.backend(),
            cluster,
        })
    }

    fn cloud(&self) -> &Ganeti {
        &self.ganeti
    }

    fn another(&self) -> Ganeti {
        self.cluster.backend()
    }

    async fn refused(&self) -> Ganeti {
        Ganeti::new(&Settings {
            password: Secret::new("wrong"),
            ..self.cluster.settings()
        })
        .unwrap()
    }

    async fn unreachable(&self) -> Ganeti {
        Ganeti::new(&Settings {
            // A port that nobody is given by chance.
            endpoint: "https://127.0.0.1:1".to_owned(),
            ..self.cluster.settings()
        })
        .unwrap()
    }

    fn class(&self) -> GanetiClass {
        class(|_| {})
    }

    fn impossible_classes(&self) -> Vec<GanetiClass> {
        vec![
            class(|class| class["os_type"] = json!("nosuch")),
            // Its installation fails when the instance is there already.
            class(|class| class["os_type"] = json!("omni-broken")),
            class(|class| class["nics"][0]["network"] = json!("nosuch")),
        ]
    }

    fn huge_classes(&self) -> Vec<GanetiClass> {
        vec![class(|class| class["memory"] = json!(900_000))]
    }

    fn scopes(&self) -> [Group; 2] {
        ["default", "spare"].map(|group| Group(group.to_owned()))
    }

    async fn plant_stranger(&self, name: &str) {
        self.cluster.add(name, &[]).await;
    }

    async fn remove_stranger(&self, name: &str) -> bool {
        let there = self.cluster.is_there(name).await;
        if there {
            self.cluster.remove(name).await;
        }
        there
    }

    async fn left(&self, name: &str) -> Vec<String> {
        self.cluster.left(name).await
    }

    async fn assert_as_asked(&self, spec: &Spec<Self>) {
        let fields = [
            "be/maxmem",
            "be/vcpus",
            "disk_template",
            "disk.sizes",
            "nic.networks.names",
            "hypervisor",
            "os",
            "tags",
        ];
        let mut found = self.cluster.instance(&spec.instance.name, &fields).await.unwrap();
        let tags = found.pop().unwrap();
        assert_eq!(
            json!(found),
            json!([64, 2, "file", [16, 8], ["net1"], "fake", "noop"])
        );
        assert!(tags.as_array().unwrap().contains(&json!("mine")), "{tags}");
    }

    /// Its guests are played, and read nothing.
    async fn user_data(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    async fn images(&self, _: &ImageKey) -> usize {
        0
    }
}

conformance!(GanetiDoor, tokio::test);
