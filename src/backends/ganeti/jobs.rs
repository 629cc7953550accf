//! What the cluster's job queue shows: which work is open, and how work ended.
//!
//! *Guarantees.* Nothing is known from our own submissions alone: a job is met again by the instance that it touches, and by the
//! mark in its comment. All who ask at the same time share one question to the cluster. The error of a finished job is told once,
//! to whoever wants to do the same again.
//!
//! *Cost.* A look reads what is open, and what failed since the look before: however many failures the cluster keeps, they are read
//! once.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::client::Client;
use super::failure::Failure;
use crate::cloud::Shared;

const FIELDS: [&str; 6] = ["id", "ops", "opstatus", "opresult", "start_ts", "end_ts"];

/// Most failures that nobody has asked for yet; the oldest go first. Those of others are never asked for.
const UNTOLD: usize = 1000;
/// IDs are given in order, but a job may show later than the next one: so many below the newest are read again.
const SLACK: u64 = 50;

/// What a step of a job does to its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Create,
    Start,
    Remove,
    Other,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Queued, or waiting for locks: it can be cancelled.
    Pending,
    /// Under way; also whatever word a newer Ganeti may have.
    Running,
    /// It took effect.
    Succeeded,
    /// It failed, or was cancelled.
    Failed,
}

/// One step of one job, about one instance.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Work {
    pub(super) job: u64,
    pub(super) kind: Kind,
    pub(super) status: Status,
    /// The instance's name, as the job was given it.
    pub(super) instance: String,
    pub(super) comment: String,
    result: Value,
    /// When the job began and ended, in seconds since the epoch by the master's clock.
    began: Option<f64>,
    ended: Option<f64>,
}

impl Work {
    pub(super) fn is_open(&self) -> bool {
        matches!(self.status, Status::Pending | Status::Running)
    }

    /// Why it failed.
    pub(super) fn failure(&self) -> Failure {
        Failure::of_job(self.job, &self.result)
    }

    /// Whether it ended after a moment.
    pub(super) fn is_after(&self, moment: f64) -> bool {
        self.ended.is_some_and(|ended| ended >= moment)
    }

    /// Whether a moment lies between its begin and its end: what was made then by a job of this kind and name was made by it.
    fn spans(&self, moment: f64) -> bool {
        self.began.is_some_and(|began| began <= moment) && self.ended.is_none_or(|ended| moment <= ended)
    }
}

/// Everything that is open, and some of what has failed.
pub(super) type Works = Arc<Vec<Work>>;

/// The open step that touches an instance.
pub(super) fn open<'a>(works: &'a [Work], name: &str) -> Option<&'a Work> {
    works.iter().find(|work| work.is_open() && work.instance == name)
}

/// The open step of one kind that touches an instance.
pub(super) fn open_of<'a>(works: &'a [Work], kind: Kind, name: &str) -> Option<&'a Work> {
    works
        .iter()
        .find(|work| work.is_open() && work.kind == kind && work.instance == name)
}

/// The job that made the instance of this name and creation time.
pub(super) fn creation_of<'a>(works: &'a [Work], name: &str, ctime: f64) -> Option<&'a Work> {
    works
        .iter()
        .find(|work| work.kind == Kind::Create && work.instance == name && work.spans(ctime))
}

/// The job queue of one cluster.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    open: Shared<Vec<Work>>,
    failures: Mutex<Failures>,
}

/// What has failed, as far as anybody may still ask for it.
#[derive(Debug, Default)]
struct Failures {
    /// Every job below has ended, and was seen. `None` before the first look: what had failed before it was told by the process
    /// before us, or to nobody who still waits.
    floor: Option<u64>,
    /// Failed jobs from there on that were seen.
    seen: BTreeSet<u64>,
    untold: VecDeque<Work>,
}

impl Jobs {
    /// The queue, as a question that begins no earlier than this call shows it.
    pub(super) async fn now(&self, client: &Client) -> Result<Works, Failure> {
        let question = async {
            let rows = client.query("job", &FIELDS, self.filter()).await?;
            let works: Vec<Work> = rows.iter().flat_map(|row| read(row)).collect();
            self.note(&works);
            Ok(works)
        };
        self.open.ask(question).await
    }

    /// The creations of instances of these names, however they ended, that are not archived yet.
    pub(super) async fn creations(&self, client: &Client, names: &[&str]) -> Result<Vec<Work>, Failure> {
        let mut filter = vec![json!("|")];
        filter.extend(
            names
                .iter()
                .map(|name| json!(["=[]", "summary", format!("INSTANCE_CREATE({name})")])),
        );
        let rows = client.query("job", &FIELDS, Value::Array(filter)).await?;
        Ok(rows.iter().flat_map(|row| read(row)).collect())
    }

