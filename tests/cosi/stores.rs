//! Our store over its watch: it begins with everything, takes our own writes at once, hears what others do, and
//! heals from whatever happens to the server.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use omni_infra_provider::omni::kinds::{
    Kind, LABEL_PROVIDER, MachineRequestStatuses, MachineRequests, MachineResources, Stage,
};
use omni_infra_provider::omni::store::OnChange;
use omni_infra_provider::omni::wire::specs;
use omni_infra_provider::omni::{Omni, Phase, Resource, State, Store};
use omni_infra_provider::sandbox::omni::Stored;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::server::{OWNER, Server};
use super::{set, status, stored_own, stored_request, stored_status, until, within};

on_both! {
    a_store_begins_with_what_there_is_and_hears_of_changes,
    an_empty_store_is_bootstrapped_too,
    what_we_wrote_is_there_at_once_and_never_goes_back,
    a_store_follows_our_own_resources_through_their_life,
    what_is_another_providers_is_not_kept,
    what_happened_while_we_were_cut_off_is_reported,
    what_happened_while_the_server_was_down_is_reported,
    what_vanished_past_the_history_is_reported: 16,
    an_id_that_was_made_anew_while_we_were_away_is_the_new_one,
    many_breaks_are_one_after_the_other_healed,
    a_store_that_cannot_keep_up_reads_everything_anew: 16,
    ten_thousand_requests_are_a_store,
    a_backlog_larger_than_a_message_may_be_is_caught_up_with: 4000,
}

/// Keeps a store from taking the next event while it is closed.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn close(&self, closed: bool) {
        *self.0.0.lock().unwrap() = closed;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let closed = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// A store that runs, and what it was told of.
struct Watched<K: Kind> {
    store: Store<K>,
    heard: Arc<Mutex<BTreeSet<String>>>,
    gate: Gate,
    _running: JoinSet<()>,
}

impl<K: Kind> Watched<K> {
    fn run(state: &State) -> Self {
        let store = Store::<K>::new(state.clone(), |resource| Some(resource.id().to_owned()));
        let heard = Arc::new(Mutex::new(BTreeSet::new()));
        let gate = Gate::default();
        let on_change: OnChange = {
            let (heard, gate) = (Arc::clone(&heard), gate.clone());
            Arc::new(move |group: &str| {
                // The runtime goes on with whatever else this thread had to do.
                tokio::task::block_in_place(|| gate.pass());
                heard.lock().unwrap().insert(group.to_owned());
            })
        };
        let mut running = JoinSet::new();
        running.spawn(store.clone().run(on_change));
        Self {
            store,
            heard,
            gate,
            _running: running,
        }
    }

    async fn bootstrapped(state: &State) -> Self {
        let watched = Self::run(state);
        within("the bootstrap", watched.store.bootstrapped()).await;
        assert!(watched.store.is_bootstrapped());
        // Word of what there is goes out after that.
        let all = watched.store.all();
        let ids: Vec<&str> = all.iter().map(|resource| resource.id()).collect();
        watched.hears(&ids).await;
        watched
    }

    /// Every entry in words.
    fn entries(&self) -> Vec<String> {
        let all = self.store.all();
        all.iter().map(|resource| words(resource)).collect()
    }

    /// Waits for these entries.
    async fn shows(&self, entries: &[&str]) {
        until(&format!("{entries:?}"), || match self.entries() {
            found if found == entries => Ok(()),
            found => Err(found),
        })
        .await;
    }

    async fn is_current(&self, current: bool) {
        until(&format!("current {current}"), || {
            match self.store.is_current() == current {
                true => Ok(()),
                false => Err(self.store.clone()),
            }
        })
        .await;
    }

