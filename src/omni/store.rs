//! A cache of one kind, kept by a watch and written through: the answer of our own write goes in at once and
//! never regresses.
//!
//! Two sources feed it, and either may be behind the other: the watch, and the answers of our own writes and
//! reads. Within one incarnation of an ID the higher version wins; of two incarnations the later made. A full
//! reading of everything overrules both, but for what we wrote after it began.
//!
//! *Guarantees*: what vanished is reported as a change, too. A dropped [`Store::run`] leaves the store
//! readable and not current.
//!
//! *Assumptions*: Omni's clock gives two incarnations of one ID different times of creation.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch as signal;

use super::kinds::Kind;
use super::resource::Resource;
use super::state::State;
use super::watch::{Seen, Watch};
use crate::cloud::Timestamp;

/// What tells a store's owner that something changed: the group of the resource, for most kinds a machine
/// request's ID.
pub type OnChange = Arc<dyn Fn(&str) + Send + Sync>;

/// A cache of all resources of one kind that belong to our provider. Cheap to clone.
pub struct Store<K: Kind> {
    inner: Arc<Inner<K>>,
}

struct Inner<K: Kind> {
    state: State,
    table: Mutex<Table<K>>,
    bootstrapped: signal::Sender<bool>,
    breaks: AtomicU64,
}

impl<K: Kind> Clone for Store<K> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<K: Kind> fmt::Debug for Store<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table();
        f.debug_struct("Store")
            .field("kind", &K::NAME)
            .field("entries", &table.entries.len())
            .field("current", &table.is_current())
            .finish_non_exhaustive()
    }
}

impl<K: Kind> Store<K> {
    /// An empty store. `group` names the group (for most kinds: the machine request) that a resource belongs
    /// to; a resource without one is not kept.
    pub fn new(state: State, group: fn(&Resource<K>) -> Option<String>) -> Self {
        Self {
            inner: Arc::new(Inner {
                state,
                table: Mutex::new(Table::new(group)),
                bootstrapped: signal::Sender::new(false),
                breaks: AtomicU64::new(0),
            }),
        }
    }

    /// Watches for ever: bootstraps, resumes, falls back to a full resync; never gives up. `on_change` hears
    /// of every change that others made, not of our own `put`s.
    pub async fn run(self, on_change: OnChange) {
        let _end = NotCurrent(&self);
        let mut watch = Watch::<K>::new(self.inner.state.clone());
        loop {
            let seen = watch.next().await;
            let all = matches!(seen, Seen::All { .. });
            if matches!(seen, Seen::Broken) {
                self.inner.breaks.fetch_add(1, Ordering::Relaxed);
            }
            let changes = self.table().take(seen);
            if changes.doubtful {
                watch.relist_soon();
            }
            if all {
                self.inner.bootstrapped.send_replace(true);
            }
            for group in &changes.groups {
                on_change(group);
            }
        }
    }

    /// Whether everything that existed has been seen at least once.
    #[must_use]
    pub fn is_bootstrapped(&self) -> bool {
        *self.inner.bootstrapped.borrow()
    }

    /// Waits until everything that existed has been seen.
    pub async fn bootstrapped(&self) {
        let mut seen = self.inner.bootstrapped.subscribe();
        // It fails only when the sender is gone, and we hold it.
        let _ = seen.wait_for(|seen| *seen).await;
    }

