//! What happens around the daemons: Omni's controllers, the cloud and time, which go on in a healthy world too; and the adversary.

use super::state::{At, Daemon, Doubt, Patch, Power, Request, Slot, State, Status, Teardown};
use super::{Scenario, Step};

struct Moves<'a> {
    state: &'a State,
    out: &'a mut Vec<Step>,
}

impl Moves<'_> {
    fn add(
        &mut self,
        who: Option<usize>,
        what: &'static str,
        place: Option<usize>,
        change: impl FnOnce(&mut State),
    ) {
        let mut state = *self.state;
        change(&mut state);
        if state != *self.state {
            self.out.push(Step {
                who,
                what,
                place,
                state,
                wrong: None,
            });
        }
    }
}

/// What goes on in a healthy world, the next thing first.
pub(super) fn tides(state: &State, out: &mut Vec<Step>) {
    let world = &state.world;
    let mut moves = Moves { state, out };
    for place in 0..2 {
        if world.in_flight[place] {
            moves.add(None, "a creation on its way is lost", Some(place), |state| {
                state.world.in_flight[place] = false;
            });
            moves.add(None, "a creation on its way lands", Some(place), |state| {
                state.world.in_flight[place] = false;
                if state.world.slots[place] == Slot::Nothing {
                    let power = Power::Stopped;
                    state.put(place, Slot::Ours { power, bare: false });
                }
            });
        }
    }
    for who in state.who().filter(|who| state.daemon(*who).at == At::Idle) {
        moves.add(Some(who), "hears of the request", None, |state| {
            state.daemon_mut(who).request = state.world.request;
        });
        moves.add(Some(who), "hears of the status", None, |state| {
            let status = state.world.status;
            state.daemon_mut(who).hear_status(status);
        });
        moves.add(Some(who), "hears of the patch", None, |state| {
            let patch = state.world.patch;
            state.daemon_mut(who).hear_patch(patch);
        });
        moves.add(Some(who), "hears of the machine resource", None, |state| {
            state.daemon_mut(who).resource = state.world.resource;
        });
        moves.add(Some(who), "hears of the registration", None, |state| {
            state.daemon_mut(who).registered = state.world.registered;
        });
    }
    omni(&mut moves);
    cloud(&mut moves);
    // `Pace::settle` is not less than what a creation may take.
    if !state.creation_may_land() {
        for who in state.who() {
            let daemon = state.daemon(who);
            if daemon.doubt == Doubt::Open && daemon.at == At::Idle {
                moves.add(Some(who), "knows that no creation is on its way", None, |state| {
                    state.daemon_mut(who).doubt = Doubt::Settled;
                });
            }
            if daemon.teardown == Teardown::Seen && daemon.at == At::Idle {
                moves.add(
                    Some(who),
                    "has waited until creations have settled",
                    None,
                    |state| {
                        state.daemon_mut(who).teardown = Teardown::Settled;
                    },
                );
            }
        }
    }
}

/// Omni's controllers: they hold what they use, and let go of what tears down.
fn omni(moves: &mut Moves<'_>) {
    let world = &moves.state.world;
    if world
        .request
        .is_some_and(|request| !request.running && !request.finalizer)
    {
        moves.add(None, "Omni destroys the request", None, |state| {
            state.world.request = None;
        });
    }
    match world.patch {
        Some(Patch {
            running: true,
            held: false,
            ..
        }) => {
            moves.add(None, "Omni holds the patch", None, |state| {
                hold_patch(state, true)
            });
        }
        Some(Patch {
            running: false,
            held: true,
            ..
        }) => {
            moves.add(None, "Omni lets go of the patch", None, |state| {
                hold_patch(state, false);
            });
        }
        _ => {}
    }
    match world.status {
        Some(Status {
            running: true,
            held: false,
            ..
        }) => {
            moves.add(None, "Omni holds the status", None, |state| {
                hold_status(state, true);
            });
        }
        Some(Status {
            running: false,
            held: true,
            ..
        }) => {
            moves.add(None, "Omni has drained", None, |state| {
                hold_status(state, false);
                state.world.drained = true;
            });
        }
        _ => {}
    }
    let runs = world.slots.iter().any(|slot| is_running(*slot));
    if world.registered.is_some() && !runs {
        moves.add(None, "the registration goes", None, |state| {
            state.world.registered = None;
        });
    }
    // That the machine of an earlier request joins only after this one was made is left out.
    let of_this = |request: &Request| {
        let claim = world.status.and_then(|status| status.claim);
        claim.is_none_or(|claim| claim.incarnation == request.incarnation)
    };
    if let Some(request) = world
        .request
        .filter(|request| request.running && runs && of_this(request))
        && world.registered.is_none()
    {
        moves.add(None, "the machine joins", None, |state| {
            state.world.registered = Some(request.incarnation);
        });
    }
}