    /// What changed since the last question.
    fn heard(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    /// Waits until it heard of all of these, and of nothing else.
    async fn hears(&self, ids: &[&str]) {
        let wanted: BTreeSet<String> = set(ids);
        until(&format!("word of {ids:?}"), || {
            let heard = self.heard.lock().unwrap();
            match heard.is_superset(&wanted) {
                true => Ok(()),
                false => Err(heard.clone()),
            }
        })
        .await;
        assert_eq!(self.heard(), wanted);
    }
}

fn words<K: Kind>(resource: &Resource<K>) -> String {
    let torn = if resource.tearing_down() { " torn" } else { "" };
    format!("{} {}{torn}", resource.id(), resource.metadata.version)
}

fn torn(mut stored: Stored) -> Stored {
    stored.phase = Phase::TearingDown;
    stored
}

async fn a_store_begins_with_what_there_is_and_hears_of_changes(mut server: impl Server) {
    server.put(&[stored_request("a"), stored_request("b")]).await;
    let state = server.client().await.state;
    let watched = Watched::<MachineRequests>::bootstrapped(&state).await;
    assert_eq!(watched.entries(), ["a 1", "b 1"]);
    assert!(watched.store.is_current());
    let read = state.get::<MachineRequests>("a").await.unwrap().unwrap();
    assert_eq!(*watched.store.get("a").unwrap(), read);

    server.put(&[stored_request("c")]).await;
    watched.hears(&["c"]).await;
    server.put(&[torn(stored_request("a"))]).await;
    watched.hears(&["a"]).await;
    server.destroy(&[stored_request("b")]).await;
    watched.hears(&["b"]).await;
    assert_eq!(watched.entries(), ["a 2 torn", "c 1"]);
    assert_eq!(watched.store.breaks(), 0);
}

async fn an_empty_store_is_bootstrapped_too(mut server: impl Server) {
    let state = server.client().await.state;
    let watched = Watched::<MachineRequests>::bootstrapped(&state).await;
    assert_eq!(watched.entries(), [""; 0]);
    assert!(watched.store.is_current());
    server.put(&[stored_request("a")]).await;
    watched.hears(&["a"]).await;
}

async fn what_we_wrote_is_there_at_once_and_never_goes_back(mut server: impl Server) {
    let state = server.client().await.state;
    let watched = Watched::<MachineRequestStatuses>::bootstrapped(&state).await;
    let created = state.create(&status("a")).await.unwrap();
    watched.store.put(created.clone());
    assert_eq!(watched.store.get("a").as_deref(), Some(&created));
    let mut current = created.clone();
    for _ in 0..20 {
        let updated = state.update(&current, None).await.unwrap();
        watched.store.put(updated.clone());
        // The event of an earlier write may come in between, and changes nothing.
        let shown = watched.store.get("a").unwrap();
        assert_eq!(shown.metadata.version, updated.metadata.version);
        current = updated;
    }
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();
    watched.store.remove(&current);
    assert_eq!(watched.entries(), [""; 0]);

    // All the events have passed once this one has: none of them brought anything back.
    server.put(&[stored_status("last")]).await;
    watched.shows(&["last 1"]).await;
    let again = state.create(&status("a")).await.unwrap();
    watched.shows(&["a 1", "last 1"]).await;
    assert_eq!(*watched.store.get("a").unwrap(), again);
}

async fn a_store_follows_our_own_resources_through_their_life(mut server: impl Server) {
    let state = server.client().await.state;
    let watched = Watched::<MachineRequestStatuses>::bootstrapped(&state).await;
    state.create(&status("a")).await.unwrap();
    watched.hears(&["a"]).await;
    let held = state
        .modify::<MachineRequestStatuses>("a", |status| {
            status.spec.stage = Stage::Provisioned;
            status.metadata.finalizers.insert("theirs".to_owned())
        })
        .await
        .unwrap();
    watched.hears(&["a"]).await;
    assert_eq!(watched.store.get("a").as_deref(), held.as_ref());
    assert!(
        !state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    watched.hears(&["a"]).await;
    assert_eq!(watched.entries(), ["a 3 torn"]);
    let mut freed = torn(stored_status("a"));
    freed.finalizers = set(&[]);
    server.put(&[freed]).await;
    watched.hears(&["a"]).await;
    assert_eq!(watched.store.get("a").unwrap().metadata.finalizers, set(&[]));
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();
    watched.hears(&["a"]).await;
    assert_eq!(watched.entries(), [""; 0]);

    // Of a kind that the server has no type for, too.
    let machines = Watched::<MachineResources>::bootstrapped(&state).await;
    server.put(&[stored_own("m")]).await;
    machines.hears(&["m"]).await;
}

async fn what_is_another_providers_is_not_kept(mut server: impl Server) {
    let mut theirs = stored_request("theirs");
    theirs
        .labels
        .insert(LABEL_PROVIDER.to_owned(), "other".to_owned());
    let mut nobodys = stored_request("nobodys");
    nobodys.labels.clear();
    server
        .put(&[theirs.clone(), nobodys, stored_request("ours")])
        .await;
    let state = server.client().await.state;
    let watched = Watched::<MachineRequests>::bootstrapped(&state).await;
    assert_eq!(watched.entries(), ["ours 1"]);
    server.put(&[torn(theirs.clone())]).await;
    server.destroy(&[theirs]).await;
    server.put(&[stored_request("late")]).await;
    watched.hears(&["late"]).await;
}

async fn what_happened_while_we_were_cut_off_is_reported(mut server: impl Server) {
    server
        .put(&[stored_request("a"), stored_request("b"), stored_request("c")])
        .await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    server.hang_up().await;
    watched.is_current(false).await;
    // Still readable, and still what it was.
    assert_eq!(watched.entries(), ["a 1", "b 1", "c 1"]);
    change(&mut server).await;
    server.listen().await;
    watched.hears(&["a", "b", "d"]).await;
    assert_eq!(watched.entries(), ["b 2 torn", "c 1", "d 1"]);
    watched.is_current(true).await;
    goes_on(&mut server, &watched, &omni).await;
}

/// Ends a, tears b down, leaves c, makes d.
async fn change(server: &mut impl Server) {
    server
        .put(&[stored_request("d"), torn(stored_request("b"))])
        .await;
    server.destroy(&[stored_request("a")]).await;
}

/// Everything works as before.
async fn goes_on(server: &mut impl Server, watched: &Watched<MachineRequests>, omni: &Omni) {
    watched.heard();
    server.put(&[stored_request("z")]).await;
    until("word of z", || match watched.heard().contains("z") {
        true => Ok(()),
        false => Err(watched.entries()),
    })
    .await;
    let read = omni.state.get::<MachineRequests>("z").await.unwrap().unwrap();
    assert_eq!(*watched.store.get("z").unwrap(), read);
    assert!(watched.store.breaks() > 0);
}

async fn what_happened_while_the_server_was_down_is_reported(mut server: impl Server) {
    server
        .put(&[stored_request("a"), stored_request("b"), stored_request("c")])
        .await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    server.crash().await;
    watched.is_current(false).await;
    assert_eq!(watched.entries(), ["a 1", "b 1", "c 1"]);
    change(&mut server).await;
    server.listen().await;
    watched.hears(&["a", "b", "d"]).await;
    assert_eq!(watched.entries(), ["b 2 torn", "c 1", "d 1"]);
    watched.is_current(true).await;
    goes_on(&mut server, &watched, &omni).await;
}

async fn what_vanished_past_the_history_is_reported(mut server: impl Server) {
    server.put(&[stored_request("a"), stored_request("b")]).await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    server.hang_up().await;
    watched.is_current(false).await;
    server.destroy(&[stored_request("a")]).await;
    for number in 0..30 {
        server
            .put(&[stored_request("b").label("x", &number.to_string())])
            .await;
    }
    server.listen().await;
    watched.hears(&["a", "b"]).await;
    assert_eq!(watched.entries(), ["b 31"]);
    watched.is_current(true).await;
    goes_on(&mut server, &watched, &omni).await;
}

async fn an_id_that_was_made_anew_while_we_were_away_is_the_new_one(mut server: impl Server) {
    server.put(&[stored_request("a"), stored_request("b")]).await;
    server.put(&[stored_request("a").label("x", "y")]).await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    let old = watched.store.get("a").unwrap();
    server.hang_up().await;
    watched.is_current(false).await;
    server.destroy(&[stored_request("a")]).await;
    sleep(Duration::from_millis(2)).await;
    server.put(&[stored_request("a")]).await;
    server.listen().await;
    // Its version is lower than the one we knew.
    watched.shows(&["a 1", "b 1"]).await;
    assert!(!watched.store.get("a").unwrap().same_incarnation(&old));
    watched.hears(&["a"]).await;
}

async fn many_breaks_are_one_after_the_other_healed(mut server: impl Server) {
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    for (number, id) in ["a", "b", "c", "d"].into_iter().enumerate() {
        match number % 2 {
            0 => server.hang_up().await,
            _ => server.crash().await,
        }
        watched.is_current(false).await;
        server.put(&[stored_request(id)]).await;
        server.listen().await;
        watched.hears(&[id]).await;
        watched.is_current(true).await;
    }
    assert_eq!(watched.entries(), ["a 1", "b 1", "c 1", "d 1"]);
}

async fn a_store_that_cannot_keep_up_reads_everything_anew(mut server: impl Server) {
    server.put(&[stored_request("a"), stored_request("b")]).await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    watched.gate.close(true);
    let large = |number: usize| {
        let mut request = stored_request("a");
        let text = format!("{number}{}", "x".repeat(1 << 20));
        request.annotations.insert("large".to_owned(), text);
        request
    };
    for number in 0..64 {
        server.put(&[large(number)]).await;
    }
    server.destroy(&[stored_request("b")]).await;
    watched.gate.close(false);
    watched.shows(&["a 65"]).await;
    until("word of b", || {
        match watched.heard.lock().unwrap().contains("b") {
            true => Ok(()),
            false => Err("none".to_owned()),
        }
    })
    .await;
    watched.is_current(true).await;
    // The server said so itself; nothing else broke.
    assert!(watched.store.breaks() > 0);
    goes_on(&mut server, &watched, &omni).await;
}

/// With what a class with user data and labels may hold.
fn stored_large(number: usize) -> Stored {
    let spec = specs::MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        extensions: vec!["siderolabs/hello-world-service".to_owned()],
        provider_data: "project: talos\n".repeat(140),
        ..specs::MachineRequestSpec::default()
    };
    stored_request(&format!("request-{number:05}")).spec(&spec)
}

async fn ten_thousand_requests_are_a_store(mut server: impl Server) {
    const COUNT: usize = 10_000;
    let all: Vec<Stored> = (0..COUNT).map(stored_large).collect();
    server.put(&all).await;
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    assert_eq!(watched.store.all().len(), COUNT);
    assert_eq!(watched.store.breaks(), 0);
    let last = watched.store.get("request-09999").unwrap();
    assert_eq!(last.spec.provider_data.len(), 15 * 140);
    let listed = within("the list", omni.state.list::<MachineRequests>(&[])).await;
    assert_eq!(listed.unwrap().len(), COUNT);

    // A change among them is one change.
    server.put(&[torn(stored_large(5000))]).await;
    watched.hears(&["request-05000"]).await;
    // And after a restart everything is read again, and nothing is news.
    server.crash().await;
    watched.is_current(false).await;
    server.destroy(&[stored_large(7000)]).await;
    server.listen().await;
    watched.hears(&["request-07000"]).await;
    assert_eq!(watched.store.all().len(), COUNT - 1);
}

async fn a_backlog_larger_than_a_message_may_be_is_caught_up_with(mut server: impl Server) {
    // 32 MiB is the most that either side takes as one message.
    const COUNT: usize = 3000;
    let large: Vec<Stored> = (0..COUNT)
        .map(|number| {
            let mut stored = stored_request(&format!("request-{number:05}"));
            stored.annotations.insert("large".to_owned(), "x".repeat(14_000));
            stored
        })
        .collect();
    let omni = server.client().await;
    let watched = Watched::<MachineRequests>::bootstrapped(&omni.state).await;
    server.hang_up().await;
    watched.is_current(false).await;
    server.put(&large).await;
    server.listen().await;
    until("all of them", || match watched.store.all().len() {
        COUNT => Ok(()),
        count => Err(count),
    })
    .await;
    watched.is_current(true).await;
}
