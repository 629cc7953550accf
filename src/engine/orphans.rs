//! Looks for instances that no request wants, says so, and deletes them where that is asked for.
//!
//! *Guarantees.* The cloud is listed first and Omni read after it, from Omni itself. Every scope and every kind was seen in full, or the
//! look counts for nothing. Before each step of a deletion Omni is asked once more, and the instance found by name and mark.
//!
//! *Not here.* What an orphan is, and the brakes: `machine/orphan.rs`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::cloud::{Cloud, CloudError, ErrorKind, Found, InstanceRef, Marked};
use crate::machine::desired::name;
use crate::machine::orphan::{Answerable, MOST_AT_ONCE, Orphan, Outlook, Sightings, Verdict, judge};
use crate::machine::release::{ANNOTATION_RELEASED, Release, Releases};
use crate::omni::kinds::{InfraProviderStatuses, MachineRequestStatuses, MachineRequests, MachineResources};
use crate::omni::{IdentityError, OmniError, Resource, State, who_am_i};

use super::health::ANNOTATION_INSTALLATION;
use super::imports::Chain;
use super::reconcile::Engine;
use super::retry;

/// What happens to an orphan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// It is reported.
    #[default]
    Report,
    /// It is reported and deleted.
    Delete,
}

/// A deletion that needs more steps goes on after the next look.
const STEPS: u32 = 60;

/// Between two steps of a deletion.
const STEP: Duration = Duration::from_secs(1);

/// Why a look counts for nothing.
#[derive(Debug, thiserror::Error)]
pub enum Blind {
    /// The cloud did not show everything.
    #[error(transparent)]
    Cloud(#[from] CloudError),
    /// Omni did not.
    #[error(transparent)]
    Omni(#[from] OmniError),
    /// Omni does not take us for this provider: what it shows may be another's, or nothing.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A watch is broken, or shows something that cannot be read.
    #[error("a watch of Omni is down")]
    Watch,
    /// Omni lost our registration, or is another Omni.
    #[error(
        "Omni has another registration of this provider than at the start: it is another account, or was set back to \
         an older state; nothing is taken for an orphan until the provider is started again"
    )]
    Installation,
    /// Somebody wrote something else where the releases are.
    #[error("the annotation {ANNOTATION_RELEASED} of the provider's registration is no list of releases")]
    Releases,
}

/// Everything in the cloud that carries a mark of this provider ID, of any installation.
#[derive(Debug)]
pub struct Survey<S> {
    /// Every scope that was looked into.
    pub scopes: BTreeSet<S>,
    /// What is there.
    pub marked: Vec<(S, Marked)>,
}

/// Looks into every scope of the site.
///
/// # Errors
///
/// The first scope that cannot be seen.
pub async fn survey<C: Cloud>(cloud: &C, provider: &str) -> Result<Survey<C::Scope>, CloudError> {
    let scopes: BTreeSet<C::Scope> = cloud.list_scopes().await?.into_iter().collect();
    let mut all = Vec::new();
    for scope in &scopes {
        let marked = cloud.list_marked(scope, provider).await?;
        all.extend(marked.into_iter().map(|marked| (scope.clone(), marked)));
    }
    Ok(Survey { scopes, marked: all })
}

/// What Omni itself says right now.
#[derive(Debug)]
pub struct Word<C: Cloud> {
    /// What answers for an instance.
    pub answerable: Answerable,
    /// What operators took back.
    pub released: Releases<C::Scope>,
    /// Every request.
    pub requests: Vec<Resource<MachineRequests>>,
    /// Every status.
    pub statuses: Vec<Resource<MachineRequestStatuses>>,
}

