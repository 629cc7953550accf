//! The figures of the README: how fast, with how many calls, and at what cost the daemon does its work.
//!
//! The other side is the sandbox, in this process: an Omni, an Oxide API whose calls take 20 ms, an image factory. The daemon is the
//! binary that `BENCH_DAEMON` names, a process of its own, so that its CPU time and memory are its own. `make bench` builds a release
//! with Oxide alone and measures that; `FIGURES` names some of the figures (`up,idle,many,import`), `BENCH_JSON` a file for the numbers.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a benchmark ends at the first thing that goes wrong, and prints"
)]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use omni_infra_provider::omni::kinds::{MachineRequestStatuses, MachineRequests, Stage};
use omni_infra_provider::sandbox::omni::{Omni, Rpc};
use omni_infra_provider::sandbox::oxide::{Limits, Moment, OxideOptions, OxidePace, Verdict};
use omni_infra_provider::sandbox::{PROJECT, Ports, SET, Sandbox, SandboxOptions};
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::sleep;

const PROVIDER: &str = "oxide";
/// How long the rack thinks about each call.
const LATENCY: Duration = Duration::from_millis(20);
/// Machines of the big scale-up.
const MACHINES: u32 = 1000;
/// Machines that exist already at a start.
const MANY: u32 = 10_000;
/// For how long nothing is asked of the daemon, to see what it does all the same.
const REST: Duration = Duration::from_secs(60);
/// Single requests on an idle system.
const SINGLE: usize = 20;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(900);

/// Bytes of the image, and of those the ones that are not zero.
const IMAGE: usize = 1280 << 20;
const FILLED: usize = 300 << 20;

/// One figure: what it is, its value, its unit.
type Figure = (&'static str, f64, &'static str);

struct World {
    sandbox: Sandbox,
    omni: Omni,
    _serving: JoinHandle<()>,
}

impl World {
    async fn new(pace: OxidePace, latency: Duration) -> Self {
        Self::with(pace, latency, OxideOptions::default().kept_bytes).await
    }

    async fn with(pace: OxidePace, latency: Duration, kept_bytes: usize) -> Self {
        let tib = 1 << 40;
        let mut limits = Limits {
            vcpus: 1_000_000,
            memory: 1000 * tib,
            storage: 10_000 * tib,
            external_ips: 100_000,
            ..Limits::default()
        };
        for sled in &mut limits.sleds {
            (sled.vcpus, sled.memory, sled.local_storage) = (1_000_000, 1000 * tib, 1000 * tib);
        }
        let options = SandboxOptions {
            ports: Ports::FREE,
            oxide: OxideOptions {
                pace,
                limits,
                kept_bytes,
                ..OxideOptions::default()
            },
            ..SandboxOptions::default()
        };
        let (sandbox, doors) = Sandbox::open(&options).await.unwrap();
        if latency > Duration::ZERO {
            sandbox.oxide.set_hook(Some(Arc::new(move |_, moment| {
                Box::pin(async move {
                    if moment == Moment::Before {
                        sleep(latency).await;
                    }
                    Verdict::Proceed
                })
            })));
        }
        let omni = sandbox.omni.clone().unwrap();
        omni.configure(|options| {
            options.delays.drain = Duration::from_millis(50);
            options.delays.join = Duration::from_millis(50);
        });
        let serving = tokio::spawn({
            let sandbox = sandbox.clone();
            async move { sandbox.serve(doors).await.unwrap() }
        });
        Self {
            sandbox,
            omni,
            _serving: serving,
        }
    }

    fn provisioned(&self) -> usize {
        let statuses = self.omni.list::<MachineRequestStatuses>(PROVIDER);
        let provisioned = statuses
            .iter()
            .filter(|status| status.spec.stage == Stage::Provisioned);
        provisioned.count()
    }

    fn requests(&self) -> usize {
        self.omni.list::<MachineRequests>(PROVIDER).len()
    }

