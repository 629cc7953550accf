//! Gives an instance back to the operator: from then on this provider never touches it, and a teardown that waits for it goes on.
//!
//! *Guarantees.* What a running request wants is not given back. One write, of our registration's annotation; the daemon hears of it by
//! its watch.

use std::collections::BTreeSet;
use std::time::SystemTime;

use crate::cloud::{Cloud, CloudError, Marked, Timestamp};
use crate::machine::desired::{Parsed, name};
use crate::machine::orphan::{Verdict, judge};
use crate::machine::release::{ANNOTATION_RELEASED, Release, Releases};
use crate::omni::kinds::{InfraProviderStatuses, MachineResources};
use crate::omni::{OmniError, State};

use super::observe::placement;
use super::orphans::{Blind, Word, ask, survey};

/// Why nothing was given back.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Omni's word is needed.
    #[error(transparent)]
    Blind(#[from] Blind),
    /// It could not be written down.
    #[error("cannot write the release to Omni")]
    Write(#[source] OmniError),
    /// It is wanted.
    #[error(
        "{0} is wanted by a machine request that runs: tear that down first, and release what cannot be deleted then"
    )]
    Wanted(String),
    /// It was never this installation's.
    #[error("{name}: {verdict}; there is nothing to release")]
    NotOurs {
        /// The instance's name.
        name: String,
        /// Whose it is.
        verdict: Verdict,
    },
    /// There is no such thing.
    #[error("neither Omni nor the cloud has {0}: `omni-infra-provider orphans` lists what there is")]
    Unknown(String),
    /// There are several.
    #[error("{name} is in several places ({places}): say which with --scope")]
    Several {
        /// The instance's name.
        name: String,
        /// The scopes, for a person.
        places: String,
    },
}

/// What was given back.
#[derive(Debug)]
pub struct Released<S> {
    /// The releases that were written down.
    pub releases: Vec<Release<S>>,
    /// Why the cloud could not be seen, if so.
    pub unseen: Option<CloudError>,
}

/// Gives back what has this name (or was made for the request of this ID), in all scopes or in the one that is named.
///
/// # Errors
///
/// Why it cannot be.
pub async fn release<C: Cloud>(
    state: &State,
    cloud: &C,
    wanted: &str,
    scope: Option<&str>,
) -> Result<Released<C::Scope>, ReleaseError> {
    let (marked, unseen) = match survey(cloud, state.provider()).await {
        Ok(survey) => (survey.marked, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let word = ask::<C>(state).await?;
    let here = |place: &C::Scope| scope.is_none_or(|scope| scope == place.to_string());
    let found: Vec<&(C::Scope, Marked)> = marked
        .iter()
        .filter(|(place, marked)| {
            let request = marked.mark.as_ref().map(|mark| mark.request.as_str());
            here(place) && (marked.name == wanted || request == Some(wanted))
        })
        .collect();
    let releases = match of_requests::<C>(state, &word, wanted).await? {
        Some((request, scopes)) => scopes
            .into_iter()
            .filter(here)
            .map(|scope| {
                let name = name::<C>(&request);
                let id = found
                    .iter()
                    .find(|(place, marked)| *place == scope && marked.name == name)
                    .and_then(|(_, marked)| marked.id.clone());
                new(scope, name, request.clone(), id)
            })
            .collect(),
        None => of_orphans::<C>(&found, &word, wanted)?,
    };
    if releases.is_empty() {
        return Err(ReleaseError::Unknown(wanted.to_owned()));
    }
    state
        .modify::<InfraProviderStatuses>(state.provider(), |registration| {
            let annotations = &mut registration.metadata.annotations;
            let Some(mut held) = Releases::read(annotations.get(ANNOTATION_RELEASED)) else {
                return false;
            };
            held.0.retain(|old| {
                !releases
                    .iter()
                    .any(|new| new.name == old.name && new.scope == old.scope)
            });
            held.0.extend(releases.iter().cloned());
            held.put(annotations);
            true
        })
        .await
        .map_err(ReleaseError::Write)?;
    Ok(Released { releases, unseen })
}

fn new<S>(scope: S, name: String, request: String, id: Option<String>) -> Release<S> {
    Release {
        scope,
        name,
        request,
        id,
        at: Timestamp::from(SystemTime::now()),
    }
}

/// The request of that ID, or whose instance has that name, and where its instance may be; `None` if Omni has nothing of it.
async fn of_requests<C: Cloud>(
    state: &State,
    word: &Word<C>,
    wanted: &str,
) -> Result<Option<(String, Vec<C::Scope>)>, ReleaseError> {
    let is = |id: &str| id == wanted || name::<C>(id) == wanted;
    let request = word.requests.iter().find(|request| is(request.id()));
    if request.is_some_and(|request| !request.tearing_down()) {
        return Err(ReleaseError::Wanted(wanted.to_owned()));
    }
    let status = word.statuses.iter().find(|status| is(status.id()));
    let Some(id) = request
        .map(|request| request.id().to_owned())
        .or_else(|| Some(status?.id().to_owned()))
    else {
        return Ok(None);
    };
    if let Some(placement) = status.and_then(placement::<C::Scope>) {
        return Ok(Some((id, placement.scopes)));
    }
    let resource = state.get::<MachineResources>(&id).await.map_err(Blind::from)?;
    if let Some(legacy) = resource.and_then(|resource| C::legacy(&resource.spec)) {
        return Ok(Some((id, vec![legacy.scope])));
    }
    let scopes = request.and_then(|request| {
        Parsed::<C>::read(&request.spec, &[])
            .scopes()
            .map(<[C::Scope]>::to_vec)
    });
    Ok(Some((id, scopes.unwrap_or_default())))
}

fn of_orphans<C: Cloud>(
    found: &[&(C::Scope, Marked)],
    word: &Word<C>,
    wanted: &str,
) -> Result<Vec<Release<C::Scope>>, ReleaseError> {
    let mut releases = Vec::new();
    let mut not_ours = None;
    for (scope, marked) in found {
        match (
            judge(scope, marked, &word.answerable, &word.released),
            &marked.mark,
        ) {
            (Verdict::Orphan, Some(mark)) => releases.push(new(
                scope.clone(),
                marked.name.clone(),
                mark.request.clone(),
                marked.id.clone(),
            )),
            (verdict, _) => not_ours = Some(verdict),
        }
    }
    let places: BTreeSet<String> = releases.iter().map(|release| release.scope.to_string()).collect();
    match (places.len(), not_ours) {
        (0, Some(verdict)) => Err(ReleaseError::NotOurs {
            name: wanted.to_owned(),
            verdict,
        }),
        (0 | 1, _) => Ok(releases),
        _ => Err(ReleaseError::Several {
            name: wanted.to_owned(),
            places: places.into_iter().collect::<Vec<_>>().join(", "),
        }),
    }
}
