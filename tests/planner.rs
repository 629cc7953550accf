//! The planner's tables, row by row, and what holds from every start.

use std::collections::BTreeMap;
use std::time::Duration;

use omni_infra_provider::backends::sim::Zone;
use omni_infra_provider::cloud::{ErrorKind, Found, Instance, InstanceState, Legacy, Timestamp};
use omni_infra_provider::machine::Pace;
use omni_infra_provider::machine::action::{
    Action, ActionKind, Ask, Decision, Finding, Look, Plan, Reason, Step,
};
use omni_infra_provider::machine::desired::Goal;
use omni_infra_provider::machine::observed::{
    By, Created, Failure, ImageSeen, Observed, PatchSeen, Placement, Seen, StatusSeen,
};
use omni_infra_provider::machine::plan::plan;
use omni_infra_provider::omni::kinds::Stage;
use proptest::prelude::*;

const NOW: Timestamp = Timestamp(1_000_000_000);
const UUID: &str = "00000000-0000-4000-8000-000000000001";

fn zone(name: &str) -> Zone {
    Zone(name.to_owned())
}

fn run_goal() -> Goal<Zone> {
    Goal::Run {
        scopes: vec![zone("a")],
    }
}

fn invalid() -> Goal<Zone> {
    Goal::Invalid {
        reason: "size must be at least 1".to_owned(),
        scopes: Some(vec![zone("a")]),
    }
}

fn tear_down() -> Goal<Zone> {
    Goal::TearDown {
        scopes: Some(vec![zone("a")]),
    }
}

const GONE: Goal<Zone> = Goal::Gone { superseded: false };

/// What is seen of a request that has a finalizer and a claim and nothing else yet.
fn claimed() -> Observed<Zone> {
    Observed {
        finalizer: true,
        request_confirmed: false,
        status: Some(StatusSeen {
            tearing_down: false,
            held: true,
            stage: Stage::Provisioning,
            uuid: String::new(),
            placement: Some(Placement {
                created: 1,
                scopes: vec![zone("a")],
            }),
            ran: false,
        }),
        machine_resource: false,
        legacy: None,
        patches: Vec::new(),
        missing_patches: Vec::new(),
        registered: false,
        scopes: vec![(zone("a"), known(Found::Nothing))],
        schematic: true,
        image: ImageSeen::Present,
        failures: BTreeMap::new(),
        created: None,
        unsettled: None,
        deleting: None,
        ended: false,
        teardown_seen: None,
        torn_down: false,
        claim_lost: false,
        running_since: None,
        last_running: None,
        lease: false,
    }
}

fn known(found: Found) -> Seen {
    Seen::Known {
        found,
        by: By::Find,
        at: NOW,
    }
}

fn instance(state: InstanceState) -> Found {
    Found::Ours(Instance {
        name: "web-x7k".to_owned(),
        id: UUID.to_owned(),
        uuid: Some(UUID.to_owned()),
        node_provider_id: Some(format!("sim://{UUID}")),
        state,
        started: Some(NOW),
        mark: None,
    })
}

/// A claimed request whose instance is there, in this state, with its UUID published.
fn with(state: InstanceState) -> Observed<Zone> {
    let mut seen = claimed();
    seen.scopes = vec![(zone("a"), known(instance(state)))];
    seen.status.as_mut().unwrap().uuid = UUID.to_owned();
    seen
}

fn ran(mut seen: Observed<Zone>) -> Observed<Zone> {
    seen.status.as_mut().unwrap().ran = true;
    seen
}

fn status(seen: &mut Observed<Zone>) -> &mut StatusSeen<Zone> {
    seen.status.as_mut().unwrap()
}

fn failure(kind: ErrorKind, not_before: Timestamp) -> Failure {
    Failure {
        kind,
        cause: "no".to_owned(),
        not_before,
    }
}

fn unknown() -> Seen {
    Seen::Unknown(failure(ErrorKind::Unavailable, NOW.after(Duration::from_secs(1))))
}

fn decide(goal: &Goal<Zone>, seen: &Observed<Zone>) -> Decision<Zone> {
    plan(goal, seen, NOW, &Pace::default())
}

#[track_caller]
fn planned(goal: &Goal<Zone>, seen: &Observed<Zone>) -> Plan<Zone> {
    match decide(goal, seen) {
        Decision::Plan(plan) => plan,
        Decision::Ask(ask) => panic!("expected a plan, was asked for {ask:?}"),
    }
}

