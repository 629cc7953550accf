//! The planner's tables, row by row, and what holds from every start.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use omni_infra_provider::backends::sim::Zone;
use omni_infra_provider::cloud::{ErrorKind, Found, Instance, InstanceState, Legacy, Replace, Timestamp};
use omni_infra_provider::machine::Pace;
use omni_infra_provider::machine::action::{
    Action, ActionKind, Ask, Decision, Finding, Look, Plan, Reason, Step, Then,
};
use omni_infra_provider::machine::desired::Goal;
use omni_infra_provider::machine::observed::{
    By, Created, Diagnosis, Failure, Former, ImageSeen, Observed, PatchSeen, Placement, Portion, Seen,
    StatusSeen,
};
use omni_infra_provider::machine::plan::plan;
use omni_infra_provider::machine::replace::{Budget, Loss};
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
        name: "web-x7k".to_owned(),
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
            replacing: None,
        }),
        machine_resource: false,
        legacy: None,
        patches: Vec::new(),
        missing_patches: Vec::new(),
        registered: false,
        scopes: vec![(zone("a"), known(Found::Nothing))],
        schematic: true,
        image: ImageSeen::Present,
        boots_from_medium: false,
        failures: BTreeMap::new(),
        created: None,
        claimed_since: Some(Timestamp(0)),
        deleting: None,
        ended: false,
        teardown_seen: None,
        torn_down: false,
        claim_lost: false,
        running_since: None,
        last_running: None,
        diagnosis: Diagnosis::Known(None),
        replace: Replace::default(),
        lost: None,
        budget: Budget::Unasked,
        former: Former::Unasked,
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
    Found::Ours(Arc::new(Instance {
        name: "web-x7k".to_owned(),
        id: UUID.to_owned(),
        uuid: Some(UUID.to_owned()),
        node_provider_id: Some(format!("sim://{UUID}")),
        state,
        started: Some(NOW),
        mark: None,
    }))
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
fn of_several_scopes_that_cannot_be_seen_the_one_that_is_longest_so_is_waited_for() {
    let goal = Goal::Run {
        scopes: vec![zone("a"), zone("b")],
    };
    let (soon, late) = (
        NOW.before(Duration::from_secs(1)),
        NOW.after(Duration::from_secs(100)),
    );
    for (a, b) in [(soon, late), (late, soon)] {
        let mut seen = claimed();
        let unseen = |until| Seen::Unknown(failure(ErrorKind::Unavailable, until));
        seen.scopes = vec![(zone("a"), unseen(a)), (zone("b"), unseen(b))];
        assert_eq!(planned(&goal, &seen).look, Look::At(late));
    }
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

fn gone(uuid: &str) -> Finding {
    Finding::Failed(Reason::Vanished {
        name: "web-x7k".to_owned(),
        uuid: uuid.to_owned(),
        last_seen: None,
    })
}

#[test]
fn r7_what_ran_and_is_gone_is_never_made_anew() {
    let mut seen = ran(claimed());
    waits(&run_goal(), &seen, gone(""));
    seen.scopes = vec![(a(), known(Found::Remains { since: None }))];
    waits(&run_goal(), &seen, gone(""));
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
    let portion = Some(Portion {
        received: 43,
        total: Some(100),
    });
    seen.image = ImageSeen::Importing(portion);
    waits(&run_goal(), &seen, Finding::Step(Step::ImportingImage(portion)));
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
    acts(&goal, &seen, Action::TakeLease);
    let later = NOW.after(Duration::from_secs(5));
    seen.failures
        .insert(ActionKind::Lease, failure(ErrorKind::Busy, later));
    let plan = planned(&goal, &seen);
    assert_eq!((plan.action, plan.look), (None, Look::At(later)));
    assert!(matches!(
        plan.finding,
        Finding::Blocked {
            step: Step::NextScope,
            ..
        }
    ));
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
fn r12_nobody_needs_the_lease_while_there_is_nothing_to_go_to() {
    let mut seen = claimed();
    seen.created = Some(Created::Failed(ErrorKind::Exhausted));
    acts(&run_goal(), &seen, Action::CreateInstance { scope: a() });
}

#[test]
fn r13_in_a_further_scope_a_creation_waits_until_none_can_land_in_an_earlier_one() {
    let goal = Goal::Run {
        scopes: vec![a(), zone("b")],
    };
    let pace = Pace::default();
    let mut seen = claimed();
    status(&mut seen).placement.as_mut().unwrap().scopes = vec![a(), zone("b")];
    let nothing = |by, at| Seen::Known {
        found: Found::Nothing,
        by,
        at,
    };
    seen.claimed_since = Some(NOW);
    seen.scopes = vec![(a(), nothing(By::Find, NOW)), (zone("b"), nothing(By::Find, NOW))];
    let settled = NOW.after(pace.settle);
    let Decision::Plan(waiting) = plan(&goal, &seen, NOW, &pace) else {
        unreachable!()
    };
    assert_eq!((waiting.action, waiting.look), (None, Look::At(settled)));
    assert_eq!(waiting.finding, Finding::Step(Step::NextScope));
    // Looks from before the time do not count, nor do lists.
    let by_find = Decision::Ask(Ask::InstanceByFind);
    assert_eq!(plan(&goal, &seen, settled, &pace), by_find);
    seen.scopes[0].1 = nothing(By::Find, settled);
    assert_eq!(plan(&goal, &seen, settled, &pace), by_find);
    seen.scopes[1].1 = nothing(By::List, settled);
    assert_eq!(plan(&goal, &seen, settled, &pace), by_find);
    seen.scopes[1].1 = nothing(By::Find, settled);
    let Decision::Plan(creating) = plan(&goal, &seen, settled, &pace) else {
        unreachable!()
    };
    let scope = zone("b");
    assert_eq!(creating.action, Some(Action::CreateInstance { scope }));
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
fn r18_what_boots_from_a_medium_is_started_when_the_medium_is_there() {
    let mut seen = with(InstanceState::Stopped);
    seen.boots_from_medium = true;
    let start = Action::StartInstance {
        scope: a(),
        id: UUID.to_owned(),
    };
    acts(&run_goal(), &seen, start);
    seen.image = ImageSeen::Unasked;
    asks(&run_goal(), &seen, Ask::Image);
    seen.image = ImageSeen::Absent;
    acts(&run_goal(), &seen, Action::StartImport { scope: a() });
    seen.image = ImageSeen::Importing(None);
    let importing = Finding::Step(Step::ImportingImage(None));
    waits(&run_goal(), &seen, importing);
    // After a restart nothing is known of the image.
    seen.schematic = false;
    acts(&run_goal(), &seen, Action::RegisterSchematic);
    // What runs has read it.
    let mut runs = with(InstanceState::Running);
    runs.boots_from_medium = true;
    runs.image = ImageSeen::Absent;
    waits(&run_goal(), &runs, Finding::Provisioned);
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
    Arc::make_mut(instance).started = Some(started);
    let not_joined = |diagnosis: Option<&str>| {
        let diagnosis = diagnosis.map(str::to_owned);
        Finding::Failed(Reason::NotJoined { started, diagnosis })
    };
    waits(&run_goal(), &seen, not_joined(None));
    seen.diagnosis = Diagnosis::Unasked;
    asks(&run_goal(), &seen, Ask::Diagnosis);
    seen.diagnosis = Diagnosis::Known(Some("no route".to_owned()));
    waits(&run_goal(), &seen, not_joined(Some("no route")));
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
                        // Each world has one replacement.
                        Ask::Budget => self.seen.budget = Budget::Free,
                        Ask::Former => self.seen.former = Former::Gone,
                        Ask::Diagnosis => self.seen.diagnosis = Diagnosis::Known(None),
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
        if let Finding::Failed(reason) = finding
            && let Some(loss) = reason.loss()
            && self.seen.lost.is_none_or(|(known, _)| known != loss)
        {
            self.seen.lost = Some((loss, self.now));
        }
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
                // Omni forgets the machine that it let go of.
                self.seen.registered &= !self
                    .seen
                    .status
                    .as_ref()
                    .is_some_and(|status| status.tearing_down && !status.held);
                for (_, seen) in &mut self.seen.scopes {
                    if let Seen::Known {
                        found: Found::Ours(instance),
                        ..
                    } = seen
                        && instance.state == InstanceState::Starting
                    {
                        Arc::make_mut(instance).state = InstanceState::Running;
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
            Action::TakeLease => seen.lease = true,
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
            Action::SpendReplacement { .. } => seen.budget = Budget::Spent,
            Action::BeginReplacement { loss } => {
                let status = seen.status.as_mut().unwrap();
                (status.replacing, status.ran) = (Some(*loss), true);
            }
            Action::CancelReplacement => seen.status.as_mut().unwrap().replacing = None,
            Action::DeleteLost { scope, .. } => set(seen, scope, Found::Remains { since: None }),
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
                seen.lost = None;
                seen.budget = Budget::TooMany { lost: 2, ran: 2 };
                seen.request_confirmed = false;
                seen.ended = !matches!(self.goal, Goal::Run { .. } | Goal::Invalid { .. });
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
    let replace = (any::<[bool; 3]>(), proptest::option::weighted(0.2, 0..3usize));
    (
        goals,
        status,
        patch,
        image,
        any_seen(),
        any::<[bool; 5]>(),
        replace,
    )
        .prop_map(
            |(goal, status, patch, image, scope, flags, (replace, replacing))| {
                let mut seen = claimed();
                let [vanished, stopped, never_joined] = replace;
                seen.replace = Replace {
                    vanished,
                    stopped,
                    never_joined,
                    per_hour: 1,
                };
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
                    replacing: replacing.map(|loss| LOSSES[loss]),
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

/// A machine that is lost this way, long enough, whose class asks for a replacement.
fn lost(loss: Loss) -> Observed<Zone> {
    let mut seen = match loss {
        Loss::Vanished => claimed(),
        Loss::Stopped => with(InstanceState::Stopped),
        Loss::NeverJoined => with(InstanceState::Running),
    };
    if let Seen::Known {
        found: Found::Ours(instance),
        ..
    } = &mut seen.scopes[0].1
    {
        Arc::make_mut(instance).started = Some(NOW.before(Duration::from_secs(3600)));
    }
    seen.replace = Replace {
        vanished: true,
        stopped: true,
        never_joined: true,
        per_hour: 1,
    };
    seen.lost = Some((loss, NOW.before(Pace::default().replace)));
    ran(seen)
}

const LOSSES: [Loss; 3] = [Loss::Vanished, Loss::Stopped, Loss::NeverJoined];

/// What became of a lost machine that is reported.
#[track_caller]
fn then(seen: &Observed<Zone>) -> Option<Then> {
    let plan = planned(&run_goal(), seen);
    match (plan.action, plan.finding) {
        (None, Finding::Failed(Reason::Lost { then, .. })) => Some(then),
        (None, Finding::Failed(_)) => None,
        other => panic!("not reported: {other:?}"),
    }
}

#[test]
fn l1_l2_a_loss_is_replaced_only_where_the_class_says_so_and_after_its_time() {
    for loss in LOSSES {
        asks(&run_goal(), &lost(loss), Ask::Budget);
        let mut seen = lost(loss);
        match loss {
            Loss::Vanished => seen.replace.vanished = false,
            Loss::Stopped => seen.replace.stopped = false,
            Loss::NeverJoined => seen.replace.never_joined = false,
        }
        assert_eq!(then(&seen), None);
        let wait = Then::ReplacedIn(Duration::from_secs(600));
        for since in [
            None,
            Some((loss, NOW.before(Duration::from_secs(599)))),
            // Lost otherwise until now.
            Some((
                LOSSES[(LOSSES.iter().position(|known| *known == loss).unwrap() + 1) % 3],
                Timestamp(0),
            )),
        ] {
            let mut seen = lost(loss);
            seen.lost = since;
            assert_eq!(then(&seen), Some(wait), "{since:?}");
        }
    }
    // A class that cannot be read asks for nothing.
    let mut seen = lost(Loss::Vanished);
    seen.replace = Replace::default();
    assert!(planned(&invalid(), &seen).action.is_none());
}

#[test]
fn l3_l4_the_budget_comes_first_then_the_note() {
    for loss in LOSSES {
        let mut seen = lost(loss);
        seen.budget = Budget::UsedUp(NOW.after(Duration::from_secs(7)));
        assert_eq!(then(&seen), Some(Then::UsedUp));
        assert_eq!(
            planned(&run_goal(), &seen).look,
            Look::At(NOW.after(Duration::from_secs(7)))
        );
        seen.budget = Budget::TooMany { lost: 3, ran: 4 };
        assert_eq!(then(&seen), Some(Then::TooMany { lost: 3, ran: 4 }));
        seen.budget = Budget::Free;
        acts(&run_goal(), &seen, Action::SpendReplacement { loss });
        seen.budget = Budget::Spent;
        acts(&run_goal(), &seen, Action::BeginReplacement { loss });
    }
}

/// A lost machine whose replacement is under way.
fn replacing(loss: Loss) -> Observed<Zone> {
    let mut seen = lost(loss);
    status(&mut seen).replacing = Some(loss);
    seen
}

#[test]
fn n1_what_cannot_be_seen_is_waited_for() {
    let mut seen = replacing(Loss::Stopped);
    seen.scopes = vec![(a(), unknown())];
    let plan = planned(&run_goal(), &seen);
    assert_eq!(plan.action, None);
    assert!(matches!(plan.finding, Finding::Unseen(_)));
    seen.scopes = vec![(a(), Seen::Unasked)];
    asks(&run_goal(), &seen, Ask::Instance);
    seen.scopes = vec![(
        a(),
        Seen::Known {
            found: Found::Nothing,
            by: By::List,
            at: NOW,
        },
    )];
    asks(&run_goal(), &seen, Ask::InstanceByFind);
}

#[test]
fn n2_a_machine_that_is_back_is_not_replaced() {
    for state in [
        InstanceState::Running,
        InstanceState::Stopped,
        InstanceState::Starting,
    ] {
        let mut seen = replacing(Loss::Vanished);
        seen.scopes = with(state).scopes;
        acts(&run_goal(), &seen, Action::CancelReplacement);
    }
    let mut seen = replacing(Loss::Stopped);
    seen.scopes = with(InstanceState::Running).scopes;
    acts(&run_goal(), &seen, Action::CancelReplacement);
    let mut seen = replacing(Loss::NeverJoined);
    seen.registered = true;
    acts(&run_goal(), &seen, Action::CancelReplacement);
    // What Omni lets go of already cannot come back.
    status(&mut seen).tearing_down = true;
    waits(&run_goal(), &seen, Finding::Keep);
}

#[test]
fn n3_the_lost_instance_goes_before_omni_lets_go_of_it() {
    for loss in [Loss::Stopped, Loss::NeverJoined] {
        let mut seen = replacing(loss);
        seen.patches = vec![PatchSeen {
            id: "provider-id-web-x7k".to_owned(),
            tearing_down: false,
            held: true,
            differs: false,
        }];
        let action = Action::DeleteLost {
            loss,
            scope: a(),
            id: UUID.to_owned(),
        };
        acts(&run_goal(), &seen, action);
        seen.scopes = with(InstanceState::Starting).scopes;
        waits(&run_goal(), &seen, Finding::Keep);
        seen.scopes = vec![(a(), known(Found::Nothing))];
        let id = "provider-id-web-x7k".to_owned();
        acts(&run_goal(), &seen, Action::TearDownPatch { id });
    }
}

#[test]
fn n4_n5_then_it_leaves_omni_and_the_cloud_as_in_a_teardown() {
    for loss in LOSSES {
        let mut seen = replacing(loss);
        seen.scopes = vec![(a(), known(Found::Remains { since: None }))];
        acts(&run_goal(), &seen, Action::TearDownStatus);
        status(&mut seen).tearing_down = true;
        waits(&run_goal(), &seen, Finding::Keep);
        status(&mut seen).held = false;
        acts(
            &run_goal(),
            &seen,
            Action::DeleteInstance { scope: a(), id: None },
        );
        // It came back while Omni let go of it.
        seen.scopes = with(InstanceState::Running).scopes;
        let id = Some(UUID.to_owned());
        acts(&run_goal(), &seen, Action::DeleteInstance { scope: a(), id });
        // A stranger has the name: nothing of ours is there.
        seen.scopes = vec![(
            a(),
            known(Found::Foreign {
                what: "theirs".to_owned(),
            }),
        )];
        asks(&run_goal(), &seen, Ask::Former);
    }
}

#[test]
fn n6_n7_n8_the_claim_goes_last_when_omni_knows_the_machine_no_more() {
    let mut seen = replacing(Loss::Vanished);
    status(&mut seen).tearing_down = true;
    status(&mut seen).held = false;
    seen.registered = true;
    waits(&run_goal(), &seen, Finding::Keep);
    seen.registered = false;
    asks(&run_goal(), &seen, Ask::Former);
    seen.former = Former::There;
    waits(&run_goal(), &seen, Finding::Keep);
    seen.former = Former::Gone;
    asks(&run_goal(), &seen, Ask::Request);
    seen.request_confirmed = true;
    seen.machine_resource = true;
    acts(&run_goal(), &seen, Action::DestroyMachineResource);
    seen.machine_resource = false;
    acts(&run_goal(), &seen, Action::DestroyStatus);
    // The request goes: an ordinary teardown.
    acts(&tear_down(), &seen, Action::DestroyStatus);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// From any start a healthy world settles; on the way no action is repeated on an unchanged observation, nothing is
    /// mutated that cannot be seen, and what ran is never created again, unless its class asks for that.
    #[test]
    fn from_any_start_a_healthy_world_settles(mut world in any_world()) {
        let asked_for = world.seen.replace != Replace::default()
            || world.seen.status.as_ref().is_some_and(|status| status.replacing.is_some());
        let ran = world.seen.ran() && !asked_for;
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
