//! Guests that really boot, in QEMU: what the firmware shows them, what their kernel is told, what they read over the network.
//!
//! The guest is `tests/ganeti/guest.sh`: it tells on its console what a Talos would read. The test makes it a machine of Omni's with
//! that alone, so that it joins only if the right words reached it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use omni_infra_provider::media::Media;
use omni_infra_provider::sandbox::omni::Omni;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use super::cluster::Cluster;
use super::stories::fresh;
use super::world::{Fate, Point, World, kernel_args_of};
use crate::support::peer::say;

/// Provider data of a machine that boots.
const CLASS: &str = "\
disk_template: file
disk_size: 32
memory: 256
vcpus: 1
hypervisor: kvm
iallocator: hail
nameservers: [10.0.0.53]
nics:
  - {mode: bridged, link: br0}
";

/// It boots in five seconds on a free machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where the guest's kernel arguments go.
const ROOM: [u8; 1700] = [b'@'; 1700];

/// What a guest told on its console.
#[derive(Debug)]
struct Told {
    uuid: String,
    serial: String,
    arguments: String,
    meta_data: String,
    network_config: String,
    user_data: String,
}

impl Told {
    /// The last whole round of what it tells, if there is one. `file` has to be there by then, where one is named.
    fn read(console: &str, file: &str) -> Option<Self> {
        let (before, _) = console.rsplit_once("guest: end")?;
        let (_, round) = before.rsplit_once("guest: uuid ")?;
        let round = format!("guest: uuid {round}");
        let lines = |key: &str| -> Vec<String> {
            let starts = format!("guest: {key} ");
            let lines = round.lines().filter_map(|line| line.strip_prefix(&starts));
            lines.map(|line| line.trim_end().to_owned()).collect()
        };
        let one = |key: &str| lines(key).concat();
        let body = |file: &str| {
            let lines = lines(&format!("{file}:"));
            let is_there = lines.first().is_some_and(|status| status.contains(" 200 "));
            let lines: String = lines.iter().skip(1).map(|line| format!("{line}\n")).collect();
            if is_there { lines } else { String::new() }
        };
        let told = Self {
            uuid: one("uuid"),
            serial: one("serial"),
            arguments: one("arguments"),
            meta_data: body("meta-data"),
            network_config: body("network-config"),
            user_data: body("user-data"),
        };
        (file.is_empty() || !body(file).is_empty()).then_some(told)
    }
}

/// Reads the console of a guest from now on, until it has told everything, `file` with it.
async fn console(cluster: &Cluster, name: &str, file: &str) -> Told {
    let path = cluster
        .base
        .join(format!("n1.gt/var/run/ganeti/kvm-hypervisor/ctrl/{name}.serial"));
    let begun = Instant::now();
    let mut text = Vec::new();
    while begun.elapsed() < PATIENCE {
        let Ok(mut serial) = UnixStream::connect(&path).await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut chunk = [0; 4096];
        while let Ok(Ok(read)) = timeout(PATIENCE, serial.read(&mut chunk)).await {
            if read == 0 || begun.elapsed() > PATIENCE {
                break;
            }
            text.extend_from_slice(&chunk[..read]);
            if let Some(told) = Told::read(&String::from_utf8_lossy(&text), file) {
                return told;
            }
        }
    }
    panic!(
        "{name} did not tell {file:?}; its console: {}",
        String::from_utf8_lossy(&text)
    );
}

/// An image factory whose ISOs are the guest, with the arguments of their schematic.
async fn factory(listener: TcpListener, omni: Omni, guest: Vec<u8>) {
    async fn answer(State((omni, guest)): State<(Omni, Vec<u8>)>, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        let asked: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let ["image", schematic, "v1.12.0", "metal-amd64.iso"] = asked[..] else {
            return Response::builder()
                .status(StatusCode::NOT_FOUND)
                .body(Body::from(path))
                .unwrap();
        };
        let schematics = omni.schematics();
        let args = kernel_args_of(&schematics[schematic]).unwrap();
        Response::new(Body::from(with_arguments(guest, &args)))
    }
    let router = Router::new().fallback(answer).with_state((omni, guest));
    axum::serve(listener, router).await.unwrap();
}

fn with_arguments(mut guest: Vec<u8>, args: &str) -> Vec<u8> {
    let at = guest
        .windows(ROOM.len())
        .position(|window| window == ROOM)
        .unwrap();
    let room = &mut guest[at..at + ROOM.len()];
    room.fill(b' ');
    room[..args.len()].copy_from_slice(args.as_bytes());
    guest
}

/// A world whose daemon serves media to guests.
async fn world(cluster: Cluster, folder: &Path) -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let guest = fs::read(cluster.base.join("guest.iso")).unwrap();
    let address = format!("{}:0", cluster.media_address);
    let mut world = World::without_machines(cluster, url).await;
    world.beside(factory(listener, world.omni.clone(), guest));
    // A port for all lives of the daemon.
    let free = TcpListener::bind(address).await.unwrap();
    let address: SocketAddr = free.local_addr().unwrap();
    let media = Media::new(folder.join("media"), format!("http://{address}"));
    world.media = Some((media, address));
    world
}