    async fn until(&self, what: &str, every: Duration, condition: impl Fn(&Self) -> bool) -> Duration {
        let begun = Instant::now();
        while !condition(self) {
            assert!(begun.elapsed() < PATIENCE, "never came: {what}");
            sleep(every).await;
        }
        begun.elapsed()
    }

    /// Calls so far: writes and reads of Omni, calls of Oxide, lists of Oxide among them.
    fn calls(&self) -> [u64; 4] {
        let (mut writes, mut reads) = (0, 0);
        for ((rpc, kind), count) in self.omni.calls() {
            match rpc {
                // What the daemon says of itself is no machine's.
                _ if kind.contains("HealthStatus") => {}
                Rpc::Watch => {}
                rpc if rpc.writes() => writes += count,
                _ => reads += count,
            }
        }
        let oxide = self.sandbox.oxide.calls();
        let lists = oxide.iter().filter(|(operation, _)| operation.ends_with("_list"));
        [
            writes,
            reads,
            oxide.values().sum(),
            lists.map(|(_, count)| count).sum(),
        ]
    }
}

/// The daemon's process.
struct Daemon(Child);

impl Daemon {
    fn start(world: &World) -> Self {
        let environment = world.sandbox.environment();
        let child = Command::new(program())
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (*name, value.expose())))
            .env("LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// CPU time so far.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        // The kernel's USER_HZ is 100 everywhere.
        ticks / 100.0
    }

    /// Most memory that it ever had, in MiB.
    fn peak(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn each(calls: u64, machines: u32) -> f64 {
    f64::from(u32::try_from(calls).unwrap()) / f64::from(machines)
}

fn since(after: [u64; 4], before: [u64; 4]) -> [u64; 4] {
    std::array::from_fn(|index| after[index] - before[index])
}

/// Many machines up and down, on a rack that takes its time for each call.
async fn up(figures: &mut Vec<Figure>) {
    let world = World::new(OxidePace::instant(), LATENCY).await;
    let daemon = Daemon::start(&world);
    world.sandbox.scale(SET, 1);
    world
        .until("the first machine", LATENCY, |world| world.provisioned() == 1)
        .await;
    let (before, cpu) = (world.calls(), daemon.cpu());
    world.sandbox.scale(SET, MACHINES + 1);
    let all = MACHINES as usize + 1;
    let every = Duration::from_millis(100);
    let time = world
        .until("all machines", every, |world| world.provisioned() == all)
        .await;
    let after = world.calls();
    let [writes, reads, cloud, lists] = since(after, before);
    figures.push(("1,000 requests -> all PROVISIONED", time.as_secs_f64(), "s"));
    figures.push(("Omni writes per machine up", each(writes, MACHINES), ""));
    figures.push(("Omni reads per machine up", each(reads, MACHINES), ""));
    figures.push((
        "Oxide calls per machine up, lists left out",
        each(cloud - lists, MACHINES),
        "",
    ));
    figures.push(("Oxide lists for all up", each(lists, 1), ""));
    figures.push(("CPU for the 1,000 up", daemon.cpu() - cpu, "s"));
    figures.push(("peak memory, 1,000 machines", daemon.peak(), "MiB"));

    let before = world.calls();
    world.sandbox.scale(SET, 0);
    let time = world.until("none", every, |world| world.requests() == 0).await;
    let [writes, reads, cloud, lists] = since(world.calls(), before);
    figures.push(("1,000 machines torn down", time.as_secs_f64(), "s"));
    figures.push(("Omni writes per machine down", each(writes, MACHINES + 1), ""));
    figures.push(("Omni reads per machine down", each(reads, MACHINES + 1), ""));
    figures.push((
        "Oxide calls per machine down, lists left out",
        each(cloud - lists, MACHINES + 1),
        "",
    ));
    figures.push(("Oxide lists for all down", each(lists, 1), ""));
    assert!(
        world.sandbox.oxide.instances(PROJECT).is_empty() && world.sandbox.oxide.disks(PROJECT).is_empty()
    );
}

/// One request at a time on an idle system, on a rack where nothing takes time.
async fn idle(figures: &mut Vec<Figure>) {
    let world = World::new(OxidePace::instant(), Duration::ZERO).await;
    let _daemon = Daemon::start(&world);
    let mut times = Vec::new();
    for machines in 0..=SINGLE {
        world.sandbox.scale(SET, u32::try_from(machines).unwrap() + 1);
        let every = Duration::from_millis(2);
        let time = world
            .until("one more", every, |world| world.provisioned() == machines + 1)
            .await;
        // The first brings the image.
        if machines > 0 {
            times.push(time.as_secs_f64());
        }
        sleep(Duration::from_millis(300)).await;
    }
    figures.push(("one request on an idle system, median", median(times), "s"));
}

/// A start with many machines, and their steady state.
async fn many(figures: &mut Vec<Figure>) {
    let world = World::new(OxidePace::instant(), Duration::ZERO).await;
    let daemon = Daemon::start(&world);
    world.sandbox.scale(SET, MANY);
    let every = Duration::from_millis(500);
    world
        .until("all machines", every, |world| {
            world.provisioned() == MANY as usize
        })
        .await;
    figures.push(("peak memory, 10,000 machines up", daemon.peak(), "MiB"));
    drop(daemon);

    let (before, begun) = (world.calls(), Instant::now());
    let daemon = Daemon::start(&world);
    // It is through when it has been quiet for a while.
    let mut cpu = (-1.0, Instant::now());
    while cpu.1.elapsed() < Duration::from_secs(5) {
        if daemon.cpu() > cpu.0 + 0.05 {
            cpu = (daemon.cpu(), Instant::now());
        }
        sleep(Duration::from_millis(100)).await;
    }
    let [writes, reads, cloud, _] = since(world.calls(), before);
    figures.push((
        "start with 10,000 machines until quiet",
        (cpu.1 - begun).as_secs_f64(),
        "s",
    ));
    figures.push(("its CPU", daemon.cpu(), "s"));
    figures.push(("its Omni writes", each(writes, 1), ""));
    figures.push(("its Omni reads", each(reads, 1), ""));
    figures.push(("its Oxide calls", each(cloud, 1), ""));
    figures.push(("peak memory, start with 10,000 machines", daemon.peak(), "MiB"));

    // A slow look each five minutes: one whole round of it.
    let rounds = 5.0 * 60.0 / REST.as_secs_f64();
    let (before, cpu) = (world.calls(), daemon.cpu());
    for _ in 0..5 {
        sleep(REST).await;
    }
    let [writes, reads, cloud, _] = since(world.calls(), before);
    let hour = 3600.0 / (rounds * REST.as_secs_f64());
    figures.push((
        "10,000 machines at rest: CPU of one core",
        (daemon.cpu() - cpu) / 300.0 * 100.0,
        "%",
    ));
    figures.push((
        "at rest: Omni calls per hour, without heartbeats",
        each(writes + reads, 1) * hour,
        "",
    ));
    figures.push(("at rest: Oxide calls per hour", each(cloud, 1) * hour, ""));
}

/// An image as large as a real one, beside `xz -dc`: medians, since either takes a tenth more or less each time.
async fn import(figures: &mut Vec<Figure>) {
    let file = image();
    let packed = Bytes::from(fs::read(&file).unwrap());
    let (mut xz, mut ours, mut cpu, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0.0_f64);
    let mut description = String::new();
    for _ in 0..3 {
        xz.push(unpacked_by_xz(&file).as_secs_f64());
        // A rack keeps what is written on other machines than this one.
        let world = World::with(OxidePace::instant(), Duration::ZERO, 0).await;
        world.sandbox.factory.serve_instead(packed.clone());
        let daemon = Daemon::start(&world);
        sleep(Duration::from_secs(2)).await;
        let (begun, before) = (Instant::now(), daemon.cpu());
        world.sandbox.scale(SET, 1);
        let every = Duration::from_millis(10);
        world
            .until("the image", every, |world| {
                !world.sandbox.oxide.images(PROJECT).is_empty()
            })
            .await;
        ours.push(begun.elapsed().as_secs_f64());
        cpu.push(daemon.cpu() - before);
        peak = peak.max(daemon.peak());
        description.clone_from(&world.sandbox.oxide.images(PROJECT)[0].description);
    }
    let size = packed.len() as f64 / f64::from(1 << 20);
    figures.push(("import: packed size", size, "MiB"));
    figures.push(("import: xz -dc", median(xz), "s"));
    figures.push(("import: ours, upload included", median(ours), "s"));
    figures.push(("import: CPU", median(cpu), "s"));
    figures.push(("import: peak memory", peak, "MiB"));
    let sum = Command::new("sh")
        .args(["-c", r#"xz -dc "$0" | sha256sum"#])
        .arg(&file)
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert!(
        description.contains(sum.split_whitespace().next().unwrap()),
        "{description}"
    );
}

fn unpacked_by_xz(file: &Path) -> Duration {
    let begun = Instant::now();
    let mut xz = Command::new("xz")
        .arg("-dc")
        .arg(file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let raw = std::io::copy(xz.stdout.as_mut().unwrap(), &mut std::io::sink()).unwrap();
    assert!(xz.wait().unwrap().success() && raw == u64::try_from(IMAGE).unwrap());
    begun.elapsed()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A packed image, made once and kept among the build's files: filled blocks that can be packed a little, and zeros between, packed
/// as Talos's imager does it (`pkg/imager/post.go`).
fn image() -> PathBuf {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-talos.raw.xz");
    if file.exists() {
        return file;
    }
    eprintln!("making an image of 1.25 GiB; this takes some minutes, once");
    let unfinished = file.with_extension("part");
    let mut xz = Command::new("xz")
        .args(["-0", "-c", "-T0"])
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&unfinished).unwrap())
        .spawn()
        .unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    let mut input = xz.stdin.take().unwrap();
    let block = 1 << 20;
    for index in 0..IMAGE / block {
        let mut bytes = vec![0_u8; block];
        if index * FILLED / IMAGE != (index + 1) * FILLED / IMAGE {
            // Three quarters of it cannot be packed.
            random.fill(&mut bytes[..block / 4 * 3]);
        }
        input.write_all(&bytes).unwrap();
    }
    drop(input);
    assert!(xz.wait().unwrap().success());
    fs::rename(&unfinished, &file).unwrap();
    file
}

/// The daemon that is measured.
fn program() -> PathBuf {
    let here = || env!("CARGO_BIN_EXE_omni-infra-provider").into();
    env::var_os("BENCH_DAEMON").map_or_else(here, PathBuf::from)
}

fn binary(figures: &mut Vec<Figure>) {
    let size = fs::metadata(program()).unwrap().len();
    figures.push(("the binary", size as f64 / 1e6, "MB"));
}

fn main() {
    // `cargo bench` and `cargo test` pass flags of the usual harness.
    if env::args().any(|argument| argument == "--list" || argument == "--test") {
        return;
    }
    let wanted = env::var("FIGURES").unwrap_or_else(|_| "up,idle,many,import".to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut figures = Vec::new();
    binary(&mut figures);
    for name in wanted.split(',') {
        let begun = figures.len();
        match name {
            "up" => runtime.block_on(up(&mut figures)),
            "idle" => runtime.block_on(idle(&mut figures)),
            "many" => runtime.block_on(many(&mut figures)),
            "import" => runtime.block_on(import(&mut figures)),
            other => panic!("{other} is no figure: up, idle, many, import"),
        }
        for (what, value, unit) in &figures[if begun == 1 { 0 } else { begun }..] {
            println!("{what:52} {value:>10.2} {unit}");
        }
    }
    if let Ok(file) = env::var("BENCH_JSON") {
        let values: BTreeMap<&str, Value> = figures
            .iter()
            .map(|(what, value, _)| (*what, json!(value)))
            .collect();
        fs::write(file, serde_json::to_string_pretty(&values).unwrap()).unwrap();
    }
}
