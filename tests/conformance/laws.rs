//! The eleven laws, in the order of `src/cloud/mod.rs`.

use std::fmt::Debug;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use omni_infra_provider::cloud::{
    Cloud, CloudError, ErrorKind, Found, ImageRef, InstanceRef, InstanceSpec, InstanceState, UserData,
};
use omni_infra_provider::machine::name::instance_name;

use super::source::Source;
use super::{
    Door, Ref, asked, create, delete, find, fresh, image, key, ours, refusal, spec, start, until, until_state,
};
use crate::support::peer::say;

/// A verb did its part, or says that another attempt is in its way.
#[track_caller]
fn assert_done_or_busy<T: Debug>(result: &Result<T, CloudError>) {
    assert!(
        result
            .as_ref()
            .err()
            .is_none_or(|error| error.kind == ErrorKind::Busy),
        "{result:?}"
    );
}

/// 1. `create_instance` twice with one spec makes one instance: at once, by two processes, and again later.
pub(crate) async fn creating_twice_makes_one<D: Door>(door: &D) {
    let spec = spec(door, &fresh("twice")).await;
    let other = door.another();
    let (one, two, three) = tokio::join!(
        door.cloud().create_instance(&spec),
        door.cloud().create_instance(&spec),
        other.create_instance(&spec),
    );
    for result in [one, two, three] {
        // Busy: another attempt is under way.
        assert_done_or_busy(&result);
    }
    let stopped = until_state(door, &spec.instance, InstanceState::Stopped).await;
    door.cloud().create_instance(&spec).await.unwrap();
    let again = until_state(door, &spec.instance, InstanceState::Stopped).await;
    assert_eq!(again.id, stopped.id);
    start(door, &stopped).await;
    door.cloud().create_instance(&spec).await.unwrap();
    assert_eq!(
        until_state(door, &stopped, InstanceState::Running).await.id,
        stopped.id
    );
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
    // What came too late the first time is in nobody's way now.
    create(door, &spec).await;
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
}

/// 2. What is created is found, by name, until it is gone; it carries our mark, class and user data unchanged.
pub(crate) async fn what_is_created_is_found_until_it_is_gone<D: Door>(door: &D) {
    let spec = spec(door, &fresh("found")).await;
    let stopped = create(door, &spec).await;
    let found = find(door, &spec.instance).await;
    let instance = ours(&found).unwrap();
    assert_eq!(instance.name, spec.instance.name);
    assert_eq!(instance.mark.as_ref(), Some(&spec.instance.mark));
    let uuid = instance.uuid.clone();
    door.assert_as_asked(&spec).await;
    if let Some(user_data) = door.user_data(&spec.instance.name).await {
        assert_eq!(user_data, spec.user_data.0);
    }
    start(door, &stopped).await;
    let found = find(door, &spec.instance).await;
    let instance = ours(&found).unwrap();
    assert_eq!(
        (instance.uuid.clone(), Some(instance.id.clone())),
        (uuid, stopped.id)
    );
    assert!(instance.started.is_some());
    // Another process sees the same.
    let others = door.another().find_instance(&spec.instance).await.unwrap();
    assert_eq!(ours(&others), Some(instance));
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
}

/// 3. `delete_instance` advances by at least one step, or says Busy; nothing there is Ok; repeated, it reaches Nothing. Without a
///    vendor ID it removes leftovers only, never an instance.
pub(crate) async fn a_deletion_advances_and_repeats<D: Door>(door: &D) {
    let spec = spec(door, &fresh("deleted")).await;
    door.cloud().delete_instance(&spec.instance).await.unwrap();
    let stopped = create(door, &spec).await;
    start(door, &stopped).await;
    let refused = door.cloud().delete_instance(&spec.instance).await;
    assert_done_or_busy(&refused);
    let still = until_state(door, &spec.instance, InstanceState::Running).await;
    assert_eq!(still.id, stopped.id);
    // Whoever holds another ID means another instance.
    let wrong = InstanceRef {
        id: Some("00000000-0000-4000-8000-00000000dead".to_owned()),
        ..spec.instance.clone()
    };
    let spared = door.cloud().delete_instance(&wrong).await;
    assert_done_or_busy(&spared);
    assert_eq!(
        until_state(door, &stopped, InstanceState::Running).await.id,
        stopped.id
    );
    // Deletions alone, with what was known at the beginning, reach nothing.
    let gone = until(
        "nothing",
        || async {
            let result = door.cloud().delete_instance(&stopped).await;
            assert_done_or_busy(&result);
            find(door, &spec.instance).await
        },
        |found| *found == Found::Nothing,
    );
    gone.await;
    door.cloud().delete_instance(&stopped).await.unwrap();
}

