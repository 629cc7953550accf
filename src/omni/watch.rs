//! A watch of one kind that heals itself: it resumes by bookmark where it can, starts anew where it must, and
//! never gives up.
//!
//! Omni says in five ways that a watch is over: an error, a clean end, an ERRORED event (after which the
//! stream stays open and silent), a refused bookmark, and silence. A sixth is not said at all: a bookmark
//! from the future, after etcd was restored from a backup, is accepted and shows nothing. So everything is
//! read anew from time to time, and soon after each resume. Reading anew is a fresh watch and not a list:
//! Omni answers lists of some kinds from a cache that lags.
//!
//! *Cancel safety*: a dropped watch takes its stream with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use prost::Message;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::error::{OmniError, OmniErrorKind};
use super::kinds::Kind;
use super::resource::Resource;
use super::state::{DEADLINE, State, jittered};
use super::wire::cosi::{Event, EventType, WatchResponse};

/// The waits between attempts to connect.
const SHORTEST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long a link has to last before its break counts as the first: a server that accepts and hangs up is
/// not a good one.
const PROVEN: Duration = Duration::from_secs(10);

/// How often everything is read anew, as a safety net.
const RELIST: Duration = Duration::from_secs(15 * 60);

/// How soon after a resume everything is read anew: after the rush of a restart, before anybody relies on it
/// for long.
const RELIST_AFTER_RESUME: Duration = Duration::from_secs(10);

/// A link that breaks all the time must not make every resume a full read.
const RELIST_AT_MOST: Duration = Duration::from_secs(2 * 60);

/// What a watch saw.
#[derive(Debug)]
pub(super) enum Seen<K: Kind> {
    /// A full reading begins; what is written from now on may be missing in it.
    Reading,
    /// Everything there is.
    All {
        /// What could be read.
        resources: Vec<Resource<K>>,
        /// IDs of what could not be: they exist, and that is all that is known.
        unreadable: BTreeSet<String>,
    },
    /// Created or changed.
    Changed(Resource<K>),
    /// Destroyed, as last known.
    Gone(Resource<K>),
    /// Something changed that cannot be read.
    Unreadable(String),
    /// The watch goes on where it broke off.
    Resumed,
    /// The watch broke: from here on things may happen unseen.
    Broken,
}

/// Where the watch stands.
enum Link<K: Kind> {
    /// Nothing is open.
    Down {
        /// When to try again.
        at: Instant,
        /// Where to go on; without one, with everything there is.
        bookmark: Option<Vec<u8>>,
    },
    /// About to be opened; a full reading has been announced.
    Opening {
        /// As above.
        bookmark: Option<Vec<u8>>,
    },
    /// Events come in.
    Open {
        /// From Omni.
        stream: Box<Streaming<WatchResponse>>,
        /// How far they were understood.
        progress: Progress<K>,
        /// When it was opened.
        since: Instant,
        /// When to read everything anew.
        relist: Instant,
    },
}

/// A watch of all resources of one kind that are ours.
pub(super) struct Watch<K: Kind> {
    state: State,
    link: Link<K>,
    seen: VecDeque<Seen<K>>,
    /// Breaks since the last link that lasted.
    failures: u32,
    /// When everything was last read.
    full: Option<Instant>,
    /// The sort of break that people were told of, until the watch is up again.
    told: Option<OmniErrorKind>,
}

impl<K: Kind> Watch<K> {
    pub(super) fn new(state: State) -> Self {
        Self {
            state,
            link: Link::Down {
                at: Instant::now(),
                bookmark: None,
            },
            seen: VecDeque::new(),
            failures: 0,
            full: None,
            told: None,
        }
    }

    /// What is seen next. Waits as long as it takes.
    pub(super) async fn next(&mut self) -> Seen<K> {
        loop {
            if let Some(seen) = self.seen.pop_front() {
                return seen;
            }
            match &mut self.link {
                Link::Down { at, bookmark } => {
                    sleep_until(*at).await;
                    let bookmark = bookmark.take();
                    if bookmark.is_none() {
                        self.seen.push_back(Seen::Reading);
                    }
                    self.link = Link::Opening { bookmark };
                }
                Link::Opening { bookmark } => {
                    let bookmark = bookmark.clone();
                    self.open(bookmark).await;
                }
                Link::Open { .. } => self.listen().await,
            }
        }
    }