/// Asks Omni itself, after making sure that it takes us for who we are.
///
/// # Errors
///
/// Why its word counts for nothing.
pub async fn ask<C: Cloud>(state: &State) -> Result<Word<C>, Blind> {
    who_am_i(state).await?;
    let registration = state
        .get::<InfraProviderStatuses>(state.provider())
        .await?
        .ok_or(Blind::Installation)?;
    let (installation, released) = read_registration::<C>(&registration)?;
    let requests = state.list::<MachineRequests>(&[]).await?;
    let statuses = state.list::<MachineRequestStatuses>(&[]).await?;
    let resources = state.list::<MachineResources>(&[]).await?;
    let ids: BTreeSet<String> = requests
        .iter()
        .map(Resource::id)
        .chain(statuses.iter().map(Resource::id))
        .chain(resources.iter().map(Resource::id))
        .map(str::to_owned)
        .collect();
    Ok(Word {
        answerable: Answerable {
            installation,
            names: ids.iter().map(|id| name::<C>(id)).collect(),
            requests: ids,
        },
        released,
        requests,
        statuses,
    })
}

fn read_registration<C: Cloud>(
    registration: &Resource<InfraProviderStatuses>,
) -> Result<(String, Releases<C::Scope>), Blind> {
    let annotations = &registration.metadata.annotations;
    let installation = annotations
        .get(ANNOTATION_INSTALLATION)
        .ok_or(Blind::Installation)?;
    let released = Releases::read(annotations.get(ANNOTATION_RELEASED)).ok_or(Blind::Releases)?;
    Ok((installation.clone(), released))
}

/// Looks for ever.
pub async fn run<C: Cloud>(engine: Arc<Engine<C>>, policy: Policy) {
    let mut sightings = Sightings::default();
    loop {
        sleep(retry::spread(engine.pace.orphan_look)).await;
        if let Err(blind) = engine.look_for_orphans(&mut sightings, policy).await {
            warn!(error = %Chain(&blind), "cannot look for orphans");
        }
    }
}

impl<C: Cloud> Engine<C> {
    /// One look. Omni is only asked where something looks orphaned by what its watches show.
    async fn look_for_orphans(
        &self,
        sightings: &mut Sightings<C::Scope>,
        policy: Policy,
    ) -> Result<(), Blind> {
        let survey = survey(&*self.cloud, &self.identity.provider).await?;
        self.forget_releases(&survey).await;
        let marked = survey.marked;
        let mine = |marked: &Marked| {
            marked
                .mark
                .as_ref()
                .is_some_and(|mark| mark.installation == self.identity.installation)
        };
        let watched: BTreeSet<String> = self.stores.keys().into_iter().collect();
        let suspicious = marked.iter().any(|(_, marked)| {
            mine(marked)
                && !marked
                    .mark
                    .as_ref()
                    .is_some_and(|mark| watched.contains(&mark.request))
        });
        if !suspicious {
            *sightings = Sightings::default();
            self.health.orphans(None);
            return Ok(());
        }
        let mut word = ask::<C>(&self.state).await?;
        if word.answerable.installation != self.identity.installation {
            return Err(Blind::Installation);
        }
        if !self.stores.are_current() {
            return Err(Blind::Watch);
        }
        word.answerable.requests.extend(watched);
        let total = marked.iter().filter(|(_, marked)| mine(marked)).count();
        let orphans = marked
            .iter()
            .filter(|(scope, marked)| {
                judge(scope, marked, &word.answerable, &word.released) == Verdict::Orphan
            })
            .filter_map(|(scope, marked)| {
                Some(Orphan {
                    scope: scope.clone(),
                    name: marked.name.clone(),
                    id: marked.id.clone(),
                    mark: marked.mark.clone()?,
                })
            })
            .collect();
        let outlook = sightings.look(orphans, total, self.clock.now(), self.pace.orphan_age);
        self.tell(&outlook, total, policy);
        if policy == Policy::Delete && !outlook.too_many {
            for (orphan, _) in outlook.ripe.into_iter().take(MOST_AT_ONCE) {
                self.collect(orphan).await?;
            }
        }
        Ok(())
    }