/// 4. `find_instance` is Nothing only when nothing of it is left, and we were allowed to look; a creation in flight is Ours.
pub(crate) async fn absence_means_that_nothing_is_left<D: Door>(door: &D) {
    let spec = spec(door, &fresh("absent")).await;
    assert_eq!(find(door, &spec.instance).await, Found::Nothing);
    door.cloud().create_instance(&spec).await.unwrap();
    let found = find(door, &spec.instance).await;
    let instance = ours(&found).unwrap_or_else(|| panic!("a creation in flight is ours: {found:?}"));
    assert!(
        matches!(instance.state, InstanceState::Starting | InstanceState::Stopped),
        "{instance:?}"
    );
    let others = door.another().find_instance(&spec.instance).await.unwrap();
    assert!(ours(&others).is_some(), "another process sees it too: {others:?}");
    let stopped = until_state(door, &spec.instance, InstanceState::Stopped).await;
    start(door, &stopped).await;
    assert_ne!(door.left(&spec.instance.name).await, [""; 0]);
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
    assert_eq!(door.left(&spec.instance.name).await, [""; 0]);
    // A deletion that meets a creation in flight.
    door.cloud().create_instance(&spec).await.unwrap();
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
    assert_eq!(door.left(&spec.instance.name).await, [""; 0]);
    let blind = door.refused().await.find_instance(&spec.instance).await;
    assert_eq!(blind.unwrap_err().kind, ErrorKind::Denied);
}

/// 5. `list_instances` returns all of ours in the scope and none of anybody else's.
pub(crate) async fn a_list_has_ours_and_nobody_elses<D: Door>(door: &D) {
    // Of an installation of its own: other laws run beside.
    let installation = fresh("installation");
    let mark =
        |instance: &mut Ref<D>, installation: &str| installation.clone_into(&mut instance.mark.installation);
    let mut names = Vec::new();
    for index in 0..3 {
        let mut spec = spec(door, &fresh(&format!("listed{index}"))).await;
        mark(&mut spec.instance, &installation);
        door.cloud().create_instance(&spec).await.unwrap();
        names.push(spec.instance);
    }
    let mut other = spec(door, &fresh("others")).await;
    mark(&mut other.instance, "another");
    door.cloud().create_instance(&other).await.unwrap();
    let stranger = fresh("stranger");
    door.plant_stranger(&stranger).await;

    let list = |scope: usize, provider: &'static str| {
        let (scope, installation) = (door.scopes()[scope].clone(), installation.clone());
        async move {
            let listed = door
                .cloud()
                .list_instances(&scope, provider, &installation)
                .await
                .unwrap();
            let mut listed: Vec<_> = listed
                .into_iter()
                .map(|instance| (instance.name, instance.mark.unwrap().request))
                .collect();
            listed.sort();
            listed
        }
    };
    let mut expected: Vec<_> = names
        .iter()
        .map(|asked| (asked.name.clone(), asked.name.clone()))
        .collect();
    expected.sort();
    // At once, while they are in flight, and when they are there.
    assert_eq!(list(0, "conformance").await, expected);
    for asked in &names {
        until_state(door, asked, InstanceState::Stopped).await;
    }
    assert_eq!(list(0, "conformance").await, expected);
    assert_eq!(list(0, "somebody").await, []);
    assert_eq!(list(1, "conformance").await, []);
    for asked in names.iter().chain([&other.instance]) {
        delete(door, asked).await;
    }
    assert_eq!(list(0, "conformance").await, []);
    assert!(door.remove_stranger(&stranger).await);
}

