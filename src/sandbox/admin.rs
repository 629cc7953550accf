//! Lets the command line look at a running sandbox and scale it: two paths on loopback, in plain text.

use std::io;

use axum::Router;
use axum::extract::{Query, State};
use axum::routing::{get, post};
use http::StatusCode;
use serde::Deserialize;
use tokio::net::TcpListener;

use super::{Sandbox, line, view};

/// More machines than this are a slip of the finger.
const MOST_MACHINES: u32 = 1000;

pub(super) async fn serve(sandbox: Sandbox, listener: TcpListener) -> io::Result<()> {
    let router = Router::new()
        .route("/status", get(status))
        .route("/scale", post(scale))
        .with_state(sandbox);
    line::serve(listener, router).await
}

async fn status(State(sandbox): State<Sandbox>) -> String {
    let rows = view::rows(&sandbox);
    let mut text = view::table(&rows).join("\n");
    text.push_str(&format!("\n\n{}\n", view::summary(&sandbox)));
    text
}

#[derive(Deserialize)]
struct Scale {
    set: String,
    machines: u32,
}

async fn scale(State(sandbox): State<Sandbox>, Query(wanted): Query<Scale>) -> (StatusCode, String) {
    let refused = |why: String| (StatusCode::BAD_REQUEST, why);
    if sandbox.omni.is_none() {
        return refused("this sandbox has no Omni to scale in".to_owned());
    }
    // Request IDs are the set's name and a suffix, and become names on the rack.
    let named = wanted.set.starts_with(|c: char| c.is_ascii_lowercase())
        && wanted.set.len() <= 40
        && wanted
            .set
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if !named {
        return refused(format!("{:?} is no name for a set", wanted.set));
    }
    if wanted.machines > MOST_MACHINES {
        return refused(format!("at most {MOST_MACHINES} machines"));
    }
    sandbox.scale(&wanted.set, wanted.machines);
    (
        StatusCode::OK,
        format!("{} has {} machines now", wanted.set, wanted.machines),
    )
}
