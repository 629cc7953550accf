//! The vendor's own Go client on the sandbox's Oxide: every call that it fakes, and what it refuses.

use std::collections::BTreeSet;

use omni_infra_provider::sandbox::PROJECT;
use omni_infra_provider::sandbox::oxide::{OxideApi, OxideOptions};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::support::peer::{self, Peer};
use crate::support::sandbox::Sandbox;

const TOKEN: &str = "oxide-token-sandbox";

/// The program that drives the vendor's client.
struct Client(Peer);

impl Client {
    /// `None` where Go is missing.
    fn start() -> Option<Self> {
        let program = peer::build("upstream/oxide")?;
        Some(Self(Peer::start(&program, &[])))
    }

    /// Has it live a story, and returns the calls that it made; a call that was not answered as it should be fails.
    async fn live(&mut self, story: &str, host: &str) -> Vec<String> {
        let command = json!({ "story": story, "host": host, "token": TOKEN });
        let mut answer = self.0.ask(&command).await;
        serde_json::from_value(answer["calls"].take()).unwrap()
    }
}

/// Every call that the sandbox fakes: method, path with a star for what varies, name.
fn faked() -> Vec<(String, Vec<String>, String)> {
    let source = include_str!("../../src/sandbox/oxide/front.rs");
    let routes = source.split("\nroutes! {\n").nth(1).unwrap();
    let routes = routes.split("\n}\n").next().unwrap();
    routes
        .lines()
        .map(|line| {
            let (method, rest) = line.trim().split_once(' ').unwrap();
            let (path, rest) = rest.split_once(" => ").unwrap();
            let path = path
                .split('/')
                .map(|segment| segment.trim_matches('"').to_owned());
            let name = rest.split('"').nth(1).unwrap();
            (method.to_owned(), path.collect(), name.to_owned())
        })
        .collect()
}

fn is_of(call: &str, method: &str, path: &[String]) -> bool {
    let Some(segments) = call
        .strip_prefix(method)
        .and_then(|rest| rest.strip_prefix(" /v1/"))
    else {
        return false;
    };
    let segments: Vec<&str> = segments.split('/').collect();
    segments.len() == path.len()
        && segments
            .iter()
            .zip(path)
            .all(|(segment, wanted)| wanted == "*" || segment == wanted)
}

#[tokio::test]
async fn the_vendors_client_understands_every_call_that_the_sandbox_fakes() {
    let Some(mut client) = Client::start() else {
        return;
    };
    let sandbox = Sandbox::start(&["--only-oxide"]).await;
    let mut calls = BTreeSet::new();
    for story in [
        "user",
        "projects",
        "disks",
        "imports",
        "instances",
        "pages",
        "refusals",
    ] {
        calls.extend(client.live(story, sandbox.variable("OXIDE_HOST")).await);
    }
    let faked = faked();
    assert!(faked.len() > 40, "{faked:?}");
    let missing: Vec<&String> = faked
        .iter()
        .filter(|(method, path, _)| !calls.iter().any(|call| is_of(call, method, path)))
        .map(|(_, _, name)| name)
        .collect();
    assert!(missing.is_empty(), "never called: {missing:?}");
}

/// Has the vendor's client live a story on a rack that is prepared for it.
async fn live_on(options: OxideOptions, story: &str, prepare: impl FnOnce(&OxideApi)) {
    let Some(mut client) = Client::start() else {
        return;
    };
    let rack = OxideApi::new(options);
    rack.add_project(PROJECT).unwrap();
    prepare(&rack);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", listener.local_addr().unwrap());
    let mut serving = JoinSet::new();
    serving.spawn(async move { rack.serve(listener).await });
    client.live(story, &host).await;
}

#[tokio::test]
async fn the_vendors_client_sees_whose_a_floating_address_is() {
    live_on(OxideOptions::default(), "addresses", |rack| {
        rack.add_floating_ip(PROJECT, "front").unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_vendors_client_is_told_that_there_is_no_room_by_a_start_alone() {
    live_on(OxideOptions::default(), "capacity", |rack| {
        rack.set_limits(|limits| limits.sleds.clear());
    })
    .await;
}

#[tokio::test]
async fn the_vendors_client_follows_pages_that_are_shorter_than_it_asked_for() {
    let options = OxideOptions {
        page: 2,
        ..OxideOptions::default()
    };
    live_on(options, "short pages", |_| {}).await;
}

#[tokio::test]
async fn the_vendors_client_is_refused_by_an_older_rack() {
    let options = OxideOptions {
        newest_api: 2_026_032_500,
        ..OxideOptions::default()
    };
    live_on(options, "too new", |_| {}).await;
}

#[tokio::test]
async fn the_vendors_client_cannot_tell_a_project_that_it_lost_from_none() {
    live_on(OxideOptions::default(), "shut out", |rack| {
        rack.hide_project(TOKEN, PROJECT, true);
    })
    .await;
}
