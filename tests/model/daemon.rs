//! One daemon: carries out what the real planner decides, as the engine does, split before every call.
//!
//! What this file repeats of the engine, and where that stands:
//!
//! * `reconcile.rs`: the goal is fixed from the stores; a request that the store lacks is read afresh first; memory is of one
//!   incarnation; a teardown is noted when it is first seen.
//! * `observe.rs`: the scopes of *where*; an own look that showed something lasting may be used again until the next own
//!   mutation of the cloud.
//! * `act.rs`, `provision.rs`: fresh Gets of request and status before a creation, one of the status before deletions and the
//!   end; that last one holds for the whole teardown.
//! * `write.rs`: writes are based on the version in the store. A refused write and one without an answer end the pass, and the
//!   resource is read before the next: here at once, since a later reading is a later event.
//! * `report.rs`: what is written of a finding, and on which version.
//!
//! A store changes between passes only (that a watch brings news in the midst of a pass is the same as before or after it, but
//! for the report, which is based on the newest). Versions are not counted: a store is out of date where it differs.

use omni_infra_provider::backends::sim::Zone;
use omni_infra_provider::machine::Goal;
use omni_infra_provider::machine::action::{Action, Ask};

use super::mind::{self, Choice, Kind, Sight, Thought};
use super::state::{
    At, Claim, Doubt, Look, Looks, Made, Patch, Place, Power, Request, Slot, Stage, State, Status, Teardown,
    Tried, Uuid,
};
use super::{Model, Step, safety};

const UNASKED: Looks = [Look::Unasked; 2];

/// A pass between two calls: what it has seen so far.
struct Pass {
    looks: Looks,
    looked: Teardown,
    by_find: bool,
    confirmed: bool,
}

/// The steps that one daemon can take; the first is that of a healthy world.
pub(super) struct Steps<'a> {
    pub(super) model: &'a mut Model,
    pub(super) who: usize,
    pub(super) out: &'a mut Vec<Step>,
}

