//! The store: resources with versions, and the log of their changes that watches read from.
//!
//! One log serves all types, as one etcd does: a bookmark is a revision, the change that it names and
//! everything before it has been seen. Types in Omni's memory share the log, but their bookmarks carry a
//! cookie that dies with the process.
//!
//! *Not here*: who may do what ([`super::rules`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::resources::{Stored, phase_text};
use super::types;
use crate::omni::Phase;

/// Namespace and type.
pub(super) type Key = (String, String);

/// What happened to one resource: neither `None` is an update, no `old` a creation, no `new` the end.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) at: Instant,
    pub(super) old: Option<Arc<Stored>>,
    pub(super) new: Option<Arc<Stored>>,
}

impl Change {
    /// The resource as it is now, or as it last was.
    pub(super) fn subject(&self) -> Option<&Arc<Stored>> {
        self.new.as_ref().or(self.old.as_ref())
    }
}

/// Why the store refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NotFound,
    Exists,
    Owner,
    Phase,
    Version,
    Finalizers,
    Malformed,
}

/// A refusal with the words that upstream uses.
#[derive(Debug, Clone)]
pub(super) struct Refused {
    pub(super) refusal: Refusal,
    pub(super) message: String,
}

impl Refused {
    fn new(refusal: Refusal, message: String) -> Self {
        Self { refusal, message }
    }

    pub(super) fn not_found(namespace: &str, kind: &str, id: &str) -> Self {
        Self::new(
            Refusal::NotFound,
            format!("resource {kind}({namespace}/{id}@undefined) doesn't exist"),
        )
    }
}

/// All resources and the log of their changes.
#[derive(Debug, Clone)]
pub(super) struct Store {
    kinds: BTreeMap<Key, BTreeMap<String, Arc<Stored>>>,
    log: VecDeque<Change>,
    revision: u64,
    /// Changes up to this revision are forgotten.
    compacted: u64,
    /// How many changes the log keeps.
    capacity: usize,
    /// In the bookmarks of types in memory: those of another process are refused.
    cookie: u64,
    last_created: SystemTime,
    /// Changes that the controllers have not looked at yet.
    pub(super) unseen: Vec<Change>,
}

