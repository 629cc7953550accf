//! When Omni's controllers look at what: a timetable without duplicates, in virtual or real time.

use std::collections::BTreeMap;

use tokio::time::Instant;

/// One thing to look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Task {
    /// Put Omni's finalizer on a machine request.
    HoldRequest(String),
    /// Take it off again, since nobody else holds the request.
    ReleaseRequest(String),
    /// End a request that nobody holds.
    EndRequest(String),
    /// Put the cleanup finalizer on a machine request status.
    HoldStatus(String),
    /// Begin the drain of a status that is torn down.
    Drain(String),
    /// End it.
    Drained(String),
    /// Make a patch of a patch request, or remove it.
    Patch(String),
    /// Match the requests of a set to its count.
    Set(String),
    /// Let a booted machine join.
    Join(String),
    /// Derive registration and machine from a link.
    Link(String),
    /// Remove a link that is torn down.
    EndLink(String),
    /// Clean up after a provider that is being deleted.
    Provider(String),
}

/// The timetable.
#[derive(Debug, Clone, Default)]
pub(super) struct Agenda {
    by_time: BTreeMap<(Instant, u64), Task>,
    planned: BTreeMap<Task, (Instant, u64)>,
    next: u64,
}

impl Agenda {
    /// Plans a task, unless it is planned for an earlier time already.
    pub(super) fn plan(&mut self, at: Instant, task: Task) {
        if let Some(planned) = self.planned.get(&task) {
            if planned.0 <= at {
                return;
            }
            self.by_time.remove(planned);
        }
        let slot = (at, self.next);
        self.next = self.next.wrapping_add(1);
        self.by_time.insert(slot, task.clone());
        self.planned.insert(task, slot);
    }

    /// The next task whose time has come.
    pub(super) fn due(&mut self, now: Instant) -> Option<Task> {
        let entry = self.by_time.first_entry()?;
        if entry.key().0 > now {
            return None;
        }
        let task = entry.remove();
        self.planned.remove(&task);
        Some(task)
    }

    /// When the next task is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.keys().next().map(|slot| slot.0)
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.by_time.clear();
        self.planned.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_task_is_planned_once_for_its_earliest_time() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut agenda = Agenda::default();
        agenda.plan(later, Task::Set("a".to_owned()));
        agenda.plan(now, Task::Set("a".to_owned()));
        agenda.plan(later, Task::Set("a".to_owned()));
        agenda.plan(later, Task::Set("b".to_owned()));
        assert_eq!(agenda.due(now), Some(Task::Set("a".to_owned())));
        assert_eq!(agenda.due(now), None);
        assert_eq!(agenda.next(), Some(later));
        assert_eq!(agenda.due(later), Some(Task::Set("b".to_owned())));
        assert_eq!(agenda.next(), None);
    }
}
