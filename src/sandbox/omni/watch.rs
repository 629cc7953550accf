//! One watch: what it sends first, then every change of its type that its caller may see.
//!
//! *Cancel safety*: a watch is a position in the log; dropping it loses nothing that a bookmark does not
//! bring back.

use std::collections::VecDeque;

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::access::{Access, Verb, access};
use super::resources::{Stored, placeholder, to_wire};
use super::signature::Actor;
use super::store::Change;
use super::{Inner, Omni, types};
use crate::omni::wire::cosi::{self, EventType, label_term::Operation};

/// Which resources of a type are meant: any of the label queries, and the ID.
#[derive(Debug, Clone, Default)]
pub(super) struct Query {
    labels: Vec<cosi::LabelQuery>,
    id: Option<IdPattern>,
}

/// A regular expression without any operator but the anchors: all that a provider was seen to send.
#[derive(Debug, Clone)]
struct IdPattern {
    text: String,
    from_start: bool,
    to_end: bool,
}

impl Query {
    pub(super) fn new(labels: Vec<cosi::LabelQuery>, id: Option<cosi::IdQuery>) -> Result<Self, Status> {
        for term in labels.iter().flat_map(|query| &query.terms) {
            let operation = Operation::try_from(term.op).map_err(|_| {
                Status::unimplemented(format!("unsupported label query operator: {}", term.op))
            })?;
            let needs_value = !matches!(
                operation,
                Operation::Exists | Operation::NotExists | Operation::In
            );
            if needs_value && term.value.is_empty() {
                // What a panic in upstream's server reads like.
                return Err(Status::internal(
                    "runtime error: index out of range [0] with length 0",
                ));
            }
        }
        let id = id
            .map(|query| query.regexp)
            .filter(|regexp| !regexp.is_empty())
            .map(|regexp| IdPattern::new(&regexp))
            .transpose()?;
        Ok(Self { labels, id })
    }

    pub(super) fn matches(&self, resource: &Stored) -> bool {
        let labels = self.labels.is_empty()
            || self
                .labels
                .iter()
                .any(|query| query.terms.iter().all(|term| term_matches(term, resource)));
        labels && self.id.as_ref().is_none_or(|id| id.matches(&resource.id))
    }
}

impl IdPattern {
    fn new(regexp: &str) -> Result<Self, Status> {
        let (from_start, text) = match regexp.strip_prefix('^') {
            Some(text) => (true, text),
            None => (false, regexp),
        };
        let (to_end, text) = match text.strip_suffix('$') {
            Some(text) => (true, text),
            None => (false, text),
        };
        if text.contains([
            '\\', '.', '+', '*', '?', '(', ')', '|', '[', ']', '{', '}', '^', '$',
        ]) {
            return Err(Status::invalid_argument(
                "failed to compile regexp: the embedded Omni knows no operators but the anchors",
            ));
        }
        Ok(Self {
            text: text.to_owned(),
            from_start,
            to_end,
        })
    }

    fn matches(&self, id: &str) -> bool {
        match (self.from_start, self.to_end) {
            (true, true) => id == self.text,
            (true, false) => id.starts_with(&self.text),
            (false, true) => id.ends_with(&self.text),
            (false, false) => id.contains(&self.text),
        }
    }
}

fn term_matches(term: &cosi::LabelTerm, resource: &Stored) -> bool {
    let value = resource.get_label(&term.key);
    let wanted = term.value.first().map(String::as_str);
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<i64>().ok());
    // `None`: cannot be compared, matches neither way.
    let matches = match term.op() {
        Operation::Exists => Some(value.is_some()),
        // Deprecated; its invert flag is ignored.
        Operation::NotExists => return value.is_none(),
        Operation::Equal => Some(value.is_some() && value == wanted),
        Operation::In => Some(value.is_some_and(|value| term.value.iter().any(|wanted| wanted == value))),
        Operation::Lt => value.map(|value| Some(value) < wanted),
        Operation::Lte => value.map(|value| Some(value) <= wanted),
        Operation::LtNumeric => number(value)
            .zip(number(wanted))
            .map(|(value, wanted)| value < wanted),
        Operation::LteNumeric => number(value)
            .zip(number(wanted))
            .map(|(value, wanted)| value <= wanted),
    };
    matches.is_some_and(|matches| matches != term.invert)
}

/// An open watch.
pub(super) struct Watcher {
    omni: Omni,
    life: CancellationToken,
    changes: Receiver<u64>,
    namespace: String,
    kind: String,
    id: Option<String>,
    query: Query,
    access: Access,
    aggregated: bool,
    /// 0 is told neither BOOTSTRAPPED nor ERRORED.
    api_version: i32,
    memory: bool,
    /// Everything up to this revision is sent, or in `pending`.
    position: u64,
    /// Messages to send before anything else.
    pending: VecDeque<cosi::WatchResponse>,
    breaks: u64,
    /// After ERRORED nothing comes any more, and the stream stays open.
    errored: bool,
    ended: bool,
}

