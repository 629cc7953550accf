//! A provider made with upstream's library, on the embedded Omni and the sandbox's Oxide, over their wires.

use std::collections::{BTreeMap, BTreeSet};

use expect_test::expect;
use serde_json::{Value, json};

use crate::support::peer::{self, Peer};
use crate::support::sandbox::Sandbox;

/// The program's idea of its provider ID; a type name of its has it inside.
const PROVIDER: &str = "upstream";
const SET: &str = "workers";

/// A running provider, and what it told so far.
struct Provider {
    peer: Peer,
    told: Vec<Value>,
}

impl Provider {
    /// Starts it and waits until Omni knows it.
    async fn start(sandbox: &Sandbox, registration: bool) -> Option<Self> {
        let program = peer::build("upstream/provider")?;
        let mut peer = Peer::start(&program, &[]);
        let settings = json!({
            "omni_endpoint": sandbox.variable("OMNI_ENDPOINT"),
            "omni_key": sandbox.variable("OMNI_SERVICE_ACCOUNT_KEY"),
            "oxide_host": sandbox.variable("OXIDE_HOST"),
            "oxide_token": sandbox.variable("OXIDE_TOKEN"),
            "registration": registration,
        });
        let registered = peer.ask(&settings).await;
        assert_eq!(registered, json!({ "event": "registered", "name": "Upstream" }));
        Some(Self {
            peer,
            told: Vec::new(),
        })
    }

    /// Listens until so many requests have met a condition.
    async fn until(&mut self, requests: usize, condition: impl Fn(&Value) -> bool) {
        let mut met = BTreeSet::new();
        while met.len() < requests {
            let event = self.peer.ask(&json!("next")).await;
            if condition(&event) {
                met.insert(event["request"].to_string());
            }
            self.told.push(event);
        }
    }

    /// What happened to each request, by event.
    fn by_request(&self) -> BTreeMap<&str, Vec<&Value>> {
        let mut requests: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for event in &self.told {
            let request = event["request"].as_str().unwrap();
            requests.entry(request).or_default().push(event);
        }
        requests
    }
}

/// The one value that all events of a name have in a member.
fn only<'a>(events: &[&'a Value], name: &str, member: &str) -> &'a str {
    let values: BTreeSet<&str> = events
        .iter()
        .filter(|event| event["event"] == name)
        .filter_map(|event| event[member].as_str())
        .collect();
    assert_eq!(values.len(), 1, "{member} of {name}: {events:#?}");
    values.into_iter().next().unwrap()
}

/// What people saw of a request, a line each.
fn seen(events: &[&Value]) -> String {
    let mut lines: Vec<String> = events
        .iter()
        .filter(|event| matches!(event["event"].as_str(), Some("created" | "updated" | "destroyed")))
        .map(|event| {
            let status = event["status"].as_str().unwrap_or_default();
            match event["event"].as_str() {
                Some("destroyed") => "destroyed".to_owned(),
                _ => format!("{} {status}", event["stage"].as_str().unwrap()),
            }
        })
        .collect();
    // Finalizers come and go, which nobody sees.
    lines.dedup();
    lines.join("\n")
}

/// Two machines come and go again.
async fn two_machines_come_and_go(registration: bool) {
    let sandbox = Sandbox::start(&["--provider-id", PROVIDER]).await;
    let Some(mut provider) = Provider::start(&sandbox, registration).await else {
        return;
    };

    sandbox.scale(SET, 2);
    provider
        .until(2, |event| {
            event["stage"] == "PROVISIONED" && event["machine"].is_string()
        })
        .await;
    sandbox
        .until("two machines that joined", |status| {
            let joined = |line: &&str| line.contains("PROVISIONED  running   joined");
            status.lines().filter(joined).count() == 2
        })
        .await;

    sandbox.scale(SET, 0);
    provider.until(2, |event| event["event"] == "deprovisioned").await;
    sandbox
        .until("nothing is left", |status| {
            !status.contains(SET) && status.contains("0 instances, 0 disks, 0 snapshots, 0 images")
        })
        .await;

    let requests = provider.by_request();
    assert_eq!(requests.len(), 2);
    let mut schematics = BTreeSet::new();
    for events in requests.values() {
        let instance = only(events, "instance", "instance");
        assert_eq!(
            only(events, "updated", "machine"),
            instance,
            "the UUID that Omni has"
        );
        assert_eq!(only(events, "deprovisioned", "instance"), instance);
        schematics.insert(only(events, "schematic", "schematic"));
        for event in events {
            assert_eq!(event["left"], Value::Null, "Omni had something of it still");
        }
        expect![[r#"
            PROVISIONING 
            PROVISIONING Running Step: "schematic" (1/3)
            PROVISIONING Running Step: "instance" (2/3)
            PROVISIONING Running Step: "patch" (3/3)
            PROVISIONED Provision Complete
            destroyed"#]]
        .assert_eq(&seen(events));
    }
    assert_eq!(schematics.len(), 1, "one image for all machines");
}

#[tokio::test]
async fn upstreams_provider_brings_machines_up_and_down() {
    two_machines_come_and_go(false).await;
}

#[tokio::test]
async fn upstreams_provider_learns_the_uuid_of_a_machine_from_its_registration() {
    two_machines_come_and_go(true).await;
}