    /// Whether the watch is up right now, and shows everything: false from a break until the resume or resync
    /// is through, and while there is a resource that cannot be read.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.table().is_current()
    }

    /// How often the watch broke.
    #[must_use]
    pub fn breaks(&self) -> u64 {
        self.inner.breaks.load(Ordering::Relaxed)
    }

    /// The resource of that ID.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Arc<Resource<K>>> {
        self.table()
            .entries
            .get(id)
            .map(|entry| Arc::clone(&entry.resource))
    }

    /// All resources of a group: the one that is named as the group is, then the others by ID.
    #[must_use]
    pub fn group(&self, group: &str) -> Vec<Arc<Resource<K>>> {
        let table = self.table();
        let namesake = table.entries.get(group).filter(|entry| entry.group.is_none());
        let ids = table.groups.get(group).into_iter().flatten();
        namesake
            .into_iter()
            .chain(ids.filter_map(|id| table.entries.get(id)))
            .map(|entry| Arc::clone(&entry.resource))
            .collect()
    }

    /// Everything, by ID.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Resource<K>>> {
        let table = self.table();
        let entries = table.entries.values();
        entries.map(|entry| Arc::clone(&entry.resource)).collect()
    }

    /// Takes in the answer of our own write or Get. An older version of the same incarnation is ignored; the
    /// entry is no longer dirty.
    pub fn put(&self, resource: Resource<K>) {
        self.table().put(resource);
    }

    /// Takes in that a Get or our own Destroy showed the ID gone. `known` is the incarnation that is gone:
    /// late events of it do not bring it back. A later incarnation in the store stays.
    ///
    /// Read `known` before the Get, or the store may have learned of a later incarnation meanwhile. Of a kind
    /// that Omni reads from a cache (config patch requests) only our own Destroy proves anything.
    pub fn remove(&self, known: &Resource<K>) {
        self.table().remove(known);
    }

    /// Takes in that a Get showed nothing under an ID of which the store knows nothing either: the entry is
    /// no longer dirty.
    pub fn put_absent(&self, id: &str) {
        self.table().dirty.remove(id);
    }

    /// Notes that a write's answer was lost: the entry has to be read before it is trusted again.
    pub fn mark_dirty(&self, id: &str) {
        self.table().dirty.insert(id.to_owned());
    }

    /// Whether the entry has to be read first.
    #[must_use]
    pub fn is_dirty(&self, id: &str) -> bool {
        self.table().dirty.contains(id)
    }

    fn table(&self) -> MutexGuard<'_, Table<K>> {
        // Nothing in the table can be half done: no code of others runs under the lock.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the store is no longer current when its watch is dropped.
struct NotCurrent<'a, K: Kind>(&'a Store<K>);

impl<K: Kind> Drop for NotCurrent<'_, K> {
    fn drop(&mut self) {
        self.0.table().up = false;
    }
}

/// What a look at the watch brought.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Groups of what others changed.
    groups: BTreeSet<String>,
    /// A full reading lacked what we wrote while it went on: it may be gone, and no event would say so.
    doubtful: bool,
}

struct Entry<K: Kind> {
    resource: Arc<Resource<K>>,
    /// `None`: of its own name, as most.
    group: Option<String>,
    /// The table's clock at our last own write or read of it; 0 if it came from the watch.
    put: u64,
}

struct Tombstone {
    created: Timestamp,
    at: u64,
}

/// The contents, and all the rules. Pure.
struct Table<K: Kind> {
    group: fn(&Resource<K>) -> Option<String>,
    entries: BTreeMap<String, Entry<K>>,
    /// What came last: the next one often says the same.
    latest: Weak<Resource<K>>,
    /// The IDs of each group, in order, but for what is named as its group. Flat, since most are of one.
    groups: HashMap<String, Vec<String>>,
    /// What is gone by our own knowledge, until the watch says so too.
    tombstones: HashMap<String, Tombstone>,
    dirty: BTreeSet<String>,
    unreadable: BTreeSet<String>,
    /// Counts our own writes and reads.
    clock: u64,
    /// The clock when the full reading began.
    reading: u64,
    up: bool,
}

impl<K: Kind> Table<K> {
    fn new(group: fn(&Resource<K>) -> Option<String>) -> Self {
        Self {
            group,
            entries: BTreeMap::new(),
            latest: Weak::new(),
            groups: HashMap::new(),
            tombstones: HashMap::new(),
            dirty: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            clock: 0,
            reading: 0,
            up: false,
        }
    }

    fn is_current(&self) -> bool {
        self.up && self.unreadable.is_empty()
    }

    fn take(&mut self, seen: Seen<K>) -> Changes {
        let mut changes = Changes::default();
        match seen {
            Seen::Reading => self.reading = self.clock,
            Seen::All {
                resources,
                unreadable,
            } => {
                self.swap(resources, unreadable, &mut changes);
                self.up = true;
            }
            Seen::Changed(resource) => self.changed(resource, &mut changes),
            Seen::Gone(resource) => self.gone(&resource, &mut changes),
            Seen::Unreadable(id) => {
                self.unreadable.insert(id);
            }
            Seen::Resumed => self.up = true,
            Seen::Broken => self.up = false,
        }
        changes
    }

