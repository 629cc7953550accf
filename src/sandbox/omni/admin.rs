//! What people and machines do to Omni: providers and keys, request sets, teardowns by hand, machines that
//! boot and die.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;

use super::store::Store;
use super::{Impossible, Inner, Machine, Omni, Role, Stored, controllers, join, signature, types};
use crate::omni::kinds::{GrpcTunnel, MachineRequestSpec};
use crate::omni::wire::specs;
use crate::secret::Secret;

/// How long `omnictl` makes keys valid, whatever it is told (watched on Omni 1.10.4).
pub const KEY_LIFETIME: Duration = Duration::from_hours(8760);

/// Everything that etcd keeps, at one moment.
#[derive(Debug, Clone)]
pub struct Backup(Store);

/// Providers and keys.
impl Omni {
    /// Creates a provider as `omnictl infraprovider create` does, and returns the text of its service account
    /// key, valid for [`KEY_LIFETIME`].
    ///
    /// # Errors
    ///
    /// The provider exists, or its ID is not a DNS label.
    pub fn add_provider(&self, id: &str) -> Result<Secret, Impossible> {
        let label = (1..=63).contains(&id.len())
            && id
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !id.starts_with('-')
            && !id.ends_with('-');
        if !label {
            return Err(Impossible(format!("{id:?} is not a DNS label")));
        }
        self.with(|inner| {
            if inner
                .store
                .get(types::INFRA, types::INFRA_PROVIDERS, id)
                .is_some()
            {
                return Err(Impossible(format!("provider {id} exists")));
            }
            let now = inner.now();
            inner
                .store
                .put(Stored::new(types::INFRA, types::INFRA_PROVIDERS, id), now);
            new_join_token(inner, id);
            add_key(
                inner,
                &format!("infra-provider:{id}"),
                Role::InfraProvider,
                KEY_LIFETIME,
            )
        })
    }

    /// Adds another key to a provider's account, as `omnictl infraprovider renewkey` does; the older ones
    /// stay valid.
    ///
    /// # Errors
    ///
    /// There is no such provider.
    pub fn renew_key(&self, id: &str, lifetime: Duration) -> Result<Secret, Impossible> {
        self.with(|inner| {
            if inner
                .store
                .get(types::INFRA, types::INFRA_PROVIDERS, id)
                .is_none()
            {
                return Err(Impossible(format!("there is no provider {id}")));
            }
            add_key(
                inner,
                &format!("infra-provider:{id}"),
                Role::InfraProvider,
                lifetime,
            )
        })
    }

    /// Adds an ordinary service account, to see what a daemon does with the wrong key.
    ///
    /// # Errors
    ///
    /// The key could not be made.
    pub fn add_service_account(&self, name: &str, role: Role) -> Result<Secret, Impossible> {
        self.with(|inner| add_key(inner, name, role, KEY_LIFETIME))
    }

    /// Takes all keys from a provider's account. Open watches stay open.
    pub fn revoke_keys(&self, id: &str) {
        let identity = signature::identity(&format!("infra-provider:{id}"));
        self.with(|inner| inner.keys.retain(|_, key| key.identity != identity));
    }

    /// Gives a provider a new join token; machines with the old one may not join any more.
    pub fn rotate_join_token(&self, id: &str) {
        self.with(|inner| new_join_token(inner, id));
    }

    /// Begins to delete a provider, with all that Omni does then.
    ///
    /// # Errors
    ///
    /// There is no such provider, or it has machines.
    pub fn delete_provider(&self, id: &str) -> Result<(), Impossible> {
        self.with(|inner| {
            let machines = inner
                .store
                .list(types::DEFAULT, types::MACHINES)
                .iter()
                .filter(|machine| machine.get_label(types::LABEL_PROVIDER) == Some(id))
                .count();
            if machines > 0 {
                return Err(Impossible(format!("provider {id} has {machines} machines")));
            }
            if controllers::tear_down(inner, types::INFRA, types::INFRA_PROVIDERS, id) {
                Ok(())
            } else {
                Err(Impossible(format!("there is no provider {id}")))
            }
        })
    }
}

fn add_key(inner: &mut Inner, account: &str, role: Role, lifetime: Duration) -> Result<Secret, Impossible> {
    let (text, fingerprint, key) = signature::generate(account, role, inner.now(), lifetime)
        .map_err(|error| Impossible(format!("no key for {account}: {error}")))?;
    inner.keys.insert(fingerprint, Arc::new(key));
    Ok(Secret::new(text))
}

fn new_join_token(inner: &mut Inner, provider: &str) {
    const LETTERS: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    // As long as Omni's: 32 random bytes in base 62.
    let token: String = (0..43)
        .filter_map(|_| LETTERS.get(inner.rng.gen_range(0..LETTERS.len())))
        .map(|letter| char::from(*letter))
        .collect();
    inner.put_join_config(provider, &token);
}

