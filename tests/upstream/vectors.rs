//! Upstream's functions, called many inputs at a time.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::support::peer::{self, Peer};

/// The program that answers with upstream's functions.
pub(super) struct Vectors(Peer);

impl Vectors {
    /// `None` where Go is missing.
    pub(super) fn start() -> Option<Self> {
        let program = peer::build("upstream/vectors")?;
        Some(Self(Peer::start(&program, &[])))
    }

    /// What a function of upstream's makes of each input.
    pub(super) async fn ask<A: DeserializeOwned>(&mut self, what: &str, inputs: &[impl Serialize]) -> Vec<A> {
        self.tell(json!({ "do": what, "inputs": inputs })).await
    }

    /// The same for a command that says more.
    pub(super) async fn tell<A: DeserializeOwned>(&mut self, command: Value) -> Vec<A> {
        let mut answers = self.0.ask(&command).await;
        serde_json::from_value(answers["answers"].take()).unwrap()
    }
}

/// Fails with the first differences, if there are any.
#[track_caller]
pub(super) fn assert_none(differences: &[String], hint: impl std::fmt::Display) {
    let shown: Vec<&str> = differences.iter().take(10).map(String::as_str).collect();
    assert!(
        differences.is_empty(),
        "{} differences ({hint}):\n{}",
        differences.len(),
        shown.join("\n")
    );
}
