//! An Oxide rack and an image factory for a world, over HTTP on loopback.
//!
//! On a paused clock time jumps to the next deadline whenever all tasks wait, also when they wait for the other end of a socket:
//! a call over HTTP takes a few jumps, each at most the second that a settling world sleeps. No deadline of a call is that short.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use omni_infra_provider::backends::oxide::{Oxide, Settings};
use omni_infra_provider::sandbox::factory::{Factory, FactoryOptions};
use omni_infra_provider::sandbox::omni::{Omni, OmniOptions};
use omni_infra_provider::sandbox::oxide::{Call, Happening, Hook, Moment, OxideApi, OxideOptions, Verdict};
use omni_infra_provider::secret::Secret;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::cloud::{Machine, TestCloud, Words};
use super::tap::{Course, Entry, Tap};

const PROJECT: &str = "talos";
/// How the names of our images begin.
const IMAGE: &str = "talos-";
/// The mark of the Go provider, on everything of it.
const BARE: &str = "Managed by the Oxide Omni infrastructure provider (oxide).";
/// One write of an import.
const IMAGE_SIZE: usize = 512;

/// A rack with a factory beside it.
pub(crate) struct Rack {
    pub(crate) api: OxideApi,
    factory: Factory,
    host: String,
    factory_host: String,
    servers: JoinSet<()>,
}

impl TestCloud for Rack {
    type Backend = Oxide;

    const PROVIDER: &'static str = "oxide";
    const CLASS: &'static str = "\
project: talos
boot_disk_size: 3
disks:
  - type: distributed
    size: 1
network_interfaces:
  - ip_config: v4
    vpc_name: default
    subnet_name: default
";
    const WORDS: Words = Words {
        importing: ("disk_bulk_write_import", Duration::ZERO),
        creating: "instance_create",
        starting: "instance_start",
    };

    async fn open(tap: &Arc<Tap>) -> Self {
        let api = OxideApi::new(OxideOptions {
            page: 2,
            seed: Some(1),
            ..OxideOptions::default()
        });
        api.add_project(PROJECT).unwrap();
        api.set_hook(Some(hook(&api, tap)));
        let factory = Factory::new(FactoryOptions {
            image_size: IMAGE_SIZE,
            ..FactoryOptions::default()
        });
        let (door, host) = listen().await;
        let (factory_door, factory_host) = listen().await;
        let mut servers = JoinSet::new();
        let (rack, images) = (api.clone(), factory.clone());
        servers.spawn(async move { rack.serve(door).await.unwrap() });
        servers.spawn(async move { images.serve(factory_door).await.unwrap() });
        Self {
            api,
            factory,
            host,
            factory_host,
            servers,
        }
    }

    fn introduce(&self, options: &mut OmniOptions) {
        options.image_factory_base_url.clone_from(&self.factory_host);
    }

    fn connect(&mut self, omni: &Omni) {
        let schematics = omni.clone();
        self.factory
            .also_knows(move |id| schematics.schematic(id).is_some());
        let (omni, mut happenings) = (omni.clone(), self.api.happenings());
        self.servers.spawn(async move {
            while let Some(happening) = happenings.recv().await {
                match happening {
                    Happening::Booted { id, user_data } => omni.machine_booted(&id.to_string(), &user_data),
                    Happening::Stopped { id } => omni.machine_stopped(&id.to_string()),
                    Happening::Gone { id } => omni.machine_gone(&id.to_string()),
                }
            }
        });
    }

    fn unhook(&self) {
        self.api.set_hook(None);
    }

    fn backend(&self) -> Oxide {
        Oxide::new(&Settings {
            host: self.host.clone(),
            token: Secret::new(OxideOptions::default().token),
            ca_bundle: None,
            provider_id: Self::PROVIDER.to_owned(),
        })
        .unwrap()
    }

    fn machines(&self) -> Vec<Machine> {
        machines(&self.api)
    }

