//! What a watch says, on the bare wire: first everything, then every change; where it goes on after a break, and
//! where it cannot.

use std::time::Duration;

use omni_infra_provider::omni::kinds::LABEL_PROVIDER;
use omni_infra_provider::omni::wire::cosi::label_term::Operation;
use omni_infra_provider::omni::wire::cosi::{
    Event, EventType, LabelQuery, LabelTerm, WatchOptions, WatchRequest, WatchResponse,
};
use omni_infra_provider::omni::{Phase, Signer};
use omni_infra_provider::sandbox::omni::Stored;
use omni_infra_provider::sandbox::omni::types::{INFRA_EPHEMERAL, INFRA_PROVIDER_HEALTH};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

use super::server::{PROVIDER, Server, Wire};
use super::{OWN_NAMESPACE, OWN_TYPE, stored_own, within};

on_both! {
    a_watch_begins_with_everything_there_is,
    a_watch_of_nothing_is_bootstrapped_too,
    a_watch_without_contents_begins_with_a_bookmark,
    every_change_is_told_in_order,
    several_changes_may_come_at_once,
    a_query_makes_updates_come_and_go,
    a_watch_of_one_resource_begins_with_it,
    a_watch_goes_on_after_its_bookmark,
    a_watch_goes_on_after_the_bookmark_of_its_beginning,
    a_bookmark_in_memory_dies_with_the_process,
    a_bookmark_that_is_none_is_refused,
    a_bookmark_that_history_has_forgotten_is_refused: 16,
    a_watch_that_cannot_keep_up_is_told_so_and_left_open: 16,
    what_no_server_can_watch_is_refused,
    an_old_client_is_spared_what_it_does_not_know,
}

/// Longer than a server takes to say something, if it has anything to say.
const SILENCE: Duration = Duration::from_millis(300);

fn everything() -> WatchOptions {
    WatchOptions {
        bootstrap_contents: true,
        ..WatchOptions::default()
    }
}

fn from(bookmark: &[u8]) -> WatchOptions {
    WatchOptions {
        start_from_bookmark: Some(bookmark.to_vec()),
        ..WatchOptions::default()
    }
}

fn request(options: WatchOptions) -> WatchRequest {
    WatchRequest {
        namespace: OWN_NAMESPACE.to_owned(),
        r#type: OWN_TYPE.to_owned(),
        id: None,
        options: Some(options),
        api_version: 1,
    }
}

/// An open watch, and what it said.
struct Watching {
    stream: Streaming<WatchResponse>,
    /// Of the last event that had one.
    bookmark: Vec<u8>,
}

impl Watching {
    /// Its first message has come: it says no more than that the watch stands.
    async fn open(wire: &mut Wire<Signer>, request: WatchRequest) -> Result<Self, Status> {
        let mut stream = wire.watch(request).await?.into_inner();
        let first = within("the first message", stream.message()).await?;
        assert_eq!(first.unwrap().event, []);
        Ok(Self {
            stream,
            bookmark: Vec::new(),
        })
    }

    async fn message(&mut self) -> Vec<Event> {
        let message = within("a message", self.stream.message()).await.unwrap();
        let events = message.unwrap().event;
        if let Some(bookmark) = events.iter().rev().find_map(|event| event.bookmark.clone()) {
            self.bookmark = bookmark;
        }
        events
    }

    /// The next events, in words, however many messages bring them.
    async fn events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        while events.len() < count {
            events.extend(self.message().await.iter().map(told));
        }
        events
    }

    async fn assert_silent(&mut self) {
        let silence = timeout(SILENCE, self.stream.message()).await;
        assert!(silence.is_err(), "{silence:?}");
    }
}

/// An event in words; a star says that it has a bookmark.
fn told(event: &Event) -> String {
    let star = if event.bookmark.is_some() { " *" } else { "" };
    let name = event.event_type().as_str_name();
    let metadata = |resource: &Option<omni_infra_provider::omni::wire::cosi::Resource>| {
        resource.clone().map(|resource| resource.metadata.unwrap())
    };
    let subject = match metadata(&event.resource) {
        Some(subject) => format!(" {:?} {}", subject.id, subject.version),
        None => String::new(),
    };
    let old = match metadata(&event.old) {
        Some(old) => format!(" was {}", old.version),
        None => String::new(),
    };
    format!("{name}{subject}{old}{star}")
}