#[track_caller]
fn acts(goal: &Goal<Zone>, seen: &Observed<Zone>, action: Action<Zone>) {
    let plan = planned(goal, seen);
    assert_eq!(plan.action, Some(action));
    assert_eq!(plan.look, Look::Now);
}

#[track_caller]
fn waits(goal: &Goal<Zone>, seen: &Observed<Zone>, finding: Finding) {
    let plan = planned(goal, seen);
    assert_eq!((plan.action, plan.finding), (None, finding));
}

#[track_caller]
fn asks(goal: &Goal<Zone>, seen: &Observed<Zone>, ask: Ask) {
    assert_eq!(decide(goal, seen), Decision::Ask(ask));
}

fn a() -> Zone {
    zone("a")
}

#[test]
fn r1_the_finalizer_comes_before_everything() {
    let mut seen = claimed();
    seen.finalizer = false;
    seen.status = None;
    seen.scopes = vec![(a(), Seen::Unasked)];
    acts(&run_goal(), &seen, Action::AddFinalizer);
    acts(&invalid(), &seen, Action::AddFinalizer);
}

#[test]
fn r2_a_status_torn_down_under_a_running_request_is_kept_and_said() {
    let mut seen = claimed();
    status(&mut seen).tearing_down = true;
    asks(&run_goal(), &seen, Ask::Request);
    seen.request_confirmed = true;
    waits(&run_goal(), &seen, Finding::Failed(Reason::StatusTornDown));
}

#[test]
fn r3_a_bad_class_is_failed_before_anything_is_created() {
    let mut seen = claimed();
    seen.status = None;
    seen.scopes = vec![(a(), Seen::Unasked)];
    acts(&invalid(), &seen, Action::CreateStatus);
    seen.status = claimed().status;
    status(&mut seen).placement = None;
    let reason = "size must be at least 1".to_owned();
    waits(&invalid(), &seen, Finding::Failed(Reason::Invalid(reason)));
}

#[test]
fn r4_the_claim_is_written_before_the_first_look_where_there_is_one_scope() {
    let mut seen = claimed();
    seen.status = None;
    seen.scopes = vec![(a(), Seen::Unasked)];
    acts(&run_goal(), &seen, Action::WriteClaim { scopes: vec![a()] });
    seen.legacy = Some(Legacy {
        scope: zone("z"),
        id: None,
    });
    let scopes = vec![zone("z")];
    acts(
        &run_goal(),
        &seen,
        Action::WriteClaim {
            scopes: scopes.clone(),
        },
    );
    acts(&invalid(), &seen, Action::WriteClaim { scopes });
}

#[test]
fn r4_with_several_scopes_all_are_known_before_one_is_claimed() {
    let goal = Goal::Run {
        scopes: vec![a(), zone("b")],
    };
    let mut seen = claimed();
    seen.status = None;
    seen.scopes = vec![(a(), Seen::Unasked), (zone("b"), Seen::Unasked)];
    asks(&goal, &seen, Ask::Instance);
    seen.scopes = vec![(a(), known(Found::Nothing)), (zone("b"), unknown())];
    assert!(matches!(planned(&goal, &seen).finding, Finding::Unseen(_)));
    seen.scopes = vec![
        (a(), known(Found::Nothing)),
        (zone("b"), known(instance(InstanceState::Running))),
    ];
    acts(
        &goal,
        &seen,
        Action::WriteClaim {
            scopes: vec![zone("b")],
        },
    );
    seen.scopes = vec![(a(), known(Found::Nothing)), (zone("b"), known(Found::Nothing))];
    acts(&goal, &seen, Action::WriteClaim { scopes: vec![a()] });
}

#[test]
fn r4_a_claim_that_vanished_is_written_anew_only_for_a_request_that_is_still_there() {
    let mut seen = claimed();
    seen.status = None;
    seen.claim_lost = true;
    asks(&run_goal(), &seen, Ask::Request);
    seen.request_confirmed = true;
    acts(&run_goal(), &seen, Action::WriteClaim { scopes: vec![a()] });
}

#[test]
fn r5_what_cannot_be_seen_moves_nothing() {
    let mut seen = claimed();
    seen.scopes = vec![(a(), unknown())];
    for goal in [run_goal(), invalid()] {
        let plan = planned(&goal, &seen);
        assert_eq!(plan.action, None);
        assert!(matches!(plan.finding, Finding::Unseen(_)));
    }
}

#[test]
fn r6_a_strangers_instance_of_our_name_is_left_alone() {
    let mut seen = claimed();
    let what = "instance web-x7k of a person".to_owned();
    seen.scopes = vec![(a(), known(Found::Foreign { what: what.clone() }))];
    waits(&run_goal(), &seen, Finding::Failed(Reason::Foreign(what)));
}

