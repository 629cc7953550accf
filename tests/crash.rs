//! The daemon dies at every call of every story, before the call took effect and after; or it takes effect and only its answer is
//! lost. Then the daemon is started again: one instance while it is wanted, nothing but images afterwards.
//!
//! A table of stories is written at the end. Each failure says which point it was: with `CRASH_POINT=…` that point is tried alone.
//!
//! Over the Oxide wire a call is one HTTP request, or one call of Omni. There a death is tried at what changes something: one
//! at a call that only reads leaves behind what the death after the last change did. The answers of both kinds are lost.
//! *Not here*: heartbeats, watches, Omni's lists and the image factory, which change nothing.

mod story;

use std::env;
use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use omni_infra_provider::backends::sim::Sim;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use self::story::{Lived, STORIES, Story, live};
use crate::support::cloud::TestCloud;
use crate::support::peer::say;
use crate::support::rack::Rack;
use crate::support::tap::{Doom, Fate};

/// Pairs of deaths that are tried of each story.
const PAIRS: usize = 12;

/// A story on a cloud, and where it goes wrong.
struct Point {
    cloud: &'static str,
    story: &'static Story,
    dooms: Vec<Doom>,
}

/// For example `sim/teardown/7-dies-after/3-answer-lost`.
impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cloud, self.story.name)?;
        self.dooms.iter().try_for_each(|doom| write!(f, "/{doom}"))
    }
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let cloud = parts.next().unwrap_or_default();
        let name = parts.next().unwrap_or_default();
        Ok(Self {
            cloud: [Sim::PROVIDER, Rack::PROVIDER]
                .into_iter()
                .find(|known| *known == cloud)
                .ok_or_else(|| format!("no such cloud: {cloud:?}"))?,
            story: STORIES
                .iter()
                .find(|story| story.name == name)
                .ok_or_else(|| format!("no such story: {name:?}"))?,
            dooms: parts.map(str::parse).collect::<Result<_, _>>()?,
        })
    }
}

/// Lives a story, in a runtime that ends with it.
fn attempt<C: TestCloud>(story: &Story, dooms: &[Doom]) -> Lived {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(live::<C>(story, dooms))
}

fn row(cells: [&str; 5]) -> String {
    let [story, cloud, calls, points, failures] = cells;
    format!("{story:24} {cloud:6} {calls:>6} {points:>6} {failures:>8}")
}

/// Everything that was tried on one cloud.
struct Trial<C> {
    title: String,
    rows: Vec<String>,
    begun: Instant,
    failures: Vec<(Point, String)>,
    _cloud: std::marker::PhantomData<C>,
}

impl<C: TestCloud> Trial<C> {
    fn new(title: String) -> Self {
        Self {
            title,
            rows: vec![row(["story", "cloud", "calls", "points", "failures"])],
            begun: Instant::now(),
            failures: Vec::new(),
            _cloud: std::marker::PhantomData,
        }
    }

    /// Tries a point.
    fn try_point(&mut self, story: &'static Story, dooms: &[Doom]) -> Lived {
        let mut lived = attempt::<C>(story, dooms);
        if let Err(reason) = std::mem::replace(&mut lived.end, Ok(())) {
            let point = Point {
                cloud: C::PROVIDER,
                story,
                dooms: dooms.to_vec(),
            };
            self.failures.push((point, reason));
        }
        lived
    }

    /// Tries a story without a death, then its points, and writes its row.
    fn story(&mut self, story: &'static Story, points: impl FnOnce(&mut Self, &Lived) -> usize) {
        let failed = self.failures.len();
        let alive = self.try_point(story, &[]);
        // A story that fails by itself has no points.
        let sound = self.failures.len() == failed && alive.calls > 0;
        let points = if sound { points(self, &alive) } else { 0 };
        let failures = self.failures.len() - failed;
        self.rows.push(row([
            story.name,
            C::PROVIDER,
            &alive.calls.to_string(),
            &points.to_string(),
            &failures.to_string(),
        ]));
    }

    /// Writes the table, also of a run that passes, and fails if anything did.
    fn end(self) {
        let seconds = self.begun.elapsed().as_secs();
        let table = format!("{}: {seconds} s\n{}", self.title, self.rows.join("\n"));
        say(&table);
        let Some((_, first)) = self.failures.first() else {
            return;
        };
        let mut all = String::new();
        for (point, reason) in &self.failures {
            let reason = reason.lines().next().unwrap_or_default();
            all.push_str(&format!("CRASH_POINT={point}: {reason}\n"));
        }
        panic!("{table}\n{all}\nthe first of them:\n{first}");
    }
}

/// Tries the one point that the environment asks for, if it is on this cloud; false if it asks for none.
fn asked_for<C: TestCloud>() -> bool {
    let Ok(text) = env::var("CRASH_POINT") else {
        return false;
    };
    let point: Point = text.parse().unwrap();
    if point.cloud == C::PROVIDER {
        let lived = attempt::<C>(point.story, &point.dooms);
        say(&format!(
            "{point}: {} of its calls struck, {} since",
            lived.struck, lived.calls
        ));
        if let Err(reason) = lived.end {
            panic!("CRASH_POINT={point}: {reason}");
        }
    }
    true
}

/// Without `everything`, what another point shows is left out.
fn every_point<C: TestCloud>(everything: bool) {
    if asked_for::<C>() {
        return;
    }
    let mut trial = Trial::<C>::new(format!("crash points, {}", C::PROVIDER));
    for story in STORIES.iter().filter(|story| everything || !story.once) {
        trial.story(story, |trial, alive| {
            let mut points = 0;
            for fate in Fate::ALL {
                for call in 1.. {
                    if !everything && fate != Fate::AnswerLost && alive.reads.contains(&call) {
                        continue;
                    }
                    let struck = trial.try_point(story, &[Doom { call, fate }]).struck;
                    points += struck;
                    if struck == 0 && call >= alive.calls {
                        break;
                    }
                }
            }
            points
        });
    }
    trial.end();
}

#[test]
fn killed_at_any_call_on_the_simulated_cloud_there_is_one_instance_and_none_afterwards() {
    every_point::<Sim>(true);
}

#[ignore = "minutes long: run it with `--ignored`"]
#[test]
fn killed_at_any_call_over_the_oxide_wire_there_is_one_instance_and_none_afterwards() {
    every_point::<Rack>(false);
}

#[test]
fn killed_twice_there_is_one_instance_and_none_afterwards() {
    if env::var_os("CRASH_POINT").is_some() {
        return;
    }
    let seed = match env::var("CRASH_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::thread_rng().r#gen(),
    };
    let mut dice = StdRng::seed_from_u64(seed);
    let mut trial = Trial::<Sim>::new(format!("killed twice, CRASH_SEED={seed}"));
    for story in STORIES {
        trial.story(story, |trial, alive| {
            let mut roll = |most: usize, fates: &[Fate]| Doom {
                call: dice.gen_range(1..=most),
                fate: fates[dice.gen_range(0..fates.len())],
            };
            let pairs: Vec<_> = (0..PAIRS)
                .map(|_| {
                    let first = roll(alive.calls, &[Fate::DiesBefore, Fate::DiesAfter]);
                    // It registers and looks again, and goes on from there.
                    [first, roll(alive.calls - first.call + 4, &Fate::ALL)]
                })
                .collect();
            // A second call that the restarted daemon never makes is none.
            let struck = pairs
                .iter()
                .filter(|pair| trial.try_point(story, *pair).struck == 2);
            struck.count()
        });
    }
    trial.end();
}
