//! The stories of a machine request, each with its golden trace.

use std::time::Duration;

use expect_test::expect;
use omni_infra_provider::cloud::{ErrorKind, InstanceState};
use omni_infra_provider::engine::observe::ANNOTATION_PLACEMENT;
use omni_infra_provider::omni::kinds::{InfraProviderHealthStatuses, MachineRequestStatuses, Stage};
use omni_infra_provider::sandbox::omni::{Rpc, Stored, types};
use tokio::time::sleep;

use crate::support::World;
use crate::support::world::PROVIDER;

#[tokio::test(start_paused = true)]
async fn a_request_becomes_a_running_machine_and_goes_with_its_request() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.assert_trace(
        "web",
        expect![[r#"
        add finalizer
        write claim
        find instance
        status: status "importing the image"
        get request
        get status
        create instance
        find instance
        status: uuid
        create patch provider-id
        start instance
        find instance
        find instance
        status: stage PROVISIONED, status "running", +ran
    "#]],
    );
    world.assert_trace(
        "",
        expect![[r#"
        register schematic
        find image
        import image
    "#]],
    );
    let status = world.status("web");
    assert_eq!((status.stage, status.error.as_str()), (Stage::Provisioned, ""));
    assert!(world.omni.is_joined(&status.id), "{world}");

    world.forget_trace();
    world.tear_down("web");
    world.settle().await;
    world.assert_trace(
        "web",
        expect![[r#"
        teardown patch provider-id
        destroy patch provider-id
        teardown status
        get status
        delete instance
        find instance
        find instance
        delete instance
        find instance
        delete instance
        find instance
        destroy status
        remove finalizer
    "#]],
    );
    world.assert_nothing_left();
    assert_eq!(world.cloud.images(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_machine_costs_omni_five_writes_and_two_reads_up_five_and_one_down() {
    let world = World::start().await;
    assert_eq!(cost(&world).await, [(5, 2), (5, 1)], "{world}");
    // Each further patch: one write up, two down.
    let mut world = World::without_daemon().await;
    world.nameservers = vec!["10.0.0.53".parse().unwrap()];
    world.start_daemon().await;
    assert_eq!(cost(&world).await, [(6, 2), (7, 1)], "{world}");
}

/// Writes and reads of Omni for one machine, up and down.
async fn cost(world: &World) -> [(u64, u64); 2] {
    // The image is known, so that its preparation does not count.
    world.request("first");
    world.settle().await;
    let counted = |rpcs: &[Rpc]| -> u64 { rpcs.iter().map(|rpc| world.omni.count(*rpc)).sum() };
    let heartbeats = || {
        let calls = world.omni.calls();
        let beats = |(_, kind): &&(Rpc, String)| kind.contains("InfraProviderHealthStatuses");
        let of = |reads: bool| -> u64 {
            calls
                .iter()
                .filter(|(call, _)| beats(call) && (call.0 == Rpc::Get) == reads)
                .map(|(_, count)| count)
                .sum()
        };
        (of(false), of(true))
    };
    let writes = || {
        counted(&[
            Rpc::Create,
            Rpc::Update,
            Rpc::Teardown,
            Rpc::Destroy,
            Rpc::CreateSchematic,
        ]) - heartbeats().0
    };
    let reads = || counted(&[Rpc::Get, Rpc::List]) - heartbeats().1;

    let start = (writes(), reads());
    world.request("web");
    world.settle().await;
    let up = (writes(), reads());
    world.tear_down("web");
    world.settle().await;
    [
        (up.0 - start.0, up.1 - start.1),
        (writes() - up.0, reads() - up.1),
    ]
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_while_omni_drains() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.omni.configure(|options| options.hold_drains = true);
    world.tear_down("web");
    world.until_traced("web", "teardown status").await;
    sleep(Duration::from_secs(1800)).await;
    world.assert_count("web", "delete instance", 0);
    assert_eq!(world.instances(), ["web"]);
    world.omni.configure(|options| options.hold_drains = false);
    world.settle().await;
    world.assert_before(("web", "teardown status"), ("web", "delete instance"));
    world.assert_before(("web", "delete instance"), ("web", "destroy status"));
    world.assert_before(("web", "destroy status"), ("web", "remove finalizer"));
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_set_scales_up_and_down_and_one_import_serves_all() {
    let world = World::start().await;
    let template = omni_infra_provider::omni::kinds::MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        ..Default::default()
    };
    world.omni.create_request_set("workers", PROVIDER, 20, &template);
    world.settle().await;
    assert_eq!(world.instances().len(), 20);
    world.assert_count("", "import image", 1);
    world.assert_count("", "register schematic", 1);
    world.omni.scale("workers", 3).unwrap();
    world.settle().await;
    assert_eq!(world.instances().len(), 3);
    world.omni.scale("workers", 0).unwrap();
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_request_deleted_while_importing_leaves_nothing_and_the_import_goes_on() {
    let world = World::start().await;
    world.request("web");
    world.until_traced("", "find image").await;
    sleep(Duration::from_secs(1)).await;
    world.tear_down("web");
    world.settle().await;
    world.assert_trace(
        "web",
        expect![[r#"
        add finalizer
        write claim
        find instance
        teardown status
        find instance
        get status
        destroy status
        remove finalizer
    "#]],
    );
    world.assert_nothing_left();
    assert_eq!(world.cloud.images(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_deleted_while_creating_leaves_nothing() {
    let world = World::start().await;
    world.request("web");
    world.until_traced("web", "create instance").await;
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
    world.assert_count("web", "create instance", 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_deleted_while_starting_leaves_nothing() {
    let world = World::start().await;
    world.request("web");
    world.until_traced("web", "start instance").await;
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_bad_class_is_said_before_anything_is_created() {
    let world = World::start().await;
    world.request_of("typo", "sise: 2");
    world.request_of("small", "size: 0");
    world.settle().await;
    world.assert_trace("typo", expect![[r#"
        add finalizer
        create status: stage FAILED, error "this request cannot be answered · line 1: unknown field `sise`: did you mean `size`? · correct the machine class, then replace this request", status "this request cannot be answered · line 1: unknown field `sise`: did you mean `size`? · correct the machine class, then replace this request"
    "#]]);
    let typo = world.status("typo");
    assert_eq!(typo.stage, Stage::Failed);
    expect!["this request cannot be answered · line 1: unknown field `sise`: did you mean `size`? · correct the machine class, then replace this request"].assert_eq(&typo.error);
    let small = world.status("small");
    assert_eq!(small.stage, Stage::Failed);
    expect!["this request cannot be answered · size must be at least 1 · correct the machine class, then replace this request"].assert_eq(&small.error);
    world.tear_down("typo").tear_down("small");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_strangers_instance_of_the_same_name_is_never_adopted_and_never_deleted() {
    let world = World::start().await;
    world.cloud.plant_foreign("a", "web");
    world.request("web");
    world.settle().await;
    let status = world.status("web");
    assert_eq!(status.stage, Stage::Failed);
    expect!["creating the instance · its name is taken: instance web without our mark · remove or rename that, or replace this request · next try within 10 min"].assert_eq(&status.error);
    world.tear_down("web");
    world.settle().await;
    world.assert_count("web", "delete instance", 0);
    world.assert_left(&["web"]);
}

#[tokio::test(start_paused = true)]
async fn a_vanished_instance_is_reported_and_not_made_anew() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.forget_trace();
    world.cloud.vanish("a", "web");
    world
        .until("FAILED", |world| world.status("web").stage == Stage::Failed)
        .await;
    world.settle().await;
    world.assert_trace("web", expect![[r#"
        find instance
        status: stage FAILED, error "the instance is gone · asked for by its name, the cloud has none; it was deleted outside of Omni: the cloud's audit log may say by whom, look for web (00000000-0000-4000-8000-000000000002) · replace this request · last seen running at <time> UTC", status "the instance is gone · asked for by its name, the cloud has none; it was deleted outside of Omni: the cloud's audit log may say by whom, look for web (00000000-0000-4000-8000-000000000002) · replace this request · last seen running at <time> UTC"
    "#]]);
    assert!(world.status("web").error.contains(" · last seen running at "));
    world.tear_down("web");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_machine_of_an_earlier_request_with_the_same_id_is_not_taken_for_this_ones() {
    let world = World::start().await;
    let uuid = "00000000-0000-4000-8000-0000000000ff";
    let registration = Stored::new(types::INFRA, types::REGISTRATIONS, uuid)
        .label(types::LABEL_PROVIDER, PROVIDER)
        .label(types::LABEL_REQUEST, "web");
    world.omni.put_raw(registration);
    sleep(Duration::from_secs(1)).await;
    world.request("web");
    world.settle().await;
    assert_eq!(world.status("web").stage, Stage::Provisioned, "{world}");
    assert_eq!(world.instances(), ["web"]);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_instance_is_reported_and_left_alone() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.forget_trace();
    world.cloud.stop("a", "web");
    world
        .until("FAILED", |world| world.status("web").stage == Stage::Failed)
        .await;
    world.settle().await;
    world.assert_count("web", "start instance", 0);
    expect!["the instance is stopped · it was running and was stopped outside of Omni · start it in the cloud and it is taken back, or replace this request"].assert_eq(&world.status("web").error);
    assert_eq!(
        world.cloud.instances(),
        [("a".to_owned(), "web".to_owned(), InstanceState::Stopped)]
    );
}

/// A world in which no machine joins.
async fn lonely() -> World {
    let world = World::start().await;
    world
        .omni
        .configure(|options| options.delays.join = Duration::from_secs(24 * 3600));
    world
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_does_not_join_in_time_is_reported_with_what_its_console_tells() {
    let world = lonely().await;
    world.request("web");
    world
        .until("PROVISIONED", |world| {
            world.status("web").stage == Stage::Provisioned
        })
        .await;
    world.cloud.write_console(
        "a",
        "web",
        "[    0.0] Command line: siderolink.api=https://omni.test/?jointoken=Wn4bQx2vT9kLr7sHc1JdYpE5uAzGm8oXf3RiNt6VwKq\r\n\
         [   74.1] [talos] controller failed {\"controller\": \"siderolink.ManagerController\", \"error\": \"error provisioning: \
         rpc error: code = PermissionDenied desc = unauthorized\"}\r\n",
    );
    sleep(Duration::from_secs(14 * 60)).await;
    assert_eq!(world.status("web").stage, Stage::Provisioned);
    world.assert_count("web", "read console", 0);
    world
        .until("FAILED", |world| world.status("web").stage == Stage::Failed)
        .await;
    world.assert_count("web", "read console", 1);
    let (before, diagnosis) = world
        .status("web")
        .error
        .split_once(" UTC · ")
        .map(|(before, after)| (before.to_owned(), after.to_owned()))
        .unwrap();
    assert!(
        before.starts_with("the instance runs but did not join · started at "),
        "{before}"
    );
    expect!["Omni refuses its join token · see whether the provider's join token was revoked or changed: a new machine gets the current one; or replace this request"].assert_eq(&diagnosis);
    // From now on at the pace of slow looks, and written only where it tells something else.
    sleep(Duration::from_secs(3600)).await;
    let trace = world.trace("web");
    let read = trace.matches("read console").count();
    assert!((9..=16).contains(&read), "{read}\n{world}");
    assert_eq!(trace.matches("stage FAILED").count(), 1, "{world}");
}

#[tokio::test(start_paused = true)]
async fn a_console_that_cannot_be_read_holds_nothing_up() {
    let world = lonely().await;
    world.fail("read console", 1000, ErrorKind::Denied);
    world.request("web");
    world
        .until("FAILED", |world| world.status("web").stage == Stage::Failed)
        .await;
    let error = world.status("web").error;
    assert!(error.ends_with("· look at its console, at the way from it to Omni, and whether the join token was revoked; or replace this request"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn omni_restarts_mid_watch_and_nothing_is_lost_or_done_twice() {
    let mut world = World::start().await;
    world.request("one");
    world.settle().await;
    world.kill_omni().await;
    sleep(Duration::from_secs(5)).await;
    // Omni's operators are not kept from their work by our broken watch.
    world.request("two");
    world.tear_down("one");
    world.start_omni();
    world.settle().await;
    assert_eq!(world.instances(), ["two"]);
    assert_eq!(world.status("two").stage, Stage::Provisioned);
    world.assert_count("two", "create instance", 1);
    world.tear_down("two");
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn an_image_shared_by_many_is_imported_once_and_wakes_all() {
    let world = World::start().await;
    let names = ["a1", "b2", "c3"];
    for name in names {
        world.request(name);
    }
    world.settle().await;
    world.assert_count("", "import image", 1);
    world.assert_count("", "find image", 1);
    for name in names {
        world.assert_before(("", "import image"), (name, "create instance"));
        assert_eq!(world.status(name).stage, Stage::Provisioned);
    }
}

#[tokio::test(start_paused = true)]
async fn an_import_that_fails_is_said_tried_again_and_recovers() {
    let world = World::start().await;
    world.fail("import image", 1, ErrorKind::Rejected);
    world.request("one");
    world.request("two");
    world
        .until("FAILED", |world| world.status("one").stage == Stage::Failed)
        .await;
    expect!["importing the image · cannot import image on sim: 1.12.0: as told · correct the machine class, then replace this request · next try within 10 min"].assert_eq(&world.status("one").error);
    world.assert_count("", "import image", 1);
    world
        .until("PROVISIONED", |world| {
            world.status("two").stage == Stage::Provisioned
        })
        .await;
    world.settle().await;
    world.assert_count("", "import image", 2);
    assert_eq!(world.status("one").stage, Stage::Provisioned);
}

#[tokio::test(start_paused = true)]
async fn a_cloud_that_hides_its_project_loses_no_machine() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.cloud.set_blind(true);
    world.tear_down("web");
    world.settle().await;
    assert_eq!(world.instances(), ["web"]);
    sleep(Duration::from_secs(3600)).await;
    assert!(
        world
            .omni
            .get::<omni_infra_provider::omni::kinds::MachineRequestStatuses>(PROVIDER, "web")
            .is_some()
    );
    world.cloud.set_blind(false);
    world.until("the end", |world| world.instances().is_empty()).await;
    world.settle().await;
    world.assert_nothing_left();
}

#[tokio::test(start_paused = true)]
async fn a_step_that_lasts_is_shown() {
    let world = World::start().await;
    world.request("web");
    world
        .until("a status line", |world| {
            world.status("web").status.starts_with("importing the image")
        })
        .await;
    assert_eq!(world.status("web").stage, Stage::Provisioning);
}

#[tokio::test(start_paused = true)]
async fn nameservers_reach_the_machine_twice() {
    let mut world = World::without_daemon().await;
    world.nameservers = vec!["10.0.0.53".parse().unwrap()];
    world.start_daemon().await;
    world.request("web");
    world.request_of("own", "nameservers: [fd00::53]");
    world.settle().await;
    let user_data = |name| String::from_utf8(world.cloud.user_data("a", name).unwrap().0).unwrap();
    assert!(user_data("web").contains("kind: ResolverConfig\nnameservers:\n    - address: 10.0.0.53\n"));
    assert!(user_data("own").contains("fd00::53") && !user_data("own").contains("10.0.0.53"));
    let patches = world
        .omni
        .list::<omni_infra_provider::omni::kinds::ConfigPatchRequests>(PROVIDER);
    let data = |id: &str| {
        patches
            .iter()
            .find(|patch| patch.id() == id)
            .unwrap()
            .spec
            .data
            .clone()
            .unwrap()
    };
    assert!(data("nameservers-web").contains("10.0.0.53"));
    assert!(data("nameservers-own").contains("fd00::53"));
    expect![[r#"
        machine:
            kubelet:
                extraConfig:
                    providerID: sim://00000000-0000-4000-8000-000000000003
    "#]]
    .assert_eq(&data("provider-id-web"));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_told_to_stop_finishes_what_it_began() {
    let mut world = World::start().await;
    world.request("web");
    world.until_traced("web", "create instance").await;
    let took = world.stop_daemon().await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(world.instances(), ["web"]);
    world.start_daemon().await;
    world.settle().await;
    world.assert_count("web", "create instance", 1);
    assert_eq!(world.status("web").stage, Stage::Provisioned);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_seen_is_asked_for_at_its_time_and_not_at_every_event() {
    let world = World::start().await;
    world.cloud.set_blind(true);
    world.request("web");
    world
        .until("a cause", |world| {
            world.status("web").status.starts_with("looking for the instance")
        })
        .await;
    sleep(Duration::from_secs(60)).await;
    world.assert_count("web", "find instance", 1);
    // The first write met Omni's own, its finalizer; the second stands.
    world.assert_count("web", "status: ", 2);
    world.cloud.set_blind(false);
    world
        .until("PROVISIONED", |world| {
            world.status("web").stage == Stage::Provisioned
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_omni_that_goes_before_a_creation_is_not_asked_in_a_circle() {
    let mut world = World::start().await;
    world.request("first");
    world.settle().await;
    world.request("web");
    world.until_traced("web", "find instance").await;
    world.kill_omni().await;
    sleep(Duration::from_secs(30)).await;
    world.assert_count("web", "create instance", 0);
    world.assert_count("web", "find instance", 1);
    world.start_omni();
    world.settle().await;
    assert_eq!(world.status("web").stage, Stage::Provisioned, "{world}");
    world.assert_count("web", "create instance", 1);
}

fn health(world: &World) -> String {
    let health = world.omni.get::<InfraProviderHealthStatuses>(PROVIDER, PROVIDER);
    health.map(|health| health.spec.error).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_a_newer_version_wrote_is_left_alone() {
    let mut world = World::start().await;
    world.request("web");
    world.settle().await;
    world.stop_daemon().await;
    let claim = r#"{"version":2}"#;
    let kind = "MachineRequestStatuses.omni.sidero.dev";
    let changed = world.omni.modify_raw("infra-provider", kind, "web", |status| {
        status
            .annotations
            .insert(ANNOTATION_PLACEMENT.to_owned(), claim.to_owned());
    });
    changed.unwrap();
    world.start_daemon().await;
    world.forget_trace();
    for goal in ["runs", "is torn down"] {
        world.settle().await;
        world.assert_trace("web", expect![""]);
        assert_eq!(world.instances(), ["web"], "the request {goal}\n{world}");
        expect!["web is stuck: its claim was written by a newer version of this provider: run that version"]
            .assert_eq(&health(&world));
        world.tear_down("web");
    }
    let status = world.omni.get::<MachineRequestStatuses>(PROVIDER, "web").unwrap();
    assert_eq!(
        status.metadata.annotations[&ANNOTATION_PLACEMENT.to_owned()],
        claim
    );
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_is_refused_is_said_and_tried_again() {
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.fail("delete instance", 2, ErrorKind::Rejected);
    world.tear_down("web");
    world.until("it is told", |world| !health(world).is_empty()).await;
    expect!["web is stuck: cannot delete instance on sim: web: as told"].assert_eq(&health(&world));
    assert_eq!(world.instances(), ["web"]);
    world
        .until("it is gone", |world| world.instances().is_empty())
        .await;
    world.settle().await;
    world.assert_nothing_left();
    assert_eq!(health(&world), "");
}

#[tokio::test(start_paused = true)]
async fn an_image_that_somebody_deleted_is_brought_again() {
    let world = World::start().await;
    world.request("first");
    world.settle().await;
    world.cloud.forget_images();
    world.request("second");
    world
        .until("it runs", |world| {
            world.status("second").stage == Stage::Provisioned
        })
        .await;
    assert_eq!(world.instances(), ["first", "second"], "{world}");
    assert_eq!(world.cloud.images(), 1);
}

#[tokio::test(start_paused = true)]
async fn work_that_somebody_undoes_at_once_is_done_again_and_makes_no_storm() {
    const MINUTE: Duration = Duration::from_secs(60);
    let world = World::start().await;
    world.request("web");
    world.settle().await;
    world.forget_trace();
    let undo = async {
        loop {
            for patch in world.omni.list_raw(types::INFRA, types::CONFIG_PATCH_REQUESTS) {
                let _ = world.omni.force_destroy(&patch.namespace, &patch.kind, &patch.id);
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(MINUTE, undo).await.is_err());
    let patched = world.trace("web").matches("create patch provider-id").count();
    assert!((10..500).contains(&patched), "{patched} times in a minute");
    world.settle().await;
    assert_eq!(
        world
            .omni
            .list_raw(types::INFRA, types::CONFIG_PATCH_REQUESTS)
            .len(),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn creations_that_are_accepted_and_fail_later_are_tried_ever_more_seldom() {
    let world = World::start().await;
    world.cloud.fail_later(usize::MAX);
    world.request("web");
    sleep(Duration::from_secs(3600)).await;
    expect!["creating the instance · cannot create instance on sim: web: no room · free capacity or raise the quota · next try within 10 min"].assert_eq(&world.status("web").status);
    // After 1, 2, 4 and 8 minutes, then every ten; each of them a call that is told and one that is accepted.
    world.assert_count("web", "create instance", 18);
    world.cloud.fail_later(0);
    world
        .until("it runs", |world| world.status("web").stage == Stage::Provisioned)
        .await;
}