#[test]
fn r7_what_ran_and_is_gone_is_never_made_anew() {
    let mut seen = ran(claimed());
    waits(
        &run_goal(),
        &seen,
        Finding::Failed(Reason::Vanished { last_seen: None }),
    );
    seen.scopes = vec![(a(), known(Found::Remains { since: None }))];
    waits(
        &run_goal(),
        &seen,
        Finding::Failed(Reason::Vanished { last_seen: None }),
    );
    seen.scopes = vec![(
        a(),
        Seen::Known {
            found: Found::Nothing,
            by: By::List,
            at: NOW,
        },
    )];
    asks(&run_goal(), &seen, Ask::InstanceByFind);
    let mut registered = claimed();
    registered.registered = true;
    assert_eq!(planned(&run_goal(), &registered).action, None);
}

#[test]
fn r8_leftovers_are_removed_once_no_creation_can_be_in_flight() {
    let mut seen = claimed();
    let young = Timestamp(NOW.0 - 1_000);
    seen.scopes = vec![(a(), known(Found::Remains { since: Some(young) }))];
    let plan = planned(&run_goal(), &seen);
    assert_eq!(
        (plan.action, plan.look),
        (None, Look::At(young.after(Pace::default().create)))
    );
    seen.created = Some(Created::Failed(ErrorKind::Unavailable));
    acts(&run_goal(), &seen, Action::DeleteLeftovers { scope: a() });
    seen.created = None;
    let old = Timestamp(NOW.0 - 61_000);
    seen.scopes = vec![(a(), known(Found::Remains { since: Some(old) }))];
    acts(&run_goal(), &seen, Action::DeleteLeftovers { scope: a() });
    acts(&invalid(), &seen, Action::DeleteLeftovers { scope: a() });
}

#[test]
fn r9_nothing_is_created_for_a_class_that_became_invalid() {
    let reason = "size must be at least 1".to_owned();
    waits(&invalid(), &claimed(), Finding::Failed(Reason::Invalid(reason)));
}

#[test]
fn r10_the_schematic_comes_before_the_image() {
    let mut seen = claimed();
    seen.schematic = false;
    seen.image = ImageSeen::Unasked;
    acts(&run_goal(), &seen, Action::RegisterSchematic);
}

#[test]
fn r11_an_absent_image_is_imported_and_waited_for_without_a_worker() {
    let mut seen = claimed();
    seen.image = ImageSeen::Unasked;
    asks(&run_goal(), &seen, Ask::Image);
    seen.image = ImageSeen::Absent;
    acts(&run_goal(), &seen, Action::StartImport { scope: a() });
    seen.image = ImageSeen::Importing(Some(43));
    waits(&run_goal(), &seen, Finding::Step(Step::ImportingImage(Some(43))));
    let later = NOW.after(Duration::from_secs(60));
    seen.image = ImageSeen::Failed(failure(ErrorKind::Rejected, later));
    let plan = planned(&run_goal(), &seen);
    assert_eq!((plan.action, plan.look), (None, Look::At(later)));
}

#[test]
fn r12_the_next_scope_needs_the_lease_and_a_find_in_every_claimed_one() {
    let goal = Goal::Run {
        scopes: vec![a(), zone("b")],
    };
    let mut seen = claimed();
    seen.created = Some(Created::Failed(ErrorKind::Exhausted));
    acts(&goal, &seen, Action::CreateInstance { scope: a() });
    seen.lease = true;
    let scopes = vec![a(), zone("b")];
    acts(&goal, &seen, Action::WriteClaim { scopes });
    seen.scopes = vec![(
        a(),
        Seen::Known {
            found: Found::Nothing,
            by: By::List,
            at: NOW,
        },
    )];
    asks(&goal, &seen, Ask::InstanceByFind);
}

#[test]
fn r12_the_next_scope_waits_for_a_creation_that_has_no_answer() {
    let pace = Pace::default();
    let goal = Goal::Run {
        scopes: vec![a(), zone("b")],
    };
    let mut seen = claimed();
    seen.lease = true;
    seen.created = Some(Created::Failed(ErrorKind::Exhausted));
    seen.unsettled = Some(NOW);
    acts(&goal, &seen, Action::CreateInstance { scope: a() });
    let Decision::Plan(later) = plan(&goal, &seen, NOW.after(pace.settle), &pace) else {
        unreachable!()
    };
    let scopes = vec![a(), zone("b")];
    assert_eq!(later.action, Some(Action::WriteClaim { scopes }));
}

