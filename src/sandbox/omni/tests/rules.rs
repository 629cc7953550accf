//! Who may do what, and in which words it is refused.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_update_needs_the_stored_version_owner_and_phase() {
    let world = World::new();
    let client = &world.client;
    let spec = specs::MachineRequestStatusSpec::default().encode_to_vec();
    let created = client
        .create(resource(types::MACHINE_REQUEST_STATUSES, "a", &spec), OWNER)
        .await
        .unwrap();
    assert_eq!(created.metadata.as_ref().unwrap().version, "1");
    assert_eq!(created.metadata.as_ref().unwrap().owner, OWNER);
    assert_refused(
        client
            .create(resource(types::MACHINE_REQUEST_STATUSES, "a", &spec), OWNER)
            .await,
        Code::AlreadyExists,
        "already exists",
    );

    // Omni's finalizer makes the created version stale within milliseconds.
    world.settle().await;
    assert_refused(
        client.update(created, OWNER, None).await,
        Code::FailedPrecondition,
        "update conflict",
    );
    let current = client.get(types::MACHINE_REQUEST_STATUSES, "a").await.unwrap();
    assert_eq!(
        current.metadata.as_ref().unwrap().finalizers,
        [types::STATUS_FINALIZER]
    );
    assert_refused(
        client.update(current.clone(), "somebody", None).await,
        Code::PermissionDenied,
        "is owned by",
    );
    assert_refused(
        client.update(current.clone(), OWNER, Some("tearingDown")).await,
        Code::InvalidArgument,
        "is not in phase",
    );
    assert_refused(
        client.destroy(types::MACHINE_REQUEST_STATUSES, "a", OWNER).await,
        Code::FailedPrecondition,
        "has pending finalizers",
    );
    assert_refused(
        client.teardown(types::MACHINE_REQUEST_STATUSES, "a", "").await,
        Code::PermissionDenied,
        "is owned by",
    );
    assert_refused(
        client.destroy(types::MACHINE_REQUEST_STATUSES, "b", OWNER).await,
        Code::NotFound,
        "doesn't exist",
    );
    let updated = client.update(current, OWNER, Some("running")).await.unwrap();
    assert_eq!(updated.metadata.unwrap().version, "3");
}

#[tokio::test(start_paused = true)]
async fn a_malformed_resource_is_an_unknown_error() {
    let world = World::new();
    let good = || resource(types::MACHINE_REQUEST_STATUSES, "a", &[]);
    let mut no_version = good();
    metadata(&mut no_version).version = String::new();
    let mut no_phase = good();
    metadata(&mut no_phase).phase = String::new();
    let mut no_spec = good();
    no_spec.spec = None;
    let mut no_metadata = good();
    no_metadata.metadata = None;
    let mut owned = good();
    metadata(&mut owned).owner = "x".to_owned();
    for (resource, fragment) in [
        (no_version, "error parsing version"),
        (no_phase, "unknown phase"),
        (no_spec, "spec is missing"),
        (no_metadata, "metadata is missing"),
        (owned, "owner is already set"),
    ] {
        assert_refused(
            world.client.create(resource, OWNER).await,
            Code::Unknown,
            fragment,
        );
    }
    let mut long = good();
    let value = "x".repeat(16_385);
    metadata(&mut long).annotations.insert("a".to_owned(), value);
    assert_refused(
        world.client.create(long, OWNER).await,
        Code::InvalidArgument,
        "failed to validate: ",
    );
}

