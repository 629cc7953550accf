//! Gathers what a pass sees: the stores without a call, the cloud and fresh Gets only where the planner asks.

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::{debug, warn};

use crate::cloud::{Cloud, Found, ImageKey, InstanceState, Timestamp};
use crate::machine::action::Ask;
use crate::machine::desired::{Goal, name};
use crate::machine::observed::{
    By, Diagnosis, Failure, Former, ImageSeen, Observed, Overall, PatchSeen, Placement, Seen, StatusSeen,
};
use crate::machine::replace::{ANNOTATION_REPLACING, Budget, Loss};
use crate::omni::kinds::{MachineRequestStatuses, MachineRequests};
use crate::omni::{Kind, OmniError, Resource, Store};
use crate::talos::patch;

use super::act::meaning;
use super::diagnose::diagnose;
use super::imports::Chain;
use super::memory::{Looked, Memory};
use super::reconcile::{Engine, Next, Pass};
use super::retry;
use super::stores::read_afresh;

/// The claim's placement, as JSON, on our status.
pub const ANNOTATION_PLACEMENT: &str = "omni-infra-provider/placement";
/// The claim's note that the instance was seen running, on our status.
pub const ANNOTATION_RAN: &str = "omni-infra-provider/ran";

/// The placement in a status's claim.
pub(super) fn placement<S: crate::cloud::Scope>(
    status: &Resource<MachineRequestStatuses>,
) -> Option<Placement<S>> {
    let text = status.metadata.annotations.get(ANNOTATION_PLACEMENT)?;
    serde_json::from_str(text).ok()
}

/// Whether the status holds a claim that this version cannot read: a newer one wrote it.
pub(super) fn is_claim_unreadable<S: crate::cloud::Scope>(status: &Resource<MachineRequestStatuses>) -> bool {
    status.metadata.annotations.contains_key(ANNOTATION_PLACEMENT) && placement::<S>(status).is_none()
}

/// A patch that we want.
pub(super) struct Wanted {
    pub(super) id: String,
    pub(super) data: String,
}

impl<C: Cloud> Engine<C> {
    /// What the stores and this process's memory show.
    pub(super) fn read_stores(
        &self,
        key: &str,
        request: Option<&Resource<MachineRequests>>,
        status: Option<&Resource<MachineRequestStatuses>>,
        goal: &Goal<C::Scope>,
        memory: &mut Memory<C>,
    ) -> Observed<C::Scope> {
        let resource = self.stores.machine_resources.get(key);
        let legacy = resource.as_ref().and_then(|resource| C::legacy(&resource.spec));
        let status_seen = status.map(|status| {
            let (tearing_down, held) = phase(memory, "status", status);
            StatusSeen {
                tearing_down,
                held,
                stage: status.spec.stage,
                uuid: status.spec.id.clone(),
                placement: placement(status),
                ran: status.metadata.annotations.contains_key(ANNOTATION_RAN),
                replacing: status
                    .metadata
                    .annotations
                    .get(ANNOTATION_REPLACING)
                    .map(|text| Loss::read(text)),
            }
        });
        let patches = self
            .stores
            .patches
            .group(key)
            .iter()
            .map(|patch| {
                let (tearing_down, held) = phase(memory, patch.id(), patch);
                PatchSeen {
                    id: patch.id().to_owned(),
                    tearing_down,
                    held,
                    differs: false,
                }
            })
            .collect();
        let claimed = status_seen.as_ref().and_then(|status| status.placement.as_ref());
        let claimed_since = claimed.map(|claim| memory.claims(&claim.scopes, self.clock.now()));
        let scopes = match (claimed, &legacy) {
            (Some(placement), _) => placement.scopes.clone(),
            (None, Some(legacy)) => vec![legacy.scope.clone()],
            (None, None) => goal.class_scopes().to_vec(),
        };
        let seen =
            Observed {
                name: name::<C>(key),
                finalizer: request
                    .is_some_and(|request| request.metadata.finalizers.contains(&self.identity.controller())),
                request_confirmed: false,
                status: status_seen,
                machine_resource: resource.is_some(),
                legacy,
                patches,
                missing_patches: Vec::new(),
                // What registered before the request was made is the machine of an earlier one with the same ID.
                registered: self.stores.registrations.group(key).iter().any(|machine| {
                    request.is_none_or(|made| machine.metadata.created >= made.metadata.created)
                }),
                scopes: scopes.into_iter().map(|scope| (scope, Seen::Unasked)).collect(),
                schematic: self.schematic_of(request, memory).is_some(),
                image: ImageSeen::Unasked,
                boots_from_medium: memory
                    .parsed
                    .as_ref()
                    .and_then(|parsed| parsed.good())
                    .is_some_and(|desired| desired.boot.is_medium()),
                failures: memory.failures.clone(),
                created: memory.created.as_ref().map(|(_, created)| *created),
                claimed_since,
                deleting: memory.deleting,
                ended: memory.ended,
                teardown_seen: memory.teardown_seen,
                torn_down: memory.request_torn_down,
                claim_lost: memory.claim_known,
                running_since: memory.running.map(|(since, _)| since),
                last_running: memory.running.map(|(_, last)| last),
                diagnosis: Diagnosis::Unasked,
                replace: memory
                    .parsed
                    .as_ref()
                    .and_then(|parsed| parsed.good().map(|desired| desired.replace))
                    .unwrap_or_default(),
                lost: memory.lost,
                budget: Budget::Unasked,
                former: Former::Unasked,
                lease: self.lease.holds(),
            };
        if seen.ran() {
            memory.ran_since.get_or_insert_with(|| self.clock.now());
        }
        seen
    }

