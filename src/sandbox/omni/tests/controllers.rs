//! What Omni does by itself.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_request_is_held_by_omni_until_we_let_go_and_then_ends() {
    let world = World::new();
    world.omni.create_request("a", "test", &template()).unwrap();
    assert!(world.request("a").unwrap().finalizers.is_empty());
    tokio::time::sleep(Duration::from_millis(50)).await;
    world.client.hold("a").await;
    world.omni.teardown_request("a").unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let held = world.request("a").unwrap();
    assert!(held.tearing_down() && held.finalizers.len() == 2);
    world.client.release("a").await;
    tokio::time::sleep(Duration::from_millis(15)).await;
    assert!(world.request("a").is_none());

    world.omni.create_request("b", "test", &template()).unwrap();
    world.settle().await;
    world.omni.teardown_request("b").unwrap();
    tokio::time::sleep(Duration::from_millis(15)).await;
    assert!(world.request("b").is_none(), "nobody but Omni held it");
}

#[tokio::test(start_paused = true)]
async fn a_set_grows_replaces_and_shrinks_unused_first() {
    let world = World::new();
    let client = &world.client;
    client.register().await;
    world.omni.create_request_set("web", "test", 3, &template());
    world.settle().await;
    let requests = world.requests();
    assert_eq!(requests.len(), 3);
    for request in &requests {
        let suffix = request.id.strip_prefix("web-").unwrap();
        assert!(
            suffix.len() == 6
                && suffix
                    .bytes()
                    .all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b))
        );
        assert_eq!(request.labels[types::LABEL_SET], "web");
        assert_eq!(request.owner, "");
        client.hold(&request.id).await;
    }

    // The oldest joins; the two others go first.
    let oldest = requests.iter().min_by_key(|request| request.created).unwrap();
    let uuid = "11111111-2222-3333-4444-555555555555";
    client.report(&oldest.id, uuid).await;
    world
        .omni
        .machine_booted(uuid, &world.documents(Some(&oldest.id)));
    world
        .until("joined", |omni| omni.is_joined(uuid).then_some(()))
        .await;
    world.omni.scale("web", 1).unwrap();
    world.settle().await;
    let left: Vec<String> = world
        .requests()
        .iter()
        .filter(|request| !request.tearing_down())
        .map(|request| request.id.clone())
        .collect();
    assert!(left.len() == 1 && left.contains(&oldest.id));

    // One that is torn down by hand is replaced when it is free.
    for request in world.requests() {
        if request.tearing_down() {
            client.release(&request.id).await;
        }
    }
    world.settle().await;
    assert_eq!(world.requests().len(), 1);
    world.omni.scale("web", 2).unwrap();
    world.settle().await;
    let new = world.requests().into_iter().find(|r| r.id != oldest.id).unwrap();
    world.omni.teardown_request(&new.id).unwrap();
    world.settle().await;
    let ids: Vec<String> = world.requests().iter().map(|r| r.id.clone()).collect();
    assert!(ids.len() == 2 && !ids.contains(&new.id) && ids.contains(&oldest.id));

    world.omni.delete_request_set("web").unwrap();
    world.settle().await;
    assert_eq!(world.requests().len(), 1, "the joined one is held by us");
    client.release(&oldest.id).await;
    world
        .until("the set is gone", |omni| {
            omni.get_raw(types::DEFAULT, types::MACHINE_REQUEST_SETS, "web")
                .is_none()
                .then_some(())
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_names_requests_the_same() {
    let mut names = Vec::new();
    for _ in 0..2 {
        let world = World::new();
        world.omni.create_request_set("web", "test", 2, &template());
        world.settle().await;
        names.push(world.requests().iter().map(|r| r.id.clone()).collect::<Vec<_>>());
    }
    assert_eq!(names[0], names[1]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_joins_with_a_valid_token_alone() {
    let world = World::new();
    world.omni.create_request("a", "test", &template()).unwrap();
    let uuid = "11111111-2222-3333-4444-555555555555";
    let registration = |omni: &Omni| omni.get_raw(types::INFRA, types::REGISTRATIONS, uuid);

    world
        .omni
        .machine_booted(uuid, &documents("wrong", "test", Some("a")));
    world
        .until("refused", |omni| omni.refused_joins().first().cloned())
        .await;
    world.omni.machine_booted(uuid, &documents("x", "nobody", None));
    world.omni.machine_booted(uuid, b"#cloud-config\n");
    world
        .until("refused", |omni| omni.refused_joins().get(1).cloned())
        .await;
    assert!(registration(&world.omni).is_none());

    world.omni.machine_booted(uuid, &world.documents(Some("a")));
    let registered = world.until("registered", registration).await;
    assert_eq!(registered.labels[types::LABEL_PROVIDER], "test");
    assert_eq!(registered.labels[types::LABEL_REQUEST], "a");
    assert!(!world.omni.is_joined(uuid), "no status names it");

    // Another token later does not relabel.
    world.omni.machine_booted(uuid, &world.documents(Some("b")));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        registration(&world.omni).unwrap().labels[types::LABEL_REQUEST],
        "a"
    );

    world.client.register().await;
    world.client.report("a", uuid).await;
    world
        .until("joined", |omni| omni.is_joined(uuid).then_some(()))
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_rotated_token_lets_the_new_in_and_the_old_out() {
    let world = World::new();
    let old = world.documents(None);
    world.omni.rotate_join_token("test");
    let uuid = |n: u8| format!("{n}1111111-2222-3333-4444-555555555555");
    world.omni.machine_booted(&uuid(1), &old);
    world.omni.machine_booted(&uuid(2), &world.documents(None));
    world.settle().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let joined: Vec<String> = world
        .omni
        .list_raw(types::INFRA, types::REGISTRATIONS)
        .iter()
        .map(|registration| registration.id.clone())
        .collect();
    assert_eq!(joined, [uuid(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_teardown_of_a_joined_status_drains_first() {
    let world = World::new();
    let client = &world.client;
    let uuid = "11111111-2222-3333-4444-555555555555";
    world.joined("a", uuid).await;
    world.omni.teardown_request("a").unwrap();
    let kind = types::MACHINE_REQUEST_STATUSES;
    assert!(!client.teardown(kind, "a", OWNER).await.unwrap());
    assert!(!client.teardown(kind, "a", OWNER).await.unwrap());
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(
        world
            .status("a")
            .unwrap()
            .finalizers
            .contains(types::STATUS_FINALIZER)
    );
    let drained = world
        .until("drained", |_| {
            world.status("a").filter(|status| status.finalizers.is_empty())
        })
        .await;
    assert!(drained.tearing_down());

    // A status may still be updated now.
    let mut status = client.get(kind, "a").await.unwrap();
    metadata(&mut status)
        .annotations
        .insert("claim".to_owned(), "x".to_owned());
    client.update(status, OWNER, None).await.unwrap();
    world.omni.machine_gone(uuid);
    assert!(client.teardown(kind, "a", OWNER).await.unwrap());
    client.destroy(kind, "a", OWNER).await.unwrap();
    client.release("a").await;
    world
        .until("gone", |_| world.request("a").is_none().then_some(()))
        .await;
    world
        .until("unlinked", |omni| {
            omni.get_raw(types::INFRA, types::REGISTRATIONS, uuid)
                .is_none()
                .then_some(())
        })
        .await;
    assert!(world.omni.violations().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_deleted_before_its_drain_began_is_a_violation() {
    let world = World::new();
    let uuid = "11111111-2222-3333-4444-555555555555";
    world.joined("a", uuid).await;
    world.omni.teardown_request("a").unwrap();
    world.omni.machine_gone(uuid);
    assert_eq!(world.omni.violations().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_while_its_request_runs_is_nobodys_fault() {
    let world = World::new();
    let uuid = "11111111-2222-3333-4444-555555555555";
    world.joined("a", uuid).await;
    world.omni.machine_stopped(uuid);
    world.omni.machine_gone(uuid);
    assert!(world.omni.violations().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_goes_down_while_it_is_drained_is_a_violation() {
    let world = World::new();
    let uuid = "11111111-2222-3333-4444-555555555555";
    world.joined("a", uuid).await;
    world.omni.configure(|options| options.hold_drains = true);
    world.omni.teardown_request("a").unwrap();
    world
        .client
        .teardown(types::MACHINE_REQUEST_STATUSES, "a", OWNER)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!world.status("a").unwrap().finalizers.is_empty());
    world.omni.machine_gone(uuid);
    assert_eq!(world.omni.violations().len(), 1);
    world.omni.configure(|options| options.hold_drains = false);
    world.settle().await;
    assert!(world.status("a").unwrap().finalizers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_status_without_a_machine_is_released_at_once() {
    let world = World::new();
    world.client.report("a", "").await;
    world.settle().await;
    world
        .client
        .teardown(types::MACHINE_REQUEST_STATUSES, "a", OWNER)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(world.status("a").unwrap().finalizers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_patch_request_becomes_a_patch_once_the_machine_is_known() {
    let world = World::new();
    let client = &world.client;
    world.omni.create_request("a", "test", &template()).unwrap();
    let spec = specs::ConfigPatchRequestSpec {
        data: "machine: {}\n".to_owned(),
        ..Default::default()
    };
    let mut patch = resource(types::CONFIG_PATCH_REQUESTS, "patch-a", &spec.encode_to_vec());
    metadata(&mut patch)
        .labels
        .insert(types::LABEL_REQUEST.to_owned(), "a".to_owned());
    client.create(patch, OWNER).await.unwrap();
    client.report("a", "").await;
    world.settle().await;
    let made = |omni: &Omni| omni.get_raw(types::DEFAULT, types::CONFIG_PATCHES, "patch-a");
    assert!(made(&world.omni).is_none());

    let mut status = client.get(types::MACHINE_REQUEST_STATUSES, "a").await.unwrap();
    let known = specs::MachineRequestStatusSpec {
        id: "some-uuid".to_owned(),
        ..Default::default()
    };
    status.spec.as_mut().unwrap().proto_spec = known.encode_to_vec();
    client.update(status, OWNER, Some("running")).await.unwrap();
    let config = world.until("a patch", made).await;
    assert_eq!(config.labels[types::LABEL_MACHINE], "some-uuid");
    assert_eq!(config.labels[types::LABEL_REQUEST], "a");
    assert_eq!(config.spec, spec.encode_to_vec());

    let kind = types::CONFIG_PATCH_REQUESTS;
    assert!(!client.teardown(kind, "patch-a", OWNER).await.unwrap());
    world.settle().await;
    assert!(made(&world.omni).is_none());
    client.destroy(kind, "patch-a", OWNER).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn cached_reads_lag_and_watches_do_not() {
    let world = World::with(OmniOptions {
        cache_staleness: Duration::from_secs(5),
        ..OmniOptions::default()
    });
    let client = &world.client;
    client
        .create(resource(types::CONFIG_PATCH_REQUESTS, "p", &[]), OWNER)
        .await
        .unwrap();
    assert_refused(
        client.get(types::CONFIG_PATCH_REQUESTS, "p").await,
        Code::NotFound,
        "doesn't exist",
    );
    let mut watch = client.watch(types::CONFIG_PATCH_REQUESTS, bootstrap()).await;
    watch.opened().await;
    assert_eq!(watch.line().await, (EventType::Created, "p".to_owned()));
    tokio::time::sleep(Duration::from_secs(6)).await;
    client.get(types::CONFIG_PATCH_REQUESTS, "p").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deleted_provider_takes_keys_statuses_and_requests_with_it() {
    let world = World::new();
    let client = &world.client;
    client.register().await;
    world.omni.create_request_set("web", "test", 1, &template());
    world.settle().await;
    let id = world.requests()[0].id.clone();
    client.hold(&id).await;
    client.report(&id, "").await;
    world.settle().await;
    world.omni.delete_provider("test").unwrap();
    world.settle().await;
    assert_refused(
        client.get(types::MACHINE_REQUESTS, &id).await,
        Code::Unauthenticated,
        "invalid signature",
    );
    let left: Vec<String> = world
        .omni
        .everything()
        .iter()
        .filter(|stored| stored.namespace == types::INFRA || stored.kind == types::MACHINE_REQUEST_SETS)
        .map(|stored| stored.to_string())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stripped_request_vanishes_under_its_provider() {
    let world = World::new();
    world.omni.create_request("a", "test", &template()).unwrap();
    world.settle().await;
    world.client.hold("a").await;
    world.omni.teardown_request("a").unwrap();
    world.omni.strip_request("a").unwrap();
    world.settle().await;
    assert!(world.request("a").is_none());
}
