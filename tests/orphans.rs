//! Instances that no request wants: found, believed late, deleted only where that is asked for; and given back.

use std::collections::BTreeSet;
use std::time::Duration;

use omni_infra_provider::backends::sim::Zone;
use omni_infra_provider::cloud::{Mark, Marked, Timestamp};
use omni_infra_provider::engine::health::ANNOTATION_INSTALLATION;
use omni_infra_provider::engine::orphans::Policy;
use omni_infra_provider::machine::orphan::{Answerable, MOST_AT_ONCE, Orphan, Sightings, Verdict, judge};
use omni_infra_provider::machine::release::{ANNOTATION_RELEASED, Release, Releases};
use omni_infra_provider::omni::kinds::{InfraProviderHealthStatuses, InfraProviderStatuses, MachineRequests};
use omni_infra_provider::omni::resource::Labels;
use tokio::time::{Instant, sleep};

use crate::support::World;
use crate::support::world::PROVIDER;

const ZONE: &str = "a";
const AGE: Duration = Duration::from_secs(1800);

async fn world(policy: Policy) -> World {
    let mut world = World::without_daemon().await;
    world.orphans = policy;
    world.start_daemon().await;
    // The daemon has registered, and by that has an installation.
    world.request("wanted");
    world.settle().await;
    world
}

fn mark(world: &World, request: &str) -> Mark {
    let registration = world
        .omni
        .get::<InfraProviderStatuses>(PROVIDER, PROVIDER)
        .unwrap();
    Mark {
        provider: PROVIDER.to_owned(),
        request: request.to_owned(),
        installation: registration.metadata.annotations[&ANNOTATION_INSTALLATION.to_owned()].clone(),
    }
}

fn plant(world: &World, name: &str) {
    world.cloud.plant_marked(ZONE, name, mark(world, name));
}

fn health(world: &World) -> String {
    let health = world.omni.get::<InfraProviderHealthStatuses>(PROVIDER, PROVIDER);
    health.map(|health| health.spec.error).unwrap_or_default()
}

/// Waits for a condition, in steps that suit a collector that looks every ten minutes.
async fn eventually(world: &World, what: &str, condition: impl Fn(&World) -> bool) {
    let begun = Instant::now();
    while !condition(world) {
        assert!(begun.elapsed() < AGE * 10, "never came: {what}\n{world}");
        sleep(Duration::from_secs(20)).await;
    }
}

/// Longer than every brake.
async fn wait_long() {
    sleep(AGE * 3).await;
}

