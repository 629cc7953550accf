//! A thousand requests at once, some of them in trouble: who is held up, and who goes first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
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

/// A cloud that takes so many calls in each second, and refuses the others.
const TAKES: u32 = 10;
/// Requests to such a cloud.
const SLOW: usize = 150;

#[tokio::test(start_paused = true)]
async fn a_cloud_that_takes_ten_calls_a_second_is_given_about_ten() {
    let mut world = World::without_daemon().await;
    // Calls taken and refused, by the second.
    let seconds = Arc::new(Mutex::new(BTreeMap::<u64, (u32, u32)>::new()));
    let (begun, counted) = (Instant::now(), seconds.clone());
    world
        .cloud
        .set_hook(Some(Arc::new(move |call: sim::Call, moment| {
            let mut refused = None;
            if moment == sim::Moment::Before {
                let mut seconds = counted.lock().unwrap();
                let second = seconds.entry(begun.elapsed().as_secs()).or_default();
                if second.0 < TAKES {
                    second.0 += 1;
                } else {
                    second.1 += 1;
                    let kind = ErrorKind::Throttled { after: None };
                    refused = Some(CloudError::new("sim", call.verb, kind, "too many requests"));
                }
            }
            Box::pin(async move { refused })
        })));
    for n in 0..SLOW {
        world.request(&format!("healthy-{n}"));
    }
    world.start_daemon().await;
    until("all machines", || provisioned(&world) == SLOW).await;
    let seconds = seconds.lock().unwrap();
    // The first seconds find the rate out, the last have little left to do.
    let crowd: Vec<(u32, u32)> = seconds.values().copied().collect();
    let middle = crowd.get(5..crowd.len().saturating_sub(5)).unwrap_or_default();
    let (taken, refused) = middle
        .iter()
        .fold((0, 0), |sum, second| (sum.0 + second.0, sum.1 + second.1));
    let length = u32::try_from(middle.len()).unwrap();
    assert!(length >= 20, "{crowd:?}");
    assert!(
        taken >= length * TAKES * 7 / 10,
        "{taken} in {length} s: {crowd:?}"
    );
    assert!(refused <= taken / 5, "{refused} of {taken} refused: {crowd:?}");
}