#[test]
fn r13_the_instance_is_created_in_the_claimed_scope() {
    acts(&run_goal(), &claimed(), Action::CreateInstance { scope: a() });
    let mut seen = claimed();
    let later = NOW.after(Duration::from_secs(9));
    seen.failures
        .insert(ActionKind::Create, failure(ErrorKind::Exhausted, later));
    let plan = planned(&run_goal(), &seen);
    assert_eq!((plan.action, plan.look), (None, Look::At(later)));
    assert!(matches!(plan.finding, Finding::Blocked { .. }));
}

#[test]
fn r14_what_was_stopped_outside_of_omni_is_said_and_left() {
    waits(
        &run_goal(),
        &ran(with(InstanceState::Stopped)),
        Finding::Failed(Reason::Stopped),
    );
}

#[test]
fn r15_a_broken_instance_is_said_in_the_clouds_words() {
    let seen = with(InstanceState::Broken("failed".to_owned()));
    waits(
        &run_goal(),
        &seen,
        Finding::Failed(Reason::Broken("failed".to_owned())),
    );
}

#[test]
fn r16_the_uuid_is_published_before_the_patches() {
    let mut seen = with(InstanceState::Stopped);
    status(&mut seen).uuid = String::new();
    seen.missing_patches = vec!["provider-id-web-x7k".to_owned()];
    let plan = planned(&run_goal(), &seen);
    assert_eq!(
        (plan.action, plan.finding, plan.look),
        (None, Finding::Keep, Look::Now)
    );
}

#[test]
fn r17_the_patches_are_written_before_the_start() {
    let id = "provider-id-web-x7k".to_owned();
    let mut seen = with(InstanceState::Stopped);
    seen.missing_patches = vec![id.clone()];
    acts(&run_goal(), &seen, Action::WritePatch { id: id.clone() });
    assert_ne!(
        planned(&invalid(), &seen).action,
        Some(Action::WritePatch { id: id.clone() })
    );

    let mut patch = PatchSeen {
        id: id.clone(),
        tearing_down: false,
        held: true,
        differs: true,
    };
    seen.missing_patches.clear();
    seen.patches = vec![patch.clone()];
    acts(&run_goal(), &seen, Action::WritePatch { id: id.clone() });
    patch.tearing_down = true;
    seen.patches = vec![patch.clone()];
    assert_eq!(planned(&run_goal(), &seen).action, None);
    patch.held = false;
    seen.patches = vec![patch];
    acts(&run_goal(), &seen, Action::DestroyPatch { id });
    seen.machine_resource = true;
    assert!(matches!(
        planned(&run_goal(), &seen).action,
        Some(Action::StartInstance { .. })
    ));
}

#[test]
fn r18_a_stopped_instance_that_never_ran_is_started() {
    let action = Action::StartInstance {
        scope: a(),
        id: UUID.to_owned(),
    };
    acts(&run_goal(), &with(InstanceState::Stopped), action);
    let reason = "size must be at least 1".to_owned();
    waits(
        &invalid(),
        &with(InstanceState::Stopped),
        Finding::Failed(Reason::Invalid(reason)),
    );
}

#[test]
fn r19_a_starting_instance_is_waited_for() {
    waits(
        &run_goal(),
        &with(InstanceState::Starting),
        Finding::Step(Step::Starting),
    );
}

#[test]
fn r20_a_machine_that_did_not_join_in_time_is_failed() {
    let mut seen = with(InstanceState::Running);
    let started = Timestamp(NOW.0 - 15 * 60 * 1000);
    let Seen::Known {
        found: Found::Ours(instance),
        ..
    } = &mut seen.scopes[0].1
    else {
        unreachable!()
    };
    instance.started = Some(started);
    waits(&run_goal(), &seen, Finding::Failed(Reason::NotJoined { started }));
    seen.registered = true;
    waits(&run_goal(), &seen, Finding::Provisioned);
}

#[test]
fn r21_a_running_instance_is_provisioned() {
    waits(&run_goal(), &with(InstanceState::Running), Finding::Provisioned);
    waits(&invalid(), &with(InstanceState::Running), Finding::Provisioned);
}

/// A torn-down request whose status is drained and whose instance ran.
fn drained() -> Observed<Zone> {
    let mut seen = ran(claimed());
    status(&mut seen).tearing_down = true;
    status(&mut seen).held = false;
    seen.teardown_seen = Some(NOW);
    seen.torn_down = true;
    seen
}