/// Requests and sets of them.
impl Omni {
    /// Creates a set of machine requests, as an operator does; replaces its template and count if it exists.
    /// Overlays are a request's alone and are ignored.
    pub fn create_request_set(&self, id: &str, provider: &str, count: u32, template: &MachineRequestSpec) {
        let request = to_wire(template);
        let spec = specs::MachineRequestSetSpec {
            provider_id: provider.to_owned(),
            machine_count: i32::try_from(count).unwrap_or(i32::MAX),
            talos_version: request.talos_version,
            extensions: request.extensions,
            kernel_args: request.kernel_args,
            meta_values: request.meta_values,
            provider_data: request.provider_data,
            grpc_tunnel: request.grpc_tunnel,
        };
        self.with(|inner| {
            let now = inner.now();
            inner.store.put(
                Stored::new(types::DEFAULT, types::MACHINE_REQUEST_SETS, id).spec(&spec),
                now,
            );
        });
    }

    /// Sets how many machines a set has.
    ///
    /// # Errors
    ///
    /// There is no such set.
    pub fn scale(&self, id: &str, count: u32) -> Result<(), Impossible> {
        self.with(|inner| {
            let now = inner.now();
            let found = inner
                .store
                .modify(types::DEFAULT, types::MACHINE_REQUEST_SETS, id, now, |set| {
                    let mut spec: specs::MachineRequestSetSpec = set.decode();
                    spec.machine_count = i32::try_from(count).unwrap_or(i32::MAX);
                    set.spec = prost::Message::encode_to_vec(&spec).into();
                });
            exists(found, "request set", id)
        })
    }

    /// Tears a set down: its requests go first.
    ///
    /// # Errors
    ///
    /// There is no such set.
    pub fn delete_request_set(&self, id: &str) -> Result<(), Impossible> {
        self.with(|inner| {
            let found = controllers::tear_down(inner, types::DEFAULT, types::MACHINE_REQUEST_SETS, id);
            exists(found, "request set", id)
        })
    }

    /// Creates one machine request that belongs to no set.
    ///
    /// # Errors
    ///
    /// The request exists.
    pub fn create_request(
        &self,
        id: &str,
        provider: &str,
        request: &MachineRequestSpec,
    ) -> Result<(), Impossible> {
        let stored = Stored::new(types::INFRA, types::MACHINE_REQUESTS, id)
            .label(types::LABEL_PROVIDER, provider)
            .spec(&to_wire(request));
        self.with(|inner| {
            if inner
                .store
                .get(types::INFRA, types::MACHINE_REQUESTS, id)
                .is_some()
            {
                return Err(Impossible(format!("request {id} exists")));
            }
            inner.add_request(stored);
            Ok(())
        })
    }

    /// Tears one request down, as an operator may; its set makes another once it is gone.
    ///
    /// # Errors
    ///
    /// There is no such request.
    pub fn teardown_request(&self, id: &str) -> Result<(), Impossible> {
        self.with(|inner| {
            let found = controllers::tear_down(inner, types::INFRA, types::MACHINE_REQUESTS, id);
            exists(found, "request", id)
        })
    }

    /// Takes all finalizers but Omni's off a request, as Omni does when its provider is gone: if it is torn
    /// down, it vanishes under the provider.
    ///
    /// # Errors
    ///
    /// There is no such request.
    pub fn strip_request(&self, id: &str) -> Result<(), Impossible> {
        self.with(|inner| exists(controllers::strip(inner, id), "request", id))
    }

    /// Destroys a resource at once, whatever holds it: a request that vanishes with no teardown.
    ///
    /// # Errors
    ///
    /// There is no such resource.
    pub fn force_destroy(&self, namespace: &str, kind: &str, id: &str) -> Result<(), Impossible> {
        self.with(|inner| exists(inner.store.remove(namespace, kind, id), types::short(kind), id))
    }

    /// Stores a resource as it is, past all rules: what another program, an older version or an administrator
    /// left behind. Spec, labels and owner of what is there already are replaced.
    pub fn put_raw(&self, resource: Stored) {
        self.with(|inner| {
            let now = inner.now();
            inner.store.put(resource, now);
        });
    }

    /// Changes a stored resource past all rules.
    ///
    /// # Errors
    ///
    /// There is no such resource.
    pub fn modify_raw(
        &self,
        namespace: &str,
        kind: &str,
        id: &str,
        change: impl FnOnce(&mut Stored),
    ) -> Result<(), Impossible> {
        self.with(|inner| {
            let now = inner.now();
            let found = inner.store.modify(namespace, kind, id, now, change);
            exists(found, types::short(kind), id)
        })
    }
}

