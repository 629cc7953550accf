//! The planner, model-checked: every reachable state of a small world in which the real `goal` and `plan` are the daemon.
//!
//! An adversary kills the daemon before and after every effect, loses answers, keeps its stores out of date, tears down, strips
//! finalizers, makes instances vanish, stop and break, plants a stranger's, and runs a second daemon. `model/safety.rs` says what
//! must hold in every state and how every state settles once nothing bad happens any more; `model/daemon.rs` is what the engine
//! makes of a decision. A counterexample is printed as a shortest way to it.
//!
//! Of time the model knows one thing: `Pace::settle` passes only when no creation can land any more that began earlier. A
//! creation may last no longer than `Pace::create` from its fresh Gets on, and what ran does not go within that time either: a
//! creation that is stuck for longer than a whole life is the orphan collector's.
//!
//! A run is bounded by the number of states in `MODEL_STATES`, where that is set; 0 is no bound.

mod daemon;
mod mind;
mod safety;
mod search;
mod state;
mod world;

use std::io::Write as _;
use std::time::Instant;

use mind::Mind;
use search::{Explored, Search};
use state::{Daemon, Power, Request, Resource, Slot, Stage, State, Status, Uuid, World};

/// Which world is explored.
#[derive(Debug, Clone, Copy, Default)]
struct Scenario {
    name: &'static str,
    daemons: usize,
    /// The class names a second scope.
    two_scopes: bool,
    /// The first daemon holds the lease, and scopes can be exhausted.
    lease: bool,
    /// The node's provider ID has to be patched in.
    patches: bool,
    /// Looks fail.
    blind: bool,
    /// Looks are used again.
    recall: bool,
    /// Instances vanish, are stopped and break.
    havoc: bool,
    /// Strangers take the name, and leave.
    strangers: bool,
    /// Our finalizer is stripped.
    strip: bool,
    /// The request is made anew with the same ID.
    anew: bool,
    /// A daemon is replaced by one for which the class is invalid, and the other way round.
    upgrade: bool,
}

/// A step of the world or of a daemon.
#[derive(Debug, Clone)]
struct Step {
    who: Option<usize>,
    what: &'static str,
    place: Option<usize>,
    state: State,
    wrong: Option<&'static str>,
}

struct Model {
    scenario: Scenario,
    mind: Mind,
}

impl Model {
    fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            mind: Mind::new(scenario.two_scopes, scenario.patches),
        }
    }

    fn daemon_steps(&mut self, state: &State, who: usize, out: &mut Vec<Step>) {
        daemon::Steps {
            model: self,
            who,
            out,
        }
        .take(state);
    }

    /// Everything that can happen next.
    fn steps(&mut self, state: &State, out: &mut Vec<Step>) {
        world::tides(state, out);
        world::harms(state, &self.scenario, out);
        for who in state.who() {
            self.daemon_steps(state, who, out);
        }
    }
}

impl Scenario {
    fn start(&self, world: World) -> State {
        let daemon = |who: usize| (who < self.daemons).then(|| Daemon::started(&world, true));
        State {
            world,
            daemons: [daemon(0), daemon(1)],
        }
    }

    /// Explores; prints the counts, or fails with a trace. `most` bounds the number of states, unless the environment does.
    fn check(&self, starts: &[World], most: usize, happens: &[&str]) -> Explored {
        let most = std::env::var("MODEL_STATES").map_or(most, |text| match text.parse() {
            Ok(0) => usize::MAX,
            Ok(most) => most,
            Err(error) => panic!("MODEL_STATES={text}: {error}"),
        });
        let begun = Instant::now();
        let mut model = Model::new(*self);
        let starts: Vec<State> = starts.iter().map(|world| self.start(*world)).collect();
        let explored = match Search::new(&mut model).explore(&starts, most) {
            Ok(explored) => explored,
            Err(trace) => panic!("{}: {trace}", self.name),
        };
        // Past the capture of the test harness: the counts are to be seen of a run that passes, too.
        let _ = writeln!(
            std::io::stderr(),
            "{}: {} states, {} transitions, depth {}, {}; settles within {} steps; {} sights; {} s",
            self.name,
            explored.states,
            explored.transitions,
            explored.depth,
            if explored.complete { "complete" } else { "bounded" },
            explored.longest,
            model.mind.thoughts(),
            begun.elapsed().as_secs()
        );
        for what in happens {
            assert!(explored.happened.contains(what), "{}: nobody {what}", self.name);
        }
        explored
    }
}

/// A request was made, and nothing else happened yet.
const MADE: World = World {
    request: Some(Request {
        incarnation: 0,
        running: true,
        finalizer: false,
    }),
    status: None,
    patch: None,
    resource: None,
    registered: None,
    slots: [Slot::Nothing; 2],
    in_flight: [false; 2],
    ran: false,
    lived: false,
    drained: false,
    stripped: false,
    anew: false,
};

