//! What a watch sends, and when.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_watch_bootstraps_and_resumes_across_a_restart_where_it_left_off() {
    let mut world = World::new();
    let client = world.client.clone();
    for id in ["b", "a"] {
        world.omni.create_request(id, "test", &template()).unwrap();
    }
    world.settle().await;
    let mut watch = client.watch(types::MACHINE_REQUESTS, bootstrap()).await;
    watch.opened().await;
    assert_eq!(watch.line().await, (EventType::Created, "a".to_owned()));
    assert_eq!(watch.line().await, (EventType::Created, "b".to_owned()));
    let bootstrapped = watch.event().await;
    assert_eq!(bootstrapped.event_type(), EventType::Bootstrapped);
    let nobody = bootstrapped.resource.unwrap().metadata.unwrap();
    assert_eq!((nobody.id.as_str(), nobody.version.as_str()), ("", "undefined"));
    let bookmark = bootstrapped.bookmark.unwrap();
    assert_eq!(bookmark.len(), 8);

    world.omni.create_request("c", "test", &template()).unwrap();
    assert_eq!(watch.line().await, (EventType::Created, "c".to_owned()));
    let held = watch.event().await;
    assert_eq!(held.event_type(), EventType::Updated);
    let old = held.old.unwrap().metadata.unwrap();
    assert_eq!((old.version.as_str(), old.finalizers.len()), ("1", 0));

    world.crash().await;
    assert!(watch.next().await.is_err());
    world.start();
    let mut watch = client.watch(types::MACHINE_REQUESTS, resume(bookmark)).await;
    watch.opened().await;
    assert_eq!(watch.line().await, (EventType::Created, "c".to_owned()));
    assert_eq!(watch.line().await, (EventType::Updated, "c".to_owned()));
    assert!(watch.is_silent().await);
}

#[tokio::test(start_paused = true)]
async fn a_compacted_watch_is_errored_and_stays_open() {
    let world = World::new();
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, bootstrap()).await;
    watch.opened().await;
    let bookmark = watch.event().await.bookmark.unwrap();
    drop(watch);
    world.omni.create_request("a", "test", &template()).unwrap();
    world.settle().await;
    world.omni.compact();
    let mut watch = world
        .client
        .watch(types::MACHINE_REQUESTS, resume(bookmark))
        .await;
    watch.opened().await;
    let errored = watch.event().await;
    assert_eq!(errored.event_type(), EventType::Errored);
    assert!(errored.resource.is_none() && errored.error.is_some());
    world.omni.create_request("b", "test", &template()).unwrap();
    assert!(watch.is_silent().await);
}

#[tokio::test(start_paused = true)]
async fn a_restored_backup_leaves_a_bookmark_of_the_future_that_stays_silent() {
    let world = World::new();
    let backup = world.omni.backup();
    world.omni.create_request("a", "test", &template()).unwrap();
    world.settle().await;
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, bootstrap()).await;
    watch.opened().await;
    watch.event().await;
    let bookmark = watch.event().await.bookmark.unwrap();
    drop(watch);
    world.omni.restore(&backup);
    let mut watch = world
        .client
        .watch(types::MACHINE_REQUESTS, resume(bookmark))
        .await;
    watch.opened().await;
    assert!(watch.is_silent().await);
}

#[tokio::test(start_paused = true)]
async fn an_aggregated_watch_of_a_provider_may_send_nothing_in_a_message() {
    let world = World::new();
    world.omni.add_provider("other").unwrap();
    let options = cosi::WatchOptions {
        aggregated: true,
        ..bootstrap()
    };
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, options).await;
    watch.opened().await;
    assert_eq!(watch.event().await.event_type(), EventType::Bootstrapped);
    world.omni.create_request("a", "other", &template()).unwrap();
    assert!(watch.next().await.unwrap().unwrap().event.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_single_watch_of_nothing_is_silent_and_then_tells_of_the_creation() {
    let world = World::new();
    let client = &world.client;
    let mut watch = client
        .watch_in(
            types::INFRA,
            types::MACHINE_REQUESTS,
            Some("a"),
            Default::default(),
        )
        .await;
    watch.opened().await;
    world.omni.create_request("b", "test", &template()).unwrap();
    world.omni.create_request("a", "test", &template()).unwrap();
    assert_eq!(watch.line().await, (EventType::Created, "a".to_owned()));
    let mut refused = client
        .watch_in(types::INFRA, types::MACHINE_REQUESTS, Some("a"), bootstrap())
        .await;
    assert_refused(refused.next().await, Code::Unimplemented, "bootstrap contents");
}

#[tokio::test(start_paused = true)]
async fn a_label_query_turns_updates_into_creations_and_destructions() {
    let world = World::new();
    let term = cosi::LabelTerm {
        key: "colour".to_owned(),
        op: cosi::label_term::Operation::Equal.into(),
        value: vec!["red".to_owned()],
        invert: false,
    };
    let options = cosi::WatchOptions {
        label_query: vec![cosi::LabelQuery { terms: vec![term] }],
        ..Default::default()
    };
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, options).await;
    watch.opened().await;
    world.omni.create_request("a", "test", &template()).unwrap();
    let paint = |colour: &'static str| {
        world
            .omni
            .modify_raw(types::INFRA, types::MACHINE_REQUESTS, "a", |request| {
                request.labels.insert("colour".to_owned(), colour.to_owned());
            })
            .unwrap();
    };
    paint("red");
    assert_eq!(watch.line().await, (EventType::Created, "a".to_owned()));
    paint("blue");
    assert_eq!(watch.line().await.0, EventType::Destroyed);
}

#[tokio::test(start_paused = true)]
async fn held_watches_send_later_what_happened_meanwhile() {
    let world = World::new();
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, bootstrap()).await;
    watch.opened().await;
    watch.event().await;
    world.omni.configure(|options| options.hold_watches = true);
    world.omni.create_request("a", "test", &template()).unwrap();
    assert!(watch.is_silent().await);
    world.omni.configure(|options| options.hold_watches = false);
    assert_eq!(watch.line().await, (EventType::Created, "a".to_owned()));
    world.omni.break_watches();
    while let Ok(Some(_)) = watch.next().await {}
}