/// 6. A name taken by something without our mark is Foreign, never adopted, never deleted.
pub(crate) async fn a_stranger_is_never_touched<D: Door>(door: &D) {
    let name = fresh("stranger");
    door.plant_stranger(&name).await;
    let spec = spec(door, &name).await;
    let found = find(door, &spec.instance).await;
    assert!(matches!(found, Found::Foreign { .. }), "{found:?}");
    let refused = door.cloud().create_instance(&spec).await;
    assert_eq!(refused.unwrap_err().kind, ErrorKind::Foreign);
    let started = door.cloud().start_instance(&spec.instance, &spec.user_data).await;
    assert_eq!(started.unwrap_err().kind, ErrorKind::Foreign);
    // Without an ID there is nothing of ours to remove.
    door.cloud().delete_instance(&spec.instance).await.unwrap();
    // Of another request, and of another installation, is a stranger's as well.
    let ours = super::spec(door, &fresh("ours")).await;
    let stopped = create(door, &ours).await;
    for change in [
        |asked: &mut Ref<D>| asked.mark.request.push('x'),
        |asked: &mut Ref<D>| asked.mark.installation.push('x'),
        |asked: &mut Ref<D>| asked.mark.provider.push('x'),
    ] {
        let mut asked = stopped.clone();
        change(&mut asked);
        let found = find(door, &asked).await;
        assert!(matches!(found, Found::Foreign { .. }), "{found:?}");
        // Foreign, or nothing of theirs there.
        let deleted = door.cloud().delete_instance(&asked).await;
        assert!(
            deleted
                .as_ref()
                .err()
                .is_none_or(|error| error.kind == ErrorKind::Foreign),
            "{deleted:?}"
        );
    }
    assert_eq!(
        until_state(door, &ours.instance, InstanceState::Stopped).await.id,
        stopped.id
    );
    delete(door, &ours.instance).await;
    assert!(
        door.remove_stranger(&name).await,
        "the stranger's instance is still there"
    );
}

/// 7. An import sweeps its own leftovers first; two at once leave one image; a cut-off one can be repeated.
pub(crate) async fn an_import_can_be_repeated<D: Door>(door: &D) {
    if D::Cloud::boot(&door.class()).format.is_none() {
        return;
    }
    let (scope, mut key) = (door.scopes()[0].clone(), key(door));
    key.schematic = format!("{:064x}", rand::random::<u128>());
    assert_eq!(door.cloud().find_image(&scope, &key).await.unwrap(), None);
    let cut = door.cloud().import_image(&scope, &key, &Source::broken()).await;
    if cut.is_err() {
        assert_eq!(door.cloud().find_image(&scope, &key).await.unwrap(), None);
    }
    let source = Source::whole();
    let (one, two) = tokio::join!(
        door.cloud().import_image(&scope, &key, &source),
        door.cloud().import_image(&scope, &key, &source),
    );
    // One may be told to wait for the other.
    for result in [&one, &two] {
        assert_done_or_busy(result);
    }
    let image = one.or(two).unwrap();
    assert_eq!(door.cloud().find_image(&scope, &key).await.unwrap(), Some(image));
    assert_eq!(door.images(&key).await, 1);
}