    /// Reads everything anew soon: the last reading left a doubt.
    pub(super) fn relist_soon(&mut self) {
        if let Link::Open { relist, .. } = &mut self.link {
            *relist = (*relist).min(Instant::now() + jittered(RELIST_AFTER_RESUME));
        }
    }

    async fn open(&mut self, bookmark: Option<Vec<u8>>) {
        let now = Instant::now();
        match self.state.open_watch::<K>(bookmark.clone()).await {
            Ok(stream) => {
                let resumed = bookmark.is_some();
                let soon = now + jittered(RELIST_AFTER_RESUME);
                let earliest = self.full.map_or(now, |full| full + RELIST_AT_MOST);
                self.link = Link::Open {
                    stream: Box::new(stream),
                    progress: Progress::new(bookmark),
                    since: now,
                    relist: soon.max(earliest),
                };
                if resumed {
                    self.seen.push_back(Seen::Resumed);
                    self.up();
                }
            }
            Err(refused) if refused.refused_precondition && bookmark.is_some() => {
                debug!(
                    kind = K::NAME,
                    reason = refused.error.message,
                    "bookmark refused, reading everything"
                );
                self.link = Link::Down {
                    at: now,
                    bookmark: None,
                };
            }
            Err(refused) => self.broken(&refused.error, bookmark),
        }
    }

    async fn listen(&mut self) {
        let Link::Open {
            stream,
            progress,
            since,
            relist,
        } = &mut self.link
        else {
            return;
        };
        let reading = progress.is_reading();
        let message = if reading {
            match timeout(DEADLINE, stream.message()).await {
                Ok(message) => message,
                Err(_) => Err(Status::deadline_exceeded("the reading of everything stalled")),
            }
        } else {
            tokio::select! {
                message = stream.message() => message,
                () = sleep_until(*relist) => {
                    // Not a break: the old stream was fine until now, and the new one is opened at once.
                    if since.elapsed() >= PROVEN {
                        self.failures = 0;
                    }
                    self.link = Link::Opening { bookmark: None };
                    self.seen.push_back(Seen::Reading);
                    return;
                }
            }
        };
        let lasted = since.elapsed() >= PROVEN;
        // While everything is being read there is nothing to go on from; after an ERRORED event neither.
        let (status, bookmark) = match message {
            Ok(Some(message)) => match progress.take(message.event, self.state.provider(), &mut self.seen) {
                Ok(()) => {
                    if reading && !progress.is_reading() {
                        let now = Instant::now();
                        *relist = now + jittered(RELIST);
                        self.full = Some(now);
                        self.up();
                    }
                    return;
                }
                Err(reason) => (Status::unavailable(reason), None),
            },
            Ok(None) => (Status::unavailable("the watch ended"), progress.bookmark.take()),
            Err(status) => (status, progress.bookmark.take()),
        };
        if lasted {
            self.failures = 0;
        }
        let bookmark = bookmark.filter(|_| !reading);
        let error = self.state.watch_error::<K>(&status).await;
        self.broken(&error, bookmark);
    }

    fn up(&mut self) {
        if self.told.take().is_some() {
            info!(kind = K::NAME, "watch is up again");
        }
    }

    fn broken(&mut self, error: &OmniError, bookmark: Option<Vec<u8>>) {
        self.failures = self.failures.saturating_add(1);
        let doublings = self.failures.saturating_sub(1).min(16);
        let wait = jittered((SHORTEST_WAIT * 2 * 2_u32.pow(doublings)).min(LONGEST_WAIT));
        // Said once for each sort of break: an Omni that is away for an hour fills no log.
        if self.told == Some(error.kind) {
            debug!(
                kind = K::NAME,
                reason = error.message,
                ?wait,
                "watch is still broken"
            );
        } else {
            warn!(
                kind = K::NAME,
                reason = error.message,
                ?wait,
                "watch broke, connecting again"
            );
            self.told = Some(error.kind);
        }
        self.link = Link::Down {
            at: Instant::now() + wait,
            bookmark,
        };
        self.seen.push_back(Seen::Broken);
    }
}