    /// Everything there is, by a reading that began a while ago. It is right even where it seems to go back
    /// in time: an etcd that was restored from a backup does.
    fn swap(&mut self, resources: Vec<Resource<K>>, unreadable: BTreeSet<String>, changes: &mut Changes) {
        let began = self.reading;
        self.tombstones.retain(|_, tombstone| tombstone.at > began);
        let mut vanished: BTreeSet<String> = self.entries.keys().cloned().collect();
        for resource in resources {
            vanished.remove(resource.id());
            if self.is_dead(&resource) {
                continue;
            }
            let keep = self.entries.get(resource.id()).is_some_and(|entry| {
                if entry.put > began {
                    !supersedes(&resource, &entry.resource)
                } else {
                    resource == *entry.resource
                }
            });
            if !keep {
                self.insert(resource, 0, changes);
            }
        }
        for id in vanished {
            let ours = self.entries.get(&id).is_some_and(|entry| entry.put > began);
            if ours {
                changes.doubtful = true;
            } else if !unreadable.contains(&id) {
                changes.groups.extend(self.take_out(&id));
            }
        }
        self.unreadable = unreadable;
    }

    fn changed(&mut self, resource: Resource<K>, changes: &mut Changes) {
        self.unreadable.remove(resource.id());
        let news = match self.entries.get(resource.id()) {
            Some(entry) => supersedes(&resource, &entry.resource),
            None => true,
        };
        if news && !self.is_dead(&resource) {
            self.insert(resource, 0, changes);
        }
    }

    fn gone(&mut self, resource: &Resource<K>, changes: &mut Changes) {
        let id = resource.id();
        self.unreadable.remove(id);
        if self.is_dead(resource) {
            self.tombstones.remove(id);
        }
        changes.groups.extend(self.take_out_up_to(resource));
    }

    fn put(&mut self, resource: Resource<K>) {
        self.clock += 1;
        self.dirty.remove(resource.id());
        if self.is_dead(&resource) {
            return;
        }
        let put = self.clock;
        match self.entries.get_mut(resource.id()) {
            Some(entry) if !supersedes(&resource, &entry.resource) => {
                if resource.same_incarnation(&entry.resource)
                    && resource.metadata.version == entry.resource.metadata.version
                {
                    entry.put = put;
                }
            }
            _ => self.insert(resource, put, &mut Changes::default()),
        }
    }

    fn remove(&mut self, known: &Resource<K>) {
        self.clock += 1;
        let id = known.id();
        self.dirty.remove(id);
        let tombstone = Tombstone {
            created: known.metadata.created,
            at: self.clock,
        };
        self.tombstones.insert(id.to_owned(), tombstone);
        self.take_out_up_to(known);
    }

    /// Whether our own knowledge says that this incarnation is gone.
    fn is_dead(&self, resource: &Resource<K>) -> bool {
        let tombstone = self.tombstones.get(resource.id());
        tombstone.is_some_and(|tombstone| tombstone.created == resource.metadata.created)
    }

    fn insert(&mut self, mut resource: Resource<K>, put: u64, changes: &mut Changes) {
        let id = resource.id().to_owned();
        // Before the former state of the same goes, which may be the latest.
        if let Some(latest) = self.latest.upgrade() {
            K::share(&mut resource.spec, &latest.spec);
        }
        changes.groups.extend(self.take_out(&id));
        let Some(group) = (self.group)(&resource) else {
            return;
        };
        changes.groups.insert(group.clone());
        let group = (group != id).then_some(group);
        if let Some(group) = &group {
            let alone = || Vec::with_capacity(1);
            let ids = self.groups.entry(group.clone()).or_insert_with(alone);
            if let Err(place) = ids.binary_search(&id) {
                ids.insert(place, id.clone());
            }
        }
        let resource = Arc::new(resource);
        self.latest = Arc::downgrade(&resource);
        self.entries.insert(id, Entry { resource, group, put });
    }

    /// Takes out an entry of the same or an earlier incarnation; tells its group.
    fn take_out_up_to(&mut self, gone: &Resource<K>) -> Option<String> {
        let entry = self.entries.get(gone.id())?;
        if entry.resource.metadata.created > gone.metadata.created {
            return None;
        }
        self.take_out(gone.id())
    }

    fn take_out(&mut self, id: &str) -> Option<String> {
        let Some(group) = self.entries.remove(id)?.group else {
            return Some(id.to_owned());
        };
        if let Some(ids) = self.groups.get_mut(&group) {
            if let Ok(place) = ids.binary_search_by(|known| known.as_str().cmp(id)) {
                ids.remove(place);
            }
            if ids.is_empty() {
                self.groups.remove(&group);
            }
        }
        Some(group)
    }
}

/// Whether `new` is a later state than `old`: a higher version, or a later incarnation, whose versions start
/// anew.
fn supersedes<K: Kind>(new: &Resource<K>, old: &Resource<K>) -> bool {
    let order = |resource: &Resource<K>| (resource.metadata.created, resource.metadata.version);
    order(new) > order(old)
}