async fn a_watch_begins_with_everything_there_is(mut server: impl Server) {
    server
        .put(&[stored_own("c"), stored_own("a"), stored_own("b")])
        .await;
    server.put(&[stored_own("b").label("x", "y")]).await;
    server.destroy(&[stored_own("c")]).await;
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    let expected = [
        "CREATED \"a\" 1",
        "CREATED \"b\" 2",
        "BOOTSTRAPPED \"\" undefined *",
    ];
    assert_eq!(watching.events(3).await, expected);
    watching.assert_silent().await;
    // Both at once.
    let both = WatchOptions {
        bootstrap_bookmark: true,
        ..everything()
    };
    let mut watching = Watching::open(&mut wire, request(both)).await.unwrap();
    assert_eq!(watching.events(4).await[3], "NOOP \"\" undefined *");
}

async fn a_watch_of_nothing_is_bootstrapped_too(mut server: impl Server) {
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    assert_eq!(watching.events(1).await, ["BOOTSTRAPPED \"\" undefined *"]);
    let bookmark = watching.bookmark.clone();
    server.put(&[stored_own("a")]).await;
    assert_eq!(watching.events(1).await, ["CREATED \"a\" 1 *"]);
    let mut resumed = Watching::open(&mut wire, request(from(&bookmark))).await.unwrap();
    assert_eq!(resumed.events(1).await, ["CREATED \"a\" 1 *"]);
}

async fn a_watch_without_contents_begins_with_a_bookmark(mut server: impl Server) {
    server.put(&[stored_own("a")]).await;
    let mut wire = server.wire().await;
    let options = WatchOptions {
        bootstrap_bookmark: true,
        ..WatchOptions::default()
    };
    let mut watching = Watching::open(&mut wire, request(options)).await.unwrap();
    assert_eq!(watching.events(1).await, ["NOOP \"\" undefined *"]);
    watching.assert_silent().await;
    // Or with nothing at all.
    let mut bare = Watching::open(&mut wire, request(WatchOptions::default()))
        .await
        .unwrap();
    bare.assert_silent().await;
    server.put(&[stored_own("b")]).await;
    assert_eq!(bare.events(1).await, ["CREATED \"b\" 1 *"]);
    let mut resumed = Watching::open(&mut wire, request(from(&watching.bookmark)))
        .await
        .unwrap();
    assert_eq!(resumed.events(1).await, ["CREATED \"b\" 1 *"]);
}

async fn every_change_is_told_in_order(mut server: impl Server) {
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    watching.events(1).await;
    let mut torn = stored_own("a").label("x", "y");
    torn.phase = Phase::TearingDown;
    server.put(&[stored_own("a")]).await;
    server.put(&[stored_own("a").label("x", "y")]).await;
    server.put(&[torn]).await;
    server.destroy(&[stored_own("a")]).await;
    server.put(&[stored_own("a")]).await;
    // Other types and namespaces are others' business.
    let elsewhere = Stored::new(OWN_NAMESPACE, "Other.test.infraprovider.sidero.dev", "x");
    server.put(&[elsewhere]).await;
    let expected = [
        "CREATED \"a\" 1 *",
        "UPDATED \"a\" 2 was 1 *",
        "UPDATED \"a\" 3 was 2 *",
        "DESTROYED \"a\" 3 *",
        "CREATED \"a\" 1 *",
    ];
    assert_eq!(watching.events(5).await, expected);
    watching.assert_silent().await;
}

async fn several_changes_may_come_at_once(mut server: impl Server) {
    server.put(&[stored_own("a"), stored_own("b")]).await;
    let mut wire = server.wire().await;
    let options = WatchOptions {
        aggregated: true,
        ..everything()
    };
    let mut watching = Watching::open(&mut wire, request(options)).await.unwrap();
    // All there is comes as one message, however large that makes it.
    let first: Vec<String> = watching.message().await.iter().map(told).collect();
    let expected = [
        "CREATED \"a\" 1",
        "CREATED \"b\" 1",
        "BOOTSTRAPPED \"\" undefined *",
    ];
    assert_eq!(first, expected);
    let bookmark = watching.bookmark.clone();
    server.put(&[stored_own("c"), stored_own("d")]).await;
    let expected = ["CREATED \"c\" 1 *", "CREATED \"d\" 1 *"];
    assert_eq!(watching.events(2).await, expected);
    let options = WatchOptions {
        aggregated: true,
        ..from(&bookmark)
    };
    let mut resumed = Watching::open(&mut wire, request(options)).await.unwrap();
    let first: Vec<String> = resumed.message().await.iter().map(told).collect();
    assert_eq!(first, expected);
}