#[test]
fn t1_patches_go_first() {
    let patch = |tearing_down, held| PatchSeen {
        id: "p".to_owned(),
        tearing_down,
        held,
        differs: false,
    };
    let mut seen = ran(with(InstanceState::Running));
    let id = "p".to_owned();
    for goal in [tear_down(), GONE] {
        seen.patches = vec![patch(false, true)];
        acts(&goal, &seen, Action::TearDownPatch { id: id.clone() });
        seen.patches = vec![patch(true, true)];
        waits(&goal, &seen, Finding::Keep);
        seen.patches = vec![patch(true, false)];
        acts(&goal, &seen, Action::DestroyPatch { id: id.clone() });
    }
}

#[test]
fn t2_t3_nothing_is_deleted_while_omni_drains() {
    let mut seen = ran(with(InstanceState::Running));
    for goal in [tear_down(), GONE] {
        status(&mut seen).tearing_down = false;
        acts(&goal, &seen, Action::TearDownStatus);
        status(&mut seen).tearing_down = true;
        status(&mut seen).held = true;
        waits(&goal, &seen, Finding::Keep);
    }
}

#[test]
fn t4_what_cannot_be_seen_keeps_the_claim() {
    let mut seen = drained();
    seen.scopes = vec![(a(), unknown())];
    for goal in [tear_down(), GONE] {
        assert_eq!(planned(&goal, &seen).action, None);
    }
    // The other scope holds nothing, but one is unknown.
    seen.scopes = vec![(a(), known(Found::Nothing)), (zone("b"), unknown())];
    assert_eq!(planned(&tear_down(), &seen).action, None);
}

#[test]
fn t5_the_instance_is_deleted_by_its_vendor_id_and_leftovers_without() {
    let mut seen = drained();
    seen.scopes = vec![(a(), known(instance(InstanceState::Running)))];
    let action = Action::DeleteInstance {
        scope: a(),
        id: Some(UUID.to_owned()),
    };
    acts(&tear_down(), &seen, action);
    seen.scopes = vec![(a(), known(Found::Remains { since: None }))];
    acts(&GONE, &seen, Action::DeleteInstance { scope: a(), id: None });
}

#[test]
fn t5_of_a_request_that_vanished_without_a_teardown_nothing_is_deleted_for_a_while() {
    let mut seen = drained();
    seen.torn_down = false;
    for found in [instance(InstanceState::Running), Found::Remains { since: None }] {
        seen.scopes = vec![(a(), known(found))];
        waits(&GONE, &seen, Finding::Keep);
        let late = NOW.after(Pace::default().orphan_age);
        let deletes = |plan: Plan<Zone>| matches!(plan.action, Some(Action::DeleteInstance { .. }));
        let Decision::Plan(then) = plan(&GONE, &seen, late, &Pace::default()) else {
            panic!("a question");
        };
        assert!(deletes(then));
        // What is held by our finalizer, or was made anew under the same ID, does not wait.
        assert!(deletes(planned(&tear_down(), &seen)));
        assert!(deletes(planned(&Goal::Gone { superseded: true }, &seen)));
    }
}

#[test]
fn t6_the_claim_goes_only_after_a_find_in_every_scope_said_nothing() {
    let mut seen = drained();
    acts(&tear_down(), &seen, Action::DestroyStatus);
    acts(&GONE, &seen, Action::DestroyStatus);
    seen.scopes = vec![(
        a(),
        Seen::Known {
            found: Found::Nothing,
            by: By::List,
            at: NOW,
        },
    )];
    asks(&tear_down(), &seen, Ask::InstanceByFind);
    let before = Timestamp(NOW.0 - 1);
    let earlier = Seen::Known {
        found: Found::Nothing,
        by: By::Find,
        at: before,
    };
    seen.scopes = vec![(a(), earlier)];
    asks(&tear_down(), &seen, Ask::InstanceByFind);
    let what = "somebody's".to_owned();
    seen.scopes = vec![(a(), known(Found::Foreign { what }))];
    acts(&tear_down(), &seen, Action::DestroyStatus);
    waits(
        &Goal::Gone { superseded: true },
        &seen,
        Finding::Failed(Reason::StatusTornDown),
    );
    seen.status = None;
    seen.ended = true;
    seen.machine_resource = true;
    acts(&tear_down(), &seen, Action::DestroyMachineResource);
}