enum Step {
    Send(cosi::WatchResponse),
    Fail(Status),
    Wait,
}

impl Watcher {
    pub(super) fn open(
        omni: Omni,
        life: CancellationToken,
        changes: Receiver<u64>,
        inner: &Inner,
        actor: &Actor,
        request: cosi::WatchRequest,
    ) -> Result<Self, Status> {
        let cosi::WatchRequest {
            namespace,
            r#type: kind,
            id,
            options,
            api_version,
        } = request;
        let options = options.unwrap_or_default();
        if id.is_some() && options.bootstrap_contents {
            return Err(Status::unimplemented(
                "bootstrap contents is not implemented for resource watch",
            ));
        }
        if id.is_some() && !options.label_query.is_empty() {
            return Err(Status::unimplemented(
                "label query is not implemented for resource watch",
            ));
        }
        let query = if id.is_some() {
            Query::default()
        } else {
            Query::new(options.label_query, options.id_query)?
        };
        let access = access(inner, actor, &namespace, &kind, Verb::Read)?;
        if namespace == types::VIRTUAL {
            return Err(Status::unknown("watch is not supported in the virtual namespace"));
        }
        if options.tail_events > 0 {
            return Err(Status::unknown("tailing events is not supported"));
        }
        if options.bootstrap_contents && options.start_from_bookmark.is_some() {
            return Err(Status::unknown(
                "bootstrap contents with a start from a bookmark is not supported",
            ));
        }
        let memory = types::in_memory(&namespace, &kind);
        let position = match &options.start_from_bookmark {
            Some(bookmark) => inner
                .store
                .read_bookmark(memory, bookmark)
                .ok_or_else(|| Status::failed_precondition("invalid watch bookmark"))?,
            None => inner.store.revision(),
        };
        let mut watcher = Self {
            omni,
            life,
            changes,
            namespace,
            kind,
            aggregated: options.aggregated && id.is_none(),
            id,
            query,
            access,
            api_version,
            memory,
            position,
            pending: VecDeque::new(),
            breaks: inner.watch_breaks,
            errored: false,
            ended: false,
        };
        // Says that the watch is established.
        watcher.pending.push_back(cosi::WatchResponse::default());
        watcher.begin(
            inner,
            options.bootstrap_contents,
            options.bootstrap_bookmark,
            options.start_from_bookmark.is_some(),
        );
        Ok(watcher)
    }

    /// Queues what comes before the first change.
    fn begin(&mut self, inner: &Inner, contents: bool, bookmark: bool, resumed: bool) {
        if let Some(id) = self.id.clone() {
            if resumed {
                return;
            }
            match inner.store.get(&self.namespace, &self.kind, &id) {
                Some(stored) if self.access.sees(stored) => {
                    let event = event(EventType::Created, Some(to_wire(stored)));
                    self.queue(vec![event]);
                }
                // The placeholder carries no provider label: a provider hears nothing of what is not there.
                None if self.access.provider.is_none() => {
                    let nothing = placeholder(&self.namespace, &self.kind, &id);
                    self.queue(vec![event(EventType::Destroyed, Some(nothing))]);
                }
                _ => {}
            }
            return;
        }
        let mark = inner.store.bookmark(self.memory, self.position);
        let nobody = placeholder(&self.namespace, &self.kind, "");
        if contents {
            let mut events: Vec<cosi::Event> = inner
                .store
                .list(&self.namespace, &self.kind)
                .iter()
                .filter(|stored| self.access.sees(stored) && self.query.matches(stored))
                .map(|stored| event(EventType::Created, Some(to_wire(stored))))
                .collect();
            if self.api_version >= 1 {
                let mut bootstrapped = event(EventType::Bootstrapped, Some(nobody.clone()));
                bootstrapped.bookmark = Some(mark.clone());
                events.push(bootstrapped);
            }
            self.queue(events);
        }
        if bookmark {
            let mut noop = event(EventType::Noop, Some(nobody));
            noop.bookmark = Some(mark);
            self.queue(vec![noop]);
        }
    }

    fn queue(&mut self, events: Vec<cosi::Event>) {
        if self.aggregated {
            self.pending.push_back(cosi::WatchResponse { event: events });
        } else {
            for event in events {
                self.pending.push_back(cosi::WatchResponse { event: vec![event] });
            }
        }
    }

