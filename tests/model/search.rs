//! Every reachable state, breadth first, so that the first counterexample is a shortest one; then, from every one of them, whether
//! a healthy world settles.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::state::{At, Daemon, State, World, facts, place_name};
use super::{Model, Step, safety};

/// More steps than any healthy world needs to settle.
const MOST_STEPS: usize = 200;

/// Of states, worlds and daemons there are few in comparison: a state is three numbers.
type Packed = [u32; 3];
const NOBODY: u32 = u32::MAX;

/// What an exploration found.
#[derive(Debug)]
pub(super) struct Explored {
    pub(super) states: usize,
    pub(super) transitions: usize,
    pub(super) depth: usize,
    /// No state was left out.
    pub(super) complete: bool,
    /// The longest way of a healthy world to where nothing moves.
    pub(super) longest: usize,
    /// What happened.
    pub(super) happened: BTreeSet<&'static str>,
}

/// Fast, and no adversary chooses our keys.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

type Fast = BuildHasherDefault<Mix>;

/// Gives equal values equal numbers.
struct Numbers<T> {
    of: HashMap<T, u32, Fast>,
    values: Vec<T>,
}

impl<T: Copy + Eq + Hash> Numbers<T> {
    fn new() -> Self {
        Self {
            of: HashMap::default(),
            values: Vec::new(),
        }
    }

    fn of(&mut self, value: T) -> u32 {
        let next = u32::try_from(self.values.len()).unwrap();
        *self.of.entry(value).or_insert_with(|| {
            self.values.push(value);
            next
        })
    }
}

pub(super) struct Search<'a> {
    model: &'a mut Model,
    worlds: Numbers<World>,
    daemons: Numbers<Daemon>,
    known: HashMap<Packed, u32, Fast>,
    states: Vec<Packed>,
    parents: Vec<u32>,
    settled: HashSet<Packed, Fast>,
}

impl<'a> Search<'a> {
    pub(super) fn new(model: &'a mut Model) -> Self {
        Self {
            model,
            worlds: Numbers::new(),
            daemons: Numbers::new(),
            known: HashMap::default(),
            states: Vec::new(),
            parents: Vec::new(),
            settled: HashSet::default(),
        }
    }

    fn pack(&mut self, state: &State) -> Packed {
        let [one, other] = state.daemons;
        [
            self.worlds.of(state.world),
            one.map_or(NOBODY, |daemon| self.daemons.of(daemon)),
            other.map_or(NOBODY, |daemon| self.daemons.of(daemon)),
        ]
    }

    fn unpack(&self, [world, one, other]: Packed) -> State {
        let daemon = |number: u32| (number != NOBODY).then(|| self.daemons.values[number as usize]);
        State {
            world: self.worlds.values[world as usize],
            daemons: [daemon(one), daemon(other)],
        }
    }

    /// Explores from these states up to `most` states. The error is a trace.
    pub(super) fn explore(&mut self, starts: &[State], most: usize) -> Result<Explored, String> {
        for start in starts {
            let packed = self.pack(start);
            self.insert(packed, NOBODY);
        }
        let mut explored = Explored {
            states: 0,
            transitions: 0,
            depth: 0,
            complete: true,
            longest: 0,
            happened: BTreeSet::new(),
        };
        let mut level_ends = self.states.len();
        let mut steps = Vec::new();
        let mut index = 0;
        while index < self.states.len() {
            if self.states.len() >= most {
                explored.complete = false;
                break;
            }
            if index == level_ends {
                explored.depth += 1;
                level_ends = self.states.len();
            }
            let state = self.unpack(self.states[index]);
            steps.clear();
            self.model.steps(&state, &mut steps);
            for step in &steps {
                explored.transitions += 1;
                explored.happened.insert(step.what);
                let wrong = step
                    .wrong
                    .or_else(|| safety::of_state(&step.state, &self.model.scenario));
                if let Some(wrong) = wrong {
                    return Err(format!("{}{}", self.trace(index, Some(step)), verdict(wrong)));
                }
                let packed = self.pack(&step.state);
                self.insert(packed, u32::try_from(index).unwrap());
            }
            index += 1;
        }
        explored.states = self.states.len();
        for index in 0..self.states.len() {
            explored.longest = explored.longest.max(self.settles(index)?);
        }
        Ok(explored)
    }

    fn insert(&mut self, packed: Packed, parent: u32) {
        let next = u32::try_from(self.states.len()).unwrap();
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.known.entry(packed) {
            vacant.insert(next);
            self.states.push(packed);
            self.parents.push(parent);
        }
    }