#[test]
fn t6_what_never_ran_settles_first_since_a_creation_may_still_land() {
    let pace = Pace::default();
    let mut seen = drained();
    status(&mut seen).ran = false;
    let plan_at = |seen: &Observed<Zone>, now| plan(&tear_down(), seen, now, &pace);
    let ripe = NOW.after(pace.settle);
    let Decision::Plan(waiting) = plan_at(&seen, NOW) else {
        unreachable!()
    };
    assert_eq!((waiting.action, waiting.look), (None, Look::At(ripe)));
    // A find made before the time does not count.
    assert_eq!(plan_at(&seen, ripe), Decision::Ask(Ask::InstanceByFind));
    seen.scopes = vec![(
        a(),
        Seen::Known {
            found: Found::Nothing,
            by: By::Find,
            at: ripe,
        },
    )];
    let Decision::Plan(plan) = plan_at(&seen, ripe) else {
        unreachable!()
    };
    assert_eq!(plan.action, Some(Action::DestroyStatus));
}

#[test]
fn t6_a_registration_alone_does_not_settle_it_since_no_creation_asks_for_it() {
    let mut seen = drained();
    status(&mut seen).ran = false;
    seen.registered = true;
    assert_eq!(planned(&tear_down(), &seen).action, None);
    status(&mut seen).stage = Stage::Provisioned;
    acts(&tear_down(), &seen, Action::DestroyStatus);
}

#[test]
fn t7_the_finalizer_goes_last_of_all() {
    let mut seen = drained();
    seen.status = None;
    // Another process may have destroyed the status: without our own memory of it, a creation may still land.
    assert_eq!(planned(&tear_down(), &seen).action, None);
    seen.ended = true;
    acts(&tear_down(), &seen, Action::RemoveFinalizer);
    assert_eq!(planned(&GONE, &seen).look, Look::Done);
}

#[test]
fn a_request_that_tears_down_without_our_finalizer_is_left_alone() {
    let seen = with(InstanceState::Running);
    waits(&Goal::Leave, &seen, Finding::Keep);
}

/// A healthy world of one request, one zone: what each action does to it.
#[derive(Debug, Clone)]
struct World {
    goal: Goal<Zone>,
    seen: Observed<Zone>,
    now: Timestamp,
    request: bool,
}

impl World {
    /// Plans, answers questions truthfully, carries the action out; false once nothing is left to do.
    fn step(&mut self) -> bool {
        let pace = Pace::default();
        let mut asked = Vec::new();
        let plan = loop {
            match plan(&self.goal, &self.seen, self.now, &pace) {
                Decision::Plan(plan) => break plan,
                Decision::Ask(ask) => {
                    assert!(!asked.contains(&ask), "asked twice for {ask:?}");
                    asked.push(ask);
                    match ask {
                        Ask::Request => self.seen.request_confirmed = true,
                        Ask::Image => self.seen.image = ImageSeen::Absent,
                        Ask::Instance | Ask::InstanceByFind => {
                            for (_, seen) in &mut self.seen.scopes {
                                let found = match seen {
                                    Seen::Known { found, .. } => found.clone(),
                                    _ => Found::Nothing,
                                };
                                *seen = Seen::Known {
                                    found,
                                    by: By::Find,
                                    at: self.now,
                                };
                            }
                        }
                    }
                }
            }
        };
        self.publish(&plan.finding);
        let Some(action) = plan.action else {
            return self.wait(plan.look);
        };
        let unseen = self
            .seen
            .scopes
            .iter()
            .any(|(_, seen)| matches!(seen, Seen::Unknown(_)));
        let cloud = matches!(
            action.kind(),
            ActionKind::Create | ActionKind::Start | ActionKind::Delete
        );
        assert!(!(cloud && unseen), "{action:?} while a scope is unknown");
        assert!(
            !cloud || self.seen.finalizer || self.goal == GONE,
            "{action:?} without finalizer"
        );
        let before = self.seen.clone();
        self.apply(&action);
        assert_ne!(
            before, self.seen,
            "{action:?} changed nothing and would be repeated for ever"
        );
        true
    }

    fn publish(&mut self, finding: &Finding) {
        let uuid = match &self.seen.scopes.first() {
            Some((
                _,
                Seen::Known {
                    found: Found::Ours(instance),
                    ..
                },
            )) => instance.uuid.clone(),
            _ => None,
        };
        let Some(status) = &mut self.seen.status else {
            return;
        };
        match finding {
            Finding::Provisioned => {
                status.stage = Stage::Provisioned;
                status.ran = true;
            }
            Finding::Failed(_) => {
                status.ran |= status.stage == Stage::Provisioned;
                status.stage = Stage::Failed;
            }
            _ => {}
        }
        if let (Some(uuid), Goal::Run { .. } | Goal::Invalid { .. }) = (uuid, &self.goal) {
            status.uuid = uuid;
        }
    }