/// Understands the bytes of one message of a watch, and tells how many things it saw. For tests of bad input, without a server.
///
/// # Errors
///
/// What is no message, or Omni's word that the stream is dead.
#[doc(hidden)]
pub fn understand<K: Kind>(message: &[u8], provider: &str) -> Result<usize, String> {
    let message = WatchResponse::decode(message).map_err(|error| error.to_string())?;
    let mut seen = VecDeque::new();
    Progress::<K>::new(None).take(message.event, provider, &mut seen)?;
    Ok(seen.len())
}

/// How far the events of one stream were understood. Pure.
#[derive(Debug)]
struct Progress<K: Kind> {
    /// What was read of everything, until that is complete.
    reading: Option<Reading<K>>,
    /// The last one that was given.
    bookmark: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Reading<K: Kind> {
    resources: BTreeMap<String, Resource<K>>,
    unreadable: BTreeSet<String>,
}

impl<K: Kind> Progress<K> {
    /// A stream that was opened with a bookmark goes on; one without begins with everything.
    fn new(bookmark: Option<Vec<u8>>) -> Self {
        let reading = Reading {
            resources: BTreeMap::new(),
            unreadable: BTreeSet::new(),
        };
        Self {
            reading: bookmark.is_none().then_some(reading),
            bookmark,
        }
    }

    fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Understands one message. An error is Omni's word that the stream is dead.
    fn take(
        &mut self,
        events: Vec<Event>,
        provider: &str,
        seen: &mut VecDeque<Seen<K>>,
    ) -> Result<(), String> {
        for event in events {
            let sort = event.event_type();
            match sort {
                EventType::Errored => {
                    let reason = event.error.unwrap_or_default();
                    return Err(format!("Omni ended the watch: {reason}"));
                }
                EventType::Bootstrapped => {
                    if let Some(Reading {
                        resources,
                        unreadable,
                    }) = self.reading.take()
                    {
                        seen.push_back(Seen::All {
                            resources: resources.into_values().collect(),
                            unreadable,
                        });
                    }
                }
                EventType::Noop => {}
                EventType::Created | EventType::Updated | EventType::Destroyed => {
                    // While a server shuts down, events without a resource come.
                    if let Some(wire) = event.resource {
                        self.resource(sort, wire, provider, seen);
                    }
                }
            }
            if event.bookmark.is_some() {
                self.bookmark = event.bookmark;
            }
        }
        Ok(())
    }