impl Steps<'_> {
    pub(super) fn take(&mut self, state: &State) {
        let daemon = state.daemon(self.who);
        let pass = |looks, by_find| Pass {
            looks,
            looked: daemon.teardown,
            by_find,
            confirmed: false,
        };
        match daemon.at {
            At::Idle => self.begin(state),
            At::Gone => self.advance(state, &pass(UNASKED, false)),
            At::Looking { looks, by_find } => {
                let pass = pass(looks, by_find);
                let thought = self.think(state, &pass);
                match thought
                    .places
                    .iter()
                    .find(|place| looks[**place] == Look::Unasked)
                {
                    Some(place) => self.look(state, &thought, looks, by_find, *place),
                    None => self.advance(state, &pass),
                }
            }
            At::RequestAgreed(place) => self.read_status_to_create(state, place),
            At::Agreed(place) => self.create(state, place),
            At::Delete {
                place,
                leftovers,
                current,
            } => self.delete(state, place, leftovers, current),
            At::DestroyStatus => self.destroy_status(state),
            At::EndResource => self.end_resource(state),
            At::RemoveFinalizer => self.remove_finalizer(state),
        }
    }

    fn emit(&mut self, what: &'static str, place: Option<Place>, state: State) {
        self.emit_judged(what, place, state, None);
    }

    fn emit_judged(
        &mut self,
        what: &'static str,
        place: Option<Place>,
        state: State,
        wrong: Option<&'static str>,
    ) {
        self.out.push(Step {
            who: Some(self.who),
            what,
            place,
            state,
            wrong,
        });
    }

    /// The pass ends here.
    fn end(&mut self, what: &'static str, mut state: State) {
        state.daemon_mut(self.who).at = At::Idle;
        self.emit(what, None, state);
    }

    fn think(&mut self, state: &State, pass: &Pass) -> std::rc::Rc<Thought> {
        let lease = self.model.scenario.lease && self.who == 0;
        let sight = Sight::of(
            state.daemon(self.who),
            pass.looks,
            pass.looked,
            pass.confirmed,
            lease,
        );
        self.model.mind.think(&sight)
    }

    /// reconcile.rs, `begin`.
    fn begin(&mut self, state: &State) {
        let mut next = *state;
        let daemon = next.daemon_mut(self.who);
        let Some(request) = daemon.request else {
            let left = daemon.status.is_some() || daemon.resource.is_some() || daemon.patch.is_some();
            if !left {
                daemon.forget();
                return self.end("has nothing left to do", next);
            }
            if state.world.request.is_some() {
                daemon.forget();
                daemon.request = state.world.request;
                return self.end("reads the request: it is there", next);
            }
            daemon.at = At::Gone;
            self.note_goal(&mut next);
            return self.emit("reads the request: it is gone", None, next);
        };
        if daemon.known.is_some_and(|known| known != request.incarnation) {
            daemon.forget();
        }
        daemon.known = Some(request.incarnation);
        if self.model.scenario.two_scopes
            && daemon.doubt == Doubt::Unasked
            && daemon.status.is_some_and(|status| status.claim.is_some())
        {
            daemon.doubt = Doubt::Open;
        }
        self.note_goal(&mut next);
        let pass = Pass {
            looks: UNASKED,
            looked: next.daemon(self.who).teardown,
            by_find: false,
            confirmed: false,
        };
        self.advance(&next, &pass);
    }

    fn note_goal(&mut self, state: &mut State) {
        let daemon = state.daemon_mut(self.who);
        match self.model.mind.goal(daemon) {
            Goal::TearDown { .. } | Goal::Gone { .. } => {
                daemon.teardown = daemon.teardown.max(Teardown::Seen);
            }
            Goal::Leave | Goal::Run { .. } | Goal::Invalid { .. } => {
                daemon.teardown = Teardown::Unseen;
                daemon.drained = false;
                daemon.ended = false;
                if let Some((_, looked)) = &mut daemon.looked {
                    *looked = Teardown::Unseen;
                }
            }
        }
    }

    /// reconcile.rs, `decide`: up to the next call.
    fn advance(&mut self, state: &State, pass: &Pass) {
        let thought = self.think(state, pass);
        for choice in &thought.choices {
            if choice.needs_age && state.creation_may_land() {
                continue;
            }
            match &choice.kind {
                Kind::Ask(Ask::Instance) => {
                    self.look(state, &thought, UNASKED, false, thought.places[0]);
                    self.recall(state, &thought);
                }
                Kind::Ask(Ask::InstanceByFind) if !pass.by_find => {
                    self.look(state, &thought, UNASKED, true, thought.places[0]);
                }
                Kind::Ask(Ask::Request) if !pass.confirmed => self.confirm(state, pass),
                Kind::Ask(_) => {
                    let wrong = Some("the planner asked for something twice");
                    self.emit_judged("asks again", None, *state, wrong);
                }
                Kind::Wait => self.report(state, pass, &thought, choice),
                Kind::Act(action) => self.act(state, pass, &thought, action),
            }
        }
    }

    /// observe.rs, `see_instance`: one scope.
    fn look(&mut self, state: &State, thought: &Thought, looks: Looks, by_find: bool, place: Place) {
        // reconcile.rs, `instance`: the Go provider's bare sentence counts as ours for a live request, or where its machine
        // resource names the instance.
        let adopts = match thought.goal {
            Goal::Run { .. } | Goal::Invalid { .. } | Goal::TearDown { .. } => true,
            Goal::Leave | Goal::Gone { .. } => state
                .daemon(self.who)
                .resource
                .is_some_and(|resource| resource.names),
        };
        let slot = state.world.slots[place];
        let ours = |power, bare| Look::Ours {
            power,
            bare,
            current: true,
        };
        let found = match slot {
            Slot::Ours { power, bare } if adopts || !bare => ours(power, bare),
            Slot::Nothing => Look::Nothing { by_find: true },
            Slot::Remains => Look::Remains,
            Slot::Foreign | Slot::Ours { .. } => Look::Foreign,
        };
        // inventory.rs, `answer`: a list knows no leftovers and no strangers.
        let listed = match found {
            Look::Ours { .. } => found,
            _ => Look::Nothing { by_find: false },
        };
        let mut see = |what, look| {
            let mut next = *state;
            let daemon = next.daemon_mut(self.who);
            let mut looks = looks;
            looks[place] = look;
            daemon.at = At::Looking { looks, by_find };
            let done = thought.places.iter().all(|place| looks[*place] != Look::Unasked);
            if done && self.model.scenario.recall {
                let lasts = thought.places.iter().all(|place| lasts(looks[*place]));
                daemon.looked = lasts.then_some((looks, daemon.teardown));
            }
            self.out.push(Step {
                who: Some(self.who),
                what,
                place: Some(place),
                state: next,
                wrong: None,
            });
        };
        see("looks with a find", found);
        if !by_find && listed != found {
            see("looks with a list", listed);
        }
        if self.model.scenario.blind {
            see("cannot look", Look::Unknown);
        }
    }

    /// observe.rs, `recall`.
    fn recall(&mut self, state: &State, thought: &Thought) {
        let Some((looks, looked)) = state.daemon(self.who).looked else {
            return;
        };
        let same =
            (0..looks.len()).all(|place| (looks[place] != Look::Unasked) == thought.places.contains(&place));
        if same {
            let pass = Pass {
                looks,
                looked,
                by_find: false,
                confirmed: false,
            };
            self.advance(state, &pass);
        }
    }

    /// observe.rs, `answer`: a fresh Get of the request.
    fn confirm(&mut self, state: &State, pass: &Pass) {
        let mut next = *state;
        let daemon = next.daemon_mut(self.who);
        let same = same_incarnation(daemon.request, state.world.request)
            && state.world.request.is_some_and(|request| request.running);
        daemon.request = state.world.request;
        if same {
            let pass = Pass {
                confirmed: true,
                ..*pass
            };
            self.advance(&next, &pass);
        } else {
            self.end("reads the request: it has changed", next);
        }
    }

    /// report.rs, `report`.
    fn report(&mut self, state: &State, pass: &Pass, thought: &Thought, choice: &Choice) {
        let daemon = state.daemon(self.who);
        let speaks = matches!(thought.goal, Goal::Run { .. } | Goal::Invalid { .. }) || choice.torn_down;
        let held = daemon.status;
        let Some(status) = held.filter(|_| speaks) else {
            return self.end("waits", *state);
        };
        self.publish(state, pass, thought, choice, status);
        // The watch may have brought news while this pass looked.
        if let Some(newer) = state.world.status.filter(|newer| *newer != status) {
            let mut next = *state;
            next.daemon_mut(self.who).hear_status(Some(newer));
            self.publish(&next, pass, thought, choice, newer);
        }
    }

    fn publish(&mut self, state: &State, pass: &Pass, thought: &Thought, choice: &Choice, based_on: Status) {
        let uuid = thought.places.iter().find_map(|place| match pass.looks[*place] {
            Look::Ours { current, .. } => Some(if current { Uuid::Of(*place) } else { Uuid::Past }),
            _ => None,
        });
        let write = |with_text: bool| {
            let mut wanted = based_on;
            if let Some((stage, _)) = choice.shown.filter(|_| with_text) {
                wanted.stage = stage;
            }
            wanted.uuid = uuid.unwrap_or(wanted.uuid);
            wanted.ran |= choice.runs || thought.ran;
            wanted
        };
        let tells = |wanted: &Status| wanted.stage != based_on.stage || wanted.uuid != based_on.uuid;
        let full = write(true);
        let bare = write(false);
        let is_step = choice.shown.is_some_and(|(_, step)| step);
        // A step that is over soon is not shown.
        let mut wanted = Vec::new();
        if is_step && full.stage != based_on.stage {
            wanted.push(bare);
        }
        wanted.push(full);
        for wanted in wanted {
            if tells(&wanted) || (choice.runs && wanted != based_on) {
                self.write_status(state, "writes the status", Some(based_on), wanted, false);
            } else {
                self.end("has nothing to write", *state);
                // Perhaps the text alone differs, and takes the note that it ran along.
                if choice.shown.is_some() && wanted != based_on {
                    self.write_status(state, "writes the status", Some(based_on), wanted, false);
                }
            }
        }
    }

    fn act(&mut self, state: &State, pass: &Pass, thought: &Thought, action: &Action<Zone>) {
        if let Some(wrong) = safety::of_decision(state.daemon(self.who), pass.looks, thought, action) {
            self.emit_judged("decides", None, *state, Some(wrong));
        }
        match action {
            Action::AddFinalizer => self.add_finalizer(state),
            Action::CreateStatus => {
                // R3's finding is a failure.
                let status = new_status(None, Stage::Failed, thought.ran);
                self.write_status(state, "creates the status", None, status, true);
            }
            Action::WriteClaim { scopes } => self.write_claim(state, thought, mind::tried(scopes)),
            Action::CreateInstance { scope } => self.read_request_to_create(state, mind::place(scope)),
            Action::StartInstance { scope, id } => {
                self.start(state, mind::place(scope), mind::is_current(id));
            }
            Action::DeleteLeftovers { scope } => self.delete(state, mind::place(scope), true, false),
            Action::DeleteInstance { scope, id } => {
                let at = At::Delete {
                    place: mind::place(scope),
                    leftovers: id.is_none(),
                    current: id.as_deref().is_some_and(mind::is_current),
                };
                self.once_drained(state, at);
            }
            Action::WritePatch { .. } => self.write_patch(state, pass, thought),
            Action::TearDownPatch { .. } => self.tear_down_patch(state),
            Action::DestroyPatch { .. } => self.destroy_patch(state),
            Action::TearDownStatus => self.tear_down_status(state),
            Action::DestroyStatus => self.once_drained(state, At::DestroyStatus),
            Action::DestroyMachineResource => self.once_drained(state, At::EndResource),
            Action::RemoveFinalizer => self.once_drained(state, At::RemoveFinalizer),
            Action::RegisterSchematic | Action::StartImport { .. } => {
                self.emit_judged("prepares", None, *state, Some("schematic and image are there"));
            }
        }
    }

    /// A write that took effect or not; either way the resource is known afterwards. `None`: refused.
    fn either(&mut self, what: &'static str, lost: &'static str, done: Option<State>, not_done: State) {
        match done {
            Some(done) => {
                self.end(what, done);
                self.end(lost, not_done);
            }
            None => self.end("writes, and the world has moved on", not_done),
        }
    }

    fn add_finalizer(&mut self, state: &State) {
        let known = state.daemon(self.who).request;
        let mut not_done = *state;
        not_done.daemon_mut(self.who).request = state.world.request;
        let done = (known == state.world.request)
            .then_some(known)
            .flatten()
            .filter(|request| request.running)
            .map(|request| {
                let request = Some(Request {
                    finalizer: true,
                    ..request
                });
                let mut done = *state;
                done.world.request = request;
                done.daemon_mut(self.who).request = request;
                done
            });
        self.either("adds the finalizer", "fails to add the finalizer", done, not_done);
    }

    /// write.rs, `remove_finalizer`: after the Get, an update of the version in the store.
    fn remove_finalizer(&mut self, state: &State) {
        let known = state.daemon(self.who).request;
        let mut not_done = *state;
        not_done.daemon_mut(self.who).request = state.world.request;
        not_done.daemon_mut(self.who).at = At::Idle;
        let Some(request) = known.filter(|_| known == state.world.request) else {
            return self.end("writes, and the world has moved on", not_done);
        };
        let request = Some(Request {
            finalizer: false,
            ..request
        });
        let mut done = *state;
        done.world.request = request;
        let daemon = done.daemon_mut(self.who);
        daemon.request = request;
        daemon.at = At::Idle;
        let wrong = safety::of_the_end(state);
        self.emit_judged("removes the finalizer", None, done, wrong);
        self.end("fails to remove the finalizer", not_done);
    }

    fn write_claim(&mut self, state: &State, thought: &Thought, tried: Tried) {
        let daemon = state.daemon(self.who);
        let Some(request) = daemon.request else {
            return self.end("has no request to claim for", *state);
        };
        let claim = Some(Claim {
            incarnation: request.incarnation,
            tried,
        });
        let known = daemon.status;
        let status = match known {
            None => new_status(claim, Stage::Provisioning, thought.ran),
            Some(status) => Status {
                claim,
                ran: status.ran || thought.ran,
                // What ran keeps its stage.
                stage: if thought.ran {
                    status.stage
                } else {
                    Stage::Provisioning
                },
                ..status
            },
        };
        self.write_status(state, "writes the claim", known, status, true);
    }

    /// A create or an update of the status, based on what the store holds.
    fn write_status(
        &mut self,
        state: &State,
        what: &'static str,
        based_on: Option<Status>,
        status: Status,
        running: bool,
    ) {
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_status(state.world.status);
        let claims = self.model.scenario.two_scopes && status.claim.is_some();
        let is_current = state.world.status == based_on;
        let in_phase = !running || based_on.is_none_or(|based_on| based_on.running);
        let done = (is_current && in_phase).then(|| {
            let mut done = *state;
            done.world.take_status(status);
            let daemon = done.daemon_mut(self.who);
            daemon.hear_status(Some(status));
            if claims && daemon.doubt == Doubt::Unasked {
                daemon.doubt = Doubt::Settled;
            }
            done
        });
        self.either(what, "fails to write the status", done, not_done);
    }

    fn write_patch(&mut self, state: &State, pass: &Pass, thought: &Thought) {
        let of = thought.places.iter().find_map(|place| match pass.looks[*place] {
            Look::Ours { current, .. } => Some(if current { Uuid::Of(*place) } else { Uuid::Past }),
            _ => None,
        });
        let Some(of) = of else {
            return self.end("has no instance to write of", *state);
        };
        let known = state.daemon(self.who).patch;
        let patch = match known {
            Some(patch) => Patch { of, ..patch },
            None => Patch {
                running: true,
                held: false,
                of,
            },
        };
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_patch(state.world.patch);
        let done = (known == state.world.patch && patch.running).then(|| {
            let mut done = *state;
            done.world.patch = Some(patch);
            done.daemon_mut(self.who).hear_patch(Some(patch));
            done
        });
        self.either("writes the patch", "fails to write the patch", done, not_done);
    }

    /// write.rs, `tear_down`: the answer says nothing of finalizers, and the store keeps what it has.
    fn tear_down_patch(&mut self, state: &State) {
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_patch(state.world.patch);
        let mut done = *state;
        match &mut done.world.patch {
            Some(patch) => {
                patch.running = false;
                done.daemon_mut(self.who).patch_torn = true;
            }
            None => done.daemon_mut(self.who).hear_patch(None),
        }
        let mut unanswered = done;
        unanswered.daemon_mut(self.who).hear_patch(done.world.patch);
        self.end("tears the patch down", done);
        self.end("tears the patch down, without an answer", unanswered);
        self.end("fails to tear the patch down", not_done);
    }

    fn destroy_patch(&mut self, state: &State) {
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_patch(state.world.patch);
        let done = (!state.world.patch.is_some_and(|patch| patch.held)).then(|| {
            let mut done = *state;
            done.world.patch = None;
            done.daemon_mut(self.who).hear_patch(None);
            done
        });
        self.either("destroys the patch", "fails to destroy the patch", done, not_done);
    }

    fn tear_down_status(&mut self, state: &State) {
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_status(state.world.status);
        let wrong = safety::of_tearing_down(state);
        let mut done = *state;
        match &mut done.world.status {
            Some(status) => {
                status.running = false;
                done.world.drained |= !status.held;
                done.daemon_mut(self.who).status_torn = true;
            }
            None => done.daemon_mut(self.who).hear_status(None),
        }
        done.daemon_mut(self.who).at = At::Idle;
        let mut unanswered = done;
        unanswered.daemon_mut(self.who).hear_status(done.world.status);
        self.emit_judged("tears the status down", None, done, wrong);
        self.end("tears the status down, without an answer", unanswered);
        self.end("fails to tear the status down", not_done);
    }

    /// act.rs, `drained`: a fresh Get of the status, once in a teardown.
    fn once_drained(&mut self, state: &State, at: At) {
        let mut next = *state;
        let daemon = next.daemon_mut(self.who);
        if daemon.drained {
            daemon.at = at;
            return self.take(&next);
        }
        daemon.hear_status(state.world.status);
        let drained = state
            .world
            .status
            .is_none_or(|status| !status.running && !status.held);
        if drained {
            daemon.drained = true;
            daemon.at = at;
            self.emit("reads the status: drained", None, next);
        } else {
            self.end("reads the status: not drained", next);
        }
    }

    fn destroy_status(&mut self, state: &State) {
        let mut not_done = *state;
        not_done.daemon_mut(self.who).hear_status(state.world.status);
        not_done.daemon_mut(self.who).at = At::Idle;
        if state.world.status.is_some_and(|status| status.held) {
            return self.end("is refused: the status is held", not_done);
        }
        let mut done = not_done;
        done.world.status = None;
        done.daemon_mut(self.who).hear_status(None);
        let unanswered = done;
        done.daemon_mut(self.who).ended = true;
        let wrong = state.world.status.and_then(|_| safety::of_the_end(state));
        self.emit_judged("destroys the status", None, done, wrong);
        self.end("destroys the status, without an answer", unanswered);
        self.end("fails to destroy the status", not_done);
    }

    /// write.rs, `destroy_machine_resource`: teardown, then destroy.
    fn end_resource(&mut self, state: &State) {
        let mut not_done = *state;
        let daemon = not_done.daemon_mut(self.who);
        daemon.resource = state.world.resource;
        daemon.at = At::Idle;
        let mut done = *state;
        match &mut done.world.resource {
            Some(resource) if resource.running => {
                resource.running = false;
                self.emit("tears the machine resource down", None, done);
            }
            _ => {
                done.world.resource = None;
                let daemon = done.daemon_mut(self.who);
                daemon.resource = None;
                daemon.at = At::Idle;
                let wrong = state.world.resource.and_then(|_| safety::of_the_end(state));
                self.emit_judged("destroys the machine resource", None, done, wrong);
            }
        }
        self.end("fails to end the machine resource", not_done);
    }

    /// provision.rs, `agreed`: first the request.
    fn read_request_to_create(&mut self, state: &State, place: Place) {
        let mut next = *state;
        let daemon = next.daemon_mut(self.who);
        let known = daemon.request;
        daemon.request = state.world.request;
        let agrees = same_incarnation(known, state.world.request)
            && state
                .world
                .request
                .is_some_and(|request| request.running && request.finalizer);
        if agrees {
            daemon.at = At::RequestAgreed(place);
            self.emit("reads the request: agreed", Some(place), next);
            self.end("cannot read the request", *state);
        } else {
            self.end("reads the request: it has changed", next);
        }
    }

    /// provision.rs, `agreed`: then the status.
    fn read_status_to_create(&mut self, state: &State, place: Place) {
        let mut next = *state;
        let daemon = next.daemon_mut(self.who);
        let known = daemon.status.and_then(|status| status.claim);
        daemon.hear_status(state.world.status);
        let agrees = state.world.status.is_some_and(|status| {
            status.running && !status.ran && status.stage != Stage::Provisioned && status.claim == known
        });
        if agrees {
            daemon.at = At::Agreed(place);
            self.emit("reads the status: agreed", Some(place), next);
        } else {
            self.end("reads the status: it has changed", next);
        }
        self.end("cannot read the status", *state);
    }

    fn create(&mut self, state: &State, place: Place) {
        let mut failed = *state;
        let daemon = failed.daemon_mut(self.who);
        daemon.at = At::Idle;
        daemon.looked = None;
        daemon.made = Made::Failed;
        let answered = daemon.doubt;
        if self.model.scenario.two_scopes {
            daemon.doubt = Doubt::Open;
        }
        let place_of = Some(place);
        let fine = |mut state: State, who: usize| {
            state.daemon_mut(who).made = Made::Fine;
            state.daemon_mut(who).doubt = answered;
            state
        };
        match state.world.slots[place] {
            Slot::Nothing => {
                let wrong = safety::of_creation(state, place);
                let mut made = failed;
                made.put(
                    place,
                    Slot::Ours {
                        power: Power::Stopped,
                        bare: false,
                    },
                );
                self.emit_judged("creates the instance", place_of, fine(made, self.who), wrong);
                self.emit("creates the instance, without an answer", place_of, made);
                self.emit("fails to create the instance", place_of, failed);
                let mut in_flight = failed;
                in_flight.world.in_flight[place] = true;
                self.emit_judged(
                    "sends a creation off and hears nothing",
                    place_of,
                    in_flight,
                    wrong,
                );
                let mut half = failed;
                half.put(place, Slot::Remains);
                self.emit("creates half of the instance", place_of, half);
                if self.model.scenario.lease {
                    failed.daemon_mut(self.who).made = Made::Exhausted;
                    failed.daemon_mut(self.who).doubt = answered;
                    self.emit("hears that the scope is exhausted", place_of, failed);
                }
            }
            // Law 1.
            Slot::Ours { bare: false, .. } => {
                self.emit("creates what is there already", place_of, fine(failed, self.who));
                self.emit("creates what is there, without an answer", place_of, failed);
            }
            Slot::Ours { bare: true, .. } | Slot::Foreign | Slot::Remains => {
                self.emit("is refused: the name is taken", place_of, failed);
            }
        }
    }

    fn start(&mut self, state: &State, place: Place, current: bool) {
        let mut failed = *state;
        failed.daemon_mut(self.who).at = At::Idle;
        failed.daemon_mut(self.who).looked = None;
        if let Slot::Ours {
            power: Power::Stopped,
            bare,
        } = state.world.slots[place]
            && current
        {
            let mut started = failed;
            started.put(
                place,
                Slot::Ours {
                    power: Power::Starting,
                    bare,
                },
            );
            let wrong = safety::of_start(state, place);
            self.emit_judged("starts the instance", Some(place), started, wrong);
        }
        self.emit("fails to start the instance", Some(place), failed);
    }

    fn delete(&mut self, state: &State, place: Place, leftovers: bool, current: bool) {
        let mut nothing = *state;
        nothing.daemon_mut(self.who).at = At::Idle;
        nothing.daemon_mut(self.who).looked = None;
        let rest = match state.world.slots[place] {
            Slot::Remains if leftovers => Some(Slot::Nothing),
            Slot::Ours { power, bare } if current && !leftovers => match power {
                Power::Running => Some(Slot::Ours {
                    power: Power::Stopping,
                    bare,
                }),
                Power::Stopped | Power::Broken => Some(Slot::Remains),
                Power::Starting | Power::Stopping => None,
            },
            _ => None,
        };
        if let Some(rest) = rest {
            if rest == Slot::Remains && state.outlives(place) {
                return;
            }
            let wrong = (!leftovers).then(|| safety::of_deletion(state)).flatten();
            let mut done = nothing;
            done.put(place, rest);
            self.emit_judged("deletes a step", Some(place), done, wrong);
        }
        self.emit("deletes nothing", Some(place), nothing);
    }
}

/// observe.rs, `good_for`.
fn lasts(look: Look) -> bool {
    match look {
        Look::Nothing { .. } => true,
        Look::Ours { power, .. } => matches!(power, Power::Running | Power::Stopped),
        Look::Unasked | Look::Unknown | Look::Remains | Look::Foreign => false,
    }
}

fn same_incarnation(known: Option<Request>, fresh: Option<Request>) -> bool {
    known
        .zip(fresh)
        .is_some_and(|(known, fresh)| known.incarnation == fresh.incarnation)
}

fn new_status(claim: Option<Claim>, stage: Stage, ran: bool) -> Status {
    Status {
        running: true,
        held: false,
        claim,
        ran,
        stage,
        uuid: Uuid::None,
    }
}
