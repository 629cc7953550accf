//! Lost machines, and their replacement where the class asks for one.

use std::time::Duration;

use expect_test::expect;
use omni_infra_provider::cloud::{ErrorKind, InstanceState};
use omni_infra_provider::machine::Pace;
use omni_infra_provider::machine::replace::ANNOTATION_REPLACEMENTS;
use omni_infra_provider::omni::kinds::{
    InfraProviderStatuses, MachineRequestSpec, MachineRequestStatuses, MachineRequests, Stage,
};
use tokio::time::sleep;

use crate::support::World;
use crate::support::tap::{Doom, Fate, without_times};
use crate::support::world::PROVIDER;

const VANISHED: &str = "replace: {vanished: true}";
const HOUR: Duration = Duration::from_secs(3600);

/// A world with a machine of this class that joined; and its UUID.
async fn with_machine(class: &str) -> (World, String) {
    with_machine_at(Pace::default(), class).await
}

async fn with_machine_at(pace: Pace, class: &str) -> (World, String) {
    let mut world = World::without_daemon().await;
    world.pace = Pace {
        heartbeat: Duration::from_secs(3600),
        ..pace
    };
    world.start_daemon().await;
    world.request_of("web", class);
    world.settle().await;
    let uuid = world.status("web").id;
    assert_eq!(world.status("web").stage, Stage::Provisioned);
    world.forget_trace();
    (world, uuid)
}

/// Somebody deletes the instance of a request; what does not run does not join again.
fn vanish(world: &World, request: &str) {
    world.cloud.vanish("a", request);
    world.omni.machine_gone(&world.status(request).id);
}

fn vanish_web(world: &World) {
    vanish(world, "web");
}

/// Somebody stops it.
fn stop(world: &World) {
    world.cloud.stop("a", "web");
    world.omni.machine_stopped(&world.status("web").id);
}

/// Waits for a condition. What takes a lost machine's time is looked at less often than [`World::until`] does.
async fn until(world: &World, what: &str, condition: impl Fn(&World) -> bool) {
    for _ in 0..6 * 3600 {
        if condition(world) {
            return;
        }
        sleep(Duration::from_secs(1)).await;
    }
    panic!("never came: {what}\n{world}");
}

fn is_replaced(world: &World, former: &str) -> bool {
    let status = world.status("web");
    status.stage == Stage::Provisioned && status.id != former && world.omni.is_joined(&status.id)
}

async fn until_replaced(world: &World, former: &str) -> String {
    until(world, "a replacement", |world| is_replaced(world, former)).await;
    world.status("web").id
}

async fn until_error(world: &World, request: &str, words: &str) {
    until(world, words, |world| world.status(request).error.contains(words)).await;
}

fn annotation(world: &World, request: &str, name: &str) -> Option<String> {
    let status = world.omni.get::<MachineRequestStatuses>(PROVIDER, request)?;
    let name = format!("omni-infra-provider/{name}");
    status.metadata.annotations.get(&name).cloned()
}