async fn a_query_makes_updates_come_and_go(mut server: impl Server) {
    let query = LabelQuery {
        terms: vec![LabelTerm {
            key: "colour".to_owned(),
            op: Operation::Equal.into(),
            value: vec!["red".to_owned()],
            invert: false,
        }],
    };
    server
        .put(&[stored_own("a").label("colour", "red"), stored_own("b")])
        .await;
    let mut wire = server.wire().await;
    let options = WatchOptions {
        label_query: vec![query],
        ..everything()
    };
    let mut watching = Watching::open(&mut wire, request(options)).await.unwrap();
    let expected = ["CREATED \"a\" 1", "BOOTSTRAPPED \"\" undefined *"];
    assert_eq!(watching.events(2).await, expected);
    server.put(&[stored_own("b").label("x", "y")]).await;
    server.put(&[stored_own("b").label("colour", "red")]).await;
    server
        .put(&[stored_own("a").label("colour", "red").label("x", "y")])
        .await;
    server.put(&[stored_own("a").label("colour", "blue")]).await;
    server.destroy(&[stored_own("a"), stored_own("b")]).await;
    let expected = [
        "CREATED \"b\" 3 *",
        "UPDATED \"a\" 2 was 1 *",
        "DESTROYED \"a\" 3 *",
        "DESTROYED \"b\" 3 *",
    ];
    assert_eq!(watching.events(4).await, expected);
    watching.assert_silent().await;
}

async fn a_watch_of_one_resource_begins_with_it(mut server: impl Server) {
    server.put(&[stored_own("a"), stored_own("b")]).await;
    let mut wire = server.wire().await;
    let one = |id: &str| WatchRequest {
        id: Some(id.to_owned()),
        ..request(WatchOptions::default())
    };
    let mut watching = Watching::open(&mut wire, one("a")).await.unwrap();
    assert_eq!(watching.events(1).await, ["CREATED \"a\" 1"]);
    server.put(&[stored_own("b").label("x", "y")]).await;
    server.put(&[stored_own("a").label("x", "y")]).await;
    assert_eq!(watching.events(1).await, ["UPDATED \"a\" 2 was 1 *"]);
    let mut missing = Watching::open(&mut wire, one("c")).await.unwrap();
    assert_eq!(missing.events(1).await, ["DESTROYED \"c\" undefined"]);
    server.put(&[stored_own("c")]).await;
    assert_eq!(missing.events(1).await, ["CREATED \"c\" 1 *"]);
}

async fn a_watch_goes_on_after_its_bookmark(mut server: impl Server) {
    server.put(&[stored_own("a"), stored_own("b")]).await;
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    watching.events(3).await;
    server.put(&[stored_own("c")]).await;
    watching.events(1).await;
    server.hang_up().await;
    let broken = within("the break", watching.stream.message()).await;
    assert!(!matches!(broken, Ok(Some(_))), "{broken:?}");

    server
        .put(&[stored_own("c").label("x", "y"), stored_own("d")])
        .await;
    server.destroy(&[stored_own("a")]).await;
    server.listen().await;
    let mut wire = server.wire().await;
    let mut resumed = Watching::open(&mut wire, request(from(&watching.bookmark)))
        .await
        .unwrap();
    let expected = [
        "UPDATED \"c\" 2 was 1 *",
        "CREATED \"d\" 1 *",
        "DESTROYED \"a\" 1 *",
    ];
    assert_eq!(resumed.events(3).await, expected);
    resumed.assert_silent().await;
    // The last bookmark is as good: nothing came after it.
    let last = from(&resumed.bookmark);
    let mut resumed = Watching::open(&mut wire, request(last)).await.unwrap();
    resumed.assert_silent().await;
}

async fn a_watch_goes_on_after_the_bookmark_of_its_beginning(mut server: impl Server) {
    server.put(&[stored_own("a")]).await;
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    watching.events(2).await;
    server.put(&[stored_own("a").label("x", "y")]).await;
    let begin = from(&watching.bookmark);
    let mut resumed = Watching::open(&mut wire, request(begin)).await.unwrap();
    assert_eq!(resumed.events(1).await, ["UPDATED \"a\" 2 was 1 *"]);
}

/// A type that Omni keeps in its memory, in the very state that upstream's server uses for all.
fn in_memory(options: WatchOptions) -> WatchRequest {
    WatchRequest {
        namespace: INFRA_EPHEMERAL.to_owned(),
        r#type: INFRA_PROVIDER_HEALTH.to_owned(),
        ..request(options)
    }
}

fn stored_health(beat: usize) -> Stored {
    Stored::new(INFRA_EPHEMERAL, INFRA_PROVIDER_HEALTH, PROVIDER)
        .label(LABEL_PROVIDER, PROVIDER)
        .label("beat", &beat.to_string())
}

#[track_caller]
fn assert_refused(opened: Result<Watching, Status>, code: Code, message: &str) {
    let refused = opened.map(|_| ()).unwrap_err();
    assert_eq!((refused.code(), refused.message()), (code, message));
}