    fn wait(&mut self, look: Look) -> bool {
        match look {
            Look::At(at) => {
                self.now = self.now.max(at);
                self.see_again();
                // A machine that did not join is looked at for ever.
                !matches!(self.goal, Goal::Run { .. } | Goal::Invalid { .. })
                    || self
                        .seen
                        .status
                        .as_ref()
                        .is_none_or(|s| s.stage != Stage::Provisioned)
            }
            Look::Soon => {
                self.see_again();
                for (_, seen) in &mut self.seen.scopes {
                    if let Seen::Known {
                        found: Found::Ours(instance),
                        ..
                    } = seen
                        && instance.state == InstanceState::Starting
                    {
                        instance.state = InstanceState::Running;
                    }
                }
                true
            }
            Look::Now => true,
            Look::Event => {
                // What the event will be.
                let mut moved = false;
                if let Some(status) = &mut self.seen.status
                    && status.tearing_down
                    && status.held
                {
                    status.held = false;
                    moved = true;
                }
                for patch in &mut self.seen.patches {
                    moved |= patch.tearing_down && patch.held;
                    patch.held &= !patch.tearing_down;
                }
                if matches!(self.seen.image, ImageSeen::Importing(_)) {
                    self.seen.image = ImageSeen::Present;
                    moved = true;
                }
                moved
            }
            Look::Slow | Look::Done => false,
        }
    }

    /// Failures heal, and what was unknown can be seen again.
    fn see_again(&mut self) {
        for (_, seen) in &mut self.seen.scopes {
            if let Seen::Unknown(_) = seen {
                *seen = known(Found::Nothing);
            }
        }
        if let ImageSeen::Failed(_) = self.seen.image {
            self.seen.image = ImageSeen::Absent;
        }
    }

    fn apply(&mut self, action: &Action<Zone>) {
        let seen = &mut self.seen;
        seen.failures.remove(&action.kind());
        let set = |seen: &mut Observed<Zone>, scope: &Zone, found: Found| {
            for (known_scope, state) in &mut seen.scopes {
                if known_scope == scope {
                    *state = known(found.clone());
                }
            }
        };
        match action {
            Action::AddFinalizer => seen.finalizer = true,
            Action::CreateStatus => {
                let mut status = claimed().status.unwrap();
                status.placement = None;
                seen.status = Some(status);
            }
            Action::WriteClaim { scopes } => {
                let status = seen.status.get_or_insert_with(|| claimed().status.unwrap());
                status.placement = Some(Placement {
                    created: 1,
                    scopes: scopes.clone(),
                });
            }
            Action::RegisterSchematic => seen.schematic = true,
            Action::StartImport { .. } => seen.image = ImageSeen::Importing(None),
            Action::CreateInstance { scope } => set(seen, scope, instance(InstanceState::Stopped)),
            Action::StartInstance { scope, .. } => set(seen, scope, instance(InstanceState::Starting)),
            Action::DeleteLeftovers { scope } => set(seen, scope, Found::Nothing),
            Action::DeleteInstance { scope, id } => {
                let rest = match id {
                    Some(_) => Found::Remains { since: None },
                    None => Found::Nothing,
                };
                set(seen, scope, rest);
            }
            Action::WritePatch { id } => {
                seen.missing_patches.retain(|missing| missing != id);
                seen.patches.retain(|patch| patch.id != *id);
                seen.patches.push(PatchSeen {
                    id: id.clone(),
                    tearing_down: false,
                    held: true,
                    differs: false,
                });
            }
            Action::TearDownPatch { id } => {
                for patch in seen.patches.iter_mut().filter(|patch| patch.id == *id) {
                    patch.tearing_down = true;
                }
            }
            Action::DestroyPatch { id } => seen.patches.retain(|patch| patch.id != *id),
            Action::TearDownStatus => seen.status.as_mut().unwrap().tearing_down = true,
            Action::DestroyStatus => {
                seen.status = None;
                seen.ended = true;
            }
            Action::DestroyMachineResource => {
                seen.machine_resource = false;
                seen.legacy = None;
            }
            Action::RemoveFinalizer => {
                seen.finalizer = false;
                self.request = false;
                self.goal = GONE;
            }
        }
    }
}