    /// The schematic's ID, if this process registered its like already.
    pub(super) fn schematic_of(
        &self,
        request: Option<&Resource<MachineRequests>>,
        memory: &Memory<C>,
    ) -> Option<String> {
        let desired = memory.parsed.as_ref()?.good()?;
        let schematic = self.schematic(desired, &request?.spec).ok()?;
        let schematics = self
            .schematics
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        schematics.get(&schematic.input_hash())?.get().cloned()
    }

    /// The image that the request boots, once its schematic is known.
    pub(super) fn image_key(&self, pass: &Pass<'_, C>) -> Option<ImageKey> {
        let schematic = self.schematic_of(pass.request.as_deref(), pass.memory)?;
        let desired = pass.desired()?;
        Some(ImageKey {
            talos_version: desired.talos_version.clone(),
            schematic,
            platform: desired.boot.platform.to_owned(),
            arch: desired.boot.arch.to_owned(),
        })
    }

    /// Sees what the planner asks for.
    pub(super) async fn answer(&self, pass: &mut Pass<'_, C>, ask: Ask) -> Result<(), Next> {
        match ask {
            Ask::Instance => self.see_instance(pass, false).await,
            Ask::InstanceByFind => self.see_instance(pass, true).await,
            // It is where the operator has put it.
            Ask::Image
                if pass
                    .desired()
                    .is_some_and(|desired| desired.boot.format.is_none()) =>
            {
                pass.seen.image = ImageSeen::Present;
            }
            Ask::Image => {
                let place = pass
                    .seen
                    .placement()
                    .and_then(|placement| placement.scopes.last().cloned())
                    .zip(self.image_key(pass));
                if let Some(place) = place {
                    pass.seen.image = match self.imports.known(&place, pass.key) {
                        ImageSeen::Unasked => self.imports.look(&place, pass.key).await,
                        known => known,
                    };
                }
            }
            Ask::Diagnosis => self.diagnose(pass).await,
            Ask::Budget => pass.seen.budget = self.budget(pass),
            Ask::Former => match self.former(pass).await {
                Ok(former) => pass.seen.former = former,
                Err(error) => return Err(self.omni_unreadable(&error)),
            },
            Ask::Request => {
                let known = pass.request.clone();
                match read_afresh(&self.state, &self.stores.requests, pass.key).await {
                    Ok(Some(fresh)) => {
                        let same = known
                            .as_ref()
                            .is_some_and(|known| known.same_incarnation(&fresh) && !fresh.tearing_down());
                        if !same {
                            return Err(Next::Now);
                        }
                        pass.seen.request_confirmed = true;
                    }
                    Ok(None) => return Err(Next::Now),
                    Err(error) => return Err(self.omni_unreadable(&error)),
                }
            }
        }
        Ok(())
    }