fn files(folder: &TempDir, end: &str) -> usize {
    let Ok(entries) = fs::read_dir(folder.path().join("media")) else {
        return 0;
    };
    let names = entries.map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(end)).count()
}

/// A parameter of the hypervisor, as the instance has it itself.
async fn parameter(cluster: &Cluster, name: &str, parameter: &str) -> serde_json::Value {
    let fields = cluster.instance(name, &["custom_hvparams"]).await.unwrap();
    fields[0][parameter].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_boots_the_iso_that_the_provider_serves() {
    let Some(cluster) = Cluster::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut world = world(cluster.clone(), folder.path()).await;
    world.start_daemon();
    let name = fresh("iso");
    world.request(&name, CLASS);
    let begun = Instant::now();
    let startup = format!("PUT /2/instances/{name}/startup");
    world.until("the start", |world| world.count(&startup) > 0).await;
    let told = console(&cluster, &name, "").await;
    say(&format!("it booted after {:.0} s", begun.elapsed().as_secs_f64()));
    assert_eq!(Some(&told.uuid), cluster.uuid(&name).await.as_ref(), "{told:?}");
    assert_eq!(told.uuid, world.status(&name).id);
    let schematics = world.omni.schematics();
    let args = schematics.values().find_map(|yaml| kernel_args_of(yaml)).unwrap();
    assert!(told.arguments.contains(&args), "{told:?} lacks {args}");
    world
        .omni
        .machine_booted_with_kernel_args(&told.uuid, &told.arguments);
    world.until_joined(&name).await;
    // The CD is out of the instance, the guest has it still, and runs on.
    let modify = cluster.ended_job(&format!("INSTANCE_SET_PARAMS({name})")).await;
    assert_eq!(cluster.job_status(&modify).await, "success");
    assert_eq!(parameter(&cluster, &name, "cdrom_image_path").await, "");
    console(&cluster, &name, "").await;
    assert_eq!(cluster.instance(&name, &["status"]).await.unwrap()[0], "running");
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_an_image_reads_its_seed_whenever_the_daemon_dies() {
    let Some(cluster) = Cluster::find() else { return };
    for fate in [None, Some(Fate::DiesBefore), Some(Fate::DiesAfter)] {
        let name = fresh("seed");
        let folder = tempfile::tempdir().unwrap();
        let mut world = world(cluster.clone(), folder.path()).await;
        let startup = format!("PUT /2/instances/{name}/startup");
        if let Some(fate) = fate {
            // Between the seed and the start, or between the start and its reading.
            world.doom(Point::Call(startup.clone()), fate);
        }
        world.start_daemon();
        let image = cluster.base.join("guest.iso");
        world.request(&name, &format!("{CLASS}boot_image: {}\n", image.display()));
        let begun = Instant::now();
        world.until("the start", |world| world.count(&startup) > 0).await;
        let told = tokio::select! {
            told = console(&cluster, &name, "user-data") => told,
            () = world.revive() => unreachable!(),
        };
        say(&format!(
            "{fate:?}: it read its seed after {:.0} s",
            begun.elapsed().as_secs_f64()
        ));
        assert_eq!(fate.is_some(), world.struck().is_some(), "{world}");
        assert_eq!(Some(&told.uuid), cluster.uuid(&name).await.as_ref(), "{told:?}");
        let meta = &told.meta_data;
        assert!(meta.contains(&told.uuid) && meta.contains(&name), "{told:?}");
        assert!(told.network_config.contains("\"version\": 1"), "{told:?}");
        assert!(told.user_data.contains("10.0.0.53"), "{told:?}");
        let url = told.serial.strip_prefix("ds=nocloud-net;s=").unwrap();

        // Nobody else may read it.
        let theft = reqwest::get(format!("{url}user-data")).await.unwrap();
        assert_eq!(theft.status(), StatusCode::NOT_FOUND);
        world.omni.machine_booted(&told.uuid, told.user_data.as_bytes());
        world.until_joined(&name).await;
        assert_eq!(told.uuid, world.status(&name).id);
        let console = console(&cluster, &name, "user-data").await;
        assert_eq!(console.user_data, told.user_data, "it may read it again");
        assert_eq!(files(&folder, ".seed"), 1);
        world.end(&name).await;
        assert_eq!(files(&folder, ".seed"), 0);
        world.assert_nothing_left(&name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_qemu_says_is_told_without_the_address_of_the_seed() {
    let Some(cluster) = Cluster::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut world = world(cluster.clone(), folder.path()).await;
    world.start_daemon();
    let name = fresh("qemu");
    let image = cluster.base.join("guest.iso");
    let class = format!(
        "{CLASS}boot_image: {}\nhypervisor_params: {{kvm_extra: -nosuchoption}}\n",
        image.display()
    );
    world.request(&name, &class);
    world
        .until("it is told", |world| {
            world.status(&name).status.contains("nosuchoption")
        })
        .await;
    let line = world.status(&name).status;
    say(&line);
    let extra = parameter(&cluster, &name, "kvm_extra").await;
    let secret = extra.as_str().unwrap().rsplit('/').nth(1).unwrap();
    assert!(secret.starts_with("seed-") && !line.contains(secret), "{line}");
    world.end(&name).await;
    world.assert_nothing_left(&name).await;
}