    fn tell(&self, outlook: &Outlook<C::Scope>, total: usize, policy: Policy) {
        for (orphan, new) in &outlook.ripe {
            if *new {
                let (name, scope, id) = (&orphan.name, &orphan.scope, &orphan.id);
                warn!(%name, %scope, id, request = orphan.mark.request, "no machine request in Omni wants this instance");
            }
        }
        let count = outlook.ripe.len();
        self.health.orphans(match outlook.ripe.first() {
            None => None,
            Some(_) if outlook.too_many => Some(format!(
                "{count} of {total} instances have no machine request: too many to be believed, none is deleted; look at them \
                 with `omni-infra-provider orphans`"
            )),
            Some((orphan, _)) if policy == Policy::Report => Some(format!(
                "{} in {} has no machine request{}: list all with `omni-infra-provider orphans`, then delete them in the cloud, \
                 or take them back with `omni-infra-provider release`",
                orphan.name,
                orphan.scope,
                match count {
                    1 => String::new(),
                    more => format!(", nor have {} more", more - 1),
                }
            )),
            Some(_) => None,
        });
    }

    /// Deletes one orphan, step by step.
    async fn collect(&self, orphan: Orphan<C::Scope>) -> Result<(), Blind> {
        let Orphan {
            scope,
            name,
            id,
            mark,
        } = orphan;
        let request = mark.request.clone();
        let mut instance = InstanceRef {
            scope,
            name,
            id: None,
            mark,
            adopt_bare: false,
        };
        for _ in 0..STEPS {
            if !self.nothing_answers_for(&instance, id.as_deref()).await? {
                return Ok(());
            }
            instance.id = match self.cloud.find_instance(&instance).await? {
                Found::Nothing | Found::Foreign { .. } => {
                    info!(name = instance.name, scope = %instance.scope, request, "deleted an orphan");
                    return Ok(());
                }
                Found::Remains { .. } => None,
                Found::Ours(found) if Some(&found.id) == id.as_ref() => Some(found.id.clone()),
                // Somebody made it anew since: not what was looked at for so long.
                Found::Ours(_) => return Ok(()),
            };
            match self.cloud.delete_instance(&instance).await {
                Err(error) if error.kind != ErrorKind::Busy => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
            sleep(STEP).await;
        }
        debug!(name = instance.name, "an orphan takes long to delete");
        Ok(())
    }

    /// Whether Omni, asked now, still has nothing that answers for the instance.
    async fn nothing_answers_for(
        &self,
        instance: &InstanceRef<C::Scope>,
        id: Option<&str>,
    ) -> Result<bool, Blind> {
        let registration = self
            .state
            .get::<InfraProviderStatuses>(&self.identity.provider)
            .await?
            .ok_or(Blind::Installation)?;
        let (installation, released) = read_registration::<C>(&registration)?;
        if installation != self.identity.installation {
            return Err(Blind::Installation);
        }
        let request = &instance.mark.request;
        Ok(!released.covers(&instance.scope, &instance.name, id)
            && self.state.get::<MachineRequests>(request).await?.is_none()
            && self.state.get::<MachineRequestStatuses>(request).await?.is_none()
            && self.state.get::<MachineResources>(request).await?.is_none())
    }

    /// Takes releases off the list of which a complete look showed nothing any more.
    async fn forget_releases(&self, survey: &Survey<C::Scope>) {
        let is_gone = |release: &Release<C::Scope>| {
            survey.scopes.contains(&release.scope)
                && !survey
                    .marked
                    .iter()
                    .any(|(_, marked)| marked.name == release.name)
        };
        if !self.released().0.iter().any(is_gone) {
            return;
        }
        let result = self
            .state
            .modify::<InfraProviderStatuses>(&self.identity.provider, |registration| {
                let annotations = &mut registration.metadata.annotations;
                let Some(mut releases) = Releases::read(annotations.get(ANNOTATION_RELEASED)) else {
                    return false;
                };
                releases.0.retain(|release| !is_gone(release));
                releases.put(annotations);
                true
            })
            .await;
        if let Err(error) = result {
            debug!(%error, "cannot forget releases");
        }
    }

    /// What operators took back, by the watch. What cannot be read releases nothing: it could only be ours still.
    pub(super) fn released(&self) -> Releases<C::Scope> {
        let registration = self.stores.registration.get(&self.identity.provider);
        registration
            .and_then(|held| Releases::read(held.metadata.annotations.get(ANNOTATION_RELEASED)))
            .unwrap_or_default()
    }
}
