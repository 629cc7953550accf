//! What the commands do that look at both sides and serve nobody.

use anyhow::Context;

#[cfg(feature = "ganeti")]
use super::ganeti;
use super::omni;
#[cfg(feature = "oxide")]
use super::oxide;
use crate::cloud::Cloud;
use crate::config::{CloudConfig, Config};
use crate::engine::{orphans, release};
use crate::machine::orphan::{Verdict, judge};
use crate::omni::Omni;
use crate::omni::kinds::InfraProviderStatuses;

/// Tries everything that the daemon needs, live, without changing anything.
///
/// # Errors
///
/// What does not work.
pub async fn check(config: &Config) -> anyhow::Result<()> {
    let omni = omni(config)?;
    omni.who_am_i()
        .await
        .context("cannot act as this provider in Omni")?;
    omni.state
        .get::<InfraProviderStatuses>(omni.state.provider())
        .await
        .context("Omni does not let us read our own registration")?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => oxide(site, config)?
            .check()
            .await
            .context("cannot use the silo")?,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => ganeti(site, None)?
            .check()
            .await
            .context("cannot use the cluster")?,
    }
    Ok(())
}

/// Something that carries our mark and that no request wants, for a person.
#[derive(Debug)]
pub struct OrphanRow {
    /// Where it is.
    pub scope: String,
    /// The instance's name.
    pub name: String,
    /// The vendor's ID; `None` for what is left of an instance.
    pub id: Option<String>,
    /// The machine request that it was made for, where its mark says so.
    pub request: Option<String>,
    /// Why no request wants it; `None` where Omni could not be asked whether one does.
    pub verdict: Option<Verdict>,
}

/// What carries our mark and no request wants.
#[derive(Debug)]
pub struct OrphanList {
    /// Everything of it; everything with our mark where Omni could not be asked.
    pub rows: Vec<OrphanRow>,
    /// Why Omni could not be asked.
    pub omni: anyhow::Result<()>,
}

/// Lists what carries our mark and no request wants, without changing anything.
///
/// # Errors
///
/// What could not be seen of the cloud.
pub async fn orphans(config: &Config) -> anyhow::Result<OrphanList> {
    let omni = omni(config)?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => rows(&omni, &oxide(site, config)?).await,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => rows(&omni, &ganeti(site, None)?).await,
    }
}

async fn rows<C: Cloud>(omni: &Omni, cloud: &C) -> anyhow::Result<OrphanList> {
    let survey = orphans::survey(cloud, omni.state.provider()).await?;
    let word = orphans::ask::<C>(&omni.state).await;
    let judged = survey.marked.into_iter().map(|(scope, marked)| OrphanRow {
        scope: scope.to_string(),
        verdict: word
            .as_ref()
            .ok()
            .map(|word| judge(&scope, &marked, &word.answerable, &word.released)),
        name: marked.name,
        id: marked.id,
        request: marked.mark.map(|mark| mark.request),
    });
    Ok(OrphanList {
        rows: judged
            .filter(|row| row.verdict != Some(Verdict::Wanted))
            .collect(),
        omni: word.map(drop).context(
            "Omni could not be asked what it wants: the list is of everything with this provider's mark",
        ),
    })
}

/// What was given back, for a person.
#[derive(Debug)]
pub struct GivenBack {
    /// Scope, name and, where it is known, the vendor's ID of each.
    pub instances: Vec<(String, String, Option<String>)>,
    /// Why the cloud could not be seen, if so.
    pub unseen: Option<String>,
}

/// Gives an instance back to the operator.
///
/// # Errors
///
/// Why it cannot be.
pub async fn release(config: &Config, name: &str, scope: Option<&str>) -> anyhow::Result<GivenBack> {
    let omni = omni(config)?;
    match &config.cloud {
        #[cfg(feature = "oxide")]
        CloudConfig::Oxide(site) => give_back(&omni, &oxide(site, config)?, name, scope).await,
        #[cfg(feature = "ganeti")]
        CloudConfig::Ganeti(site) => give_back(&omni, &ganeti(site, None)?, name, scope).await,
    }
}

async fn give_back<C: Cloud>(
    omni: &Omni,
    cloud: &C,
    name: &str,
    scope: Option<&str>,
) -> anyhow::Result<GivenBack> {
    let released = release::release(&omni.state, cloud, name, scope).await?;
    let instances = released.releases.into_iter();
    Ok(GivenBack {
        instances: instances
            .map(|release| (release.scope.to_string(), release.name, release.id))
            .collect(),
        unseen: released.unseen.map(|error| error.to_string()),
    })
}
