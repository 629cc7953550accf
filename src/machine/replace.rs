//! Decides whether a lost machine may be replaced now: the limits of its class and of the provider, and a brake for when many are lost.
//!
//! *Guarantees.* Pure. What was spent is written to Omni before a replacement begins ([`Ledger`]), so that no restart forgets it; a
//! ledger that cannot be read counts as all spent. Each replacement is spent once, however often it is begun.
//!
//! *Not here.* What a lost machine is, and how it is replaced: [`mod@super::plan`].

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cloud::{Replace, Timestamp};
use crate::omni::resource::Labels;

/// The ledger, as JSON, on our InfraProviderStatus.
pub const ANNOTATION_REPLACEMENTS: &str = "omni-infra-provider/replacements";
/// How a machine was lost, on our status: its replacement is under way.
pub const ANNOTATION_REPLACING: &str = "omni-infra-provider/replacing";

/// What the limits are counted over.
pub const HOUR: Duration = Duration::from_secs(3600);
/// More than one in so many of all machines that ran: too many to be believed, or to be replaced without a person. A single one is
/// always believed.
pub const SHARE: usize = 5;

/// How a machine was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// It ran, and its instance is gone.
    Vanished,
    /// It ran, and its instance was stopped outside of Omni.
    Stopped,
    /// Its instance runs, and it did not join by the deadline.
    NeverJoined,
}

impl Loss {
    /// Reads the annotation of a status. What a newer version may have written counts as the loss for which no instance is deleted.
    #[must_use]
    pub fn read(text: &str) -> Self {
        match text {
            "stopped" => Self::Stopped,
            "never joined" => Self::NeverJoined,
            _ => Self::Vanished,
        }
    }

    /// Whether a class asks for a replacement.
    #[must_use]
    pub fn is_replaced(self, class: &Replace) -> bool {
        match self {
            Self::Vanished => class.vanished,
            Self::Stopped => class.stopped,
            Self::NeverJoined => class.never_joined,
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vanished => "vanished",
            Self::Stopped => "stopped",
            Self::NeverJoined => "never joined",
        })
    }
}

/// One replacement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// When it was decided, by our clock.
    pub at: Timestamp,
    /// The machine request set; empty where the request has none.
    pub set: String,
    /// The machine request.
    pub request: String,
    /// When the status of the lost machine was made, by Omni's clock: each machine of a request has a status of its own.
    pub status: Timestamp,
}

/// The replacements of the last hour.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger(Vec<Spent>);

impl Ledger {
    /// Reads the annotation. `None` if it is no ledger.
    #[must_use]
    pub fn read(annotation: Option<&String>) -> Option<Self> {
        annotation.map_or(Some(Self::default()), |text| serde_json::from_str(text).ok())
    }

    /// Writes the annotation with one entry more, and without what is older than an hour.
    pub fn put(mut self, spent: Spent, annotations: &mut Labels) {
        let now = spent.at;
        self.0.retain(|known| now.since(known.at) < HOUR);
        self.0.push(spent);
        // Numbers and strings: they always serialise.
        let text = serde_json::to_string(&self).unwrap_or_default();
        annotations.insert(ANNOTATION_REPLACEMENTS.to_owned(), text);
    }

    fn recent(&self, now: Timestamp) -> impl Iterator<Item = &Spent> {
        self.0.iter().filter(move |spent| now.since(spent.at) < HOUR)
    }
}

/// How many machines of this provider there are, and how many of them are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fleet {
    /// Those that ran.
    pub ran: usize,
    /// Those of them that are shown as failed.
    pub lost: usize,
}

/// Whether a lost machine may be replaced now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Budget {
    /// Nobody looked yet this pass.
    Unasked,
    /// It may, once that is spent.
    Free,
    /// It may: this very replacement was spent.
    Spent,
    /// Not before this moment of our clock: the hour's replacements are used up.
    UsedUp(Timestamp),
    /// Not while so many are lost.
    TooMany {
        /// Lost ones.
        lost: usize,
        /// All that ran.
        ran: usize,
    },
}

/// Judges one replacement; `most` is the provider's own limit. Its entry's time is now.
#[must_use]
pub fn judge(ledger: Option<&Ledger>, one: &Spent, class: &Replace, fleet: Fleet, most: u32) -> Budget {
    let now = one.at;
    let Fleet { ran, lost } = fleet;
    if lost > 1 && lost.saturating_mul(SHARE) > ran {
        return Budget::TooMany { lost, ran };
    }
    let Some(ledger) = ledger else {
        return Budget::UsedUp(now.after(HOUR));
    };
    let is_this = |spent: &Spent| spent.request == one.request && spent.status == one.status;
    if ledger.recent(now).any(is_this) {
        return Budget::Spent;
    }
    let of_set = ledger.recent(now).filter(|spent| spent.set == one.set);
    let waits = [free_at(of_set, class.per_hour), free_at(ledger.recent(now), most)];
    waits
        .into_iter()
        .flatten()
        .max()
        .map_or(Budget::Free, Budget::UsedUp)
}

