//! A stateful Oxide API on loopback: what a rack answers, remembers and refuses, on the `oxide` crate's own
//! types.
//!
//! It is a *fake*: it speaks the wire and keeps state, and its rules were read in nexus (each file names
//! where). Field names cannot drift, because every body is one of the vendor SDK's types.
//!
//! *Guarantees*: all state changes happen in one step under one lock. What takes time on a rack (a creation,
//! a start, a boot) is written on an agenda that [`OxideApi::serve`] acts on, by tokio's clock alone; a
//! caller that goes away does not stop it, as a saga of nexus is not stopped. Dropping `serve` ends every
//! connection.
//!
//! *Not here*: what a booted machine does, which is the sandbox's business ([`OxideApi::happenings`]).

mod answer;
mod content;
mod create;
mod disks;
mod front;
mod hook;
mod images;
mod instances;
mod options;
mod placement;
mod projects;
mod rack;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use oxide::types;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;

pub use answer::Refusal;
pub use hook::{Call, Happening, Hook, Moment, Verdict};
pub use options::{Limits, OxideOptions, OxidePace, Sled, SledFamily};
use rack::Rack;

use super::line;

/// The sandbox's rack: its API, and a door for tests. Clones share one rack.
#[derive(Clone)]
pub struct OxideApi(Arc<Mutex<Rack>>);

impl fmt::Debug for OxideApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OxideApi")
    }
}

impl OxideApi {
    /// An empty rack. Nothing is due on it until it is served.
    #[must_use]
    pub fn new(options: OxideOptions) -> Self {
        Self(Arc::new(Mutex::new(Rack::new(options))))
    }