fn exists(found: bool, what: &str, id: &str) -> Result<(), Impossible> {
    if found {
        Ok(())
    } else {
        Err(Impossible(format!("there is no {what} {id}")))
    }
}

fn to_wire(request: &MachineRequestSpec) -> specs::MachineRequestSpec {
    specs::MachineRequestSpec {
        talos_version: request.talos_version.clone(),
        overlay: request
            .overlay
            .clone()
            .map(|(name, image)| specs::Overlay { name, image }),
        extensions: request.extensions.clone(),
        kernel_args: request.kernel_args.clone(),
        meta_values: request
            .meta_values
            .iter()
            .map(|(key, value)| specs::MetaValue {
                key: *key,
                value: value.clone(),
            })
            .collect(),
        provider_data: request.provider_data.clone(),
        grpc_tunnel: match request.grpc_tunnel {
            GrpcTunnel::Unset => specs::GrpcTunnelMode::Unset,
            GrpcTunnel::Enabled => specs::GrpcTunnelMode::Enabled,
            GrpcTunnel::Disabled => specs::GrpcTunnelMode::Disabled,
        }
        .into(),
    }
}

/// Machines. A cloud, or its fake, tells Omni what a machine would tell it over SideroLink.
impl Omni {
    /// An instance boots Talos with those documents as user data. If the token in them is valid it joins
    /// after a while ([`super::Delays::join`]), unless it goes down before; else [`Omni::refused_joins`] says
    /// why not.
    pub fn machine_booted(&self, uuid: &str, user_data: &[u8]) {
        self.booted(uuid, join::api_url_of_documents(user_data));
    }

    /// The same, for an instance whose join config is on its kernel command line.
    pub fn machine_booted_with_kernel_args(&self, uuid: &str, args: &str) {
        self.booted(uuid, join::api_url_of_kernel_args(args));
    }

    fn booted(&self, uuid: &str, api_url: Result<String, String>) {
        let uuid = uuid.to_ascii_lowercase();
        self.with(|inner| {
            inner.machines.insert(
                uuid.clone(),
                Machine {
                    running: true,
                    api_url,
                },
            );
            controllers::plan_join(inner, &uuid);
            inner.bump();
        });
    }

    /// An instance stopped; it may boot again.
    pub fn machine_stopped(&self, uuid: &str) {
        self.went_down(uuid, false);
    }

    /// An instance is gone for good.
    pub fn machine_gone(&self, uuid: &str) {
        self.went_down(uuid, true);
    }

    fn went_down(&self, uuid: &str, gone: bool) {
        let uuid = uuid.to_ascii_lowercase();
        self.with(|inner| controllers::went_down(inner, &uuid, gone));
    }

    /// Whether a machine of that UUID has joined and was accepted.
    #[must_use]
    pub fn is_joined(&self, uuid: &str) -> bool {
        self.get_raw(types::DEFAULT, types::MACHINES, &uuid.to_ascii_lowercase())
            .is_some()
    }
}

/// Trouble.
impl Omni {
    /// Everything that etcd keeps, to be restored later.
    #[must_use]
    pub fn backup(&self) -> Backup {
        self.with(|inner| Backup(inner.store.clone()))
    }

    /// Restores a backup: time turns back, and bookmarks of the lost time are of the future now. Open watches
    /// notice nothing.
    pub fn restore(&self, backup: &Backup) {
        self.with(|inner| {
            let lost = inner.store.revision().saturating_sub(backup.0.revision());
            inner.store = backup.0.clone();
            // The store's part of the ticker went back by as much.
            inner.bumps = inner.bumps.wrapping_add(lost);
            inner.drains.clear();
            inner.agenda.clear();
            controllers::rescan(inner);
            inner.bump();
        });
    }

    /// Forgets the log of changes: who resumes a watch from before gets ERRORED, or `invalid watch bookmark`.
    pub fn compact(&self) {
        self.with(|inner| inner.store.compact());
    }

    /// Ends all open watches with an error; connections stay.
    pub fn break_watches(&self) {
        self.with(|inner| {
            inner.watch_breaks = inner.watch_breaks.wrapping_add(1);
            inner.bump();
        });
    }

    /// Breaks all connections; Omni lives on and can be dialled at once.
    pub fn break_connections(&self) {
        self.with(|inner| {
            inner.connections.cancel();
            inner.connections = tokio_util::sync::CancellationToken::new();
        });
    }

    /// What a restart does to what Omni keeps in memory: heartbeats are gone, and bookmarks of them are
    /// invalid. [`Omni::run`] does it whenever it is not the first.
    pub fn restart_ephemeral(&self) {
        self.with(|inner| {
            inner.store.forget_memory();
            inner.publish_options();
            inner.bump();
        });
    }
}
