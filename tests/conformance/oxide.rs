//! Oxide, over real sockets, against the sandbox's rack.

use omni_infra_provider::backends::oxide::{Oxide, OxideClass, Project, Settings};
use omni_infra_provider::cloud::ImageKey;
use omni_infra_provider::sandbox::oxide::{OxideApi, OxideOptions, OxidePace};
use omni_infra_provider::secret::Secret;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::{Door, Spec, conformance};

const TOKEN: &str = "oxide-token-sandbox";
const PROJECT: &str = "prod";

pub(crate) struct OxideDoor {
    api: OxideApi,
    oxide: Oxide,
    host: String,
    _server: JoinSet<()>,
}

fn backend(host: &str, token: &str) -> Oxide {
    Oxide::new(&Settings {
        host: host.to_owned(),
        token: Secret::new(token),
        ca_bundle: None,
        provider_id: "conformance".to_owned(),
    })
    .unwrap()
}

fn class(change: impl FnOnce(&mut Value)) -> OxideClass {
    let mut class = json!({
        "project": PROJECT,
        "cpus": 2,
        "memory": 8,
        "disks": [{"type": "distributed", "size": 5}],
        "network_interfaces": [{"ip_config": "v4", "subnet_name": "default", "vpc_name": "default"}],
    });
    change(&mut class);
    serde_json::from_value(class).unwrap()
}

impl Door for OxideDoor {
    type Cloud = Oxide;

    async fn open() -> Option<Self> {
        let api = OxideApi::new(OxideOptions {
            page: 2,
            pace: OxidePace::instant(),
            ..OxideOptions::default()
        });
        api.add_project(PROJECT).unwrap();
        api.add_project("other").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", listener.local_addr().unwrap());
        let mut server = JoinSet::new();
        let served = api.clone();
        server.spawn(async move { served.serve(listener).await.unwrap() });
        Some(Self {
            oxide: backend(&host, TOKEN),
            api,
            host,
            _server: server,
        })
    }

    fn cloud(&self) -> &Oxide {
        &self.oxide
    }

    fn another(&self) -> Oxide {
        backend(&self.host, TOKEN)
    }

    async fn refused(&self) -> Oxide {
        backend(&self.host, "oxide-token-revoked")
    }

    async fn unreachable(&self) -> Oxide {
        // A port that was free a moment ago.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        backend(&host, TOKEN)
    }

    fn class(&self) -> OxideClass {
        class(|_| {})
    }

    fn impossible_classes(&self) -> Vec<OxideClass> {
        vec![
            class(|class| class["network_interfaces"][0]["vpc_name"] = json!("gone")),
            class(|class| class["network_interfaces"][0]["subnet_name"] = json!("gone")),
            class(|class| class["anti_affinity_groups"] = json!(["gone"])),
        ]
    }

    fn huge_classes(&self) -> Vec<OxideClass> {
        // More than any sled has.
        vec![class(|class| class["cpus"] = json!(254))]
    }

    fn scopes(&self) -> [Project; 2] {
        [PROJECT, "other"].map(|project| Project(project.to_owned()))
    }

    async fn plant_stranger(&self, name: &str) {
        self.api.plant_instance(PROJECT, name, "a database").unwrap();
    }

    async fn remove_stranger(&self, name: &str) -> bool {
        self.api.vanish_instance(PROJECT, name, true)
    }

    async fn left(&self, name: &str) -> Vec<String> {
        let instances = self
            .api
            .instances(PROJECT)
            .into_iter()
            .map(|instance| instance.name.to_string());
        let disks = self
            .api
            .disks(PROJECT)
            .into_iter()
            .map(|disk| disk.name.to_string());
        let mut left: Vec<String> = instances
            .chain(disks)
            .filter(|found| found.ends_with(name))
            .collect();
        left.extend(
            self.api
                .nics(PROJECT, name)
                .iter()
                .map(|nic| nic.name.to_string()),
        );
        left
    }

    async fn assert_as_asked(&self, spec: &Spec<Self>) {
        let asked = self.api.asked_for(PROJECT, &spec.instance.name).unwrap();
        let asked = serde_json::to_value(asked).unwrap();
        assert_eq!(asked["ncpus"], json!(2));
        assert_eq!(asked["memory"], json!(8_u64 << 30));
        assert_eq!(asked["disks"][0]["size"], json!(5_u64 << 30));
    }

    async fn user_data(&self, name: &str) -> Option<Vec<u8>> {
        Some(self.api.user_data(PROJECT, name).unwrap())
    }

    async fn images(&self, key: &ImageKey) -> usize {
        let images = self.api.images(PROJECT);
        images
            .iter()
            .filter(|image| image.name.contains(&key.schematic[..16]))
            .count()
    }
}

conformance!(OxideDoor, tokio::test);