    /// Looks for the instance in every scope of *where*.
    async fn see_instance(&self, pass: &mut Pass<'_, C>, by_find: bool) {
        let now = self.clock.now();
        let released = self.released();
        let name = name::<C>(pass.key);
        let given_up = |scope: &C::Scope| released.covers(scope, &name, None);
        let afresh = pass.seen.scopes.iter().any(|(scope, _)| given_up(scope));
        if !afresh && self.is_blind(pass, now) {
            return;
        }
        let by_find = by_find || pass.memory.find_next;
        let wanted = matches!(pass.goal, Goal::Run { .. } | Goal::Invalid { .. });
        let patient = wanted && pass.seen.ran() && pass.memory.soon == 0;
        let mutated = pass.memory.mutated.unwrap_or_default();
        if !by_find && !afresh && self.recall(pass, now, mutated) {
            return;
        }
        // A machine that needs nothing is content with a list half a slow look old; where something is under way, a look has to
        // be newer than the last one, or it would tell nothing new.
        let news = match &pass.memory.looked {
            _ if patient => now.before(self.pace.slow / 2),
            Some(looked) => looked.at.after(Duration::from_millis(1)),
            None => now.before(self.pace.step),
        };
        let no_older = mutated.max(news);
        let mut failed = false;
        let scopes: Vec<C::Scope> = pass.seen.scopes.iter().map(|(scope, _)| scope.clone()).collect();
        for (index, scope) in scopes.into_iter().enumerate() {
            let instance = self.instance(pass, &scope);
            let answer = if given_up(&scope) {
                // Whatever is there is the operator's, also where nobody can look.
                Ok((given_back(&instance.name), By::Find, self.clock.now()))
            } else if by_find {
                self.inventory.find(&instance).await
            } else {
                self.inventory.look(&instance, no_older, patient).await
            };
            let seen = match answer {
                Ok((Found::Ours(found), by, at)) if released.covers(&scope, &found.name, Some(&found.id)) => {
                    Seen::Known {
                        found: given_back(&found.name),
                        by,
                        at,
                    }
                }
                Ok((found, by, at)) => Seen::Known { found, by, at },
                Err(error) => {
                    failed = true;
                    let wait = retry::wait(error.kind, pass.memory.blind.saturating_add(1));
                    self.health.cloud_failed(&error);
                    if pass.memory.blind == 0 {
                        warn!(%scope, kind = error.kind.label(), error = %Chain(&error), "cannot see the instance");
                    }
                    if matches!(pass.goal, Goal::TearDown { .. } | Goal::Gone { .. }) {
                        self.health.stuck(pass.key, error.to_string());
                    }
                    Seen::Unknown(Failure {
                        kind: error.kind,
                        cause: error.to_string(),
                        not_before: self.clock.now().after(wait),
                    })
                }
            };
            if let Some(place) = pass.seen.scopes.get_mut(index) {
                place.1 = seen;
            }
        }
        pass.memory.blind = if failed {
            pass.memory.blind.saturating_add(1)
        } else {
            0
        };
        pass.memory.find_next = failed;
        pass.memory.saw(&pass.seen.overall());
        pass.memory.looked = Some(Looked {
            scopes: pass.seen.scopes.clone(),
            at: now,
        });
        self.note_running(pass);
        self.compare_patches(pass);
    }

    /// Whether the last look failed and its next try is not due: an event must not make us ask again and again.
    fn is_blind(&self, pass: &mut Pass<'_, C>, now: Timestamp) -> bool {
        let Some(looked) = &pass.memory.looked else {
            return false;
        };
        let waits = looked
            .scopes
            .iter()
            .any(|(_, seen)| matches!(seen, Seen::Unknown(failure) if failure.not_before > now));
        let blind = waits
            && looked.at >= pass.memory.mutated.unwrap_or_default()
            && same_scopes(&looked.scopes, &pass.seen.scopes);
        if blind {
            pass.seen.scopes.clone_from(&looked.scopes);
        }
        blind
    }

