//! What a world needs of a cloud besides its verbs: to be watched, furnished and ended in the middle of a call.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use omni_infra_provider::backends::sim::{self, Sim, SimPace};
use omni_infra_provider::cloud::{Cloud, CloudError, ErrorKind, InstanceState};
use omni_infra_provider::sandbox::omni::{Omni, OmniOptions};
use tokio::time::sleep;

use super::tap::{Course, Entry, Tap};

/// The words of a trace at which a machine has come so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Words {
    /// The import runs so long after this call.
    pub(crate) importing: (&'static str, Duration),
    pub(crate) creating: &'static str,
    pub(crate) starting: &'static str,
}

/// An instance, whoever's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) running: bool,
}

/// A cloud that a test holds by both ends.
pub(crate) trait TestCloud: Sized {
    type Backend: Cloud;

    /// The provider ID of its daemon, and its own name.
    const PROVIDER: &'static str;
    /// The least that a machine class says.
    const CLASS: &'static str;
    const WORDS: Words;

    /// An empty cloud, every call of which goes through the tap.
    async fn open(tap: &Arc<Tap>) -> Self;

    /// What an Omni beside this cloud has to know of it.
    fn introduce(&self, _options: &mut OmniOptions) {}

    /// From now on Omni hears of machines what they would tell it.
    fn connect(&mut self, omni: &Omni);

    /// Lets go of the tap.
    fn unhook(&self);

    /// What a daemon is started with.
    fn backend(&self) -> Self::Backend;

    /// All instances, by name.
    fn machines(&self) -> Vec<Machine>;

    /// Everything there is, a line each, but for images of Talos.
    fn things(&self) -> Vec<String>;

    /// How many images of Talos there are.
    fn images(&self) -> usize;

    /// Somebody else's things are there, some of them with names like ours.
    fn plant_stranger(&self);

    /// The Go provider made a machine of this name, and it runs; returns its UUID and the Go provider's record of it.
    fn plant_go(&self, name: &str) -> (String, Bytes);

    /// The Go provider's record of a machine that it has not made yet.
    fn go_intent(&self) -> Bytes;

    /// An instance goes and its disks stay, as after a creation that failed half-way.
    fn leave_remains(&self, name: &str);
}

impl TestCloud for Sim {
    type Backend = Self;

    const PROVIDER: &'static str = "sim";
    const CLASS: &'static str = "";
    const WORDS: Words = Words {
        importing: ("find image", Duration::from_secs(1)),
        creating: "create instance",
        starting: "start instance",
    };

    async fn open(tap: &Arc<Tap>) -> Self {
        let sim = Self::new(SimPace::default());
        let (tap, seen) = (tap.clone(), sim.clone());
        sim.set_hook(Some(Arc::new(move |call: sim::Call, moment| {
            let (tap, seen) = (tap.clone(), seen.clone());
            Box::pin(async move {
                // The heartbeat and the orphan collector look at their own time.
                if matches!(call.verb, "check" | "list scopes" | "list marked") {
                    return None;
                }
                let entry = sim_entry(&call);
                let course = match moment {
                    sim::Moment::Before => tap.before(entry),
                    sim::Moment::After => {
                        tap.saw(&seen.machines());
                        tap.after(&entry)
                    }
                };
                match course {
                    Course::GoesOn if moment == sim::Moment::Before => {
                        fault(&call, tap.fault(call.verb)?, "as told")
                    }
                    Course::GoesOn => None,
                    Course::Hangs => std::future::pending().await,
                    Course::AnswerLost => fault(&call, ErrorKind::Unavailable, "the answer was lost"),
                }
            })
        })));
        sim
    }

    fn connect(&mut self, omni: &Omni) {
        let omni = omni.clone();
        self.set_on_event(Arc::new(move |event| {
            let omni = omni.clone();
            match event {
                sim::Event::Started {
                    uuid,
                    user_data,
                    after,
                } => {
                    tokio::spawn(async move {
                        sleep(after).await;
                        omni.machine_booted(&uuid, &user_data.0);
                    });
                }
                sim::Event::Stopped { uuid } => omni.machine_stopped(&uuid),
            }
        }));
    }

    fn unhook(&self) {
        self.set_hook(None);
    }

    fn backend(&self) -> Self {
        self.clone()
    }

    fn machines(&self) -> Vec<Machine> {
        let found = self.instances().into_iter();
        found
            .map(|(zone, name, state)| Machine {
                id: self.instance_id(&zone, &name).unwrap(),
                name,
                running: state == InstanceState::Running,
            })
            .collect()
    }

    fn things(&self) -> Vec<String> {
        let machines = self.machines().into_iter();
        let machines = machines.map(|it| format!("instance {} {} {}", it.name, it.id, it.running));
        let disks = self.disks().into_iter().map(|(_, name)| format!("disk {name}"));
        machines.chain(disks).collect()
    }

    fn images(&self) -> usize {
        Self::images(self)
    }

    fn plant_stranger(&self) {
        self.plant_foreign("a", "web-0");
        // The Go provider's, and no request's.
        self.plant_bare("a", "website", Self::PROVIDER);
    }

    fn plant_go(&self, name: &str) -> (String, Bytes) {
        let id = self.plant_bare("a", name, Self::PROVIDER);
        (id.clone(), format!("a/{id}").into())
    }

    fn go_intent(&self) -> Bytes {
        Bytes::new()
    }

    fn leave_remains(&self, name: &str) {
        self.lose_instance("a", name);
    }
}

fn fault(call: &sim::Call, kind: ErrorKind, what: &str) -> Option<CloudError> {
    Some(CloudError::new(
        "sim",
        call.verb,
        kind,
        format!("{}: {what}", call.on),
    ))
}

fn sim_entry(call: &sim::Call) -> Entry {
    let key = match call.verb {
        "find image" | "import image" | "list instances" => "",
        _ => call.on.as_str(),
    };
    Entry {
        key: key.to_owned(),
        what: call.verb.to_owned(),
        reads: call.verb.starts_with("find") || call.verb.starts_with("list"),
    }
}