#[tokio::test(start_paused = true)]
async fn an_orphan_is_deleted_where_that_is_asked_for_and_nothing_else_is() {
    let world = world(Policy::Delete).await;
    plant(&world, "lost");
    world.cloud.plant_foreign(ZONE, "database");
    world.cloud.plant_bare(ZONE, "theirs", PROVIDER);
    let elsewhere = Mark {
        installation: "another".to_owned(),
        ..mark(&world, "stray")
    };
    world.cloud.plant_marked(ZONE, "stray", elsewhere);
    eventually(&world, "the orphan is gone", |world| {
        !world.instances().contains(&"lost".to_owned())
    })
    .await;
    wait_long().await;
    assert_eq!(
        world.instances(),
        ["database", "stray", "theirs", "wanted"],
        "{world}"
    );
    let disks: Vec<String> = world.cloud.disks().into_iter().map(|(_, name)| name).collect();
    assert_eq!(disks, ["database", "stray", "theirs", "wanted"], "{world}");
    assert_eq!(health(&world), "");
    assert_eq!(world.omni.violations(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn an_orphan_is_believed_only_after_its_time() {
    let world = world(Policy::Delete).await;
    plant(&world, "lost");
    sleep(AGE - Duration::from_secs(60)).await;
    assert_eq!(world.instances(), ["lost", "wanted"], "{world}");
    eventually(&world, "it goes", |world| world.instances() == ["wanted"]).await;
}

#[tokio::test(start_paused = true)]
async fn an_orphan_is_only_reported_by_default() {
    let world = world(Policy::default()).await;
    plant(&world, "lost");
    eventually(&world, "it is told", |world| !health(world).is_empty()).await;
    assert!(
        health(&world).starts_with("lost in a has no machine request: list all with"),
        "{}",
        health(&world)
    );
    wait_long().await;
    assert_eq!(world.instances(), ["lost", "wanted"], "{world}");
    world.cloud.vanish(ZONE, "lost");
    eventually(&world, "it is told no more", |world| health(world).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_vanished_with_all_that_omni_knew_of_it_leaves_an_orphan() {
    let mut world = world(Policy::Delete).await;
    // The daemon is away while Omni's administrator cleans up past all rules.
    world.stop_daemon().await;
    for stored in world.omni.everything() {
        let kind = stored.kind.split('.').next().unwrap_or_default();
        if matches!(
            kind,
            "MachineRequests" | "MachineRequestStatuses" | "ConfigPatchRequests"
        ) {
            world
                .omni
                .force_destroy(&stored.namespace, &stored.kind, &stored.id)
                .unwrap();
        }
    }
    assert!(world.omni.list::<MachineRequests>(PROVIDER).is_empty());
    world.start_daemon().await;
    eventually(&world, "it goes", |world| world.instances().is_empty()).await;
    world.settle().await;
    assert!(world.cloud.disks().is_empty(), "{world}");
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_finalizers_were_stripped_leaves_nothing() {
    let world = world(Policy::Delete).await;
    world.tear_down("wanted");
    world.omni.strip_request("wanted").unwrap();
    world.settle().await;
    assert_eq!(world.instances(), Vec::<String>::new(), "{world}");
    assert!(world.cloud.disks().is_empty(), "{world}");
}

#[tokio::test(start_paused = true)]
async fn an_omni_that_lost_its_data_makes_no_orphans() {
    let world = world(Policy::Delete).await;
    let backup = world.omni.backup();
    for id in ["b", "c", "d", "e"] {
        world.request(id);
    }
    world.settle().await;
    world.omni.restore(&backup);
    world.omni.break_watches();
    eventually(&world, "it is told", |world| {
        health(world).contains("too many to be believed")
    })
    .await;
    wait_long().await;
    assert_eq!(world.instances(), ["b", "c", "d", "e", "wanted"], "{world}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_collected_while_omni_is_odd() {
    let mut world = world(Policy::Delete).await;
    plant(&world, "lost");

    // Its watches still show what was.
    world.omni.configure(|options| options.suspended = true);
    wait_long().await;
    assert_eq!(world.instances(), ["lost", "wanted"], "suspended\n{world}");
    world.omni.configure(|options| options.suspended = false);

    // It answers for another account, or was emptied and set up again.
    let namespace = "infra-provider";
    let kind = "InfraProviderStatuses.omni.sidero.dev";
    let set = |installation: &str| {
        let installation = installation.to_owned();
        world.omni.modify_raw(namespace, kind, PROVIDER, |stored| {
            stored
                .annotations
                .insert(ANNOTATION_INSTALLATION.to_owned(), installation);
        })
    };
    let ours = mark(&world, "lost").installation;
    set("another").unwrap();
    wait_long().await;
    assert_eq!(world.instances(), ["lost", "wanted"], "another account\n{world}");
    set(&ours).unwrap();

    // It is out of reach.
    world.kill_omni().await;
    wait_long().await;
    assert_eq!(world.instances(), ["lost", "wanted"], "out of reach\n{world}");

    // The cloud does not show everything.
    world.cloud.set_blind(true);
    world.start_omni();
    wait_long().await;
    world.cloud.set_blind(false);
    assert_eq!(world.instances(), ["lost", "wanted"], "blind\n{world}");

    eventually(&world, "it goes at last", |world| world.instances() == ["wanted"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_released_is_never_touched_and_forgotten_once_it_is_gone() {
    let world = world(Policy::Delete).await;
    plant(&world, "kept");
    release(&world, "kept");
    wait_long().await;
    assert_eq!(world.instances(), ["kept", "wanted"], "{world}");
    assert_eq!(health(&world), "");

    // Not even by a request of the same ID.
    world.request("kept");
    world.settle().await;
    assert!(
        world.status("kept").error.contains("was given back"),
        "{:?}",
        world.status("kept")
    );
    world.tear_down("kept");
    world.settle().await;
    assert_eq!(world.instances(), ["kept", "wanted"], "{world}");

    world.cloud.vanish(ZONE, "kept");
    eventually(&world, "the release is forgotten", |world| {
        released(world).is_empty()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_release_frees_a_teardown_that_waits_for_what_cannot_be_seen() {
    let world = world(Policy::Report).await;
    world.cloud.set_blind(true);
    world.tear_down("wanted");
    world.settle().await;
    assert_eq!(world.omni.list::<MachineRequests>(PROVIDER).len(), 1, "{world}");
    release(&world, "wanted");
    eventually(&world, "the request is gone", |world| {
        world.omni.list::<MachineRequests>(PROVIDER).is_empty()
    })
    .await;
    assert_eq!(world.instances(), ["wanted"], "{world}");
}

fn release(world: &World, name: &str) {
    let namespace = "infra-provider";
    let kind = "InfraProviderStatuses.omni.sidero.dev";
    let releases = Releases(vec![Release {
        scope: Zone(ZONE.to_owned()),
        name: name.to_owned(),
        request: name.to_owned(),
        id: None,
        at: Timestamp(0),
    }]);
    let mut annotations = Labels::new();
    releases.put(&mut annotations);
    let stored = world.omni.modify_raw(namespace, kind, PROVIDER, |stored| {
        stored.annotations.extend(annotations)
    });
    stored.unwrap();
}

fn released(world: &World) -> Vec<Release<Zone>> {
    let registration = world
        .omni
        .get::<InfraProviderStatuses>(PROVIDER, PROVIDER)
        .unwrap();
    Releases::read(registration.metadata.annotations.get(ANNOTATION_RELEASED))
        .unwrap()
        .0
}

#[test]
fn only_what_carries_our_installation_and_nothing_answers_for_is_an_orphan() {
    let ours = Mark {
        provider: PROVIDER.to_owned(),
        request: "web".to_owned(),
        installation: "i".to_owned(),
    };
    let zone = Zone(ZONE.to_owned());
    let instance = |mark: Option<Mark>| Marked {
        name: "web".to_owned(),
        id: Some("1".to_owned()),
        mark,
    };
    let omni = |ids: &[&str]| Answerable {
        installation: "i".to_owned(),
        requests: ids.iter().map(ToString::to_string).collect(),
        names: ids.iter().map(ToString::to_string).collect(),
    };
    let released = |id: Option<&str>, name: &str| {
        Releases(vec![Release {
            scope: zone.clone(),
            name: name.to_owned(),
            request: "web".to_owned(),
            id: id.map(str::to_owned),
            at: Timestamp(0),
        }])
    };
    let none = Releases::default();
    let other = Mark {
        installation: "j".to_owned(),
        ..ours.clone()
    };
    for (mark, omni, released, expected) in [
        (Some(ours.clone()), omni(&["web"]), &none, Verdict::Wanted),
        (Some(ours.clone()), omni(&["other"]), &none, Verdict::Orphan),
        (
            Some(ours.clone()),
            omni(&[]),
            &released(Some("1"), "web"),
            Verdict::Released,
        ),
        (
            Some(ours.clone()),
            omni(&[]),
            &released(None, "web"),
            Verdict::Released,
        ),
        (
            Some(ours.clone()),
            omni(&[]),
            &released(Some("2"), "web"),
            Verdict::Orphan,
        ),
        (Some(ours), omni(&[]), &released(None, "db"), Verdict::Orphan),
        (Some(other), omni(&[]), &none, Verdict::OtherInstallation),
        (None, omni(&["web"]), &none, Verdict::Wanted),
        (None, omni(&[]), &none, Verdict::Bare),
    ] {
        let marked = instance(mark);
        assert_eq!(
            judge(&zone, &marked, &omni, released),
            expected,
            "{marked:?} {omni:?} {released:?}"
        );
    }
}

#[test]
fn an_orphan_is_ripe_after_two_looks_and_its_age_and_a_crowd_of_them_is_not_believed() {
    let orphan = |name: &str| Orphan {
        scope: Zone(ZONE.to_owned()),
        name: name.to_owned(),
        id: Some(name.to_owned()),
        mark: Mark {
            provider: PROVIDER.to_owned(),
            request: name.to_owned(),
            installation: "i".to_owned(),
        },
    };
    let begin = Timestamp(1_000_000);
    let mut sightings = Sightings::default();
    assert_eq!(
        sightings.look(vec![orphan("a")], 10, begin, Duration::ZERO).ripe,
        [],
        "one look is none"
    );
    let mut sightings = Sightings::default();
    let early = begin.after(AGE / 2);
    let late = begin.after(AGE);
    assert_eq!(sightings.look(vec![orphan("a")], 10, begin, AGE).ripe, []);
    assert_eq!(
        sightings
            .look(vec![orphan("a"), orphan("b")], 10, early, AGE)
            .ripe,
        []
    );
    let outlook = sightings.look(vec![orphan("a"), orphan("b")], 10, late, AGE);
    assert_eq!(outlook.ripe, [(orphan("a"), true)], "each has its own age");
    let outlook = sightings.look(vec![orphan("a")], 10, late, AGE);
    assert_eq!(outlook.ripe, [(orphan("a"), false)], "it is news once");
    // Not seen once, it begins anew.
    sightings.look(vec![], 10, late, AGE);
    assert_eq!(
        sightings.look(vec![orphan("a")], 10, late.after(AGE), AGE).ripe,
        []
    );

    let crowd: BTreeSet<&str> = ["a", "b", "c"].into();
    for (count, marked, too_many) in [
        (1, 1, false),
        (2, 8, false),
        (2, 7, true),
        (3, 12, false),
        (3, 11, true),
    ] {
        let orphans = crowd.iter().take(count).map(|name| orphan(name)).collect();
        let outlook = Sightings::default().look(orphans, marked, begin, AGE);
        assert_eq!(outlook.too_many, too_many, "{count} of {marked}");
    }
}

#[tokio::test(start_paused = true)]
async fn at_most_a_few_orphans_are_deleted_after_one_look() {
    let world = world(Policy::Delete).await;
    let many = MOST_AT_ONCE + 2;
    for index in 0..many * 3 {
        world.request(&format!("w{index}"));
    }
    world.settle().await;
    for index in 0..many {
        plant(&world, &format!("lost-{index}"));
    }
    let left = |world: &World| {
        world
            .instances()
            .iter()
            .filter(|name| name.starts_with("lost"))
            .count()
    };
    eventually(&world, "the first go", |world| left(world) < many).await;
    eventually(&world, "a look ends", |world| left(world) == many - MOST_AT_ONCE).await;
    // Until the next look.
    sleep(Duration::from_secs(300)).await;
    assert_eq!(left(&world), many - MOST_AT_ONCE, "{world}");
    eventually(&world, "all go", |world| left(world) == 0).await;
}