    /// Serves the API, and lets time pass on the rack, until the future is dropped.
    ///
    /// # Errors
    /// When the listener cannot be served.
    pub async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let router = Router::new().fallback(front::answer).with_state(self.clone());
        tokio::select! {
            result = line::serve(listener, router) => result,
            () = self.let_time_pass() => Ok(()),
        }
    }

    async fn let_time_pass(&self) {
        loop {
            let (next, wake) = self.with(|rack| (rack.act(Instant::now()), rack.wake.clone()));
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = wake.notified() => {}
            }
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Rack) -> T) -> T {
        // A panic of a test inside the lock must not hide the rest of that test.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, operation: &'static str) -> Option<Hook> {
        self.with(|rack| {
            *rack.counts.entry(operation).or_default() += 1;
            rack.hook.clone()
        })
    }

    // Watching.

    /// Wakes at every change of the rack's state. The number only grows.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.with(|rack| rack.changed.subscribe())
    }

    /// What happens to instances from now on, in its order.
    #[must_use]
    pub fn happenings(&self) -> mpsc::UnboundedReceiver<Happening> {
        self.with(Rack::listen)
    }

    /// How often each operation was called, refused and interfered ones included.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.with(|rack| rack.counts.clone())
    }

    /// How often one operation was called.
    #[must_use]
    pub fn called(&self, operation: &str) -> u64 {
        self.with(|rack| rack.counts.get(operation).copied().unwrap_or_default())
    }

    /// Decides from now on what becomes of calls; `None` lets them all pass.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.with(|rack| rack.hook = hook);
    }

    // Looking.

    /// The instances of a project, by name.
    #[must_use]
    pub fn instances(&self, project: &str) -> Vec<types::Instance> {
        self.with(|rack| {
            let Some(project) = project_named(rack, project) else {
                return Vec::new();
            };
            let all = rack.instances.values().map(|it| it.view.clone());
            sorted(all.filter(|it| it.project_id == project), |it| {
                it.name.to_string()
            })
        })
    }

    /// The disks of a project, by name.
    #[must_use]
    pub fn disks(&self, project: &str) -> Vec<types::Disk> {
        self.with(|rack| {
            let Some(project) = project_named(rack, project) else {
                return Vec::new();
            };
            let all = rack.disks.values().map(|it| it.view.clone());
            sorted(all.filter(|it| it.project_id == project), |it| {
                it.name.to_string()
            })
        })
    }

    /// The snapshots of a project, by name.
    #[must_use]
    pub fn snapshots(&self, project: &str) -> Vec<types::Snapshot> {
        self.with(|rack| {
            let Some(project) = project_named(rack, project) else {
                return Vec::new();
            };
            let all = rack.snapshots.values().map(|it| it.view.clone());
            sorted(all.filter(|it| it.project_id == project), |it| {
                it.name.to_string()
            })
        })
    }

    /// The images of a project, by name; promoted ones belong to no project.
    #[must_use]
    pub fn images(&self, project: &str) -> Vec<types::Image> {
        self.with(|rack| {
            let Some(project) = project_named(rack, project) else {
                return Vec::new();
            };
            let all = rack.images.values().map(|it| it.view.clone());
            sorted(all.filter(|it| it.project_id == Some(project)), |it| {
                it.name.to_string()
            })
        })
    }

    /// The request body that made an instance.
    #[must_use]
    pub fn asked_for(&self, project: &str, instance: &str) -> Option<types::InstanceCreate> {
        self.look_at(project, instance, |it| it.asked.clone()).flatten()
    }

    /// The user data of an instance, decoded.
    #[must_use]
    pub fn user_data(&self, project: &str, instance: &str) -> Option<Vec<u8>> {
        self.look_at(project, instance, |it| it.user_data.clone())
    }

    /// The network interfaces of an instance.
    #[must_use]
    pub fn nics(&self, project: &str, instance: &str) -> Vec<types::InstanceNetworkInterface> {
        self.look_at(project, instance, |it| it.nics.clone())
            .unwrap_or_default()
    }

    fn look_at<T>(&self, project: &str, instance: &str, see: impl FnOnce(&rack::Instance) -> T) -> Option<T> {
        self.with(|rack| {
            let id = rack.instance_named(project_named(rack, project)?, instance)?;
            rack.instances.get(&id).map(see)
        })
    }

    /// The SHA-256, in hex, of the first `length` bytes of an image, with what nobody wrote as zeros. `None`
    /// without such an image, or once its content was larger than [`OxideOptions::kept_bytes`].
    #[must_use]
    pub fn image_sha256(&self, project: &str, image: &str, length: u64) -> Option<String> {
        self.with(|rack| {
            let id = rack.image_named(Some(project_named(rack, project)?), image)?;
            let content = rack.images.get(&id)?.content.clone();
            Some(content)
        })?
        .sha256(length)
    }

    /// How many bulk writes went into an image, repeated ones included.
    #[must_use]
    pub fn image_writes(&self, project: &str, image: &str) -> Option<u64> {
        self.with(|rack| {
            let id = rack.image_named(Some(project_named(rack, project)?), image)?;
            rack.images.get(&id).map(|image| image.content.writes)
        })
    }

    // Furnishing the rack.

    /// Makes a project, with a VPC `default` that has a subnet `default`.
    ///
    /// # Errors
    /// When the name is not one, or taken.
    pub fn add_project(&self, name: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| rack.add_project(Rack::name(name)?, "made by the sandbox".to_owned()))
    }

    /// Makes a VPC, without subnets.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one, or taken.
    pub fn add_vpc(&self, project: &str, name: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            rack.add_vpc(project, name)
        })
    }

    /// Makes a subnet in a VPC.
    ///
    /// # Errors
    /// When there is no such project or VPC, or the name is not one, or taken.
    pub fn add_subnet(&self, project: &str, vpc: &str, name: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            let vpc = rack
                .vpc_named(project, vpc)
                .ok_or_else(|| Refusal::not_found("vpc", &answer::Pick::Name(vpc.to_owned())))?;
            rack.add_subnet(vpc, name)
        })
    }

    /// Makes an anti-affinity group.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one.
    pub fn add_group(
        &self,
        project: &str,
        name: &str,
        policy: types::AffinityPolicy,
    ) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            rack.add_group(project, name, policy)
        })
    }

    /// Makes a floating IP.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one.
    pub fn add_floating_ip(&self, project: &str, name: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            rack.add_floating_ip(project, name)
        })
    }

    /// Makes a token valid, or valid again with everything visible.
    pub fn add_token(&self, token: &str, user: &str) {
        self.with(|rack| {
            let fresh = rack::Token {
                user: user.to_owned(),
                ..rack::Token::default()
            };
            rack.tokens.insert(token.to_owned(), fresh)
        });
    }

    /// Makes a token invalid: a 401 from now on.
    pub fn revoke_token(&self, token: &str) {
        self.with(|rack| rack.tokens.remove(token));
    }

    /// Takes a project out of a token's sight, or gives it back: a 404 for it and for everything in it.
    pub fn hide_project(&self, token: &str, project: &str, hidden: bool) {
        self.with(|rack| {
            let project = project_named(rack, project);
            if let (Some(project), Some(token)) = (project, rack.tokens.get_mut(token)) {
                if hidden {
                    token.hidden.insert(project);
                } else {
                    token.hidden.remove(&project);
                }
            }
        });
    }

    /// Changes room and quotas.
    pub fn set_limits(&self, change: impl FnOnce(&mut Limits)) {
        self.with(|rack| change(&mut rack.limits));
    }

    /// Changes how long things take from now on.
    pub fn set_pace(&self, change: impl FnOnce(&mut OxidePace)) {
        self.with(|rack| change(&mut rack.pace));
    }

    // Behind the daemon's back.

    /// Puts an instance there that nobody asked the API for: it runs, and has no disks.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one, or taken.
    pub fn plant_instance(&self, project: &str, name: &str, description: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            let id = rack.plant_instance(project, name, description)?;
            rack.touch();
            Ok(id)
        })
    }

    /// Puts a disk of 2 GiB there in any state.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one, or taken.
    pub fn plant_disk(
        &self,
        project: &str,
        name: &str,
        description: &str,
        state: types::DiskState,
    ) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            let id = rack.plant_disk(project, name, description)?;
            if let Some(disk) = rack.disks.get_mut(&id) {
                disk.view.state = state;
            }
            rack.touch();
            Ok(id)
        })
    }

    /// Puts an empty image there, as from a disk of 2 GiB.
    ///
    /// # Errors
    /// When there is no such project, or the name is not one, or taken.
    pub fn plant_image(&self, project: &str, name: &str, description: &str) -> Result<Uuid, Refusal> {
        self.with(|rack| {
            let project = project_of(rack, project)?;
            let id = rack.plant_image(project, name, description)?;
            rack.touch();
            Ok(id)
        })
    }

    /// Takes an instance away, with its disks or without, whatever it does. Says whether it was there.
    pub fn vanish_instance(&self, project: &str, name: &str, with_disks: bool) -> bool {
        self.meddle(project, name, |rack, id| {
            if with_disks {
                rack.disks.retain(|_, disk| !disks::belongs_to(&disk.view, id));
            }
            rack.remove_instance(id);
        })
    }

    /// Stops an instance, at the rack's pace. Says whether it was there.
    pub fn stop_instance(&self, project: &str, name: &str) -> bool {
        self.meddle(project, name, |rack, id| {
            // What cannot be stopped now is not; the test sees it in its state.
            let _ = rack.stop_instance(id);
        })
    }

    /// Starts an instance, if it can be started. Says whether it was there.
    pub fn start_instance(&self, project: &str, name: &str) -> bool {
        self.meddle(project, name, |rack, id| {
            let _ = rack.start_instance(id);
        })
    }

    /// Has an instance write to its serial console. Says whether it was there.
    pub fn write_console(&self, project: &str, name: &str, text: &str) -> bool {
        self.meddle(project, name, |rack, id| {
            if let Some(it) = rack.instances.get_mut(&id) {
                it.console.extend_from_slice(text.as_bytes());
            }
        })
    }

    /// Makes an instance `failed`. Says whether it was there.
    pub fn break_instance(&self, project: &str, name: &str) -> bool {
        self.meddle(project, name, Rack::fail_instance)
    }

    fn meddle(&self, project: &str, name: &str, act: impl FnOnce(&mut Rack, Uuid)) -> bool {
        self.with(|rack| {
            let found = project_named(rack, project).and_then(|project| rack.instance_named(project, name));
            if let Some(id) = found {
                act(rack, id);
                rack.touch();
            }
            found.is_some()
        })
    }

    /// Takes a disk away, whatever its state. Says whether it was there.
    pub fn vanish_disk(&self, project: &str, name: &str) -> bool {
        self.with(|rack| {
            let found = project_named(rack, project).and_then(|project| rack.disk_named(project, name));
            let removed = found.and_then(|id| rack.disks.remove(&id)).is_some();
            rack.touch();
            removed
        })
    }

    /// Puts a disk into another state. Says whether it was there.
    pub fn set_disk_state(&self, project: &str, name: &str, state: types::DiskState) -> bool {
        self.with(|rack| {
            let found = project_named(rack, project).and_then(|project| rack.disk_named(project, name));
            let disk = found.and_then(|id| rack.disks.get_mut(&id));
            let there = disk.map(|disk| disk.view.state = state).is_some();
            rack.touch();
            there
        })
    }

    /// Takes an image away. Says whether it was there.
    pub fn vanish_image(&self, project: &str, name: &str) -> bool {
        self.with(|rack| {
            let project = project_named(rack, project);
            let found = project.and_then(|project| rack.image_named(Some(project), name));
            let removed = found.and_then(|id| rack.images.remove(&id)).is_some();
            rack.touch();
            removed
        })
    }
}

fn project_named(rack: &Rack, name: &str) -> Option<Uuid> {
    rack.projects
        .values()
        .find(|it| it.name.as_str() == name)
        .map(|it| it.id)
}

fn project_of(rack: &Rack, name: &str) -> Result<Uuid, Refusal> {
    project_named(rack, name)
        .ok_or_else(|| Refusal::not_found("project", &answer::Pick::Name(name.to_owned())))
}

fn sorted<T>(items: impl Iterator<Item = T>, key: impl Fn(&T) -> String) -> Vec<T> {
    let mut items: Vec<_> = items.collect();
    items.sort_by_cached_key(key);
    items
}
