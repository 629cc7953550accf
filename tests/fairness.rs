//! A thousand requests at once, some of them in trouble: who is held up, and who goes first.

use std::sync::Arc;
use std::time::Duration;

use omni_infra_provider::backends::sim;
use omni_infra_provider::cloud::{CloudError, ErrorKind};
use omni_infra_provider::omni::kinds::{MachineRequestStatuses, Stage};
use tokio::time::{Instant, sleep};

use crate::support::World;
use crate::support::world::PROVIDER;

/// Healthy requests.
const HEALTHY: usize = 1000;
/// Requests in each kind of trouble.
const TROUBLED: usize = 10;
/// A version whose image cannot be had.
const NO_IMAGE: &str = "9.9.9";

/// What the cloud answers to a call.
fn answer(call: &sim::Call) -> Option<CloudError> {
    let (kind, words) = match call.on.as_str() {
        name if name.starts_with("throttled-") => (ErrorKind::Throttled { after: None }, "too many requests"),
        name if name.starts_with("denied-") => (ErrorKind::Denied, "no such project"),
        NO_IMAGE if call.verb == "import image" => (ErrorKind::Unavailable, "the stream broke off"),
        _ => return None,
    };
    Some(CloudError::new(
        "sim",
        call.verb,
        kind,
        format!("{}: {words}", call.on),
    ))
}

/// A world in which `troubled` of each kind are queued before the healthy ones.
async fn crowded(troubled: usize) -> World {
    let mut world = World::without_daemon().await;
    world.cloud.set_hook(Some(Arc::new(|call: sim::Call, moment| {
        let refused = (moment == sim::Moment::Before).then(|| answer(&call)).flatten();
        Box::pin(async move { refused })
    })));
    for n in 0..troubled {
        world.request_of(&format!("throttled-{n}"), "zones: [throttled]");
        world.request_of(&format!("denied-{n}"), "zones: [denied]");
        let mut spec = World::<sim::Sim>::template("");
        spec.talos_version = NO_IMAGE.to_owned();
        let id = format!("no-image-{n}");
        world.omni.create_request(&id, PROVIDER, &spec).unwrap();
    }
    for n in 0..HEALTHY {
        world.request(&format!("healthy-{n}"));
    }
    world.start_daemon().await;
    world
}

fn provisioned(world: &World) -> usize {
    let statuses = world.omni.list::<MachineRequestStatuses>(PROVIDER);
    let healthy = statuses
        .iter()
        .filter(|status| status.id().starts_with("healthy-") && status.spec.stage == Stage::Provisioned);
    healthy.count()
}

/// Waits; looks seldom, since a look at a thousand costs.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        sleep(Duration::from_millis(250)).await;
    }
    panic!("never came: {what}");
}

async fn time_of_all(troubled: usize) -> (World, Duration) {
    let world = crowded(troubled).await;
    let begun = Instant::now();
    until("all healthy machines", || provisioned(&world) == HEALTHY).await;
    (world, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn requests_in_trouble_hold_no_healthy_one_up() {
    let (_, alone) = time_of_all(0).await;
    let (world, beside) = time_of_all(TROUBLED).await;
    // By the clock of the simulation, on which only the calls take time.
    assert!(
        beside <= alone * 3 / 2,
        "{alone:?} alone, {beside:?} beside troubled ones"
    );
    for (id, words) in [
        ("throttled-0", "too many requests"),
        ("denied-0", "no such project"),
        ("no-image-0", "the stream broke off"),
    ] {
        until(id, || {
            let told = world.status(id);
            format!("{} {}", told.status, told.error).contains(words)
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_ends_goes_before_what_begins() {
    let world = World::start().await;
    world.request("old");
    world.settle().await;
    for n in 0..HEALTHY {
        world.request(&format!("healthy-{n}"));
    }
    world
        .until("the crowd is at work", |world| world.instances().len() > 10)
        .await;
    let before = world.instances().len();
    world.tear_down("old");
    world.until_traced("old", "teardown patch").await;
    let made = world.instances().len() - before;
    assert!(before < HEALTHY / 2 && made < 40, "{before} and {made} more");
}