#[tokio::test(start_paused = true)]
async fn a_provider_sees_and_writes_its_own_alone() {
    let world = World::new();
    let key = world.omni.add_provider("other").unwrap();
    let other = Client::new(&world.omni, "other", key.expose());
    let created = world
        .client
        .create(resource(types::MACHINE_REQUEST_STATUSES, "a", &[]), OWNER)
        .await
        .unwrap();
    assert_eq!(created.metadata.unwrap().labels[types::LABEL_PROVIDER], "test");

    assert_refused(
        other.get(types::MACHINE_REQUEST_STATUSES, "a").await,
        Code::NotFound,
        "not found",
    );
    assert_refused(
        other.destroy(types::MACHINE_REQUEST_STATUSES, "a", OWNER).await,
        Code::NotFound,
        "not found",
    );
    let mine = other.list(types::INFRA, types::MACHINE_REQUEST_STATUSES).await;
    assert!(mine.unwrap().is_empty());
    // The cache in front of join configs knows no providers.
    let configs = other.list(types::INFRA, types::PROVIDER_JOIN_CONFIGS).await;
    assert_eq!(configs.unwrap(), ["other", "test"]);
    let mut watch = other.watch(types::PROVIDER_JOIN_CONFIGS, bootstrap()).await;
    watch.opened().await;
    assert_eq!(watch.line().await, (EventType::Created, "other".to_owned()));
    assert_eq!(watch.line().await.0, EventType::Bootstrapped);

    let mut foreign = resource("Machine.test.infraprovider.sidero.dev", "a", &[]);
    metadata(&mut foreign).namespace = "infra-provider:test".to_owned();
    assert_refused(
        other.create(foreign.clone(), "").await,
        Code::PermissionDenied,
        "namespace not allowed, must be one of:",
    );
    foreign.spec.as_mut().unwrap().yaml_spec = "a: 1\n".to_owned();
    world.client.create(foreign.clone(), "").await.unwrap();
    let kind = "Machine.test.infraprovider.sidero.dev";
    let read = world
        .client
        .get_in("infra-provider:test", kind, "a")
        .await
        .unwrap();
    assert_eq!(read.spec.unwrap().yaml_spec, "a: 1\n");
    metadata(&mut foreign).r#type = types::MACHINE_REQUESTS.to_owned();
    assert_refused(
        world.client.create(foreign, "").await,
        Code::InvalidArgument,
        "must have a type suffix",
    );
}

#[tokio::test(start_paused = true)]
async fn a_provider_may_change_nothing_but_finalizers_of_a_request() {
    let world = World::with(OmniOptions {
        future_fields: true,
        ..OmniOptions::default()
    });
    let client = &world.client;
    world.omni.create_request("a", "test", &template()).unwrap();
    world.settle().await;
    let refused = "infra providers are not allowed to update \"MachineRequests.omni.sidero.dev\" resources \
                   other than setting finalizers";

    let read = client.get(types::MACHINE_REQUESTS, "a").await.unwrap();
    let mut cut = read.clone();
    let spec = cut.spec.as_mut().unwrap();
    spec.proto_spec = specs::MachineRequestSpec::decode(spec.proto_spec.as_slice())
        .unwrap()
        .encode_to_vec();
    assert_refused(
        client.update(cut, "", None).await,
        Code::PermissionDenied,
        refused,
    );
    let mut labelled = read.clone();
    metadata(&mut labelled)
        .labels
        .insert("a".to_owned(), "b".to_owned());
    // What differs is looked at before the version.
    metadata(&mut labelled).version = "77".to_owned();
    assert_refused(
        client.update(labelled, "", None).await,
        Code::PermissionDenied,
        refused,
    );
    assert_refused(
        client.teardown(types::MACHINE_REQUESTS, "a", "").await,
        Code::PermissionDenied,
        refused,
    );
    assert_refused(
        client.destroy(types::MACHINE_REQUESTS, "a", "").await,
        Code::PermissionDenied,
        "infra providers are not allowed to destroy",
    );
    assert_refused(
        client
            .create(resource(types::MACHINE_REQUESTS, "b", &[]), "")
            .await,
        Code::PermissionDenied,
        "infra providers are not allowed to create",
    );
    client.hold("a").await;
    let held = world.request("a").unwrap();
    assert!(held.finalizers.contains(OWNER) && held.finalizers.contains(types::REQUEST_FINALIZER));
}