const BAD: &str = "invalid watch bookmark";

async fn a_bookmark_in_memory_dies_with_the_process(mut server: impl Server) {
    server.put(&[stored_health(1)]).await;
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, in_memory(everything())).await.unwrap();
    watching.events(2).await;
    assert_eq!(watching.bookmark.len(), 16);
    server.crash().await;
    server.listen().await;
    server.put(&[stored_health(2)]).await;
    let mut wire = server.wire().await;
    let opened = Watching::open(&mut wire, in_memory(from(&watching.bookmark))).await;
    assert_refused(opened, Code::FailedPrecondition, BAD);
    Watching::open(&mut wire, in_memory(everything())).await.unwrap();
}

async fn a_bookmark_that_is_none_is_refused(mut server: impl Server) {
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, in_memory(everything())).await.unwrap();
    watching.events(1).await;
    let mut future = watching.bookmark.clone();
    future[8..].copy_from_slice(&1_000_000_u64.to_be_bytes());
    for bookmark in [b"".as_slice(), b"short", &[7; 16], &future] {
        let opened = Watching::open(&mut wire, in_memory(from(bookmark))).await;
        assert_refused(opened, Code::FailedPrecondition, BAD);
    }
}

async fn a_bookmark_that_history_has_forgotten_is_refused(mut server: impl Server) {
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, in_memory(everything())).await.unwrap();
    watching.events(1).await;
    for beat in 0..10 {
        server.put(&[stored_health(beat)]).await;
    }
    let early = watching.bookmark.clone();
    watching.events(10).await;
    let late = watching.bookmark.clone();
    for beat in 10..20 {
        server.put(&[stored_health(beat)]).await;
    }
    let opened = Watching::open(&mut wire, in_memory(from(&early))).await;
    assert_refused(opened, Code::FailedPrecondition, BAD);
    let mut resumed = Watching::open(&mut wire, in_memory(from(&late))).await.unwrap();
    assert_eq!(resumed.events(10).await[9], "UPDATED \"test\" 20 was 19 *");
}

async fn a_watch_that_cannot_keep_up_is_told_so_and_left_open(mut server: impl Server) {
    server.put(&[stored_health(0)]).await;
    let mut wire = server.wire().await;
    let mut watching = Watching::open(&mut wire, in_memory(everything())).await.unwrap();
    watching.events(2).await;
    // Nobody reads what the server sends; what both ends hold back for a slow reader is some megabytes.
    let large = "x".repeat(1 << 20);
    for beat in 0..64 {
        let mut health = stored_health(beat);
        health.annotations.insert("large".to_owned(), large.clone());
        server.put(&[health]).await;
    }
    let errored = loop {
        let events = watching.message().await;
        if let Some(event) = events
            .iter()
            .find(|event| event.event_type() == EventType::Errored)
        {
            break event.clone();
        }
    };
    assert_eq!((errored.resource, errored.bookmark), (None, None));
    assert!(!errored.error.unwrap().is_empty());
    server.put(&[stored_health(99)]).await;
    watching.assert_silent().await;
}

async fn what_no_server_can_watch_is_refused(mut server: impl Server) {
    let mut wire = server.wire().await;
    let one = |options| WatchRequest {
        id: Some("a".to_owned()),
        ..request(options)
    };
    let query = WatchOptions {
        label_query: vec![LabelQuery::default()],
        ..WatchOptions::default()
    };
    let opened = Watching::open(&mut wire, one(everything())).await;
    assert_refused(
        opened,
        Code::Unimplemented,
        "bootstrap contents is not implemented for resource watch",
    );
    let opened = Watching::open(&mut wire, one(query)).await;
    assert_refused(
        opened,
        Code::Unimplemented,
        "label query is not implemented for resource watch",
    );
    let mut watching = Watching::open(&mut wire, request(everything())).await.unwrap();
    watching.events(1).await;
    let both = WatchOptions {
        bootstrap_contents: true,
        ..from(&watching.bookmark)
    };
    let opened = Watching::open(&mut wire, request(both)).await;
    assert_eq!(opened.map(|_| ()).unwrap_err().code(), Code::Unknown);
}

async fn an_old_client_is_spared_what_it_does_not_know(mut server: impl Server) {
    server.put(&[stored_own("a")]).await;
    let mut wire = server.wire().await;
    let old = WatchRequest {
        api_version: 0,
        ..request(everything())
    };
    let mut watching = Watching::open(&mut wire, old).await.unwrap();
    assert_eq!(watching.events(1).await, ["CREATED \"a\" 1"]);
    server.put(&[stored_own("b")]).await;
    assert_eq!(watching.events(1).await, ["CREATED \"b\" 1 *"]);
}
