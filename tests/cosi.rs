//! One suite, two servers: what we rely on of COSI's state, written once and run against upstream's own server
//! and against our embedded Omni. A difference between the two fails here.
//!
//! What is not COSI's but Omni's (who may write what, what its controllers do) is not here: of that only Omni
//! itself could be the judge.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use omni_infra_provider::omni::kinds::{LABEL_PROVIDER, MachineRequestStatusSpec, MachineRequestStatuses};
use omni_infra_provider::omni::wire::{cosi, specs};
use omni_infra_provider::omni::{OmniErrorKind, Resource, state};
use omni_infra_provider::sandbox::omni::Stored;
use omni_infra_provider::sandbox::omni::types::{INFRA, MACHINE_REQUEST_STATUSES, MACHINE_REQUESTS};
use tokio::time::{sleep, timeout};

/// Makes a test of each scenario for each server. A number is how many changes the server keeps of a type.
macro_rules! on_both {
    ($($scenario:ident $(: $history:literal)?),* $(,)?) => {
        mod upstream {
            $(crate::cosi::on_both!(@test Upstream $scenario $($history)?);)*
        }
        mod embedded {
            $(crate::cosi::on_both!(@test Embedded $scenario $($history)?);)*
        }
    };
    (@test $server:ident $scenario:ident $($history:literal)?) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $scenario() {
            use crate::cosi::server::{HISTORY, $server, Server as _};
            let history = [HISTORY $(, $history)?];
            if let Some(server) = $server::start(history[history.len() - 1]).await {
                super::$scenario(server).await;
            }
        }
    };
}
use on_both;

mod calls;
mod server;
mod signatures;
mod stores;
mod watches;
mod words;

use server::{OWNER, PROVIDER};

/// Longer than anything here takes: a guard against hanging, and no measure.
const PATIENCE: Duration = Duration::from_secs(120);

async fn within<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, wait).await {
        Ok(result) => result,
        Err(_) => panic!("never: {what}"),
    }
}

/// Waits for a condition, bounded; `look` says what was last seen.
async fn until<T: Debug>(what: &str, mut look: impl FnMut() -> Result<(), T>) {
    let waiting = async {
        while look().is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(PATIENCE, waiting).await.is_err() {
        panic!("never: {what}; last seen: {:?}", look().err());
    }
}

/// The meaning of a refusal.
#[track_caller]
fn refusal<T: Debug>(result: state::Result<T>) -> OmniErrorKind {
    result.unwrap_err().kind
}

/// A status of ours, not yet stored.
fn status(id: &str) -> Resource<MachineRequestStatuses> {
    let mut status = Resource::new(id, MachineRequestStatusSpec::default());
    status.metadata.owner = OWNER.to_owned();
    status
}

/// The same, as a server stores it.
fn stored_status(id: &str) -> Stored {
    Stored::new(INFRA, MACHINE_REQUEST_STATUSES, id)
        .owner(OWNER)
        .label(LABEL_PROVIDER, PROVIDER)
}

/// A machine request, as a server stores it.
fn stored_request(id: &str) -> Stored {
    Stored::new(INFRA, MACHINE_REQUESTS, id)
        .label(LABEL_PROVIDER, PROVIDER)
        .spec(&specs::MachineRequestSpec {
            talos_version: "1.12.0".to_owned(),
            ..specs::MachineRequestSpec::default()
        })
}

/// A type of our provider's own: the server knows nothing of it.
const OWN_NAMESPACE: &str = "infra-provider:test";
const OWN_TYPE: &str = "Machine.test.infraprovider.sidero.dev";

/// A resource of it, for the wire.
fn own(id: &str, labels: &[(&str, &str)]) -> cosi::Resource {
    cosi::Resource {
        metadata: Some(cosi::Metadata {
            namespace: OWN_NAMESPACE.to_owned(),
            r#type: OWN_TYPE.to_owned(),
            id: id.to_owned(),
            version: "undefined".to_owned(),
            phase: "running".to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..cosi::Metadata::default()
        }),
        spec: Some(cosi::Spec::default()),
    }
}

/// The same, as a server stores it.
fn stored_own(id: &str) -> Stored {
    Stored::new(OWN_NAMESPACE, OWN_TYPE, id)
}

fn set<S: FromIterator<String>>(words: &[&str]) -> S {
    words.iter().map(|word| (*word).to_owned()).collect()
}