#[tokio::test(start_paused = true)]
async fn registration_and_heartbeat_have_the_providers_id_and_the_heartbeat_dies_with_omni() {
    let mut world = World::new();
    let client = world.client.clone();
    assert_refused(
        client
            .create(resource(types::INFRA_PROVIDER_STATUSES, "other", &[]), "")
            .await,
        Code::InvalidArgument,
        "resource ID must match the infra provider ID",
    );
    client.register().await;
    let mut health = resource(types::INFRA_PROVIDER_HEALTH, "test", &[]);
    metadata(&mut health).namespace = types::INFRA_EPHEMERAL.to_owned();
    client.create(health, OWNER).await.unwrap();
    let options = cosi::WatchOptions {
        bootstrap_bookmark: true,
        ..Default::default()
    };
    let mut watch = client
        .watch_in(
            types::INFRA_EPHEMERAL,
            types::INFRA_PROVIDER_HEALTH,
            None,
            options,
        )
        .await;
    watch.opened().await;
    let noop = watch.event().await;
    assert_eq!(noop.event_type(), EventType::Noop);
    let bookmark = noop.bookmark.unwrap();
    assert_eq!(bookmark.len(), 16);

    world.crash().await;
    assert!(watch.next().await.is_err(), "a crash breaks watches");
    assert!(client.get(types::INFRA_PROVIDER_STATUSES, "test").await.is_err());
    world.start();
    client.get(types::INFRA_PROVIDER_STATUSES, "test").await.unwrap();
    assert_refused(
        client
            .get_in(types::INFRA_EPHEMERAL, types::INFRA_PROVIDER_HEALTH, "test")
            .await,
        Code::NotFound,
        "doesn't exist",
    );
    let mut watch = client
        .watch_in(
            types::INFRA_EPHEMERAL,
            types::INFRA_PROVIDER_HEALTH,
            None,
            resume(bookmark),
        )
        .await;
    assert_refused(
        watch.next().await,
        Code::FailedPrecondition,
        "invalid watch bookmark",
    );
}

#[tokio::test(start_paused = true)]
async fn roles_suspension_and_registration_decide_who_may_what() {
    let world = World::new();
    let client = &world.client;
    for kind in [types::LINKS, types::MACHINE_REQUEST_SETS] {
        assert_refused(
            client.list(types::DEFAULT, kind).await,
            Code::PermissionDenied,
            "unauthorized: access denied: insufficient role",
        );
    }
    assert_refused(
        client
            .list(types::DEFAULT, "ImageFactoryAuths.omni.sidero.dev")
            .await,
        Code::PermissionDenied,
        "access",
    );
    let definitions = client
        .list(types::META, types::RESOURCE_DEFINITIONS)
        .await
        .unwrap();
    let pjc = "providerjoinconfigs.omni.sidero.dev".to_owned();
    assert!(definitions.contains(&pjc));
    world
        .omni
        .configure(|options| options.provider_join_configs = false);
    let definitions = client
        .list(types::META, types::RESOURCE_DEFINITIONS)
        .await
        .unwrap();
    assert!(!definitions.contains(&pjc));

    world.omni.configure(|options| options.suspended = true);
    assert_refused(
        client
            .create(resource(types::MACHINE_REQUEST_STATUSES, "a", &[]), "")
            .await,
        Code::PermissionDenied,
        "users are not allowed to modify",
    );
    world.omni.configure(|options| options.suspended = false);
    world
        .omni
        .force_destroy(types::INFRA, types::INFRA_PROVIDERS, "test")
        .unwrap();
    assert_refused(
        client.list(types::INFRA, types::MACHINE_REQUESTS).await,
        Code::PermissionDenied,
        "infra provider with name \"test\" is not registered in the system",
    );
    world.omni.configure(|options| options.eula_accepted = false);
    assert_refused(
        client.list(types::INFRA, types::MACHINE_REQUESTS).await,
        Code::FailedPrecondition,
        "EULA has not been accepted",
    );
}