    /// Takes this process's own last look, where it is recent enough for what it showed; true if so.
    fn recall(&self, pass: &mut Pass<'_, C>, now: Timestamp, mutated: Timestamp) -> bool {
        let Some(looked) = &pass.memory.looked else {
            return false;
        };
        let same = same_scopes(&looked.scopes, &pass.seen.scopes);
        let news = pass.memory.ran_since.is_some_and(|since| looked.at < since);
        let good_for = looked
            .scopes
            .iter()
            .map(|(_, seen)| self.good_for(seen, news))
            .min();
        if !same || looked.at < mutated || now.since(looked.at) >= good_for.unwrap_or_default() {
            return false;
        }
        pass.seen.scopes.clone_from(&looked.scopes);
        self.compare_patches(pass);
        true
    }

    /// How long a look stays good, if we change nothing. Absence lets us create, which is safe; but once there is `news` that
    /// the instance ran, another process made what an older look did not show. What is under way is looked at anew each time.
    fn good_for(&self, seen: &Seen, news: bool) -> Duration {
        match seen {
            Seen::Known { found, .. } => match found {
                Found::Nothing if news => Duration::ZERO,
                Found::Nothing => self.pace.slow / 2,
                Found::Ours(instance) => match instance.state {
                    InstanceState::Running => self.pace.slow / 2,
                    InstanceState::Stopped => self.pace.step * 4,
                    InstanceState::Starting | InstanceState::Broken(_) => Duration::ZERO,
                },
                Found::Remains { .. } | Found::Foreign { .. } => Duration::ZERO,
            },
            Seen::Unasked | Seen::Unknown(_) => Duration::ZERO,
        }
    }

    fn note_running(&self, pass: &mut Pass<'_, C>) {
        let running = pass.seen.scopes.iter().any(|(_, seen)| {
            matches!(
                seen,
                Seen::Known { found: Found::Ours(instance), .. } if instance.state == InstanceState::Running
            )
        });
        if running {
            let now = self.clock.now();
            let since = pass.memory.running.map_or(now, |(since, _)| since);
            pass.memory.running = Some((since, now));
            pass.seen.running_since = Some(since);
            pass.seen.last_running = Some(now);
        }
    }

    /// Reads the console of an instance that should have joined: when the deadline has passed, and then at the pace of slow looks.
    /// Without an answer there is no diagnosis: nothing waits for one.
    async fn diagnose(&self, pass: &mut Pass<'_, C>) {
        let now = self.clock.now();
        let due = pass
            .memory
            .diagnosed
            .as_ref()
            .is_none_or(|(at, _)| now.since(*at) >= self.pace.slow / 2);
        if due && let Overall::Ours(scope, instance) = pass.seen.overall() {
            let (scope, id) = (scope.clone(), instance.id.clone());
            let mut instance = self.instance(pass, &scope);
            instance.id = Some(id);
            let diagnosis = match self.cloud.read_console(&instance).await {
                Ok(console) => console.map(|console| diagnose(&console.0)),
                Err(error) => {
                    debug!(error = %Chain(&error), "cannot read the console");
                    None
                }
            };
            pass.memory.diagnosed = Some((now, diagnosis));
        }
        let known = pass.memory.diagnosed.as_ref();
        pass.seen.diagnosis = Diagnosis::Known(known.and_then(|(_, diagnosis)| diagnosis.clone()));
    }

    /// Compares the patches that exist with those that we want; they depend on the instance that was seen.
    fn compare_patches(&self, pass: &mut Pass<'_, C>) {
        let wanted = self.wanted_patches(pass);
        let held = self.stores.patches.group(pass.key);
        let content: BTreeMap<&str, Option<&str>> = held
            .iter()
            .map(|patch| (patch.id(), patch.spec.data.as_deref()))
            .collect();
        for patch in &mut pass.seen.patches {
            patch.differs = wanted
                .iter()
                .find(|wanted| wanted.id == patch.id)
                .is_some_and(|wanted| {
                    let data = content.get(patch.id.as_str()).copied().flatten();
                    !data.is_some_and(|data| patch::same(data, &wanted.data))
                });
        }
        pass.seen.missing_patches = wanted
            .into_iter()
            .map(|wanted| wanted.id)
            .filter(|id| !content.contains_key(id.as_str()))
            .collect();
    }

