//! Fifty machines at once, beside fifty of Ganeti's own command line: a measurement, not an assertion of speed.

use std::fs;
use std::time::Instant;

use super::cluster::Cluster;
use super::stories::{CLASS, fresh};
use super::world::World;
use crate::support::peer::say;

const MACHINES: usize = 50;

/// Seconds of processor time, and the most memory in MiB, of this process.
fn cost() -> (f64, u64) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // utime and stime, behind the name in parentheses, in hundredths of a second.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: f64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<f64>().unwrap())
        .sum();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.split_whitespace().next().unwrap().parse().unwrap();
    (ticks / 100.0, peak / 1024)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: takes minutes, and has the cluster for itself"]
async fn fifty_machines_beside_fifty_of_the_command_line() {
    let Some(cluster) = Cluster::find() else { return };
    let theirs: Vec<String> = (0..MACHINES).map(|_| fresh("theirs")).collect();
    let ours: Vec<String> = (0..MACHINES).map(|_| fresh("ours")).collect();

    let begun = Instant::now();
    let mut adding = tokio::task::JoinSet::new();
    for name in theirs.clone() {
        let cluster = cluster.clone();
        adding.spawn(async move {
            cluster.add(&name, &["--net", "0:network=net1,ip=pool"]).await;
            // The fake hypervisor reads its own files while it writes them, and then fails a start.
            let start = ["gnt-instance", "startup", &name];
            let mut tries = 1;
            while let Err(error) = cluster.try_gnt(&start).await {
                assert!(tries < 10, "{error}");
                tries += 1;
            }
        });
    }
    adding.join_all().await;
    let by_hand = begun.elapsed();
    say(&format!(
        "command line: {MACHINES} up in {:.1} s",
        by_hand.as_secs_f64()
    ));

    let mut world = World::start(cluster.clone()).await;
    let (begun, before) = (Instant::now(), cost());
    // On the same node by name, as theirs: an allocator holds all locks while it thinks.
    let class = CLASS.replace("iallocator: hail", "primary_node: n1.gt");
    for name in &ours {
        world.request(name, &class);
    }
    for name in &ours {
        world.until_joined(name).await;
    }
    let (up, after, calls) = (begun.elapsed(), cost(), world.rapi_calls());
    say(&format!(
        "daemon: {MACHINES} up and joined in {:.1} s, {calls} RAPI calls, {:.1} s of processor (with Omni and the machines in \
         the same process), {} MiB at most",
        up.as_secs_f64(),
        after.0 - before.0,
        after.1
    ));
    let begun = Instant::now();
    for name in &ours {
        world.omni.teardown_request(name).unwrap();
    }
    for name in &ours {
        world.until_gone(name).await;
    }
    say(&format!(
        "daemon: {MACHINES} gone in {:.1} s, {} RAPI calls",
        begun.elapsed().as_secs_f64(),
        world.rapi_calls() - calls
    ));
    let mut removing = tokio::task::JoinSet::new();
    for name in theirs {
        let cluster = cluster.clone();
        removing.spawn(async move { cluster.remove(&name).await });
    }
    removing.join_all().await;
    for name in &ours {
        world.assert_nothing_left(name).await;
    }
}
