//! The tap on every call that the daemon makes: it traces them, and ends the daemon, or an answer, at one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use futures_util::future::{BoxFuture, FutureExt as _};
use omni_infra_provider::cloud::ErrorKind;
use omni_infra_provider::sandbox::omni::{Call, Moment, Omni, Rpc, Verdict};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::cloud::Machine;

/// One traced call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The request it concerns; empty where it concerns all.
    pub(crate) key: String,
    /// What is done.
    pub(crate) what: String,
    /// It changes nothing.
    pub(crate) reads: bool,
}

/// How a call ends the daemon, or only its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    DiesBefore,
    /// It took effect; where that sets off what takes its time, this still goes on.
    DiesAfter,
    AnswerLost,
}

impl Fate {
    pub(crate) const ALL: [Self; 3] = [Self::DiesBefore, Self::DiesAfter, Self::AnswerLost];
}

/// A call by its number, and what it is fatal to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Doom {
    pub(crate) call: usize,
    pub(crate) fate: Fate,
}

/// For example `7-dies-after`.
impl fmt::Display for Doom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fate = match self.fate {
            Fate::DiesBefore => "dies-before",
            Fate::DiesAfter => "dies-after",
            Fate::AnswerLost => "answer-lost",
        };
        write!(f, "{}-{fate}", self.call)
    }
}

impl FromStr for Doom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let call = text.split('-').next().unwrap_or_default().parse();
        let call = call.map_err(|_| format!("{text:?} begins with no number"))?;
        let dooms = Fate::ALL.map(|fate| Self { call, fate });
        dooms
            .into_iter()
            .find(|doom| doom.to_string() == text)
            .ok_or_else(|| format!("{text:?} ends with none of dies-before, dies-after, answer-lost"))
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    GoesOn,
    /// Nobody waits for its end any more.
    Hangs,
    AnswerLost,
}

/// What is due, since calls are counted.
#[derive(Default)]
struct Count {
    calls: usize,
    reads: Vec<usize>,
    doom: Option<Doom>,
    /// The doomed call, between its arrival and its effect.
    doomed: Option<Entry>,
    struck: bool,
}

/// What the hooks share: the trace, and what is to go wrong.
#[derive(Default)]
pub(crate) struct Tap {
    pub(crate) trace: Mutex<Vec<Entry>>,
    pub(crate) daemon: Mutex<Option<AbortHandle>>,
    /// The next calls of a cloud's verb that fail, and how.
    pub(crate) faults: Mutex<BTreeMap<&'static str, (usize, ErrorKind)>>,
    /// Name and ID of every instance that was ever seen, since the last [`Tap::doom`].
    pub(crate) made: Mutex<BTreeSet<(String, String)>>,
    /// Wakes when the daemon dies of a call.
    pub(crate) died: Notify,
    count: Mutex<Count>,
}

impl Tap {
    /// Counts calls from now on, and dooms one of them.
    pub(crate) fn doom(&self, doom: Option<Doom>) {
        // An earlier death that nobody waited for.
        let _ = self.died.notified().now_or_never();
        *self.count.lock().unwrap() = Count {
            doom,
            ..Count::default()
        };
    }

    /// How many calls there were since then, and whether the doomed one was among them.
    pub(crate) fn counted(&self) -> (usize, bool) {
        let count = self.count.lock().unwrap();
        (count.calls, count.struck)
    }

    /// Which of them changed nothing.
    pub(crate) fn reads(&self) -> Vec<usize> {
        self.count.lock().unwrap().reads.clone()
    }

    /// A call arrived.
    pub(crate) fn before(&self, entry: Entry) -> Course {
        self.trace.lock().unwrap().push(entry.clone());
        let mut count = self.count.lock().unwrap();
        count.calls += 1;
        if entry.reads {
            let call = count.calls;
            count.reads.push(call);
        }
        match count.doom {
            Some(doom) if doom.call == count.calls => match doom.fate {
                Fate::DiesBefore => {
                    count.struck = true;
                    self.kill();
                    Course::Hangs
                }
                Fate::DiesAfter | Fate::AnswerLost => {
                    count.doomed = Some(entry);
                    Course::GoesOn
                }
            },
            _ => Course::GoesOn,
        }
    }

    /// A call that arrived takes effect now, and will be answered later.
    pub(crate) fn during(&self, entry: &Entry) {
        let mut count = self.count.lock().unwrap();
        let dies = count.doom.is_some_and(|doom| doom.fate == Fate::DiesAfter);
        if dies && count.doomed.as_ref() == Some(entry) {
            count.doomed = None;
            count.struck = true;
            self.kill();
        }
    }