    /// Follows a healthy world from a state to where nothing moves; how many steps that took to what is known to settle.
    fn settles(&mut self, index: usize) -> Result<usize, String> {
        let mut path = vec![self.states[index]];
        loop {
            let last = path[path.len() - 1];
            if self.settled.contains(&last) {
                break;
            }
            let state = self.unpack(last);
            let wrong = match self.model.healthy(&state) {
                Ok(next) if next.state != state => {
                    let next = self.pack(&next.state);
                    let circle = path.contains(&next) || path.len() > MOST_STEPS;
                    path.push(next);
                    circle.then_some("a healthy world runs in a circle")
                }
                Ok(last) => last
                    .wrong
                    .or_else(|| safety::of_the_settled(&state, &self.model.scenario)),
                Err(wrong) => Some(wrong),
            };
            if let Some(wrong) = wrong {
                return Err(self.healthy_trace(index, &path) + &verdict(wrong));
            }
            if path[path.len() - 1] == last {
                break;
            }
        }
        let steps = path.len() - 1;
        self.settled.extend(path);
        Ok(steps)
    }

    fn healthy_trace(&mut self, index: usize, path: &[Packed]) -> String {
        let mut text = self.trace(index, None);
        text.push_str("from here on nothing bad happens:\n");
        for (number, packed) in path[..path.len() - 1].iter().enumerate() {
            let state = self.unpack(*packed);
            if let Ok(step) = self.model.healthy(&state) {
                tell(&mut text, number + 1, &step, &state);
            }
        }
        text
    }

    /// The way to a state, in words; each step with the facts that it changed.
    fn trace(&mut self, index: usize, last: Option<&Step>) -> String {
        let mut way = vec![index];
        while let parent = self.parents[way[way.len() - 1]]
            && parent != NOBODY
        {
            way.push(parent as usize);
        }
        way.reverse();
        let mut state = self.unpack(self.states[way[0]]);
        let mut text = format!("\nat first:\n  {}\n", facts(&state).join("\n  "));
        for (number, index) in way.iter().enumerate().skip(1) {
            let next = self.unpack(self.states[*index]);
            let mut steps = Vec::new();
            self.model.steps(&state, &mut steps);
            let step = steps.iter().find(|step| step.state == next).unwrap();
            tell(&mut text, number, step, &state);
            state = next;
        }
        if let Some(step) = last {
            tell(&mut text, way.len(), step, &state);
        }
        text
    }
}

fn verdict(wrong: &str) -> String {
    format!("WRONG: {wrong}\n")
}

fn tell(text: &mut String, number: usize, step: &Step, before: &State) {
    let who = step.who.map(|who| format!("daemon {who} ")).unwrap_or_default();
    let place = step
        .place
        .map(|place| format!(" ({})", place_name(place)))
        .unwrap_or_default();
    let _ = writeln!(text, "{number:3}. {who}{}{place}", step.what);
    for (old, new) in facts(before).iter().zip(facts(&step.state)) {
        if *old != new {
            let _ = writeln!(text, "       {new}");
        }
    }
}

impl Model {
    /// What happens next in a healthy world: what is under way goes on, then every daemon makes a pass. The same state: nothing
    /// moves any more.
    fn healthy(&mut self, state: &State) -> Result<Step, &'static str> {
        let mut steps = Vec::new();
        if state.world.in_flight == [false; 2]
            && let Some(who) = state.who().find(|who| state.daemon(*who).at != At::Idle)
        {
            self.daemon_steps(state, who, &mut steps);
            return steps.into_iter().next().ok_or("a pass does not go on");
        }
        super::world::tides(state, &mut steps);
        if let Some(tide) = steps.into_iter().next() {
            return Ok(tide);
        }
        for who in state.who() {
            let step = self.pass(state, who)?;
            if step.state != *state {
                return Ok(step);
            }
        }
        Ok(Step {
            who: None,
            what: "nothing moves",
            place: None,
            state: *state,
            wrong: None,
        })
    }

    /// A whole pass in which nothing goes wrong.
    fn pass(&mut self, start: &State, who: usize) -> Result<Step, &'static str> {
        let mut state = *start;
        for _ in 0..MOST_STEPS {
            let mut steps = Vec::new();
            self.daemon_steps(&state, who, &mut steps);
            let step = steps.into_iter().next().ok_or("a pass does not go on")?;
            if step.state.daemon(who).at == At::Idle {
                let idle = ["waits", "has nothing to write", "has nothing left to do"];
                if step.state == *start && !idle.contains(&step.what) {
                    return Err("a daemon repeats for ever what changes nothing");
                }
                return Ok(step);
            }
            state = step.state;
        }
        Err("a pass has no end")
    }
}