#[cfg(test)]
mod tests {
    use super::super::kinds::{
        LABEL_REQUEST, MachineRequestSpec, MachineRequestStatusSpec, MachineRequestStatuses, MachineRequests,
    };
    use super::*;

    type Status = Resource<MachineRequestStatuses>;

    fn status(id: &str, created: u64, version: u64) -> Status {
        let mut resource = Resource::new(id, MachineRequestStatusSpec::default());
        resource.metadata.created = Timestamp(created);
        resource.metadata.version = version;
        resource
    }

    fn in_group(id: &str, version: u64, group: &str) -> Status {
        let mut resource = status(id, 1, version);
        resource
            .metadata
            .labels
            .insert(LABEL_REQUEST.into(), group.into());
        resource
    }

    fn by_id() -> Table<MachineRequestStatuses> {
        Table::new(|resource| Some(resource.id().to_owned()))
    }

    fn by_label() -> Table<MachineRequestStatuses> {
        Table::new(|resource| resource.metadata.labels.get(LABEL_REQUEST).cloned())
    }

    fn all(resources: &[Status]) -> Seen<MachineRequestStatuses> {
        Seen::All {
            resources: resources.to_vec(),
            unreadable: BTreeSet::new(),
        }
    }

    fn versions(table: &Table<MachineRequestStatuses>) -> Vec<(String, u64, u64)> {
        let entries = table.entries.iter();
        let tell = |(id, entry): (&String, &Entry<MachineRequestStatuses>)| {
            let metadata = &entry.resource.metadata;
            (id.clone(), metadata.created.0, metadata.version)
        };
        entries.map(tell).collect()
    }

    fn groups(changes: &Changes) -> Vec<&str> {
        changes.groups.iter().map(String::as_str).collect()
    }

    #[test]
    fn an_event_that_our_own_write_overtook_changes_nothing() {
        let mut table = by_id();
        table.take(all(&[status("a", 1, 1)]));
        table.put(status("a", 1, 3));
        for late in [2, 3] {
            let changes = table.take(Seen::Changed(status("a", 1, late)));
            assert!(changes.groups.is_empty());
        }
        assert_eq!(versions(&table), [("a".into(), 1, 3)]);
        let changes = table.take(Seen::Changed(status("a", 1, 4)));
        assert_eq!(groups(&changes), ["a"]);
    }

