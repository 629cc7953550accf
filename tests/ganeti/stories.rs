//! Whole machines on the real cluster: up, down, and through every death of the daemon.

use std::sync::Arc;

use omni_infra_provider::omni::kinds::Stage;
use omni_infra_provider::secret::Secret;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::cluster::Cluster;
use super::world::{Fate, Point, World};
use crate::support::peer::say;

/// Provider data of a machine that fits anywhere.
pub(crate) const CLASS: &str = "\
disk_template: file
disk_size: 16
memory: 64
hypervisor: fake
iallocator: hail
nics:
  - {network: net1, ip: pool}
";

/// Worlds that live beside each other on the cluster, which runs twenty jobs at once.
const WORLDS: usize = 6;

/// A name that no earlier run used.
pub(crate) fn fresh(name: &str) -> String {
    format!("{name}-{:06x}", rand::random::<u32>() & 0xff_ffff)
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_come_join_and_go_and_nothing_is_left() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::start(cluster).await;
    let names: Vec<String> = (0..3).map(|_| fresh("story")).collect();
    for name in &names {
        world.request(name, CLASS);
    }
    for name in &names {
        world.until_joined(name).await;
        let uuid = world.cluster.uuid(name).await.unwrap();
        assert_eq!(world.status(name).id, uuid, "{world}");
        assert_eq!(world.status(name).stage, Stage::Provisioned);
        let patch = world.patch(&format!("provider-id-{name}"));
        assert!(patch.contains(&format!("providerID: ganeti://{uuid}")), "{patch}");
    }
    for name in &names[1..] {
        world.end(name).await;
    }
    assert!(world.cluster.is_there(&names[0]).await);
    world.end(&names[0]).await;
    for name in &names {
        world.assert_nothing_left(name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nameservers_are_in_the_image_and_in_a_patch() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::without_daemon(cluster).await;
    world.nameservers = vec!["10.0.0.1".parse().unwrap()];
    world.start_daemon();
    let name = fresh("names");
    world.request(&name, CLASS);
    world.until_joined(&name).await;
    let args = super::world::kernel_args(&world.omni).unwrap();
    let inline = args
        .split(' ')
        .find_map(|arg| arg.strip_prefix("talos.config.inline="))
        .unwrap();
    use base64::Engine as _;
    let frame = base64::engine::general_purpose::STANDARD.decode(inline).unwrap();
    let text = String::from_utf8_lossy(&frame);
    assert!(
        text.contains("kind: ResolverConfig") && text.contains("10.0.0.1"),
        "{text}"
    );
    assert!(!args.contains(&name), "an image serves all machines: {args}");
    assert!(world.patch(&format!("nameservers-{name}")).contains("10.0.0.1"));
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}

/// A whole life in which a call meets its fate, if one does; the calls that changed something.
async fn live(cluster: Cluster, name: &str, doom: Option<(Point, Fate)>) -> Vec<String> {
    let mut world = World::without_daemon(cluster).await;
    if let Some((point, fate)) = doom.clone() {
        world.doom(point, fate);
    }
    world.start_daemon();
    world.request(name, CLASS);
    world.until_joined(name).await;
    let uuid = world.cluster.uuid(name).await;
    assert_eq!(uuid.as_deref(), Some(world.status(name).id.as_str()), "{world}");
    world.end(name).await;
    world.assert_nothing_left(name).await;
    // How often a status is written depends on how long things take: the last calls of one life may not come in another.
    let has_to_come = matches!(doom, Some((Point::Call(_), _)));
    assert!(!has_to_come || world.struck().is_some(), "{doom:?}\n{world}");
    world.calls()
}

/// The calls of Omni are lost one way or another on a simulated cloud; here the daemon dies after each, and the cluster's jobs go on.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_call_is_the_daemons_last_there_is_one_machine_and_nothing_afterwards() {
    let Some(cluster) = Cluster::find() else { return };
    let undisturbed = live(cluster.clone(), &fresh("crash"), None).await;
    let mut lives: Vec<(String, Point, Fate)> = Vec::new();
    for (index, call) in undisturbed.iter().enumerate() {
        if !call.contains("/2/") {
            lives.push((fresh("crash"), Point::Nth(index + 1), Fate::DiesAfter));
        }
    }
    for call in [
        "POST /2/instances",
        "PUT /2/instances/NAME/startup",
        "DELETE /2/instances/NAME",
    ] {
        for fate in [Fate::DiesBefore, Fate::DiesAfter, Fate::AnswerLost] {
            let name = fresh("crash");
            let point = Point::Call(call.replace("NAME", &name));
            lives.push((name, point, fate));
        }
    }
    let points = lives.len();
    let permits = Arc::new(Semaphore::new(WORLDS));
    let mut living = JoinSet::new();
    for (name, point, fate) in lives {
        let (permits, cluster) = (permits.clone(), cluster.clone());
        living.spawn(async move {
            let _permit = permits.acquire_owned().await.unwrap();
            live(cluster, &name, Some((point, fate))).await
        });
    }
    living.join_all().await;
    say(&format!("{points} points"));
    assert!(
        points >= 18,
        "the story is shorter than it should be: {undisturbed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_was_away_while_its_job_ran_goes_on() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::start(cluster).await;
    let name = fresh("away");
    // Its installation takes three seconds.
    world.request(&name, &format!("{CLASS}os_type: omni-slow\n"));
    world.die_after("POST /2/instances").await;
    // The job makes the instance without us.
    world.cluster.ended_job(&format!("INSTANCE_CREATE({name})")).await;
    world.until_joined(&name).await;
    assert_eq!(world.count("POST /2/instances"), 1, "{world}");
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_whose_job_was_archived_meanwhile_does_no_harm() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::start(cluster).await;
    let name = fresh("archived");
    world.request(&name, CLASS);
    world.die_after("POST /2/instances").await;
    let job = world.cluster.ended_job(&format!("INSTANCE_CREATE({name})")).await;
    world.cluster.gnt(&["gnt-job", "archive", &job]).await;
    world.until_joined(&name).await;
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_teardown_that_meets_an_unfinished_creation_leaves_nothing() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::start(cluster).await;
    let name = fresh("early");
    world.request(&name, &format!("{CLASS}os_type: omni-slow\n"));
    world
        .until("the creation", |world| world.count("POST /2/instances") > 0)
        .await;
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_instance_is_told_and_never_touched() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::start(cluster).await;
    let name = fresh("taken");
    world.cluster.add(&name, &[]).await;
    // A short name expands to this one: RAPI would take the one for the other.
    let short = fresh("short");
    let long = format!("{short}.example.org");
    world.cluster.add(&long, &[]).await;
    world.request(&name, CLASS);
    world.request(&short, CLASS);
    world
        .until("it is told", |world| {
            world.status(&name).error.contains("its name is taken")
        })
        .await;
    world.until_joined(&short).await;
    world.end(&short).await;
    world.end(&name).await;
    assert!(world.cluster.is_there(&name).await);
    assert!(world.cluster.is_there(&long).await);
    world.cluster.remove(&name).await;
    world.cluster.remove(&long).await;
}

/// What the status of a request says in the end, whose class is so.
async fn told(cluster: Cluster, change: &str, sign: &str) -> String {
    let mut world = World::start(cluster).await;
    let name = fresh("told");
    // YAML takes no key twice: the change replaces the lines of its keys.
    let keys: Vec<&str> = change.lines().filter_map(|line| line.split(':').next()).collect();
    let class: Vec<&str> = CLASS
        .lines()
        .filter(|line| !keys.iter().any(|key| line.starts_with(&format!("{key}:"))))
        .filter(|line| !keys.contains(&"nics") || !line.starts_with("  -"))
        .collect();
    world.request(&name, &format!("{}\n{change}\n", class.join("\n")));
    world
        .until(sign, |world| {
            let status = world.status(&name);
            status.status.contains(sign) || status.error.contains(sign)
        })
        .await;
    let line = world.status(&name).status;
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
    line
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_line_says_what_to_change() {
    let Some(cluster) = Cluster::find() else { return };
    cluster
        .add("full-pool", &["--net", "0:network=tiny,ip=pool"])
        .await;
    let mut telling = JoinSet::new();
    for (change, sign) in [
        ("os_type: nosuch", "gnt-os list"),
        ("os_type: omni-broken", "boom"),
        ("memory: 900000", "memory"),
        ("nics: [{network: nosuch, ip: pool}]", "gnt-network list"),
        ("nics: [{network: tiny, ip: pool}]", "no free address"),
        ("node_groups: [nosuch]", "gnt-group list"),
        ("disk_template: plain", "disk_template"),
        ("hypervisor_params: {nosuch: 1}", "nosuch"),
        ("boot_image: /nosuch.raw\nhypervisor: kvm", "[ganeti.media]"),
        (
            "boot_iso: /nosuch.iso\nhypervisor: kvm",
            "put the ISO there on every node",
        ),
    ] {
        let cluster = cluster.clone();
        telling.spawn(async move { format!("{change}: {}", told(cluster, change, sign).await) });
    }
    let lines = telling.join_all().await;
    cluster.remove("full-pool").await;
    say(&lines.join("\n"));
    for line in lines {
        assert!(line.contains("next try within"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_told_and_ends_no_machine() {
    let Some(cluster) = Cluster::find() else { return };
    let mut world = World::without_daemon(cluster).await;
    let right = std::mem::replace(&mut world.password, Secret::new("wrong"));
    world.start_daemon();
    let name = fresh("denied");
    world.request(&name, CLASS);
    world
        .until("it is told", |world| {
            world.status(&name).status.contains("rapi/users")
        })
        .await;
    say(&world.status(&name).status);
    world.kill_daemon();
    world.password = right;
    world.until_joined(&name).await;
    world.kill_daemon();
    world.password = Secret::new("wrong");
    world.start_daemon();
    world.omni.teardown_request(&name).unwrap();
    world
        .until("it is told", |world| world.health().contains("rapi/users"))
        .await;
    say(&world.health());
    assert!(world.cluster.is_there(&name).await);
    world.kill_daemon();
    world.password = world.cluster.settings().password;
    world.until_gone(&name).await;
    world.assert_nothing_left(&name).await;
}