/// 8. Every failure has the right kind; not-found is never an error, not-allowed never looks like not-found.
pub(crate) async fn every_failure_has_its_kind<D: Door>(door: &D) {
    door.cloud().check().await.unwrap();
    let nowhere = asked(door, &fresh("nowhere"));
    assert_eq!(find(door, &nowhere).await, Found::Nothing);
    for (cloud, kind) in [
        (door.refused().await, ErrorKind::Denied),
        (door.unreachable().await, ErrorKind::Unavailable),
    ] {
        assert_eq!(cloud.check().await.unwrap_err().kind, kind);
        assert_eq!(cloud.find_instance(&nowhere).await.unwrap_err().kind, kind);
        let listed = cloud.list_instances(&nowhere.scope, "conformance", "x").await;
        assert_eq!(listed.unwrap_err().kind, kind);
        let mut spec = spec(door, &nowhere.name).await;
        spec.instance = nowhere.clone();
        assert_eq!(cloud.create_instance(&spec).await.unwrap_err().kind, kind);
        assert_eq!(cloud.delete_instance(&nowhere).await.unwrap_err().kind, kind);
    }
    let gone = door.cloud().start_instance(&nowhere, &UserData(Vec::new())).await;
    assert_eq!(
        gone.unwrap_err().kind,
        ErrorKind::Busy,
        "the next look shows that it is gone"
    );
    let impossible = door
        .impossible_classes()
        .into_iter()
        .map(|class| (class, ErrorKind::Rejected));
    let huge = door
        .huge_classes()
        .into_iter()
        .map(|class| (class, ErrorKind::Exhausted));
    for (class, kind) in impossible.chain(huge) {
        let spec = InstanceSpec {
            class,
            ..spec(door, &fresh("refused")).await
        };
        let error = match refusal_or_start(door, &spec).await {
            Some(error) => error,
            None => refusal(door, &spec).await,
        };
        assert_eq!(error.kind, kind, "{error}");
        assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
        assert_eq!(door.left(&spec.instance.name).await, [""; 0]);
    }
}

/// Some clouds look for capacity only at the start. The error of that, where it comes to it.
async fn refusal_or_start<D: Door>(
    door: &D,
    spec: &super::Spec<D>,
) -> Option<omni_infra_provider::cloud::CloudError> {
    if let Err(error) = door.cloud().create_instance(spec).await {
        return Some(error);
    }
    let found = until(
        "a creation that ended",
        || find(door, &spec.instance),
        |found| ours(found).is_none_or(|instance| instance.state == InstanceState::Stopped),
    )
    .await;
    let id = ours(&found)?.id.clone();
    let stopped = InstanceRef {
        id: Some(id),
        ..spec.instance.clone()
    };
    door.cloud().start_instance(&stopped, &spec.user_data).await.err()
}

/// 9. Names at the limit work; user data at the limit arrives.
pub(crate) async fn names_and_user_data_at_the_limit_work<D: Door>(door: &D) {
    let limits = D::Cloud::LIMITS;
    let long = fresh(&"l".repeat(limits.name)).replace('-', "");
    let long = long[long.len() - limits.name..].to_owned();
    // What begins with a digit is no name; what is too long is shortened to just the limit.
    let shortened = instance_name(&format!("{}-{}", "c".repeat(200), fresh("x")), limits);
    assert_eq!(shortened.len(), limits.name);
    for name in [long, shortened] {
        let mut spec = spec(door, &name).await;
        // A request ID may be longer than any name, and odd.
        spec.instance.mark.request = format!("{}/Ä b", "r".repeat(200));
        spec.user_data = UserData(vec![b'#'; limits.user_data]);
        let stopped = create(door, &spec).await;
        start(door, &stopped).await;
        if let Some(user_data) = door.user_data(&name).await {
            assert_eq!(user_data.len(), limits.user_data);
        }
        assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
        assert_eq!(door.left(&name).await, [""; 0]);
    }
}

/// Polls a future at most so often, and drops it.
async fn dropped_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

/// Cut points that are tried beside each other.
const BESIDE: usize = 4;

/// 10. Any future may be dropped at any await; the next call converges.
pub(crate) async fn what_is_dropped_anywhere_converges<D: Door>(door: &D) {
    let image = image(door).await;
    let mut points = 0;
    // What is created in one round is deleted in it: the cut points of both grow together.
    loop {
        // Each is polled only when it is woken: a poll in vain would count as a cut point.
        let rounds: FuturesUnordered<_> = (points + 1..=points + BESIDE)
            .map(|polls| cut_after(door, &image, polls))
            .collect();
        let cut: Vec<bool> = rounds.collect().await;
        assert!(points > 0 || cut.contains(&true), "nothing was ever dropped");
        points += BESIDE;
        if cut.contains(&false) {
            break;
        }
    }
    say(&format!("dropped at {points} points"));
}

