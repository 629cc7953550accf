//! Decides which marked instances no request wants, and which of them may be deleted now.
//!
//! *Guarantees.* Pure. Nothing is ripe that was not an orphan in two complete looks and for a minimum age; nothing at all while
//! more than a share of everything marked looks orphaned, since then it is more likely that Omni's side is wrong.
//!
//! *Assumptions.* The cloud was listed before Omni: an instance that is younger than the look at Omni has a request in it.
//!
//! *Not here.* Looking, and deleting: `engine/orphans.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::cloud::{Mark, Marked, Scope, Timestamp};

use super::release::Releases;

/// At most so many are deleted after one look.
pub const MOST_AT_ONCE: usize = 5;

/// More than one in so many of everything that carries our mark: too many to be believed. A single orphan is always believed.
pub const SHARE: usize = 4;

/// Whose a marked thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A request, or what is left of one in Omni, answers for it.
    Wanted,
    /// It carries our mark, and Omni has nothing that answers for it.
    Orphan,
    /// The same, and it was released to the operator.
    Released,
    /// Its mark names another installation: another Omni account with this provider ID, or this provider before it was deleted and
    /// created anew. Never collected.
    OtherInstallation,
    /// It carries the Go provider's sentence, which names neither request nor installation. Never collected.
    Bare,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wanted => "wanted",
            Self::Orphan => "no machine request in Omni",
            Self::Released => "released to you: never touched again",
            Self::OtherInstallation => {
                "made for another Omni account, or before this provider was created anew: never touched"
            }
            Self::Bare => "made by the Go provider, for no request that Omni has: never touched",
        })
    }
}

/// What Omni has: everything that answers for an instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answerable {
    /// The installation.
    pub installation: String,
    /// IDs of all requests, and of the statuses and machine resources of requests that are gone.
    pub requests: BTreeSet<String>,
    /// The names of their instances.
    pub names: BTreeSet<String>,
}

/// Judges one marked thing.
#[must_use]
pub fn judge<S: Scope>(scope: &S, marked: &Marked, omni: &Answerable, released: &Releases<S>) -> Verdict {
    let Some(mark) = &marked.mark else {
        return match omni.names.contains(&marked.name) {
            true => Verdict::Wanted,
            false => Verdict::Bare,
        };
    };
    if mark.installation != omni.installation {
        Verdict::OtherInstallation
    } else if omni.requests.contains(&mark.request) {
        Verdict::Wanted
    } else if released.covers(scope, &marked.name, marked.id.as_deref()) {
        Verdict::Released
    } else {
        Verdict::Orphan
    }
}

/// One orphan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan<S> {
    /// Where it lives.
    pub scope: S,
    /// The instance's name.
    pub name: String,
    /// The vendor's ID; `None` for what is left of an instance.
    pub id: Option<String>,
    /// Its mark, in full.
    pub mark: Mark,
}

/// How long something has looked orphaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sighting {
    first: Timestamp,
    looks: u32,
    ripe: bool,
}

type Key<S> = (S, String, Option<String>);

/// What looked orphaned at the last look, in the memory of this process: a restart begins anew.
#[derive(Debug)]
pub struct Sightings<S>(BTreeMap<Key<S>, Sighting>);

impl<S> Default for Sightings<S> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// What one complete look makes of the orphans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlook<S> {
    /// Orphans beyond doubt, and whether each is one since this look.
    pub ripe: Vec<(Orphan<S>, bool)>,
    /// Whether so many look orphaned that none may be deleted.
    pub too_many: bool,
}

impl<S: Scope> Sightings<S> {
    /// Takes in a complete look at cloud and Omni: all orphans, out of so many marked things, at this moment of our clock. `age` is
    /// for how long, at least, something has to look orphaned to be one.
    pub fn look(
        &mut self,
        orphans: Vec<Orphan<S>>,
        marked: usize,
        now: Timestamp,
        age: Duration,
    ) -> Outlook<S> {
        let before = std::mem::take(&mut self.0);
        let too_many = orphans.len() > 1 && orphans.len().saturating_mul(SHARE) > marked;
        let mut ripe = Vec::new();
        for orphan in orphans {
            let key = (orphan.scope.clone(), orphan.name.clone(), orphan.id.clone());
            let known = before.get(&key);
            let first = known.map_or(now, |sighting| sighting.first);
            let looks = known.map_or(1, |sighting| sighting.looks.saturating_add(1));
            let is_ripe = looks >= 2 && now.since(first) >= age;
            let sighting = Sighting {
                first,
                looks,
                ripe: is_ripe,
            };
            self.0.insert(key, sighting);
            if is_ripe {
                ripe.push((orphan, !known.is_some_and(|known| known.ripe)));
            }
        }
        Outlook { ripe, too_many }
    }
}