    pub(super) fn into_stream(self) -> BoxStream<'static, Result<cosi::WatchResponse, Status>> {
        stream::unfold(self, |mut watcher| async move {
            if watcher.ended {
                return None;
            }
            loop {
                watcher.changes.borrow_and_update();
                match watcher.step() {
                    Step::Send(response) => return Some((Ok(response), watcher)),
                    Step::Fail(status) => {
                        watcher.ended = true;
                        return Some((Err(status), watcher));
                    }
                    Step::Wait => {}
                }
                tokio::select! {
                    biased;
                    () = watcher.life.cancelled() => {
                        watcher.ended = true;
                        return Some((Err(Status::unavailable("Omni is gone")), watcher));
                    }
                    changed = watcher.changes.changed() => if changed.is_err() {
                        return None;
                    },
                }
            }
        })
        .boxed()
    }

    fn step(&mut self) -> Step {
        let omni = self.omni.clone();
        omni.with(|inner| {
            if inner.watch_breaks != self.breaks {
                return Step::Fail(Status::unknown("error reading a body from connection"));
            }
            if let Some(response) = self.pending.pop_front() {
                return Step::Send(response);
            }
            if self.errored || inner.options.hold_watches {
                return Step::Wait;
            }
            if self.position < inner.store.compacted() {
                self.errored = true;
                if self.api_version >= 1 {
                    let mut errored = event(EventType::Errored, None);
                    errored.error = Some("etcdserver: mvcc: required revision has been compacted".to_owned());
                    self.queue(vec![errored]);
                }
            } else {
                self.advance(inner);
            }
            self.pending.pop_front().map_or(Step::Wait, Step::Send)
        })
    }

    /// Queues the changes since the last look.
    fn advance(&mut self, inner: &Inner) {
        let mut events = Vec::new();
        let mut any = false;
        for change in inner.store.since(self.position) {
            let Some(subject) = change.subject() else { continue };
            let meant = subject.namespace == self.namespace
                && subject.kind == self.kind
                && self.id.as_ref().is_none_or(|id| *id == subject.id);
            if !meant {
                continue;
            }
            let Some(mut event) = self.seen(change) else {
                continue;
            };
            any = true;
            if self.access.sees(subject) {
                event.bookmark = Some(inner.store.bookmark(self.memory, change.revision));
                events.push(event);
            }
        }
        self.position = self.position.max(inner.store.revision());
        // The provider's filter works on whole messages and lets empty ones through.
        if any && (self.aggregated || !events.is_empty()) {
            self.queue(events);
        }
    }

    /// A change as the query sees it: what starts to match is created, what stops to match is destroyed.
    fn seen(&self, change: &Change) -> Option<cosi::Event> {
        let before = change.old.as_ref().filter(|old| self.query.matches(old));
        let after = change.new.as_ref().filter(|new| self.query.matches(new));
        match (before, after) {
            (None, None) => None,
            (None, Some(new)) => Some(event(EventType::Created, Some(to_wire(new)))),
            (Some(old), None) => {
                let last = change.new.as_ref().unwrap_or(old);
                Some(event(EventType::Destroyed, Some(to_wire(last))))
            }
            (Some(old), Some(new)) => {
                let mut event = event(EventType::Updated, Some(to_wire(new)));
                event.old = Some(to_wire(old));
                Some(event)
            }
        }
    }
}

fn event(event_type: EventType, resource: Option<cosi::Resource>) -> cosi::Event {
    cosi::Event {
        resource,
        event_type: event_type.into(),
        old: None,
        error: None,
        bookmark: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(key: &str, op: Operation, values: &[&str], invert: bool) -> bool {
        let term = cosi::LabelTerm {
            key: key.to_owned(),
            op: op.into(),
            value: values.iter().map(|value| (*value).to_owned()).collect(),
            invert,
        };
        let query = Query::new(vec![cosi::LabelQuery { terms: vec![term] }], None).unwrap();
        let resource = Stored::new("", "", "a").label("colour", "red").label("size", "9");
        query.matches(&resource)
    }

    #[test]
    fn label_operators_compare_as_cosi_does() {
        assert!(matches("colour", Operation::Exists, &[], false));
        assert!(matches("shape", Operation::Exists, &[], true));
        assert!(matches("shape", Operation::NotExists, &[], false));
        assert!(matches("colour", Operation::Equal, &["red"], false));
        assert!(matches("shape", Operation::Equal, &["round"], true));
        assert!(matches("colour", Operation::In, &["blue", "red"], false));
        assert!(matches("size", Operation::LtNumeric, &["10"], false));
        assert!(!matches("size", Operation::Lt, &["10"], false));
        assert!(matches("size", Operation::Lte, &["9"], false));
        // What cannot be compared matches neither way.
        assert!(!matches("shape", Operation::Lt, &["a"], true));
        assert!(!matches("colour", Operation::LteNumeric, &["1"], true));
    }

    #[test]
    fn an_id_pattern_is_anchored_where_it_says_so() {
        let query = |regexp: &str| {
            let regexp = regexp.to_owned();
            Query::new(Vec::new(), Some(cosi::IdQuery { regexp }))
        };
        let web = Stored::new("", "", "web-x7k");
        for (pattern, expected) in [
            ("eb-", true),
            ("^eb", false),
            ("^web", true),
            ("x7k$", true),
            ("^x$", false),
        ] {
            assert_eq!(query(pattern).unwrap().matches(&web), expected, "{pattern}");
        }
        assert!(query("w.b").is_err());
    }
}