    fn filter(&self) -> Value {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let unsuccessful = json!(["!=", "status", "success"]);
        match failures.floor {
            None => unsuccessful,
            // A word of a newer Ganeti's is open as well.
            Some(floor) => json!([
                "&",
                unsuccessful,
                [
                    "|",
                    [">=", "id", floor],
                    ["&", ["!=", "status", "error"], ["!=", "status", "canceled"]]
                ]
            ]),
        }
    }

    fn note(&self, works: &[Work]) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let floor = failures.floor;
        let mut new = BTreeSet::new();
        for work in works.iter().filter(|work| work.status == Status::Failed) {
            if floor.is_some_and(|floor| work.job < floor) || failures.seen.contains(&work.job) {
                continue;
            }
            new.insert(work.job);
            if floor.is_some() {
                failures.untold.push_back(work.clone());
            }
        }
        while failures.untold.len() > UNTOLD {
            failures.untold.pop_front();
        }
        let open = works.iter().filter(|work| work.is_open());
        let lowest = open.map(|work| work.job).min();
        let newest = works.iter().map(|work| work.job + 1).max();
        let next = lowest.or(newest).unwrap_or_default().saturating_sub(SLACK);
        let next = next.max(floor.unwrap_or_default());
        failures.floor = Some(next);
        failures.seen.append(&mut new);
        failures.seen = failures.seen.split_off(&next);
    }

    /// The newest failure of this kind of work on an instance that nobody was told of yet. Older ones count as told with it.
    pub(super) fn tell(&self, kind: Kind, name: &str, ours: impl Fn(&Work) -> bool) -> Option<Work> {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meant = |work: &Work| work.kind == kind && work.instance == name && ours(work);
        let newest = failures
            .untold
            .iter()
            .filter(|work| is_meant(work))
            .max_by_key(|work| work.job)
            .cloned();
        failures.untold.retain(|work| !is_meant(work));
        newest
    }
}

/// The steps of one job that are about an instance. What cannot be read is left out: it is no job of ours.
fn read(row: &[Value]) -> Vec<Work> {
    let [id, ops, statuses, results, began, ended] = row else {
        return Vec::new();
    };
    let (Some(id), Some(ops)) = (id.as_u64().or_else(|| id.as_str()?.parse().ok()), ops.as_array()) else {
        return Vec::new();
    };
    let text = |op: &Value, name: &str| op.get(name).and_then(Value::as_str).map(str::to_owned);
    let step = |(index, op): (usize, &Value)| {
        Some(Work {
            job: id,
            kind: match op.get("OP_ID").and_then(Value::as_str) {
                Some("OP_INSTANCE_CREATE") => Kind::Create,
                Some("OP_INSTANCE_STARTUP") => Kind::Start,
                Some("OP_INSTANCE_REMOVE") => Kind::Remove,
                _ => Kind::Other,
            },
            status: match statuses.get(index).and_then(Value::as_str) {
                Some("queued" | "waiting") => Status::Pending,
                Some("success") => Status::Succeeded,
                Some("error" | "canceled") => Status::Failed,
                _ => Status::Running,
            },
            instance: text(op, "instance_name")?.to_ascii_lowercase(),
            comment: text(op, "comment").unwrap_or_default(),
            result: results.get(index).cloned().unwrap_or_default(),
            began: seconds(began),
            ended: seconds(ended),
        })
    };
    ops.iter().enumerate().filter_map(step).collect()
}

