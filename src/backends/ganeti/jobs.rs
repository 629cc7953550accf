//! What the cluster's job queue shows: which work is open, and how work ended.
//!
//! *Guarantees.* Nothing is known from our own submissions alone: a job is met again by the instance that it touches, and by the
//! mark in its comment. All who ask at the same time share one question to the cluster. The error of a finished job is told once,
//! to whoever wants to do the same again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::client::Client;
use super::failure::Failure;
use crate::cloud::Shared;

const FIELDS: [&str; 6] = ["id", "ops", "opstatus", "opresult", "start_ts", "end_ts"];

/// From this many remembered failures on, those are forgotten that the cluster has archived.
const TOLD: usize = 10_000;

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

/// Everything that is open, and what failed and is not archived yet.
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
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    /// Whether a first look was made: what had failed before it was told by the process before us, or to nobody who still waits.
    begun: bool,
    jobs: HashSet<u64>,
}

impl Jobs {
    /// The queue, as a question that begins no earlier than this call shows it.
    pub(super) async fn now(&self, client: &Client) -> Result<Works, Failure> {
        let question = async {
            let rows = client
                .query("job", &FIELDS, json!(["!=", "status", "success"]))
                .await?;
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

    fn note(&self, works: &[Work]) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = || works.iter().filter(|work| work.status == Status::Failed);
        if !told.begun {
            told.begun = true;
            told.jobs.extend(failed().map(|work| work.job));
        } else if told.jobs.len() > TOLD {
            let there: HashSet<u64> = failed().map(|work| work.job).collect();
            told.jobs.retain(|job| there.contains(job));
        }
    }

    /// The newest failure of this kind of work on an instance that nobody was told of yet. Older ones count as told with it.
    pub(super) fn tell<'a>(
        &self,
        works: &'a [Work],
        kind: Kind,
        name: &str,
        ours: impl Fn(&Work) -> bool,
    ) -> Option<&'a Work> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        works
            .iter()
            .filter(|work| work.status == Status::Failed && work.kind == kind && work.instance == name)
            .filter(|work| ours(work) && told.jobs.insert(work.job))
            .max_by_key(|work| work.job)
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
        let tell = |kind, ours: bool| jobs.tell(&later, kind, "web", |_| ours).map(|work| work.job);
        assert_eq!(tell(Kind::Create, false), None);
        assert_eq!(tell(Kind::Create, true), Some(3));
        assert_eq!(tell(Kind::Create, true), None);
        assert_eq!(tell(Kind::Start, true), Some(4));
    }
}