#[tokio::test(start_paused = true)]
async fn a_vanished_machine_is_replaced_once_and_the_second_within_the_hour_is_reported() {
    let (world, first) = with_machine(VANISHED).await;
    vanish(&world, "web");
    until_error(&world, "web", "it gets one if it stays so for 10 min").await;
    sleep(Duration::from_secs(9 * 60)).await;
    world.assert_count("", "spend a replacement", 0);
    let second = until_replaced(&world, &first).await;
    world.assert_count("", "spend a replacement", 1);
    world.assert_count("web", "create instance", 1);
    world.assert_before(("", "spend a replacement"), ("web", "teardown patch"));
    world.assert_before(("web", "teardown status"), ("web", "destroy status"));
    world.assert_before(("web", "destroy status"), ("web", "write claim"));
    world.assert_before(("web", "write claim"), ("web", "create instance"));
    assert!(
        world.omni.is_joined(&second) && !world.omni.is_joined(&first),
        "{world}"
    );
    assert_eq!(annotation(&world, "web", "replacing"), None);

    world.forget_trace();
    vanish(&world, "web");
    until_error(&world, "web", "as many within the last hour as it allows").await;
    expect!["the instance is gone · asked for by its name, the cloud has none; it was deleted outside of Omni: the cloud's audit log may say by whom, look for web (00000000-0000-4000-8000-000000000003) · replace this request · its machine class asks for a replacement, but there were as many within the last hour as it allows · next try within 60 min · last seen running at <time> UTC"].assert_eq(without_times(&world.status("web").error).as_str());
    sleep(HOUR / 3).await;
    world.assert_count("web", "create instance", 0);
    world.assert_count("", "spend a replacement", 0);
    // An hour later it is its turn.
    until_replaced(&world, &second).await;
    world.assert_count("", "spend a replacement", 1);
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn the_limit_holds_over_a_restart() {
    let (mut world, first) = with_machine(VANISHED).await;
    vanish(&world, "web");
    let second = until_replaced(&world, &first).await;
    world.stop_daemon().await;
    world.forget_trace();
    vanish(&world, "web");
    world.start_daemon().await;
    until_error(&world, "web", "as many within the last hour as it allows").await;
    world.assert_count("", "spend a replacement", 0);
    until_replaced(&world, &second).await;
}

#[tokio::test(start_paused = true)]
async fn a_class_that_asks_for_one_kind_of_replacement_gets_no_other() {
    for (class, lose) in [
        ("", "vanish"),
        ("replace: {stopped: true, never_joined: true}", "vanish"),
        ("replace: {}", "stop"),
        ("replace: {vanished: true, never_joined: true}", "stop"),
    ] {
        let (world, uuid) = with_machine(class).await;
        match lose {
            "vanish" => vanish(&world, "web"),
            _ => stop(&world),
        }
        until(&world, "FAILED", |world| {
            world.status("web").stage == Stage::Failed
        })
        .await;
        sleep(HOUR).await;
        let status = world.status("web");
        assert_eq!(
            (status.stage, status.id),
            (Stage::Failed, uuid),
            "{class}\n{world}"
        );
        assert!(!status.error.contains("asks for"), "{class}: {}", status.error);
        world.assert_count("", "spend a replacement", 0);
        world.assert_count("web", "delete instance", 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stopped_machine_is_deleted_and_replaced_where_the_class_says_so() {
    let (world, first) = with_machine("replace: {stopped: true}").await;
    stop(&world);
    until_replaced(&world, &first).await;
    world.assert_before(("", "spend a replacement"), ("web", "delete instance"));
    world.assert_before(("web", "delete instance"), ("web", "teardown status"));
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_stopped_machine_that_is_started_in_time_is_taken_back() {
    let (world, uuid) = with_machine("replace: {stopped: true}").await;
    stop(&world);
    until_error(&world, "web", "it gets one if it stays so for 10 min").await;
    sleep(Duration::from_secs(5 * 60)).await;
    world.cloud.start("a", "web");
    until(&world, "PROVISIONED", |world| {
        world.status("web").stage == Stage::Provisioned
    })
    .await;
    sleep(HOUR).await;
    assert_eq!(world.status("web").id, uuid);
    world.assert_count("", "spend a replacement", 0);
    world.assert_count("web", "delete instance", 0);
    // Lost again, it has its time again.
    stop(&world);
    until_error(&world, "web", "it gets one if it stays so for 10 min").await;
    sleep(Duration::from_secs(9 * 60)).await;
    world.assert_count("", "spend a replacement", 0);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_comes_back_after_the_note_keeps_its_instance() {
    let (world, uuid) = with_machine("replace: {stopped: true}").await;
    stop(&world);
    // As long as the deletion fails, everything is still there.
    world.fail("delete instance", 1000, ErrorKind::Unavailable);
    until(&world, "the note", |world| {
        annotation(world, "web", "replacing").as_deref() == Some("stopped")
    })
    .await;
    world.cloud.start("a", "web");
    until(&world, "PROVISIONED", |world| {
        world.status("web").stage == Stage::Provisioned
    })
    .await;
    assert_eq!(annotation(&world, "web", "replacing"), None);
    assert_eq!(world.status("web").id, uuid);
    assert_eq!(
        world.cloud.instances(),
        [("a".to_owned(), "web".to_owned(), InstanceState::Running)]
    );
    world.assert_count("web", "teardown status", 0);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_never_joined_is_deleted_and_replaced_where_the_class_says_so() {
    let world = World::start().await;
    world
        .omni
        .configure(|options| options.delays.join = Duration::from_secs(60));
    world.request_of("web", "replace: {never_joined: true}");
    until(&world, "PROVISIONED", |world| {
        world.status("web").stage == Stage::Provisioned
    })
    .await;
    // What it has in its user data is not taken any more.
    world.omni.rotate_join_token(PROVIDER);
    until_error(&world, "web", "it gets one if it stays so for 10 min").await;
    assert_eq!(world.omni.refused_joins().len(), 1);
    let first = world.status("web").id;
    until_replaced(&world, &first).await;
    world.settle().await;
    world.assert_before(("web", "delete instance"), ("web", "teardown status"));
    assert_eq!(world.omni.violations(), Vec::<String>::new());
    world.assert_count("web", "create instance", 2);
}

#[tokio::test(start_paused = true)]
async fn a_strangers_instance_is_never_replaced() {
    let (world, _) = with_machine("replace: {vanished: true, stopped: true, never_joined: true}").await;
    vanish(&world, "web");
    world.cloud.plant_foreign("a", "web");
    until(&world, "FAILED", |world| {
        world.status("web").stage == Stage::Failed
    })
    .await;
    stop(&world);
    sleep(HOUR).await;
    assert!(
        world
            .status("web")
            .error
            .starts_with("creating the instance · its name is taken")
    );
    world.assert_count("", "spend a replacement", 0);
    world.assert_count("web", "delete instance", 0);
    assert_eq!(world.instances(), ["web"]);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_that_took_the_name_stops_a_replacement_before_its_creation() {
    let (world, _) = with_machine(VANISHED).await;
    vanish(&world, "web");
    until(&world, "a teardown", |world| {
        world.trace("web").contains("teardown status")
    })
    .await;
    world.cloud.plant_foreign("a", "web");
    until_error(&world, "web", "its name is taken").await;
    world.assert_count("web", "create instance", 0);
    world.assert_count("web", "delete instance", 0);
    assert_eq!(world.instances(), ["web"]);
}

#[tokio::test(start_paused = true)]
async fn when_many_vanish_at_once_none_is_replaced() {
    let world = World::start().await;
    let names: Vec<String> = (1..=9).map(|n| format!("web-{n}")).collect();
    for name in &names {
        world.request_of(name, "replace: {vanished: true, per_hour: 10}");
    }
    world.settle().await;
    world.forget_trace();
    for name in &names[..4] {
        vanish(&world, name);
    }
    for name in &names[..4] {
        until_error(&world, name, "4 of 9 machines are lost").await;
    }
    expect!["the instance is gone · asked for by its name, the cloud has none; it was deleted outside of Omni: the cloud's audit log may say by whom, look for web-1 (00000000-0000-4000-8000-000000000002) · replace this request · its machine class asks for a replacement, but 4 of 9 machines are lost: that looks like another fault than theirs, and none is replaced while it lasts · last seen running at <time> UTC"].assert_eq(without_times(&world.status("web-1").error).as_str());
    sleep(HOUR).await;
    world.assert_count("", "spend a replacement", 0);
    assert_eq!(world.instances(), names[4..]);
    // Once a person has dealt with three of them, the fourth is believed.
    for name in &names[..3] {
        world.tear_down(name);
    }
    until(&world, "a replacement", |world| {
        world.status("web-4").stage == Stage::Provisioned
    })
    .await;
    world.assert_count("", "spend a replacement", 1);
}

#[tokio::test(start_paused = true)]
async fn a_cloud_that_lies_for_a_while_costs_no_machine() {
    let (world, uuid) = with_machine(VANISHED).await;
    world.fail("find instance", 10_000, ErrorKind::Unavailable);
    world.cloud.set_blind(true);
    sleep(HOUR).await;
    world.assert_count("", "spend a replacement", 0);
    assert_eq!(world.status("web").id, uuid);
    assert_eq!(world.instances(), ["web"]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_of_a_request_set_is_replaced_by_omni_under_a_new_request() {
    let world = World::start().await;
    let template = MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        provider_data: VANISHED.to_owned(),
        ..MachineRequestSpec::default()
    };
    world.omni.create_request_set("workers", PROVIDER, 2, &template);
    world.settle().await;
    let before = world.instances();
    let lost = before[0].clone();
    vanish(&world, &lost);
    until(&world, "a new request", |world| {
        world.instances().len() == 2 && !world.instances().contains(&lost)
    })
    .await;
    world.settle().await;
    world.assert_count("", "spend a replacement", 1);
    world.assert_count(&lost, "create instance", 1);
    world.assert_count(&lost, "remove finalizer", 1);
    let requests: Vec<String> = world
        .omni
        .list::<MachineRequests>(PROVIDER)
        .iter()
        .map(|request| request.id().to_owned())
        .collect();
    assert_eq!(requests.len(), 2);
    assert!(requests.contains(&before[1]) && !requests.contains(&lost));
    let registration = world
        .omni
        .get::<InfraProviderStatuses>(PROVIDER, PROVIDER)
        .unwrap();
    let ledger = &registration.metadata.annotations[&ANNOTATION_REPLACEMENTS.to_owned()];
    assert!(ledger.contains("\"set\":\"workers\""), "{ledger}");
    world.omni.scale("workers", 0).unwrap();
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn while_omni_drains_nothing_is_made_and_an_operator_can_end_it() {
    let (world, uuid) = with_machine(VANISHED).await;
    world.omni.configure(|options| options.hold_drains = true);
    vanish(&world, "web");
    until(&world, "a teardown", |world| {
        world.trace("web").contains("teardown status")
    })
    .await;
    sleep(HOUR).await;
    world.assert_count("web", "create instance", 0);
    let status = world.status("web");
    assert_eq!((status.stage, status.id), (Stage::Failed, uuid));
    expect!["the instance is gone · it is being replaced, as its machine class asks for: Omni lets go of the former machine first, which may take some minutes"].assert_eq(&status.error);
    world.tear_down("web");
    world.omni.configure(|options| options.hold_drains = false);
    world.settle().await;
    world.assert_nothing_left();
}

/// Lives through a loss; whether the doomed call was ever made.
async fn survive(class: &str, lose: fn(&World), doom: Doom) -> bool {
    let pace = Pace {
        replace: Duration::from_secs(30),
        ..Pace::default()
    };
    let (mut world, former) = with_machine_at(pace, class).await;
    world.doom(Some(doom));
    lose(&world);
    until(&world, "a replacement, or death", |world| {
        world.daemon_is_dead() || is_replaced(world, &former)
    })
    .await;
    let (_, struck) = world.counted();
    world.doom(None);
    if world.daemon_is_dead() {
        world.start_daemon().await;
    }
    let context = format!("{class}: call {doom}\n{world}");
    until_replaced(&world, &former).await;
    world.settle().await;
    assert_eq!(world.instances(), ["web"], "{context}");
    assert_eq!(world.status("web").stage, Stage::Provisioned, "{context}");
    assert_eq!(world.ledger(), 1, "{context}");
    assert_eq!(world.omni.violations(), Vec::<String>::new(), "{context}");
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
    struck
}

#[test]
fn killed_at_any_call_of_a_replacement_there_is_one_new_machine() {
    for (class, lose) in [
        (VANISHED, vanish_web as fn(&World)),
        ("replace: {stopped: true}", stop),
    ] {
        let mut points = 0;
        for fate in Fate::ALL {
            for call in 1.. {
                // Each life in a runtime that ends with it: a daemon that goes on takes time from the next.
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .start_paused(true)
                    .build()
                    .unwrap();
                if !runtime.block_on(survive(class, lose, Doom { call, fate })) {
                    break;
                }
                points += 1;
            }
        }
        println!("replacement, {class}: {points} points");
        assert!(
            points > 45,
            "the story is shorter than it should be: {points} points"
        );
    }
}

impl World {
    /// Entries of the ledger.
    fn ledger(&self) -> usize {
        let registration = self
            .omni
            .get::<InfraProviderStatuses>(PROVIDER, PROVIDER)
            .unwrap();
        let text = &registration.metadata.annotations[&ANNOTATION_REPLACEMENTS.to_owned()];
        serde_json::from_str::<Vec<serde_json::Value>>(text)
            .unwrap()
            .len()
    }
}