/// `[seconds, microseconds]`.
fn seconds(stamp: &Value) -> Option<f64> {
    Some(stamp.get(0)?.as_f64()? + stamp.get(1)?.as_f64()? / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64, op: &str, status: &str, span: (u64, u64)) -> Vec<Value> {
        let stamp = |seconds: u64| match seconds {
            0 => Value::Null,
            seconds => json!([seconds, 500_000]),
        };
        vec![
            json!(id),
            json!([{"OP_ID": op, "instance_name": "Web", "comment": "ours"}]),
            json!([status]),
            json!([["OpPrereqError", ["no room", "insufficient_resources"]]]),
            stamp(span.0),
            stamp(span.1),
        ]
    }

    fn works(rows: &[Vec<Value>]) -> Vec<Work> {
        rows.iter().flat_map(|row| read(row)).collect()
    }

    #[test]
    fn work_is_read_from_a_job() {
        let work = &works(&[row(7, "OP_INSTANCE_CREATE", "waiting", (1, 0))])[0];
        assert_eq!(
            (
                work.job,
                work.kind,
                work.status,
                work.instance.as_str(),
                work.comment.as_str()
            ),
            (7, Kind::Create, Status::Pending, "web", "ours")
        );
        for (word, status) in [
            ("queued", Status::Pending),
            ("running", Status::Running),
            ("canceling", Status::Running),
            ("some new word", Status::Running),
            ("success", Status::Succeeded),
            ("error", Status::Failed),
            ("canceled", Status::Failed),
        ] {
            assert_eq!(
                works(&[row(7, "OP_INSTANCE_CREATE", word, (1, 0))])[0].status,
                status,
                "{word}"
            );
        }
        // Every field null is what RAPI says of a job that it does not know.
        assert_eq!(read(&vec![Value::Null; 6]), []);
        assert_eq!(
            works(&[row(1, "OP_INSTANCE_MIGRATE", "running", (1, 0))])[0].kind,
            Kind::Other
        );
    }

    #[test]
    fn an_instance_was_made_by_the_job_in_whose_time_it_was_made() {
        let works = works(&[
            row(1, "OP_INSTANCE_CREATE", "success", (10, 20)),
            row(2, "OP_INSTANCE_CREATE", "error", (30, 40)),
            row(3, "OP_INSTANCE_CREATE", "running", (50, 0)),
            row(4, "OP_INSTANCE_STARTUP", "success", (21, 29)),
        ]);
        let made = |ctime| creation_of(&works, "web", ctime).map(|work| work.job);
        assert_eq!(
            [15.0, 25.0, 35.0, 55.0, 5.0].map(made),
            [Some(1), None, Some(2), Some(3), None]
        );
        assert_eq!(creation_of(&works, "other", 15.0), None);
    }

    #[test]
    fn a_failure_is_told_once_and_an_old_one_never() {
        let jobs = Jobs::default();
        jobs.note(&works(&[row(1, "OP_INSTANCE_CREATE", "error", (1, 2))]));
        let later = works(&[
            row(1, "OP_INSTANCE_CREATE", "error", (1, 2)),
            row(2, "OP_INSTANCE_CREATE", "error", (3, 4)),
            row(3, "OP_INSTANCE_CREATE", "canceled", (5, 6)),
            row(4, "OP_INSTANCE_STARTUP", "error", (5, 6)),
        ]);
        jobs.note(&later);
        let tell = |kind, ours: bool| jobs.tell(kind, "web", |_| ours).map(|work| work.job);
        assert_eq!(tell(Kind::Create, false), None);
        assert_eq!(tell(Kind::Create, true), Some(3));
        assert_eq!(tell(Kind::Create, true), None);
        assert_eq!(tell(Kind::Start, true), Some(4));
    }

    #[test]
    fn an_old_failure_is_read_once_and_no_later_one_is_missed() {
        let jobs = Jobs::default();
        let filter = || jobs.filter().to_string();
        assert_eq!(filter(), r#"["!=","status","success"]"#);
        jobs.note(&works(&[
            row(1, "OP_INSTANCE_CREATE", "error", (1, 2)),
            row(300, "OP_INSTANCE_CREATE", "running", (1, 0)),
            row(400, "OP_INSTANCE_CREATE", "error", (1, 2)),
        ]));
        // The one that runs may still fail.
        assert!(filter().contains(r#"[">=","id",250]"#), "{}", filter());
        let look = works(&[
            row(300, "OP_INSTANCE_CREATE", "error", (1, 9)),
            row(400, "OP_INSTANCE_CREATE", "error", (1, 2)),
            row(402, "OP_INSTANCE_REMOVE", "error", (8, 9)),
        ]);
        for _ in 0..2 {
            jobs.note(&look);
            assert!(filter().contains(r#"[">=","id",353]"#), "{}", filter());
        }
        // It shows later than the next one.
        jobs.note(&works(&[
            row(401, "OP_INSTANCE_STARTUP", "error", (8, 9)),
            row(402, "OP_INSTANCE_REMOVE", "error", (8, 9)),
        ]));
        let tell = |kind| jobs.tell(kind, "web", |_| true).map(|work| work.job);
        assert_eq!(tell(Kind::Create), Some(300));
        assert_eq!(tell(Kind::Start), Some(401));
        assert_eq!(tell(Kind::Remove), Some(402));
        // Nothing of the queue is left to read; nothing is told twice.
        jobs.note(&[]);
        jobs.note(&look);
        assert!(filter().contains(r#"[">=","id",353]"#), "{}", filter());
        assert_eq!([Kind::Create, Kind::Start, Kind::Remove].map(tell), [None; 3]);
    }

    #[test]
    fn failures_of_others_do_not_pile_up() {
        let jobs = Jobs::default();
        jobs.note(&[]);
        for id in 0..5000 {
            jobs.note(&works(&[row(id, "OP_INSTANCE_CREATE", "error", (1, 2))]));
        }
        let failures = jobs.failures.lock().unwrap();
        assert!(
            failures.untold.len() <= UNTOLD && failures.seen.len() <= 51,
            "{failures:?}"
        );
    }
}
