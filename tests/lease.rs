//! Several daemons of one provider: taking turns, or each believing itself alone.

mod world;

use std::time::Duration;

use omni_infra_provider::omni::Kind;
use omni_infra_provider::omni::kinds::{LeaseSpec, Leases, Stage};
use omni_infra_provider::sandbox::omni::{Rpc, Stored};
use tokio::time::{advance, sleep};

use world::{Line, PROVIDER, World};

/// Two zones, in the order to try.
const TWO_ZONES: &str = "zones: [x, y]";

/// An active daemon `a` and a standby `b`, both ready; who holds the lease.
async fn active_and_standby() -> (World, String) {
    let mut world = World::start();
    world.start_in_turns("a");
    world.until("a holder", |world| !world.holder().is_empty()).await;
    let first = world.holder();
    world.start_in_turns("b");
    let watches = |world: &World| world.calls("Lease.", |rpc| rpc == Rpc::Watch);
    world.until("two watches", |world| watches(world) == 2).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(world.holder(), first);
    (world, first)
}

async fn until_provisioned(world: &World, id: &str) {
    world
        .until("PROVISIONED", |world| {
            world.status(id).stage == Stage::Provisioned
        })
        .await;
}

fn all_by(lines: &[Line], who: &str) -> bool {
    lines.iter().all(|line| line.who.is_empty() || line.who == who)
}

fn registrations(world: &World) -> u64 {
    world.calls("InfraProviderStatuses", |rpc| rpc != Rpc::Watch)
}

fn one(zone: &str, name: &str) -> [(String, String); 1] {
    [(zone.to_owned(), name.to_owned())]
}