/// When fewer than `most` of these are younger than an hour; `None` if that is so now.
fn free_at<'a>(spent: impl Iterator<Item = &'a Spent>, most: u32) -> Option<Timestamp> {
    let mut times: Vec<Timestamp> = spent.map(|spent| spent.at).collect();
    times.sort_unstable();
    let surplus = (times.len() + 1).checked_sub(usize::try_from(most).unwrap_or(usize::MAX))?;
    let last = times.get(surplus.checked_sub(1)?)?;
    Some(last.after(HOUR))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn one(set: &str, request: &str, status: u64, at: Timestamp) -> Spent {
        Spent {
            at,
            set: set.to_owned(),
            request: request.to_owned(),
            status: Timestamp(status),
        }
    }

    fn ago(minutes: u64) -> Timestamp {
        NOW.before(Duration::from_secs(minutes * 60))
    }

    fn class(per_hour: u32) -> Replace {
        Replace {
            per_hour,
            ..Replace::default()
        }
    }

    fn judged(spent: &[Spent], per_hour: u32, most: u32) -> Budget {
        let ledger = Ledger(spent.to_vec());
        let fleet = Fleet { ran: 10, lost: 1 };
        judge(
            Some(&ledger),
            &one("web", "web-1", 1, NOW),
            &class(per_hour),
            fleet,
            most,
        )
    }

    #[test]
    fn an_hours_replacements_of_a_set_are_limited() {
        assert_eq!(judged(&[], 1, 10), Budget::Free);
        let first = one("web", "web-2", 2, ago(50));
        assert_eq!(judged(std::slice::from_ref(&first), 2, 10), Budget::Free);
        assert_eq!(
            judged(std::slice::from_ref(&first), 1, 10),
            Budget::UsedUp(NOW.after(HOUR / 6))
        );
        let second = one("web", "web-3", 3, ago(20));
        assert_eq!(
            judged(&[second.clone(), first.clone()], 2, 10),
            Budget::UsedUp(NOW.after(HOUR / 6))
        );
        assert_eq!(
            judged(&[second, first], 1, 10),
            Budget::UsedUp(NOW.after(HOUR * 2 / 3))
        );
        assert_eq!(judged(&[one("db", "db-1", 4, ago(1))], 1, 10), Budget::Free);
        assert_eq!(judged(&[one("web", "web-2", 2, ago(60))], 1, 10), Budget::Free);
        // A clock that was ahead.
        let ahead = one("web", "web-2", 2, NOW.after(HOUR));
        assert_eq!(judged(&[ahead], 1, 10), Budget::UsedUp(NOW.after(HOUR * 2)));
    }

    #[test]
    fn an_hours_replacements_of_all_sets_are_limited() {
        let spent = [one("db", "db-1", 4, ago(30)), one("lb", "lb-1", 5, ago(10))];
        assert_eq!(judged(&spent, 5, 3), Budget::Free);
        assert_eq!(judged(&spent, 5, 2), Budget::UsedUp(NOW.after(HOUR / 2)));
        assert_eq!(judged(&[], 1, 0), Budget::Free);
    }

    #[test]
    fn a_replacement_is_spent_once() {
        let spent = |status, minutes| [one("web", "web-1", status, ago(minutes))];
        assert_eq!(judged(&spent(1, 5), 1, 1), Budget::Spent);
        // The one before, of the same request.
        assert!(matches!(judged(&spent(0, 5), 1, 10), Budget::UsedUp(_)));
        assert_eq!(judged(&spent(1, 61), 1, 1), Budget::Free);
    }

    #[test]
    fn nothing_is_replaced_while_many_are_lost() {
        let budget = |ran, lost| {
            judge(
                Some(&Ledger::default()),
                &one("web", "web-1", 1, NOW),
                &class(1),
                Fleet { ran, lost },
                10,
            )
        };
        for (ran, lost) in [(1, 1), (2, 1), (10, 2), (100, 20)] {
            assert_eq!(budget(ran, lost), Budget::Free, "{lost} of {ran}");
        }
        for (ran, lost) in [(2, 2), (9, 2), (100, 21), (5, 5)] {
            assert_eq!(
                budget(ran, lost),
                Budget::TooMany { lost, ran },
                "{lost} of {ran}"
            );
        }
    }

    #[test]
    fn a_ledger_is_written_and_read_and_what_is_none_counts_as_used_up() {
        let mut annotations = Labels::new();
        Ledger(vec![
            one("web", "old", 0, ago(60)),
            one("web", "web-2", 2, ago(59)),
        ])
        .put(one("db", "db-1", 3, NOW), &mut annotations);
        let text = annotations.get(ANNOTATION_REPLACEMENTS);
        expect_test::expect![[r#"[{"at":996460000,"set":"web","request":"web-2","status":2},{"at":1000000000,"set":"db","request":"db-1","status":3}]"#]].assert_eq(text.unwrap());
        let read = Ledger::read(text).unwrap();
        assert_eq!(read.recent(NOW).count(), 2);
        assert_eq!(Ledger::read(None), Some(Ledger::default()));
        assert_eq!(Ledger::read(Some(&"{}".to_owned())), None);
        let budget = judge(
            None,
            &one("web", "web-1", 1, NOW),
            &class(1),
            Fleet::default(),
            10,
        );
        assert_eq!(budget, Budget::UsedUp(NOW.after(HOUR)));
    }

    #[test]
    fn a_loss_is_read_as_it_is_written() {
        for loss in [Loss::Vanished, Loss::Stopped, Loss::NeverJoined] {
            assert_eq!(Loss::read(&loss.to_string()), loss);
        }
        assert_eq!(Loss::read("melted"), Loss::Vanished);
    }
}