    /// The patches that we want, as far as the instance is known.
    pub(super) fn wanted_patches(&self, pass: &Pass<'_, C>) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let instance = pass.seen.scopes.iter().find_map(|(_, seen)| match seen {
            Seen::Known {
                found: Found::Ours(instance),
                ..
            } => Some(instance),
            _ => None,
        });
        if let Some(id) = instance.and_then(|instance| instance.node_provider_id.as_ref()) {
            wanted.push(Wanted {
                id: format!("provider-id-{}", pass.key),
                data: patch::node_provider_id(id),
            });
        }
        if let Some(data) = pass
            .desired()
            .and_then(|desired| patch::nameservers(&desired.nameservers))
        {
            wanted.push(Wanted {
                id: format!("nameservers-{}", pass.key),
                data,
            });
        }
        wanted
    }

    /// A request that the store does not have: a fresh Get has to say so before anything is concluded from it.
    pub(super) async fn confirm_gone(&self, key: &str, memory: &mut Memory<C>) -> Result<(), Next> {
        match self.state.get::<MachineRequests>(key).await {
            Ok(None) => Ok(()),
            Ok(Some(fresh)) => {
                *memory = Memory::default();
                self.stores.requests.put(fresh);
                Err(Next::Now)
            }
            Err(error) => Err(self.omni_unreadable(&error)),
        }
    }

    /// Reads what a lost answer made doubtful, before anything is concluded from it.
    pub(super) async fn read_dirty(&self, key: &str, memory: &mut Memory<C>) -> Result<(), Next> {
        self.read_one(&self.stores.requests, key).await?;
        self.read_one(&self.stores.statuses, key).await?;
        self.read_one(&self.stores.machine_resources, key).await?;
        let mut patches: Vec<String> = self
            .stores
            .patches
            .group(key)
            .iter()
            .map(|patch| patch.id().to_owned())
            .collect();
        patches.extend([format!("provider-id-{key}"), format!("nameservers-{key}")]);
        patches.sort_unstable();
        patches.dedup();
        for id in patches {
            self.read_one(&self.stores.patches, &id).await?;
        }
        memory.torn_down.retain(|id, (created, version)| {
            let current = match id.as_str() {
                "status" => self
                    .stores
                    .statuses
                    .get(key)
                    .map(|r| (r.metadata.created, r.metadata.version)),
                id => self
                    .stores
                    .patches
                    .get(id)
                    .map(|r| (r.metadata.created, r.metadata.version)),
            };
            current == Some((*created, *version))
        });
        Ok(())
    }

    async fn read_one<K: Kind>(&self, store: &Store<K>, id: &str) -> Result<(), Next> {
        if !store.is_dirty(id) {
            return Ok(());
        }
        match read_afresh(&self.state, store, id).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.omni_unreadable(&error)),
        }
    }

    fn omni_unreadable(&self, error: &OmniError) -> Next {
        warn!(%error, "cannot read from Omni");
        self.after(retry::wait(meaning(error.kind), 3))
    }
}

/// What an operator took back is a stranger's.
fn given_back(name: &str) -> Found {
    Found::Foreign {
        what: format!(
            "{name} was given back with `omni-infra-provider release`, and something of that name may still be there"
        ),
    }
}

fn same_scopes<S: PartialEq>(one: &[(S, Seen)], other: &[(S, Seen)]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.0 == other.0)
}

/// Phase and hold of a resource. Teardown's answer says nothing of finalizers: until something newer is seen, they count as
/// present.
fn phase<K: Kind, C: Cloud>(memory: &Memory<C>, id: &str, resource: &Resource<K>) -> (bool, bool) {
    let version = (resource.metadata.created, resource.metadata.version);
    if memory.torn_down.get(id) == Some(&version) {
        return (true, true);
    }
    (resource.tearing_down(), !resource.metadata.finalizers.is_empty())
}