    #[test]
    fn the_answer_of_a_late_get_does_not_go_back_either() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 5)));
        table.put(status("a", 1, 4));
        assert_eq!(versions(&table), [("a".into(), 1, 5)]);
    }

    #[test]
    fn versions_start_anew_with_a_new_incarnation() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 9)));
        table.take(Seen::Changed(status("a", 2, 1)));
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
        table.put(status("a", 1, 10));
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
    }

    #[test]
    fn late_events_do_not_bring_back_what_we_destroyed() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 2)));
        table.remove(&status("a", 1, 2));
        assert!(table.take(Seen::Changed(status("a", 1, 3))).groups.is_empty());
        table.put(status("a", 1, 3));
        assert_eq!(versions(&table), []);
        // Ours is the only knowledge of it until here; the destroyed event is no news, and ends the
        // tombstone.
        assert!(table.take(Seen::Gone(status("a", 1, 3))).groups.is_empty());
        assert!(table.tombstones.is_empty());
        table.take(Seen::Changed(status("a", 2, 1)));
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
    }

    #[test]
    fn a_tombstone_does_not_hide_the_next_incarnation() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 2)));
        table.remove(&status("a", 1, 2));
        table.put(status("a", 2, 1));
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
        assert!(table.take(Seen::Changed(status("a", 1, 3))).groups.is_empty());
        assert!(table.take(Seen::Gone(status("a", 1, 3))).groups.is_empty());
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
    }

    #[test]
    fn removing_what_is_known_spares_a_later_incarnation() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 2, 1)));
        table.remove(&status("a", 1, 7));
        assert_eq!(versions(&table), [("a".into(), 2, 1)]);
    }

    #[test]
    fn a_destroyed_event_is_a_change() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 2)));
        assert_eq!(groups(&table.take(Seen::Gone(status("a", 1, 3)))), ["a"]);
        assert_eq!(versions(&table), []);
    }

    #[test]
    fn a_full_reading_tells_what_came_what_changed_and_what_vanished() {
        let mut table = by_id();
        table.take(all(&[status("a", 1, 1), status("b", 1, 1), status("c", 1, 1)]));
        table.take(Seen::Reading);
        let changes = table.take(all(&[status("b", 1, 2), status("c", 1, 1), status("d", 1, 1)]));
        assert_eq!(groups(&changes), ["a", "b", "d"]);
        assert!(!changes.doubtful);
    }

    #[test]
    fn a_full_reading_is_right_even_where_it_goes_back_in_time() {
        let mut table = by_id();
        table.put(status("a", 5, 9));
        table.take(Seen::Reading);
        let changes = table.take(all(&[status("a", 5, 4)]));
        assert_eq!(groups(&changes), ["a"]);
        assert_eq!(versions(&table), [("a".into(), 5, 4)]);
    }

    #[test]
    fn what_we_write_while_everything_is_read_survives_the_reading() {
        let mut table = by_id();
        table.take(all(&[status("a", 1, 1), status("b", 1, 1)]));
        table.take(Seen::Reading);
        table.put(status("a", 1, 2));
        table.put(status("new", 1, 1));
        table.remove(&status("b", 1, 1));
        let changes = table.take(all(&[status("a", 1, 1), status("b", 1, 1)]));
        assert_eq!(groups(&changes), [""; 0]);
        assert!(
            changes.doubtful,
            "`new` may be gone again, and no event would say so"
        );
        assert_eq!(versions(&table), [("a".into(), 1, 2), ("new".into(), 1, 1)]);
        table.take(Seen::Reading);
        let changes = table.take(all(&[status("a", 1, 2)]));
        assert_eq!(groups(&changes), ["new"]);
        assert!(table.tombstones.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_neither_gone_nor_current() {
        let mut table = by_id();
        table.take(all(&[status("a", 1, 1)]));
        table.take(Seen::Reading);
        let changes = table.take(Seen::All {
            resources: Vec::new(),
            unreadable: ["a".to_owned()].into(),
        });
        assert_eq!(changes, Changes::default());
        assert_eq!(versions(&table), [("a".into(), 1, 1)]);
        assert!(!table.is_current());
        table.take(Seen::Changed(status("a", 1, 2)));
        assert!(table.is_current());
        table.take(Seen::Unreadable("a".into()));
        assert!(!table.is_current());
        table.take(Seen::Gone(status("a", 1, 3)));
        assert!(table.is_current());
    }

    #[test]
    fn a_break_makes_the_store_stale_until_the_watch_goes_on() {
        let mut table = by_id();
        assert!(!table.is_current());
        table.take(all(&[]));
        assert!(table.is_current());
        table.take(Seen::Broken);
        assert!(!table.is_current());
        table.take(Seen::Resumed);
        assert!(table.is_current());
    }

    #[test]
    fn requests_that_are_written_alike_share_their_spec() {
        let mut table = Table::<MachineRequests>::new(|request| Some(request.id().to_owned()));
        let request = |id: &str, version: u64, talos_version: &str| {
            let spec = MachineRequestSpec {
                talos_version: talos_version.to_owned(),
                ..MachineRequestSpec::default()
            };
            let mut request = Resource::new(id, Arc::new(spec));
            request.metadata.version = version;
            request
        };
        for (id, version, talos_version) in [("a", 1, "1"), ("b", 1, "1"), ("b", 2, "1"), ("c", 1, "2")] {
            table.put(request(id, version, talos_version));
        }
        let spec = |id: &str| &table.entries[id].resource.spec;
        assert!(Arc::ptr_eq(spec("a"), spec("b")) && spec("c").talos_version == "2");
    }

    #[test]
    fn groups_follow_their_members() {
        let mut table = by_label();
        table.take(Seen::Changed(in_group("a", 1, "x")));
        table.take(Seen::Changed(in_group("b", 1, "x")));
        assert_eq!(table.groups.get("x").unwrap().len(), 2);
        let changes = table.take(Seen::Changed(in_group("a", 2, "y")));
        assert_eq!(groups(&changes), ["x", "y"]);
        // Without a group it is not kept.
        let changes = table.take(Seen::Changed(status("a", 1, 3)));
        assert_eq!(groups(&changes), ["y"]);
        assert_eq!(versions(&table), [("b".into(), 1, 1)]);
        assert_eq!(table.groups.keys().collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn only_a_read_or_a_write_of_ours_ends_a_doubt() {
        let mut table = by_id();
        table.take(Seen::Changed(status("a", 1, 1)));
        table.dirty.insert("a".into());
        table.take(Seen::Changed(status("a", 1, 2)));
        assert!(table.dirty.contains("a"));
        table.put(status("a", 1, 2));
        assert!(!table.dirty.contains("a"));
        table.dirty.insert("a".into());
        table.remove(&status("a", 1, 2));
        assert!(!table.dirty.contains("a"));
    }
}