fn cloud(moves: &mut Moves<'_>) {
    for place in 0..2 {
        let Slot::Ours { power, bare } = moves.state.world.slots[place] else {
            continue;
        };
        let (what, power) = match power {
            Power::Starting => ("the instance has started", Power::Running),
            Power::Stopping => ("the instance has stopped", Power::Stopped),
            Power::Stopped | Power::Running | Power::Broken => continue,
        };
        moves.add(None, what, Some(place), |state| {
            state.put(place, Slot::Ours { power, bare });
            state.world.lived |= power == Power::Running;
        });
    }
}

/// What an adversary does: users, failures, strangers.
pub(super) fn harms(state: &State, scenario: &Scenario, out: &mut Vec<Step>) {
    let world = &state.world;
    let mut moves = Moves { state, out };
    for who in state.who() {
        moves.add(Some(who), "dies and is started again", None, |state| {
            let world = state.world;
            let valid = state.daemon(who).valid;
            *state.daemon_mut(who) = Daemon::started(&world, valid);
        });
        if scenario.upgrade {
            moves.add(
                Some(who),
                "is replaced by one that reads classes otherwise",
                None,
                |state| {
                    let world = state.world;
                    let valid = !state.daemon(who).valid;
                    *state.daemon_mut(who) = Daemon::started(&world, valid);
                },
            );
        }
    }
    match world.request {
        Some(request) => {
            if request.running {
                moves.add(None, "a user tears the request down", None, |state| {
                    let running = false;
                    state.world.request = Some(Request { running, ..request });
                });
            }
            if scenario.strip && request.finalizer {
                moves.add(None, "somebody strips our finalizer", None, |state| {
                    let finalizer = false;
                    state.world.request = Some(Request { finalizer, ..request });
                    state.world.stripped = true;
                });
            }
        }
        None if scenario.anew && !world.anew => {
            moves.add(None, "a user makes the request anew", None, |state| {
                state.world.request = Some(Request {
                    incarnation: 1,
                    running: true,
                    finalizer: false,
                });
                state.world.anew = true;
                state.world.ran = false;
                // Of an instance that is still there.
                state.world.lived &= state.world.slots.iter().any(|slot| slot.is_instance());
                state.world.drained = false;
            });
        }
        None => {}
    }
    let places = if scenario.two_scopes { 2 } else { 1 };
    for place in 0..places {
        let slot = world.slots[place];
        if scenario.strangers {
            match slot {
                Slot::Nothing => moves.add(None, "a stranger takes the name", Some(place), |state| {
                    state.put(place, Slot::Foreign);
                }),
                Slot::Foreign => moves.add(None, "the stranger leaves", Some(place), |state| {
                    state.put(place, Slot::Nothing);
                }),
                Slot::Remains | Slot::Ours { .. } => {}
            }
        }
        let Slot::Ours { power, bare } = slot else {
            continue;
        };
        if !scenario.havoc {
            continue;
        }
        let is_heard = state
            .who()
            .all(|who| state.daemon(who).registered == world.registered);
        if is_heard && !state.outlives(place) {
            moves.add(None, "the instance vanishes", Some(place), |state| {
                state.put(place, Slot::Nothing);
            });
            moves.add(
                None,
                "the instance vanishes but for its disk",
                Some(place),
                |state| {
                    state.put(place, Slot::Remains);
                },
            );
        }
        if power == Power::Running {
            moves.add(None, "somebody stops the instance", Some(place), |state| {
                let power = Power::Stopped;
                state.put(place, Slot::Ours { power, bare });
            });
        }
        if power != Power::Broken {
            moves.add(None, "the instance breaks", Some(place), |state| {
                let power = Power::Broken;
                state.put(place, Slot::Ours { power, bare });
            });
        }
    }
}

pub(super) fn is_running(slot: Slot) -> bool {
    matches!(
        slot,
        Slot::Ours {
            power: Power::Running,
            ..
        }
    )
}

fn hold_status(state: &mut State, held: bool) {
    if let Some(status) = &mut state.world.status {
        status.held = held;
    }
}

fn hold_patch(state: &mut State, held: bool) {
    if let Some(patch) = &mut state.world.patch {
        patch.held = held;
    }
}