#[tokio::test(start_paused = true)]
async fn a_standby_does_nothing_until_the_active_dies_and_takes_over_then() {
    let (mut world, first) = active_and_standby().await;
    let (registered, beats) = (
        registrations(&world),
        world.calls("InfraProviderHealth", |_| true),
    );
    assert_eq!(registered, 2, "a Get and a Create, of the active alone");
    assert!(beats > 0);
    world.request("one", "");
    until_provisioned(&world, "one").await;
    assert!(all_by(&world.log(0), "a"), "{world}");

    world.kill("a").await;
    let from = world.log_length();
    world.request("two", "");
    let took = world.until("b", |world| world.holder() != first).await;
    assert!(took <= world.pace.lease, "{took:?}");
    until_provisioned(&world, "two").await;
    assert!(all_by(&world.log(from), "b"), "{world}");
    assert_eq!(registrations(&world), registered + 1, "a Get of the new active");
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_at_once_when_the_active_is_told_to_stop() {
    let (mut world, first) = active_and_standby().await;
    world.request("one", "");
    world.until_logged("a", "create one").await;
    world.stop("a").await;
    let took = world
        .until("b", |world| !["", &first].contains(&world.holder().as_str()))
        .await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    until_provisioned(&world, "one").await;
    assert_eq!(world.instances(), one("a", "one"));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_was_paused_and_woken_makes_not_one_call_more() {
    let (world, first) = active_and_standby().await;
    let (a, b) = (world.daemon("a"), world.daemon("b"));
    // What b does does not blur what a does.
    b.calls.close();
    world.request("web", "");
    world.until_logged("a", "create web").await;
    a.answers.close();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.instances(), one("a", "web"));

    // All sleep for a minute; the first to be woken is a's worker, by the answer. Its timers come later.
    let from = world.log_length();
    a.wire.close();
    a.answers.open();
    advance(Duration::from_secs(60)).await;
    world.until("b", |world| world.holder() != first).await;
    a.wire.open();
    // Not so long that the calls that b is held in fail.
    sleep(Duration::from_secs(30)).await;
    let lines = world.log(from);
    assert!(all_by(&lines, "b"), "{world}");
    assert!(
        lines.iter().all(|line| !line.who.is_empty()),
        "a write to Omni: {lines:?}"
    );

    b.calls.open();
    until_provisioned(&world, "web").await;
    assert_eq!(world.instances(), one("a", "web"));
    assert!(all_by(&world.log(from), "b"), "{world}");
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_cut_off_from_omni_ends_before_another_begins() {
    let (world, first) = active_and_standby().await;
    let from = world.log_length();
    let names = ["one", "two", "three", "four", "five"];
    for name in names {
        world.request(name, "");
    }
    world.until_logged("a", "import image").await;
    world.daemon("a").wire.close();
    let took = world.until("b", |world| world.holder() != first).await;
    assert!(took <= world.pace.lease, "{took:?}");
    for name in names {
        until_provisioned(&world, name).await;
    }
    let lines = world.log(from);
    let begun = lines.iter().position(|line| line.who == "b").unwrap();
    assert!(all_by(&lines[begun..], "b"), "{world}");
    // Healed, it stands by.
    world.daemon("a").wire.open();
    let from = world.log_length();
    world.request("six", "");
    until_provisioned(&world, "six").await;
    assert!(all_by(&world.log(from), "b"), "{world}");
}

#[tokio::test(start_paused = true)]
async fn while_omni_is_away_for_long_nobody_acts_and_then_one_does() {
    let (mut world, _) = active_and_standby().await;
    world.request("web", "");
    world.until_logged("a", "import image").await;
    world.kill_omni().await;
    sleep(world.pace.lease).await;
    let from = world.log_length();
    sleep(Duration::from_secs(300)).await;
    assert_eq!(world.log(from), []);
    world.start_omni();
    until_provisioned(&world, "web").await;
    assert_eq!(world.instances(), one("a", "web"));
    let lines = world.log(from);
    let active = lines.iter().find(|line| !line.who.is_empty()).unwrap().who;
    assert!(all_by(&lines, active), "{world}");
}

#[tokio::test(start_paused = true)]
async fn a_lone_daemon_pays_nothing_for_a_lease_that_it_does_not_need() {
    let mut world = World::start();
    world.start_alone("a");
    world.request("web", TWO_ZONES);
    until_provisioned(&world, "web").await;
    world.omni.teardown_request("web").unwrap();
    world.until("the end", |world| world.instances().is_empty()).await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.calls("Lease.", |_| true), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lone_daemon_takes_the_lease_to_go_to_the_next_zone() {
    let mut world = World::start();
    world.start_alone("a");
    world.fill("a", "x");
    world.request("web", TWO_ZONES);
    until_provisioned(&world, "web").await;
    assert_eq!(world.instances(), one("y", "web"));
    assert_eq!(world.calls("Lease.", |_| true), 2, "a Get and a Create\n{world}");
}

#[tokio::test(start_paused = true)]
async fn every_zone_is_tried_once_the_one_before_it_is_full() {
    let mut world = World::start();
    world.start_alone("a");
    world.fill("a", "x");
    world.fill("a", "y");
    world.request("web", "zones: [x, y, z]");
    until_provisioned(&world, "web").await;
    assert_eq!(world.instances(), one("z", "web"));
    let created = world
        .log(0)
        .into_iter()
        .filter(|line| line.what.starts_with("create web"));
    let created: Vec<String> = created.map(|line| line.what).collect();
    assert_eq!(created, ["create web in x", "create web in y", "create web in z"]);
}

#[tokio::test(start_paused = true)]
async fn of_two_daemons_that_find_a_zone_full_one_claims_the_next_and_there_is_one_machine() {
    let mut world = World::start();
    for name in ["a", "b"] {
        world.start_alone(name);
        world.fill(name, "x");
    }
    let names = ["one", "two", "three"];
    for name in names {
        world.request(name, "zones: [x, y, z]");
    }
    for name in names {
        until_provisioned(&world, name).await;
    }
    let expected = ["one", "three", "two"].map(|name| ("y".to_owned(), name.to_owned()));
    assert_eq!(world.instances(), expected, "{world}");
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_lands_late_in_a_zone_that_another_daemon_left_stays_the_only_one() {
    let mut world = World::start();
    world.start_alone("a");
    world.request("web", TWO_ZONES);
    world.until_logged("a", "create web in x").await;
    world.daemon("a").calls.close();
    world.start_alone("b");
    world.fill("b", "x");
    world
        .until_logged("", "~annotation omni-infra-provider/placement")
        .await;
    // As late as the cloud's guard lets a creation be.
    sleep(Duration::from_secs(30)).await;
    world.daemon("a").calls.open();
    until_provisioned(&world, "web").await;
    sleep(Duration::from_secs(600)).await;
    assert_eq!(world.instances(), one("x", "web"), "{world}");
    assert!(!world.did("", "the instance is gone"), "{world}");
}

#[tokio::test(start_paused = true)]
async fn two_daemons_that_say_different_things_do_not_answer_each_other_at_once() {
    let mut world = World::start();
    for name in ["a", "b"] {
        world.start_alone(name);
        world.fill(name, "x");
    }
    world.request("web", "zones: [x]");
    world.until_shown("web", "no room for a").await;
    world.until_shown("web", "no room for b").await;
    let from = world.log_length();
    sleep(Duration::from_secs(600)).await;
    let lines = world.log(from);
    let written = lines.iter().filter(|line| line.who.is_empty()).count();
    assert!(written <= 2 * 600 / 15 + 2, "{written} writes\n{world}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_needs_the_lease_of_another_daemon_says_so_and_waits() {
    let mut world = World::start();
    let mut lease = Stored::new(
        &Leases::namespace(PROVIDER),
        &Leases::type_name(PROVIDER),
        "active",
    );
    let spec = LeaseSpec {
        holder: "another".to_owned(),
        duration_ms: 12_000,
        ..LeaseSpec::default()
    };
    lease.spec = Leases::encode(&spec, &[]).into();
    world.omni.put_raw(lease);
    world.start_alone("a");
    world.fill("a", "x");
    world.request("web", TWO_ZONES);
    world
        .until_shown(
            "web",
            "trying the next place · another daemon of this provider holds the lease",
        )
        .await;
    assert_eq!(world.status("web").stage, Stage::Provisioning);
    // The other one gives no sign of life.
    until_provisioned(&world, "web").await;
    assert_eq!(world.instances(), one("y", "web"));
}
