//! The embedded default: an Omni, an Oxide API and an image factory in one process, on real wires, on
//! loopback.
//!
//! [`Sandbox::open`] takes the ports and furnishes the place: a provider with a key, a machine request set, a
//! project with a network, a token. [`Sandbox::serve`] runs it all and carries news from the rack to Omni:
//! what boots there reads its user data and joins.
//!
//! *Guarantees*: it binds 127.0.0.1 and nothing else; dropping [`Sandbox::serve`] ends every server and
//! connection.
//!
//! *Not here*: what a person sees of it ([`demo`], `cli/sandbox.rs`).

mod admin;
pub mod demo;
pub mod factory;
mod line;
pub mod omni;
pub mod oxide;
pub mod view;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

use self::factory::{Factory, FactoryOptions};
use self::omni::{Delays, Impossible, Omni, OmniOptions};
use self::oxide::{Happening, OxideApi, OxideOptions, Refusal};
use crate::omni::kinds::MachineRequestSpec;
use crate::secret::Secret;

/// The project on the rack that requests name.
pub const PROJECT: &str = "talos";
/// The machine request set that is there from the start.
pub const SET: &str = "workers";
/// What its machines run: the oldest Talos that a provider has to serve.
const TALOS_VERSION: &str = "1.12.0";

/// What the set's machines are made of, as a user would write it into a machine class.
pub const PROVIDER_DATA: &str = "\
project: talos
cpus: 2
memory: 8
boot_disk_size: 10
disks:
  - type: distributed
    size: 20
network_interfaces:
  - ip_config: v4
    vpc_name: default
    subnet_name: default
";

/// Ports of the four servers; 0 is any free one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Omni.
    pub omni: u16,
    /// The Oxide API.
    pub oxide: u16,
    /// The image factory.
    pub factory: u16,
    /// Scaling and status.
    pub admin: u16,
}

impl Ports {
    /// Any free ones.
    pub const FREE: Self = Self {
        omni: 0,
        oxide: 0,
        factory: 0,
        admin: 0,
    };
}

impl Default for Ports {
    /// Known ones, far from what Omni, Talos and their friends use themselves.
    fn default() -> Self {
        Self {
            omni: 17080,
            oxide: 17081,
            factory: 17082,
            admin: 17083,
        }
    }
}

/// What the sandbox is to be.
#[derive(Debug, Clone)]
pub struct SandboxOptions {
    /// Where it listens.
    pub ports: Ports,
    /// The provider ID that the key is for.
    pub provider: String,
    /// Machines in the set at the start.
    pub machines: u32,
    /// No Omni: an Oxide and a factory beside a real one.
    pub only_oxide: bool,
    /// The rack.
    pub oxide: OxideOptions,
    /// The factory.
    pub factory: FactoryOptions,
}

impl Default for SandboxOptions {
    fn default() -> Self {
        Self {
            ports: Ports::default(),
            provider: "oxide".to_owned(),
            machines: 0,
            only_oxide: false,
            oxide: OxideOptions::default(),
            factory: FactoryOptions::default(),
        }
    }
}

/// Why the sandbox could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A port is taken, or not ours to take.
    #[error("cannot listen on 127.0.0.1:{port} for {what}")]
    Port {
        /// Which server.
        what: &'static str,
        /// The port.
        port: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The embedded Omni refused its provider.
    #[error("the embedded Omni refused: {0}")]
    Omni(Impossible),
    /// The rack refused its furniture.
    #[error("the sandbox's rack refused: {0}")]
    Oxide(Refusal),
}

/// The sandbox: handles to what is in it. Clones share it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The embedded Omni, unless there is only Oxide.
    pub omni: Option<Omni>,
    /// The rack.
    pub oxide: OxideApi,
    /// The image factory.
    pub factory: Factory,
    /// The provider ID that the key is for.
    pub provider: String,
    key: Secret,
    token: Secret,
    addresses: Addresses,
}

#[derive(Debug, Clone, Copy)]
struct Addresses {
    omni: Option<SocketAddr>,
    oxide: SocketAddr,
    factory: SocketAddr,
    admin: SocketAddr,
}

/// The bound sockets of a sandbox that does not serve yet.
#[derive(Debug)]
pub struct Doors {
    omni: Option<TcpListener>,
    oxide: TcpListener,
    factory: TcpListener,
    admin: TcpListener,
}

