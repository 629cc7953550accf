//! Seeded schedules: random faults on both sides, random wishes, one daemon or two; what must hold at any time is checked at every
//! change, and once the faults end the world settles.
//!
//! `SCHEDULES` is how many are run; `SCHEDULE_SEED` runs one of them again, `SCHEDULE_TRIES` times at most, because a script is
//! always the same and the daemons' jitter is not. `SCHEDULE_PROGRESS` tells how far it is.
#![expect(
    clippy::disallowed_methods,
    reason = "a schedule's runtime ends with it, and all its tasks with that"
)]

mod gate;
mod rack;
mod rough;
mod script;
mod told;
mod watchman;
mod world;

use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use script::Script;
use world::World;

/// How many schedules `cargo test` runs: about a minute of two cores in an unoptimised build.
const SCHEDULES: u64 = 300;

/// The same over the wire to a rack, where each is slower.
const RACK_SCHEDULES: u64 = 15;

/// How often one seed is run, if it does not fail before.
const TRIES: u64 = 20;

/// A schedule takes well under a second; one that takes so long runs in a circle.
const STUCK: Duration = Duration::from_secs(600);

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);

/// How long the world is left alone after the provider was deleted: longer than any wait of the daemon.
const AFTER_DELETION: Duration = Duration::from_secs(1800);

/// What schedules came to.
#[derive(Default)]
struct Tally {
    passed: AtomicU64,
    /// With two daemons.
    pairs: AtomicU64,
    /// Whose provider was deleted.
    deleted: AtomicU64,
    /// Whose deletion left instances behind.
    left: AtomicU64,
    /// Creations that outlived their machine.
    outlived: AtomicU64,
}

/// Past the capture of the test harness: the seed is to be seen of a run that passes, too.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

/// The seed of the n-th schedule of a run: neighbours have nothing in common (SplitMix64).
fn seed_of(run: u64, n: u64) -> u64 {
    let mut z = run.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn schedules_of_faults_and_wishes_keep_what_must_hold_and_settle() {
    let tally = Tally::default();
    if let Some(seed) = number("SCHEDULE_SEED") {
        let tries = number("SCHEDULE_TRIES").unwrap_or(TRIES);
        run(tries, |_| seed, &tally);
        return;
    }
    let count = number("SCHEDULES").unwrap_or(SCHEDULES);
    let start: u64 = rand::random();
    say(&format!("schedules: {count} from seed {start}"));
    run(count, |n| seed_of(start, n), &tally);
}

#[test]
fn schedules_over_the_wire_to_a_rack_settle() {
    let seeds: Vec<u64> = match number("RACK_SEED") {
        Some(seed) => vec![seed; 20],
        None => {
            let start: u64 = rand::random();
            let count = number("RACK_SCHEDULES").unwrap_or(RACK_SCHEDULES);
            say(&format!("schedules over the wire: {count} from seed {start}"));
            (0..count).map(|n| seed_of(start, n)).collect()
        }
    };
    for seed in seeds {
        if let Err(why) = rack::play(seed) {
            panic!("{why}--- again\nRACK_SEED={seed} cargo test --all-features --test main schedules_over");
        }
    }
}

/// Runs schedules over all cores, until one fails.
fn run(count: u64, seed: impl Fn(u64) -> u64 + Sync, tally: &Tally) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let failure: Mutex<Option<String>> = Mutex::new(None);
    let running: Vec<Mutex<Option<(u64, Instant)>>> = (0..threads).map(|_| Mutex::new(None)).collect();
    let work = |place: &Mutex<Option<(u64, Instant)>>| {
        while !over.load(Ordering::Relaxed) {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= count {
                return;
            }
            let seed = seed(n);
            *place.lock().unwrap() = Some((seed, Instant::now()));
            if let Err(why) = schedule(seed, tally) {
                over.store(true, Ordering::Relaxed);
                failure.lock().unwrap().get_or_insert(why);
            }
            *place.lock().unwrap() = None;
        }
    };
    let (done, ended) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        for place in &running {
            let (work, done) = (&work, done.clone());
            scope.spawn(move || {
                work(place);
                drop(done);
            });
        }
        drop(done);
        let mut told = Instant::now();
        // Ends when the last thread has dropped its end.
        while ended.recv_timeout(Duration::from_secs(1)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            for place in &running {
                if let Some((seed, since)) = *place.lock().unwrap()
                    && since.elapsed() > STUCK
                {
                    say(&format!("a schedule runs in a circle: {}", again(seed)));
                    std::process::abort();
                }
            }
            if told.elapsed() > PROGRESS && std::env::var_os("SCHEDULE_PROGRESS").is_some() {
                told = Instant::now();
                say(&tally.told(begun));
            }
        }
    });
    say(&tally.told(begun));
    if let Some(failure) = failure.into_inner().unwrap() {
        panic!("{failure}");
    }
}

