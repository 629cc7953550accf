//! What operators took back: instances that this provider never touches again, though they carry its mark.
//!
//! A mark cannot be taken off everywhere (Oxide's descriptions are for ever), so a release is kept in Omni: an annotation of our
//! registration. An entry goes once nothing of that name is left in the cloud.

use serde::{Deserialize, Serialize};

use crate::cloud::{Scope, Timestamp};
use crate::omni::resource::Labels;

/// The releases, as JSON, on our InfraProviderStatus.
pub const ANNOTATION_RELEASED: &str = "omni-infra-provider/released";

/// One instance that was given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "S: Scope")]
pub struct Release<S> {
    /// Where it lives.
    pub scope: S,
    /// The instance's name.
    pub name: String,
    /// The machine request that it was made for.
    pub request: String,
    /// The vendor's ID; `None` where it could not be seen, or was what is left of an instance: then everything of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When, by the operator's clock.
    pub at: Timestamp,
}

/// All that were given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent, bound = "S: Scope")]
pub struct Releases<S>(pub Vec<Release<S>>);

impl<S> Default for Releases<S> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<S: Scope> Releases<S> {
    /// Reads the annotation. `None` if it is no list of releases: then nobody may conclude what was not released.
    #[must_use]
    pub fn read(annotation: Option<&String>) -> Option<Self> {
        annotation.map_or(Some(Self::default()), |text| serde_json::from_str(text).ok())
    }

    /// Writes the annotation; none where nothing is released.
    pub fn put(&self, annotations: &mut Labels) {
        match serde_json::to_string(self) {
            Ok(text) if !self.0.is_empty() => annotations.insert(ANNOTATION_RELEASED.to_owned(), text),
            _ => annotations.remove(ANNOTATION_RELEASED),
        };
    }

    /// Whether this instance was given back. A scope can be written in two ways (a project's name, its ID), a vendor's ID in one.
    #[must_use]
    pub fn covers(&self, scope: &S, name: &str, id: Option<&str>) -> bool {
        self.0.iter().any(|release| match (&release.id, id) {
            (Some(released), Some(id)) => released == id,
            _ => release.name == name && release.scope == *scope,
        })
    }
}

/// The requests whose instances were given back, whatever the scopes.
#[must_use]
pub fn released_requests(annotation: Option<&String>) -> Vec<String> {
    #[derive(Deserialize)]
    struct Entry {
        request: String,
    }
    let entries: Option<Vec<Entry>> = annotation.and_then(|text| serde_json::from_str(text).ok());
    let entries = entries.unwrap_or_default().into_iter();
    entries.map(|entry| entry.request).collect()
}