fn any_found() -> impl Strategy<Value = Found> {
    prop_oneof![
        Just(Found::Nothing),
        Just(Found::Remains { since: None }),
        Just(Found::Remains { since: Some(NOW) }),
        Just(instance(InstanceState::Stopped)),
        Just(instance(InstanceState::Starting)),
        Just(instance(InstanceState::Running)),
        Just(instance(InstanceState::Broken("failed".to_owned()))),
        Just(Found::Foreign {
            what: "somebody's".to_owned()
        }),
    ]
}

fn any_seen() -> impl Strategy<Value = Seen> {
    prop_oneof![
        1 => Just(Seen::Unasked),
        1 => Just(unknown()),
        6 => (any_found(), prop_oneof![Just(By::Find), Just(By::List)]).prop_map(|(found, by)| {
            // A list knows neither leftovers nor strangers.
            let by = match found {
                Found::Remains { .. } | Found::Foreign { .. } => By::Find,
                _ => by,
            };
            Seen::Known { found, by, at: NOW }
        }),
    ]
}

fn any_world() -> impl Strategy<Value = World> {
    let goals = prop_oneof![
        3 => Just(run_goal()),
        1 => Just(invalid()),
        2 => Just(tear_down()),
        1 => Just(GONE),
    ];
    let status = proptest::option::of((any::<[bool; 5]>(), 0..4usize));
    let patch = proptest::option::of(any::<[bool; 3]>());
    let image = prop_oneof![
        Just(ImageSeen::Unasked),
        Just(ImageSeen::Absent),
        Just(ImageSeen::Importing(None)),
        Just(ImageSeen::Failed(failure(
            ErrorKind::Rejected,
            NOW.after(Duration::from_secs(5))
        ))),
        Just(ImageSeen::Present),
    ];
    (goals, status, patch, image, any_seen(), any::<[bool; 5]>()).prop_map(
        |(goal, status, patch, image, scope, flags)| {
            let mut seen = claimed();
            seen.finalizer = flags[0] || goal == tear_down();
            seen.registered = flags[1];
            seen.schematic = flags[2];
            seen.machine_resource = flags[3];
            seen.legacy = (flags[3] && flags[4]).then(|| Legacy { scope: a(), id: None });
            seen.image = image;
            seen.scopes = vec![(a(), scope)];
            seen.teardown_seen = Some(NOW);
            seen.torn_down = flags[2];
            seen.claim_lost = flags[4];
            if flags[4] {
                seen.missing_patches = vec!["provider-id-web-x7k".to_owned()];
            }
            seen.patches = patch
                .map(|[tearing_down, held, differs]| PatchSeen {
                    id: "nameservers-web-x7k".to_owned(),
                    tearing_down,
                    held,
                    differs,
                })
                .into_iter()
                .collect();
            seen.status = status.map(|([tearing_down, held, uuid, placed, ran], stage)| StatusSeen {
                tearing_down,
                held,
                stage: [
                    Stage::Unknown,
                    Stage::Provisioning,
                    Stage::Provisioned,
                    Stage::Failed,
                ][stage],
                uuid: if uuid { UUID.to_owned() } else { String::new() },
                placement: placed.then(|| Placement {
                    created: 1,
                    scopes: vec![a()],
                }),
                ran,
            });
            World {
                request: goal != GONE,
                goal,
                seen,
                now: NOW,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// From any start a healthy world settles; on the way no action is repeated on an unchanged observation, nothing is
    /// mutated that cannot be seen, and what ran is never created again.
    #[test]
    fn from_any_start_a_healthy_world_settles(mut world in any_world()) {
        let ran = world.seen.ran();
        let start = world.clone();
        let mut passes = 0;
        loop {
            let created_before = world.seen.overall_is_ours();
            if !world.step() {
                break;
            }
            let created = !created_before && world.seen.overall_is_ours();
            prop_assert!(!(ran && created), "created again: {start:?}");
            passes += 1;
            prop_assert!(passes < 60, "does not settle: {start:?}\nended as {world:?}");
        }
        if world.goal == GONE {
            prop_assert!(world.seen.status.is_none() && !world.seen.machine_resource && world.seen.patches.is_empty());
            prop_assert!(!world.seen.overall_is_ours());
        }
    }
}

/// Whether our instance is seen anywhere.
trait Ours {
    fn overall_is_ours(&self) -> bool;
}

impl Ours for Observed<Zone> {
    fn overall_is_ours(&self) -> bool {
        self.scopes.iter().any(|(_, seen)| {
            matches!(
                seen,
                Seen::Known {
                    found: Found::Ours(_),
                    ..
                }
            )
        })
    }
}