    fn things(&self) -> Vec<String> {
        let instances = self.machines().into_iter();
        let instances = instances.map(|it| format!("instance {} {} {}", it.name, it.id, it.running));
        let disks = self.api.disks(PROJECT).into_iter();
        let disks = disks.map(|it| format!("disk {} {} {:?}", it.name.as_str(), it.id, it.state));
        let snapshots = self.api.snapshots(PROJECT).into_iter();
        let snapshots = snapshots.map(|it| format!("snapshot {} {}", it.name.as_str(), it.id));
        let images = self.api.images(PROJECT).into_iter();
        let images = images.filter(|it| !it.name.starts_with(IMAGE));
        let images = images.map(|it| format!("image {} {}", it.name.as_str(), it.id));
        instances.chain(disks).chain(snapshots).chain(images).collect()
    }

    fn images(&self) -> usize {
        let images = self.api.images(PROJECT);
        images.iter().filter(|it| it.name.starts_with(IMAGE)).count()
    }

    fn plant_stranger(&self) {
        let elsewhere = format!("{BARE} request=web installation=0b6ff3a2-0000-4000-8000-000000000001");
        for (name, words) in [
            ("web-0", "a database"),
            ("website", BARE),
            ("elsewhere", &elsewhere),
        ] {
            let id = self.api.plant_instance(PROJECT, name, words).unwrap();
            let attached = oxide::types::DiskState::Attached(id);
            self.api.plant_disk(PROJECT, name, words, attached).unwrap();
        }
        let detached = oxide::types::DiskState::Detached;
        self.api
            .plant_disk(PROJECT, "imp-abc", "not ours", detached)
            .unwrap();
        self.api.plant_image(PROJECT, "debian", "").unwrap();
    }

    fn plant_go(&self, name: &str) -> (String, Bytes) {
        let id = self.api.plant_instance(PROJECT, name, BARE).unwrap();
        let attached = || oxide::types::DiskState::Attached(id);
        let boot = self.api.plant_disk(PROJECT, name, BARE, attached()).unwrap();
        let data = format!("disk-01-{name}");
        let second = self.api.plant_disk(PROJECT, &data, BARE, attached()).unwrap();
        let record = [
            self.go_intent().to_vec(),
            pair(2, &id.to_string(), name),
            pair(3, &boot.to_string(), name),
            pair(3, &second.to_string(), &data),
        ];
        (id.to_string(), record.concat().into())
    }

    fn go_intent(&self) -> Bytes {
        pair(1, "", PROJECT).into()
    }

    fn leave_remains(&self, name: &str) {
        assert!(self.api.vanish_instance(PROJECT, name, false));
    }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", listener.local_addr().unwrap());
    (listener, host)
}

/// Every call but the one that only asks whether the token is good.
fn hook(api: &OxideApi, tap: &Arc<Tap>) -> Hook {
    let (api, tap) = (api.clone(), tap.clone());
    Arc::new(move |call: &Call, moment| {
        let course = match moment {
            _ if call.operation == "current_user_view" => Course::GoesOn,
            Moment::Before => {
                let course = tap.before(entry(call));
                // Nexus goes on with its sagas when nobody waits for their end.
                tap.during(&entry(call));
                course
            }
            Moment::After => {
                tap.saw(&machines(&api));
                tap.after(&entry(call))
            }
        };
        let verdict = match course {
            Course::GoesOn => Verdict::Proceed,
            Course::Hangs => Verdict::Hang,
            Course::AnswerLost => Verdict::Drop,
        };
        Box::pin(async { verdict })
    })
}

fn entry(call: &Call) -> Entry {
    Entry {
        key: call.target.clone().unwrap_or_default(),
        what: call.operation.to_owned(),
        reads: call.method == http::Method::GET,
    }
}

fn machines(api: &OxideApi) -> Vec<Machine> {
    let all = api.instances(PROJECT).into_iter();
    all.map(|it| Machine {
        name: it.name.to_string(),
        id: it.id.to_string(),
        running: it.run_state == oxide::types::InstanceState::Running,
    })
    .collect()
}

/// A field of the Go provider's record: an ID and a name.
fn pair(number: u8, id: &str, name: &str) -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| {
        let length = u8::try_from(bytes.len()).unwrap();
        [&[number << 3 | 2, length], bytes].concat()
    };
    field(
        number,
        &[field(1, id.as_bytes()), field(2, name.as_bytes())].concat(),
    )
}