/// What happens in every world that is not cut short.
const A_LIFE: [&str; 8] = [
    "writes the claim",
    "creates the instance",
    "starts the instance",
    "tears the status down",
    "deletes a step",
    "destroys the status",
    "removes the finalizer",
    "Omni destroys the request",
];

const UNBOUNDED: usize = usize::MAX;

#[test]
fn one_daemon_makes_one_instance_and_leaves_nothing_whatever_happens() {
    let scenario = Scenario {
        name: "one daemon",
        daemons: 1,
        patches: true,
        blind: true,
        havoc: true,
        strangers: true,
        ..Scenario::default()
    };
    assert!(scenario.check(&[MADE], UNBOUNDED, &A_LIFE).complete);
}

#[test]
fn looks_that_are_used_again_mislead_nobody() {
    let scenario = Scenario {
        name: "old looks",
        daemons: 1,
        patches: true,
        blind: true,
        recall: true,
        havoc: true,
        strangers: true,
        ..Scenario::default()
    };
    assert!(scenario.check(&[MADE], UNBOUNDED, &A_LIFE).complete);
}

#[test]
fn an_exhausted_scope_is_left_for_the_next_and_one_instance_is_made() {
    let scenario = Scenario {
        name: "two scopes",
        daemons: 1,
        two_scopes: true,
        lease: true,
        blind: true,
        havoc: true,
        strangers: true,
        ..Scenario::default()
    };
    let happens = [&A_LIFE[..], &["hears that the scope is exhausted"]].concat();
    assert!(scenario.check(&[MADE], UNBOUNDED, &happens).complete);
}

#[test]
fn a_request_made_anew_inherits_nothing() {
    let scenario = Scenario {
        name: "made anew",
        daemons: 1,
        anew: true,
        havoc: true,
        ..Scenario::default()
    };
    let happens = [&A_LIFE[..], &["a user makes the request anew"]].concat();
    assert!(scenario.check(&[MADE], UNBOUNDED, &happens).complete);
}

#[test]
fn what_a_stripped_finalizer_leaves_is_found_by_its_claim() {
    let scenario = Scenario {
        name: "stripped",
        daemons: 1,
        strip: true,
        anew: true,
        havoc: true,
        ..Scenario::default()
    };
    let happens = [&A_LIFE[..], &["somebody strips our finalizer"]].concat();
    assert!(scenario.check(&[MADE], UNBOUNDED, &happens).complete);
}

#[test]
fn a_class_that_becomes_invalid_loses_no_instance() {
    let scenario = Scenario {
        name: "upgrade",
        daemons: 1,
        upgrade: true,
        havoc: true,
        ..Scenario::default()
    };
    let happens = [&A_LIFE[..], &["creates the status"]].concat();
    assert!(scenario.check(&[MADE], UNBOUNDED, &happens).complete);
}

#[test]
fn machines_of_the_go_provider_are_adopted_and_end_with_their_requests() {
    let scenario = Scenario {
        name: "hand-over",
        daemons: 1,
        blind: true,
        havoc: true,
        strangers: true,
        patches: true,
        ..Scenario::default()
    };
    let happens = [
        "writes the claim",
        "destroys the machine resource",
        "deletes a step",
    ];
    let starts = of_the_go_provider();
    assert!(scenario.check(&starts, UNBOUNDED, &happens).complete);
}

/// Where the Go provider may have been stopped: it writes finalizer, status, an empty machine resource, then makes the instance
/// and names it.
fn of_the_go_provider() -> Vec<World> {
    let held = Request {
        incarnation: 0,
        running: true,
        finalizer: true,
    };
    let status = |stage| {
        Some(Status {
            running: true,
            held: true,
            claim: None,
            ran: false,
            stage,
            uuid: if stage == Stage::Provisioned {
                Uuid::Of(0)
            } else {
                Uuid::None
            },
        })
    };
    let resource = |names| Some(Resource { running: true, names });
    let bare = |power| [Slot::Ours { power, bare: true }, Slot::Nothing];
    let begun = World {
        request: Some(held),
        ..MADE
    };
    let answered = World {
        status: status(Stage::Provisioning),
        ..begun
    };
    let empty = World {
        resource: resource(false),
        ..answered
    };
    let mut starts = vec![begun, answered, empty];
    for power in [Power::Stopped, Power::Starting, Power::Running] {
        for names in [false, true] {
            starts.push(World {
                resource: resource(names),
                slots: bare(power),
                lived: power == Power::Running,
                ..answered
            });
        }
    }
    starts.push(World {
        status: status(Stage::Provisioned),
        resource: resource(true),
        slots: bare(Power::Running),
        ran: true,
        lived: true,
        ..begun
    });
    starts
}

#[test]
fn two_daemons_make_one_instance_and_leave_nothing() {
    let scenario = Scenario {
        name: "two daemons",
        daemons: 2,
        ..Scenario::default()
    };
    scenario.check(&[MADE], 200_000, &[]);
}