    /// A call took effect, or was refused.
    pub(crate) fn after(&self, entry: &Entry) -> Course {
        let mut count = self.count.lock().unwrap();
        if count.doomed.as_ref() != Some(entry) {
            return Course::GoesOn;
        }
        count.doomed = None;
        count.struck = true;
        match count.doom.map(|doom| doom.fate) {
            Some(Fate::AnswerLost) => Course::AnswerLost,
            _ => {
                self.kill();
                Course::Hangs
            }
        }
    }

    /// Notes which instances there are.
    pub(crate) fn saw(&self, machines: &[Machine]) {
        let mut made = self.made.lock().unwrap();
        made.extend(machines.iter().map(|it| (it.name.clone(), it.id.clone())));
    }

    /// How a call of a verb fails, if it was told to.
    pub(crate) fn fault(&self, verb: &str) -> Option<ErrorKind> {
        let mut faults = self.faults.lock().unwrap();
        let (times, kind) = faults.get_mut(verb)?;
        *times = times.checked_sub(1)?;
        Some(*kind)
    }

    fn kill(&self) {
        if let Some(daemon) = self.daemon.lock().unwrap().take() {
            daemon.abort();
        }
        self.died.notify_one();
    }
}

/// Puts the tap on Omni.
pub(crate) fn tap_omni(omni: &Omni, tap: &Arc<Tap>) {
    let tap = tap.clone();
    omni.set_hook(Arc::new(
        move |call: &Call, moment: Moment| -> BoxFuture<'static, Verdict> {
            let course = match (omni_entry(call), moment) {
                (None, _) => Course::GoesOn,
                (Some(entry), Moment::Before) => tap.before(entry),
                (Some(entry), Moment::After) => tap.after(&entry),
            };
            let verdict = match course {
                Course::GoesOn => Verdict::Proceed,
                Course::Hangs => Verdict::Hang,
                Course::AnswerLost => Verdict::Drop,
            };
            Box::pin(async { verdict })
        },
    ));
}

/// The words of a trace. Watches, lists and heartbeats are left out.
fn omni_entry(call: &Call) -> Option<Entry> {
    let kind = call.kind.split('.').next().unwrap_or_default();
    let detail = call.detail.as_str();
    let entry = |key: &str, what: String| {
        Some(Entry {
            key: key.to_owned(),
            what,
            reads: call.rpc == Rpc::Get,
        })
    };
    match (call.rpc, kind) {
        (Rpc::Watch | Rpc::List, _) | (_, "InfraProviderHealthStatuses" | "CurrentUsers") => None,
        (rpc, "InfraProviderStatuses") => entry("provider", format!("{rpc} registration")),
        (Rpc::CreateSchematic, _) => entry("", "register schematic".to_owned()),
        (rpc, "MachineRequests") => match rpc {
            Rpc::Get => entry(&call.id, "get request".to_owned()),
            _ if detail.contains("+finalizer") => entry(&call.id, "add finalizer".to_owned()),
            _ if detail.contains("-finalizer") => entry(&call.id, "remove finalizer".to_owned()),
            _ => entry(&call.id, format!("{rpc} request: {detail}")),
        },
        (rpc, "MachineRequestStatuses") => match rpc {
            Rpc::Get => entry(&call.id, "get status".to_owned()),
            Rpc::Create if detail.contains("placement") => entry(&call.id, "write claim".to_owned()),
            Rpc::Create => entry(&call.id, format!("create status: {detail}")),
            Rpc::Update if detail.contains("placement") => entry(&call.id, format!("update claim: {detail}")),
            Rpc::Update => entry(&call.id, format!("status: {}", shorten(detail))),
            _ => entry(&call.id, format!("{rpc} status")),
        },
        (rpc, "ConfigPatchRequests") => {
            let (patch, key) = ["provider-id", "nameservers"]
                .into_iter()
                .find_map(|name| Some((name, call.id.strip_prefix(name)?.strip_prefix('-')?)))
                .unwrap_or(("patch", call.id.as_str()));
            entry(key, format!("{rpc} patch {patch}"))
        }
        (rpc, other) => entry(&call.id, format!("{rpc} {other}")),
    }
}

/// Annotation names are longer than what they tell, and the time of day is another each day.
fn shorten(detail: &str) -> String {
    without_times(&detail.replace("+annotation omni-infra-provider/", "+"))
}

/// Replaces every time of day.
pub(crate) fn without_times(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    for index in 1..words.len() {
        if words[index].starts_with("UTC") {
            words[index - 1] = "<time>";
        }
    }
    words.join(" ")
}
