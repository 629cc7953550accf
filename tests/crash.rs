//! The daemon dies at every call of a story, before it took effect and after; or the call takes effect and only its answer is
//! lost. Then it is started again: one instance while it is wanted, nothing but images afterwards.

use omni_infra_provider::omni::kinds::Stage;

use crate::support::World;

/// How a call ends the daemon, or only its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    DiesBefore,
    DiesAfter,
    AnswerLost,
}

const FATES: [Fate; 3] = [Fate::DiesBefore, Fate::DiesAfter, Fate::AnswerLost];

fn arm(world: &World, k: usize, fate: Fate) {
    match fate {
        Fate::DiesBefore => world.die_at(k, false),
        Fate::DiesAfter => world.die_at(k, true),
        Fate::AnswerLost => world.lose_answer(k),
    }
}

/// Starts the daemon again if it died; true if it got to the fatal call at all.
async fn revive(world: &mut World, k: usize, fate: Fate) -> bool {
    if fate != Fate::AnswerLost {
        if !world.daemon_is_dead() {
            world.live_for_ever();
            return false;
        }
        world.live_for_ever();
        world.start_daemon().await;
        world.settle().await;
        return true;
    }
    let reached = world.calls() >= k;
    world.live_for_ever();
    reached
}

#[track_caller]
fn assert_one(world: &World, context: &str) {
    assert_eq!(world.instances(), ["web"], "{context}\n{world}");
    assert_eq!(
        world.status("web").stage,
        Stage::Provisioned,
        "{context}\n{world}"
    );
    assert_eq!(
        world.omni.violations(),
        Vec::<String>::new(),
        "{context}\n{world}"
    );
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_call_of_a_creation_there_is_one_instance_and_none_afterwards() {
    let mut points = 0;
    for fate in FATES {
        for k in 1.. {
            let mut world = World::start().await;
            arm(&world, k, fate);
            world.request("web");
            world.settle().await;
            let context = format!("call {k}, {fate:?}");
            let reached = revive(&mut world, k, fate).await;
            assert_one(&world, &context);
            world.tear_down("web");
            world.settle().await;
            world.assert_nothing_left();
            if !reached {
                break;
            }
            points += 1;
        }
    }
    println!("creation: {points} points");
    assert!(
        points > 30,
        "the story is shorter than it should be: {points} points"
    );
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_call_of_a_teardown_nothing_is_left() {
    let mut points = 0;
    for fate in FATES {
        for k in 1.. {
            let mut world = World::start().await;
            world.request("web");
            world.settle().await;
            assert_one(&world, "before the teardown");
            arm(&world, k, fate);
            world.tear_down("web");
            world.settle().await;
            let reached = revive(&mut world, k, fate).await;
            world.assert_nothing_left();
            if !reached {
                break;
            }
            points += 1;
        }
    }
    println!("teardown: {points} points");
    assert!(
        points > 20,
        "the story is shorter than it should be: {points} points"
    );
}