impl Store {
    pub(super) fn new(capacity: usize, cookie: u64) -> Self {
        Self {
            kinds: BTreeMap::new(),
            log: VecDeque::new(),
            revision: 0,
            compacted: 0,
            capacity,
            cookie,
            last_created: UNIX_EPOCH,
            unseen: Vec::new(),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn compacted(&self) -> u64 {
        self.compacted
    }

    pub(super) fn get(&self, namespace: &str, kind: &str, id: &str) -> Option<&Arc<Stored>> {
        self.kinds.get(&(namespace.to_owned(), kind.to_owned()))?.get(id)
    }

    /// All resources of a type, by ID.
    pub(super) fn list(&self, namespace: &str, kind: &str) -> Vec<Arc<Stored>> {
        self.kinds
            .get(&(namespace.to_owned(), kind.to_owned()))
            .map(|all| all.values().cloned().collect())
            .unwrap_or_default()
    }

    /// Everything there is, by namespace, type and ID.
    pub(super) fn everything(&self) -> Vec<Arc<Stored>> {
        self.kinds
            .values()
            .flat_map(|all| all.values().cloned())
            .collect()
    }

    /// What `list` would have said `staleness` ago: the view of a cache that lags.
    pub(super) fn list_stale(
        &self,
        namespace: &str,
        kind: &str,
        staleness: Duration,
    ) -> BTreeMap<String, Arc<Stored>> {
        let mut view: BTreeMap<String, Arc<Stored>> = self
            .list(namespace, kind)
            .into_iter()
            .map(|stored| (stored.id.clone(), stored))
            .collect();
        let now = Instant::now();
        for change in self.log.iter().rev() {
            if now.duration_since(change.at) >= staleness {
                break;
            }
            let Some(subject) = change.subject() else { continue };
            if subject.namespace != namespace || subject.kind != kind {
                continue;
            }
            match &change.old {
                Some(old) => view.insert(old.id.clone(), old.clone()),
                None => view.remove(&subject.id),
            };
        }
        view
    }

    /// Changes after that revision, oldest first.
    pub(super) fn since(&self, revision: u64) -> impl Iterator<Item = &Change> {
        let from = self.log.partition_point(|change| change.revision <= revision);
        self.log.range(from..)
    }

    /// Stores a new resource. The owner is `options.owner`; one in the metadata may only agree with it.
    pub(super) fn create(
        &mut self,
        mut resource: Stored,
        owner: &str,
        now: SystemTime,
    ) -> Result<Arc<Stored>, Refused> {
        if !resource.owner.is_empty() && resource.owner != owner {
            return Err(Refused::new(
                Refusal::Malformed,
                format!("owner is already set to {:?}", resource.owner),
            ));
        }
        if self
            .get(&resource.namespace, &resource.kind, &resource.id)
            .is_some()
        {
            return Err(Refused::new(
                Refusal::Exists,
                format!("resource {resource} already exists"),
            ));
        }
        owner.clone_into(&mut resource.owner);
        resource.version = 1;
        resource.created = self.stamp(now);
        Ok(self.commit_new(resource))
    }

    /// Replaces a resource. Etcd-backed types are asked version, owner, phase in that order, those in memory
    /// owner, version, phase, as the two state implementations do.
    pub(super) fn update(
        &mut self,
        mut resource: Stored,
        version: Option<u64>,
        owner: &str,
        expected: Option<Phase>,
        now: SystemTime,
    ) -> Result<Arc<Stored>, Refused> {
        let Some(current) = self
            .get(&resource.namespace, &resource.kind, &resource.id)
            .cloned()
        else {
            return Err(Refused::not_found(
                &resource.namespace,
                &resource.kind,
                &resource.id,
            ));
        };
        let wrong_version = || {
            let asked = version.map_or_else(|| "undefined".to_owned(), |version| version.to_string());
            (version != Some(current.version)).then(|| {
                Refused::new(
                    Refusal::Version,
                    format!(
                        "resource {current} update conflict: \
                         expected version {asked:?}, actual version \"{}\"",
                        current.version
                    ),
                )
            })
        };
        let wrong_owner = || {
            (current.owner != owner).then(|| {
                Refused::new(
                    Refusal::Owner,
                    format!("resource {current} is owned by {:?}", current.owner),
                )
            })
        };
        let refused = if types::in_memory(&resource.namespace, &resource.kind) {
            wrong_owner().or_else(wrong_version)
        } else {
            wrong_version().or_else(wrong_owner)
        };
        if let Some(refused) = refused {
            return Err(refused);
        }
        if let Some(expected) = expected
            && current.phase != expected
        {
            return Err(Refused::new(
                Refusal::Phase,
                format!("resource {current} is not in phase {}", phase_text(expected)),
            ));
        }
        resource.version = current.version.saturating_add(1);
        resource.created = current.created;
        resource.updated = now;
        Ok(self.commit_update(&current, resource))
    }

    /// Ends a resource that nothing holds.
    pub(super) fn destroy(
        &mut self,
        namespace: &str,
        kind: &str,
        id: &str,
        owner: &str,
    ) -> Result<(), Refused> {
        let Some(current) = self.get(namespace, kind, id).cloned() else {
            return Err(Refused::not_found(namespace, kind, id));
        };
        if current.owner != owner {
            return Err(Refused::new(
                Refusal::Owner,
                format!("resource {current} is owned by {:?}", current.owner),
            ));
        }
        if !current.finalizers.is_empty() {
            let held: Vec<&str> = current.finalizers.iter().map(String::as_str).collect();
            return Err(Refused::new(
                Refusal::Finalizers,
                format!("resource {current} has pending finalizers &[{}]", held.join(" ")),
            ));
        }
        self.remove(namespace, kind, id);
        Ok(())
    }

    /// Changes a resource as Omni itself does: no version, no owner is asked for, and no change makes no
    /// event. False if there is no such resource.
    pub(super) fn modify(
        &mut self,
        namespace: &str,
        kind: &str,
        id: &str,
        now: SystemTime,
        change: impl FnOnce(&mut Stored),
    ) -> bool {
        let Some(current) = self.get(namespace, kind, id).cloned() else {
            return false;
        };
        let mut resource = (*current).clone();
        change(&mut resource);
        if resource != *current {
            resource.version = current.version.saturating_add(1);
            resource.updated = now;
            self.commit_update(&current, resource);
        }
        true
    }

    /// Stores what is not there yet, or brings spec, labels and owner of what is there up to date.
    pub(super) fn put(&mut self, resource: Stored, now: SystemTime) {
        let (namespace, kind, id) = (
            resource.namespace.clone(),
            resource.kind.clone(),
            resource.id.clone(),
        );
        if self.get(&namespace, &kind, &id).is_some() {
            self.modify(&namespace, &kind, &id, now, |current| {
                current.spec = resource.spec;
                current.labels = resource.labels;
                current.owner = resource.owner;
            });
        } else {
            let mut resource = resource;
            resource.version = 1;
            resource.created = self.stamp(now);
            resource.updated = now;
            self.commit_new(resource);
        }
    }

    /// Removes a resource, whoever holds it.
    pub(super) fn remove(&mut self, namespace: &str, kind: &str, id: &str) -> bool {
        let key = (namespace.to_owned(), kind.to_owned());
        let Some(current) = self.kinds.get_mut(&key).and_then(|all| all.remove(id)) else {
            return false;
        };
        self.record(Some(current), None);
        true
    }

    /// Forgets the log: whoever resumes from an older bookmark is told so.
    pub(super) fn compact(&mut self) {
        self.log.clear();
        self.compacted = self.revision;
    }

    /// What a restart of the process does to the types in its memory: they are gone, and so are their
    /// bookmarks.
    pub(super) fn forget_memory(&mut self) {
        self.kinds
            .retain(|(namespace, kind), _| !types::in_memory(namespace, kind));
        self.log.retain(|change| {
            change
                .subject()
                .is_some_and(|subject| !types::in_memory(&subject.namespace, &subject.kind))
        });
        self.cookie = self.cookie.wrapping_add(1);
    }

    /// The bookmark of a revision.
    pub(super) fn bookmark(&self, memory: bool, revision: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16);
        if memory {
            bytes.extend_from_slice(&self.cookie.to_be_bytes());
        }
        bytes.extend_from_slice(&revision.to_be_bytes());
        bytes
    }

    /// The revision that a bookmark names; `None` if it is not a bookmark of this process. One of the future
    /// is taken where etcd takes it, and stays silent (watched on Omni 1.10.4).
    pub(super) fn read_bookmark(&self, memory: bool, bookmark: &[u8]) -> Option<u64> {
        if !memory {
            return Some(u64::from_be_bytes(bookmark.try_into().ok()?));
        }
        let (cookie, revision) = bookmark.split_at_checked(8)?;
        let cookie = u64::from_be_bytes(cookie.try_into().ok()?);
        let revision = u64::from_be_bytes(revision.try_into().ok()?);
        (cookie == self.cookie && revision >= self.compacted && revision <= self.revision).then_some(revision)
    }

    /// A creation time that no other resource has, not even to the millisecond: it tells incarnations of one
    /// ID apart.
    fn stamp(&mut self, now: SystemTime) -> SystemTime {
        let next = self.last_created + Duration::from_millis(1);
        self.last_created = now.max(next);
        self.last_created
    }

    fn commit_new(&mut self, resource: Stored) -> Arc<Stored> {
        let resource = Arc::new(resource);
        self.kinds
            .entry(resource.key())
            .or_default()
            .insert(resource.id.clone(), resource.clone());
        self.record(None, Some(resource.clone()));
        resource
    }

    fn commit_update(&mut self, current: &Arc<Stored>, resource: Stored) -> Arc<Stored> {
        let resource = Arc::new(resource);
        self.kinds
            .entry(resource.key())
            .or_default()
            .insert(resource.id.clone(), resource.clone());
        self.record(Some(current.clone()), Some(resource.clone()));
        resource
    }

    fn record(&mut self, old: Option<Arc<Stored>>, new: Option<Arc<Stored>>) {
        self.revision = self.revision.saturating_add(1);
        let change = Change {
            revision: self.revision,
            at: Instant::now(),
            old,
            new,
        };
        self.unseen.push(change.clone());
        self.log.push_back(change);
        while self.log.len() > self.capacity {
            if let Some(forgotten) = self.log.pop_front() {
                self.compacted = forgotten.revision;
            }
        }
    }
}