/// A life, each verb of which is dropped after so many polls; false if none was.
async fn cut_after<D: Door>(door: &D, image: &ImageRef, polls: usize) -> bool {
    let mut spec = spec(door, &fresh("dropped")).await;
    spec.image = image.clone();
    let created = dropped_after(polls, door.cloud().create_instance(&spec)).await;
    let found = find(door, &spec.instance).await;
    if found == Found::Nothing {
        door.cloud().create_instance(&spec).await.unwrap();
    }
    let stopped = until(
        "stopped",
        || async {
            // The remains of a cut-off creation are removed and it is made anew, as by the engine.
            match find(door, &spec.instance).await {
                Found::Remains { .. } => drop(door.cloud().delete_instance(&spec.instance).await),
                Found::Nothing => drop(door.cloud().create_instance(&spec).await),
                Found::Ours(_) | Found::Foreign { .. } => {}
            }
            find(door, &spec.instance).await
        },
        |found| ours(found).is_some_and(|instance| instance.state == InstanceState::Stopped),
    )
    .await;
    let stopped = InstanceRef {
        id: ours(&stopped).map(|instance| instance.id.clone()),
        ..spec.instance.clone()
    };
    let started = dropped_after(polls, door.cloud().start_instance(&stopped, &spec.user_data)).await;
    door.cloud()
        .start_instance(&stopped, &spec.user_data)
        .await
        .unwrap();
    until_state(door, &stopped, InstanceState::Running).await;
    let deleted = dropped_after(polls, door.cloud().delete_instance(&stopped)).await;
    assert_eq!(delete(door, &spec.instance).await, Found::Nothing);
    assert_eq!(door.left(&spec.instance.name).await, [""; 0]);
    created.is_none() || started.is_none() || deleted.is_none()
}

/// 11. `list_marked` returns every instance that carries a mark of the provider ID, whatever the installation; `list_scopes` every
///     scope that can be looked into. What could not be seen is an error.
pub(crate) async fn every_mark_of_the_provider_is_listed<D: Door>(door: &D) {
    // A provider of its own: other laws run beside. One begins as the other does.
    let provider = fresh("marks");
    let longer = format!("{provider}-longer");
    let mut made = Vec::new();
    for (name, provider, installation) in [
        ("mine", &provider, "one"),
        ("earlier", &provider, "two"),
        ("other", &longer, "one"),
    ] {
        let mut spec = spec(door, &fresh(name)).await;
        spec.instance.mark.provider.clone_from(provider);
        installation.clone_into(&mut spec.instance.mark.installation);
        made.push(create(door, &spec).await);
    }
    let stranger = fresh("stranger");
    door.plant_stranger(&stranger).await;

    let [scope, elsewhere] = door.scopes();
    assert!(door.cloud().list_scopes().await.unwrap().contains(&scope));
    let list = |scope: super::Scope<D>, provider: String| async move {
        let mut listed: Vec<_> = door
            .cloud()
            .list_marked(&scope, &provider)
            .await
            .unwrap()
            .into_iter()
            .map(|marked| (marked.name, marked.id, marked.mark))
            .collect();
        listed.sort_by(|one, other| one.0.cmp(&other.0));
        listed
    };
    let mut expected: Vec<_> = made
        .iter()
        .take(2)
        .map(|made| (made.name.clone(), made.id.clone(), Some(made.mark.clone())))
        .collect();
    expected.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(list(scope.clone(), provider.clone()).await, expected);
    assert_eq!(list(elsewhere, provider.clone()).await, []);
    for (cloud, kind) in [
        (door.refused().await, ErrorKind::Denied),
        (door.unreachable().await, ErrorKind::Unavailable),
    ] {
        assert_eq!(cloud.list_scopes().await.unwrap_err().kind, kind);
        let listed = cloud.list_marked(&scope, &provider).await;
        assert_eq!(listed.unwrap_err().kind, kind);
    }
    for asked in &made {
        delete(door, asked).await;
    }
    assert_eq!(list(scope, provider).await, []);
    assert!(door.remove_stranger(&stranger).await);
}