    fn resource(
        &mut self,
        sort: EventType,
        wire: super::wire::cosi::Resource,
        provider: &str,
        seen: &mut VecDeque<Seen<K>>,
    ) {
        let id = wire
            .metadata
            .as_ref()
            .map(|metadata| metadata.id.clone())
            .unwrap_or_default();
        let resource = match Resource::<K>::from_wire(wire) {
            Ok(resource) if resource.belongs_to(provider) => resource,
            Ok(_) => return,
            Err(reason) => {
                warn!(kind = K::NAME, id, reason, "resource cannot be read");
                match &mut self.reading {
                    Some(reading) => {
                        reading.unreadable.insert(id);
                    }
                    None => seen.push_back(Seen::Unreadable(id)),
                }
                return;
            }
        };
        let gone = sort == EventType::Destroyed;
        match &mut self.reading {
            Some(reading) if gone => {
                reading.resources.remove(&id);
            }
            Some(reading) => {
                reading.resources.insert(id, resource);
            }
            None if gone => seen.push_back(Seen::Gone(resource)),
            None => seen.push_back(Seen::Changed(resource)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kinds::{LABEL_PROVIDER, MachineRequestStatusSpec, MachineRequestStatuses};
    use super::super::wire::cosi;
    use super::*;
    use crate::cloud::Timestamp;

    type Statuses = MachineRequestStatuses;

    fn wire(id: &str, provider: &str) -> cosi::Resource {
        let mut resource = Resource::<Statuses>::new(id, MachineRequestStatusSpec::default());
        resource.metadata.version = 1;
        resource
            .metadata
            .labels
            .insert(LABEL_PROVIDER.into(), provider.into());
        resource.to_wire(provider, Timestamp(0))
    }

    fn event(sort: EventType, resource: Option<cosi::Resource>, bookmark: Option<u8>) -> Event {
        Event {
            resource,
            event_type: sort.into(),
            old: None,
            error: None,
            bookmark: bookmark.map(|byte| vec![byte]),
        }
    }

    fn take(progress: &mut Progress<Statuses>, events: Vec<Event>) -> Result<Vec<String>, String> {
        let mut seen = VecDeque::new();
        progress.take(events, "oxide", &mut seen)?;
        let tell = |seen: &Seen<Statuses>| match seen {
            Seen::All {
                resources,
                unreadable,
            } => {
                let ids: Vec<&str> = resources.iter().map(Resource::id).collect();
                format!("all {ids:?} unreadable {unreadable:?}")
            }
            Seen::Changed(resource) => format!("changed {}", resource.id()),
            Seen::Gone(resource) => format!("gone {}", resource.id()),
            Seen::Unreadable(id) => format!("unreadable {id}"),
            other => format!("{other:?}"),
        };
        Ok(seen.iter().map(tell).collect())
    }

    #[test]
    fn everything_is_told_at_once_and_changes_one_by_one() {
        let mut progress = Progress::new(None);
        let placeholder = cosi::Resource::default();
        let told = take(
            &mut progress,
            vec![
                event(EventType::Created, Some(wire("a", "oxide")), None),
                event(EventType::Created, Some(wire("b", "ganeti")), None),
            ],
        );
        assert_eq!(told, Ok(vec![]));
        assert!(progress.is_reading());
        let told = take(
            &mut progress,
            vec![
                event(EventType::Created, Some(wire("c", "oxide")), None),
                event(EventType::Bootstrapped, Some(placeholder), Some(1)),
                event(EventType::Updated, Some(wire("a", "oxide")), Some(2)),
                event(EventType::Destroyed, Some(wire("c", "oxide")), Some(3)),
                event(EventType::Updated, Some(wire("b", "ganeti")), Some(4)),
            ],
        );
        let expected = [r#"all ["a", "c"] unreadable {}"#, "changed a", "gone c"];
        assert_eq!(told, Ok(expected.map(String::from).to_vec()));
        assert_eq!(progress.bookmark, Some(vec![4]));
    }

    #[test]
    fn empty_messages_and_events_without_a_resource_mean_nothing() {
        let mut progress = Progress::new(Some(vec![7]));
        assert_eq!(take(&mut progress, vec![]), Ok(vec![]));
        let nothing = vec![
            event(EventType::Created, None, None),
            event(EventType::Noop, None, Some(8)),
        ];
        assert_eq!(take(&mut progress, nothing), Ok(vec![]));
        assert_eq!(progress.bookmark, Some(vec![8]));
    }

    #[test]
    fn an_errored_event_ends_the_stream() {
        let mut progress = Progress::new(Some(vec![7]));
        let mut errored = event(EventType::Errored, None, None);
        errored.error = Some("compacted".into());
        let told = take(&mut progress, vec![errored]);
        assert_eq!(told, Err("Omni ended the watch: compacted".into()));
    }

    #[test]
    fn what_cannot_be_read_is_told_and_not_dropped() {
        let mut bad = wire("bad", "oxide");
        if let Some(spec) = &mut bad.spec {
            spec.proto_spec = vec![0xff];
        }
        let mut progress = Progress::new(None);
        let events = vec![
            event(EventType::Created, Some(bad.clone()), None),
            event(EventType::Bootstrapped, None, Some(1)),
            event(EventType::Updated, Some(bad), Some(2)),
        ];
        let expected = [r#"all [] unreadable {"bad"}"#, "unreadable bad"];
        assert_eq!(
            take(&mut progress, events),
            Ok(expected.map(String::from).to_vec())
        );
    }
}