impl Tally {
    fn told(&self, begun: Instant) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        format!(
            "schedules: {} passed in {} s ({} with two daemons; {} with a deleted provider, {} of them left instances; \
             {} creations outlived their machine)",
            of(&self.passed),
            begun.elapsed().as_secs(),
            of(&self.pairs),
            of(&self.deleted),
            of(&self.left),
            of(&self.outlived),
        )
    }
}

fn again(seed: u64) -> String {
    format!("SCHEDULE_SEED={seed} cargo test --all-features --test main schedules")
}

/// Runs the schedule of a seed.
fn schedule(seed: u64, tally: &Tally) -> Result<(), String> {
    let script = Script::new(seed);
    let again = again(seed);
    play(&script, tally).map_err(|why| format!("{why}--- again\n{again}"))
}

/// Plays one script in a runtime of its own; what went wrong, in full.
fn play(script: &Script, tally: &Tally) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let ended = runtime.block_on(live(script, tally));
    drop(runtime);
    let (wrongs, told) = ended;
    if wrongs.is_empty() {
        tally.passed.fetch_add(1, Ordering::Relaxed);
        if script.daemons == 2 {
            tally.pairs.fetch_add(1, Ordering::Relaxed);
        }
        return Ok(());
    }
    Err(format!(
        "{}\n--- script\n{script}--- trace\n{told}",
        wrongs.join("\n")
    ))
}

/// Returns what went wrong, and everything that tells why.
async fn live(script: &Script, tally: &Tally) -> (Vec<String>, String) {
    let mut world = World::new(script).await;
    let watchman = world.watchman.clone();
    let mut wrongs: Vec<String> = tokio::select! {
        ended = to_its_end(&mut world, script) => ended.err().into_iter().collect(),
        circling = watchman.circles() => vec![circling],
    };
    if world.is_provider_deleted() {
        tally.deleted.fetch_add(1, Ordering::Relaxed);
        tally
            .left
            .fetch_add(u64::from(!world.owned().is_empty()), Ordering::Relaxed);
    }
    wrongs.extend(world.watchman.wrongs());
    wrongs.extend(world.violations());
    wrongs.extend(world.dead_daemons());
    let outlived = world.watchman.outlived_count();
    tally.outlived.fetch_add(outlived.into(), Ordering::Relaxed);
    let told = match wrongs.is_empty() {
        true => String::new(),
        false => format!("{}--- at the end\n{}", world.watchman.told(), world.told()),
    };
    (wrongs, told)
}

async fn to_its_end(world: &mut World, script: &Script) -> Result<(), String> {
    world.live(script).await;
    world.heal();
    if world.is_provider_deleted() {
        tokio::time::sleep(AFTER_DELETION).await;
        return Ok(());
    }
    let settles = world.settles().await;
    settles.map_err(|missing| format!("it does not settle: {missing}"))?;
    let ends = world.scale_to_nothing().await;
    ends.map_err(|left| format!("it does not end: {left}"))
}