async fn bind(what: &'static str, port: u16) -> Result<(TcpListener, SocketAddr), SandboxError> {
    let failed = |source| SandboxError::Port { what, port, source };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .await
        .map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

impl Sandbox {
    /// Takes the ports and furnishes the sandbox.
    ///
    /// # Errors
    /// When a port cannot be had, or the provider ID is not one.
    pub async fn open(options: &SandboxOptions) -> Result<(Self, Doors), SandboxError> {
        let (oxide_door, oxide_at) = bind("Oxide", options.ports.oxide).await?;
        let (factory_door, factory_at) = bind("the image factory", options.ports.factory).await?;
        let (admin_door, admin_at) = bind("scaling and status", options.ports.admin).await?;

        let oxide = OxideApi::new(options.oxide.clone());
        // With it come a VPC and a subnet, both called `default`.
        oxide.add_project(PROJECT).map_err(SandboxError::Oxide)?;
        let factory = Factory::new(options.factory.clone());

        let (mut omni, mut omni_door, mut omni_at) = (None, None, None);
        let mut key = Secret::default();
        if !options.only_oxide {
            let (door, at) = bind("Omni", options.ports.omni).await?;
            (omni_door, omni_at) = (Some(door), Some(at));
            let embedded = Omni::new(OmniOptions {
                image_factory_base_url: format!("http://{factory_at}"),
                delays: Delays {
                    // The rack takes its own time to boot a machine.
                    join: Duration::from_millis(300),
                    ..Delays::default()
                },
                ..OmniOptions::default()
            });
            key = embedded
                .add_provider(&options.provider)
                .map_err(SandboxError::Omni)?;
            let schematics = embedded.clone();
            // As with a real Omni, schematics are registered with Omni and downloaded from its factory.
            factory.also_knows(move |id| schematics.schematic(id).is_some());
            omni = Some(embedded);
        }
        let sandbox = Self {
            omni,
            oxide,
            factory,
            provider: options.provider.clone(),
            key,
            token: Secret::new(options.oxide.token.clone()),
            addresses: Addresses {
                omni: omni_at,
                oxide: oxide_at,
                factory: factory_at,
                admin: admin_at,
            },
        };
        sandbox.scale(SET, options.machines);
        let doors = Doors {
            omni: omni_door,
            oxide: oxide_door,
            factory: factory_door,
            admin: admin_door,
        };
        Ok((sandbox, doors))
    }

    /// Runs the sandbox until the future is dropped.
    ///
    /// # Errors
    /// When one of its servers ends, which none does by itself.
    pub async fn serve(&self, doors: Doors) -> io::Result<()> {
        let omni = async {
            match (&self.omni, doors.omni) {
                (Some(omni), Some(listener)) => {
                    let connections = TcpListenerStream::new(listener).map(|accepted| {
                        let stream = accepted?;
                        // gRPC's small frames would each wait for the other side's delayed acknowledgement.
                        stream.set_nodelay(true)?;
                        Ok(stream)
                    });
                    omni.serve(connections).await;
                    Err::<(), _>(io::Error::other("the embedded Omni ended"))
                }
                _ => std::future::pending().await,
            }
        };
        tokio::try_join!(
            omni,
            self.oxide.serve(doors.oxide),
            self.factory.serve(doors.factory),
            admin::serve(self.clone(), doors.admin),
            self.carry_news(),
        )?;
        Ok(())
    }

    /// Tells Omni what its machines would: that they booted, and with which join config; that they went down.
    async fn carry_news(&self) -> io::Result<()> {
        let mut happenings = self.oxide.happenings();
        while let Some(happening) = happenings.recv().await {
            let Some(omni) = &self.omni else {
                continue;
            };
            match happening {
                Happening::Booted { id, user_data } => omni.machine_booted(&id.to_string(), &user_data),
                Happening::Stopped { id } => omni.machine_stopped(&id.to_string()),
                Happening::Gone { id } => omni.machine_gone(&id.to_string()),
            }
        }
        Ok(())
    }

    /// Sets how many machines a set has, and makes the set if there is none of that name. Without an Omni it
    /// does nothing.
    pub fn scale(&self, set: &str, machines: u32) {
        let Some(omni) = &self.omni else {
            return;
        };
        if omni.scale(set, machines).is_err() {
            let template = MachineRequestSpec {
                talos_version: TALOS_VERSION.to_owned(),
                provider_data: PROVIDER_DATA.to_owned(),
                ..MachineRequestSpec::default()
            };
            omni.create_request_set(set, &self.provider, machines, &template);
        }
    }

    /// What a user of the daemon would export. The second is a secret of this sandbox, and of no other.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, Secret)> {
        let url = |address: SocketAddr| Secret::new(format!("http://{address}"));
        let mut variables = Vec::new();
        if let Some(omni) = self.addresses.omni {
            variables.push(("OMNI_ENDPOINT", url(omni)));
            variables.push(("OMNI_SERVICE_ACCOUNT_KEY", self.key.clone()));
        }
        variables.push(("OXIDE_HOST", url(self.addresses.oxide)));
        variables.push(("OXIDE_TOKEN", self.token.clone()));
        if self.omni.is_some() && self.provider != "oxide" {
            variables.push(("PROVIDER_ID", Secret::new(self.provider.clone())));
        }
        variables
    }

    /// Where the image factory is: for a real Omni also its Kubernetes registry.
    #[must_use]
    pub fn factory_address(&self) -> SocketAddr {
        self.addresses.factory
    }

    /// Where the sandbox can be scaled.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.addresses.admin
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::json;
    use tokio::task::JoinSet;

    use super::omni::types;
    use super::*;
    use crate::omni::wire::specs;

    async fn start(options: SandboxOptions) -> (Sandbox, JoinSet<io::Result<()>>) {
        let (sandbox, doors) = Sandbox::open(&SandboxOptions {
            ports: Ports::FREE,
            ..options
        })
        .await
        .unwrap();
        let mut servers = JoinSet::new();
        let served = sandbox.clone();
        servers.spawn(async move { served.serve(doors).await });
        (sandbox, servers)
    }

    async fn post(url: String, body: String) -> (u16, String) {
        let client = reqwest::Client::new();
        let sent = client
            .post(url)
            .header("authorization", "Bearer oxide-token-sandbox");
        let answer = sent.body(body).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    #[tokio::test]
    async fn what_boots_on_the_rack_links_to_omni() {
        let (sandbox, _servers) = start(SandboxOptions::default()).await;
        let omni = sandbox.omni.clone().unwrap();
        let config = omni
            .get_raw(types::INFRA, types::PROVIDER_JOIN_CONFIGS, "oxide")
            .unwrap();
        let config: specs::ProviderJoinConfigSpec = config.decode();
        let body = json!({
            "name": "web-1",
            "hostname": "web-1",
            "description": "",
            "ncpus": 1,
            "memory": 1_u64 << 30,
            "ssh_public_keys": [],
            "user_data": STANDARD.encode(config.config.unwrap().config),
            "start": true,
        });
        let oxide = sandbox.addresses.oxide;
        let (status, made) = post(
            format!("http://{oxide}/v1/instances?project=talos"),
            body.to_string(),
        )
        .await;
        assert_eq!(status, 201, "{made}");
        let id = sandbox.oxide.instances(PROJECT)[0].id.to_string();
        // No request of ours: Omni lets it in, and does not accept it.
        let linked = omni.until(|omni| omni.get_raw(types::DEFAULT, types::LINKS, &id));
        let linked = tokio::time::timeout(Duration::from_secs(20), linked).await;
        assert!(linked.is_ok(), "{:?}", omni.refused_joins());
        assert!(!view::rows(&sandbox)[0].joined);
    }

    #[tokio::test]
    async fn a_running_sandbox_is_scaled_and_shown() {
        let (sandbox, _servers) = start(SandboxOptions {
            machines: 1,
            ..SandboxOptions::default()
        })
        .await;
        let omni = sandbox.omni.clone().unwrap();
        let requests = |wanted: usize| {
            let omni = omni.clone();
            async move {
                let there = omni.until(|omni| {
                    let found = omni.list_raw(types::INFRA, types::MACHINE_REQUESTS).len();
                    (found == wanted).then_some(())
                });
                tokio::time::timeout(Duration::from_secs(20), there)
                    .await
                    .unwrap();
            }
        };
        requests(1).await;
        let admin = sandbox.admin_address();
        let scale = |query: &str| post(format!("http://{admin}/scale?{query}"), String::new());
        assert_eq!(
            scale("set=workers&machines=2").await,
            (200, "workers has 2 machines now".to_owned())
        );
        requests(2).await;
        assert_eq!(scale("set=others&machines=1").await.0, 200);
        requests(3).await;
        assert_eq!(scale("set=No%20name&machines=1").await.0, 400);
        assert_eq!(scale("set=workers&machines=5000").await.0, 400);
        let status = reqwest::get(format!("http://{admin}/status")).await.unwrap();
        let status = status.text().await.unwrap();
        assert!(
            status.starts_with("REQUEST") && status.lines().count() == 6,
            "{status}"
        );
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let (first, _doors) = Sandbox::open(&SandboxOptions {
            ports: Ports::FREE,
            ..SandboxOptions::default()
        })
        .await
        .unwrap();
        let port = first.factory_address().port();
        let options = SandboxOptions {
            ports: Ports {
                factory: port,
                ..Ports::FREE
            },
            ..SandboxOptions::default()
        };
        let error = Sandbox::open(&options).await.unwrap_err().to_string();
        assert_eq!(
            error,
            format!("cannot listen on 127.0.0.1:{port} for the image factory")
        );
    }

    #[tokio::test]
    async fn without_an_omni_there_is_nothing_to_scale() {
        let (sandbox, _servers) = start(SandboxOptions {
            only_oxide: true,
            ..SandboxOptions::default()
        })
        .await;
        let names: Vec<_> = sandbox.environment().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["OXIDE_HOST", "OXIDE_TOKEN"]);
        let url = format!("http://{}/scale?set=workers&machines=1", sandbox.admin_address());
        assert_eq!(post(url, String::new()).await.0, 400);
    }

    #[test]
    fn the_sets_provider_data_is_a_valid_class() {
        let value: serde_json::Value = serde_saphyr::from_str(PROVIDER_DATA).unwrap();
        serde_json::from_value::<crate::backends::oxide::OxideClass>(value).unwrap();
    }
}
