//! The two servers that one suite runs against: upstream's in a process of its own, and our embedded Omni.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use omni_infra_provider::omni::wire::cosi::state_client::StateClient;
use omni_infra_provider::omni::{Dial, Omni, Phase, Settings, Signer};
use omni_infra_provider::sandbox::omni::{self as sandbox, Clock, Delays, OmniOptions, Stored};
use omni_infra_provider::secret::Secret;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::support::peer::{self, Peer};

/// Our provider ID.
pub(super) const PROVIDER: &str = "test";

/// The owner that the Go library would be of what it writes for this provider.
pub(super) const OWNER: &str = "test.ProvisionController";

/// How many changes upstream's state keeps of a type unless it is told otherwise.
pub(super) const HISTORY: usize = 100;

/// The service account key of an hour's work: `omnictl` makes them good for a year.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    pub(super) lifetime: Duration,
    /// How long ago it was made.
    pub(super) age: Duration,
    /// Whether the server knows it.
    pub(super) known: bool,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_hours(8760),
            age: Duration::ZERO,
            known: true,
        }
    }
}

/// A server of COSI state on a loopback port, as the tests see it. What is put, destroyed and ordered needs no
/// signature and works whether it listens or not: it is Omni's own doing.
pub(super) trait Server: Sized {
    /// An empty server that listens; `None` where it cannot be had. It keeps so many changes of a type.
    async fn start(history: usize) -> Option<Self>;

    /// Where it listens; the same after it went away and came back.
    fn endpoint(&self) -> String;

    /// A key of our provider's.
    async fn key(&mut self, order: Order) -> Secret;

    /// Creates the resources, or replaces what there is, whoever owns it.
    async fn put(&mut self, resources: &[Stored]);

    /// Ends the resources, whatever holds them.
    async fn destroy(&mut self, resources: &[Stored]);

    /// Breaks all connections and refuses new ones. The state lives on.
    async fn hang_up(&mut self);

    /// Dies without a word. What was stored is kept, what only was in memory is not.
    async fn crash(&mut self);

    /// Listens again, after [`Server::hang_up`] or [`Server::crash`].
    async fn listen(&mut self);

    /// A client with a good key.
    async fn client(&mut self) -> Omni {
        let key = self.key(Order::default()).await;
        self.login(&key)
    }

    /// A client with that key.
    fn login(&self, key: &Secret) -> Omni {
        let settings = Settings {
            endpoint: self.endpoint(),
            key: key.clone(),
            provider_id: PROVIDER.to_owned(),
            ca_bundle: None,
            insecure: false,
        };
        Omni::new(&settings, Dial::Tcp).unwrap()
    }

    /// A bare client: what it sends and gets is the wire's.
    async fn wire(&mut self) -> Wire<Signer> {
        let signer = self.client().await.signer;
        self.wire_with(signer)
    }

    /// A bare client with another way to sign.
    fn wire_with<I: Interceptor>(&self, interceptor: I) -> Wire<I> {
        let channel = Endpoint::new(self.endpoint()).unwrap().connect_lazy();
        StateClient::with_interceptor(channel, interceptor).max_decoding_message_size(64 << 20)
    }
}

pub(super) type Wire<I> = StateClient<InterceptedService<Channel, I>>;

/// Upstream's server.
pub(super) struct Upstream {
    peer: Peer,
    program: std::path::PathBuf,
    address: String,
    history: usize,
    /// Keys that the server knows; the next process has to be told.
    trusted: Vec<String>,
    folder: tempfile::TempDir,
}

impl Upstream {
    fn spawn(program: &std::path::Path, folder: &std::path::Path, history: usize) -> Peer {
        let store = folder.join("state.bolt");
        Peer::start(
            program,
            &[
                "--store".as_ref(),
                store.as_os_str(),
                "--history".as_ref(),
                history.to_string().as_ref(),
            ],
        )
    }

    async fn tell(&mut self, what: &str, resources: Vec<Value>) {
        // A line at a time: neither side has to hold ten thousand.
        for resources in resources.chunks(100) {
            self.peer
                .ask(&json!({ "do": what, "resources": resources }))
                .await;
        }
    }

    /// Creates a resource from the fields of upstream's own type.
    pub(super) async fn put_fields(&mut self, namespace: &str, kind: &str, id: &str, fields: Value) {
        let mut resource = text(&Stored::new(namespace, kind, id));
        resource["labels"] = json!({ sandbox::types::LABEL_PROVIDER: PROVIDER });
        resource["fields"] = fields;
        self.tell("put", vec![resource]).await;
    }
}

/// A resource as upstream's server takes it in a command.
fn text(resource: &Stored) -> Value {
    json!({
        "namespace": resource.namespace,
        "type": resource.kind,
        "id": resource.id,
        "owner": resource.owner,
        "phase": match resource.phase {
            Phase::Running => "running",
            Phase::TearingDown => "tearingDown",
        },
        "finalizers": resource.finalizers,
        "labels": resource.labels,
        "annotations": resource.annotations,
        "spec": STANDARD.encode(&resource.spec),
    })
}

impl Server for Upstream {
    async fn start(history: usize) -> Option<Self> {
        let program = peer::build("cosi-server")?;
        let folder = tempfile::tempdir().unwrap();
        let mut server = Self {
            peer: Self::spawn(&program, folder.path(), history),
            program,
            address: own_address().to_string(),
            history,
            trusted: Vec::new(),
            folder,
        };
        server.listen().await;
        Some(server)
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn key(&mut self, order: Order) -> Secret {
        let answer = self
            .peer
            .ask(&json!({
                "do": "key",
                "account": format!("infra-provider:{PROVIDER}"),
                "lifetime": format!("{}s", order.lifetime.as_secs()),
                "age": format!("{}s", order.age.as_secs()),
            }))
            .await;
        let key = answer["key"].as_str().unwrap().to_owned();
        if order.known {
            self.peer.ask(&json!({ "do": "trust", "key": key })).await;
            self.trusted.push(key.clone());
        }
        Secret::new(key)
    }

    async fn put(&mut self, resources: &[Stored]) {
        self.tell("put", resources.iter().map(text).collect()).await;
    }

    async fn destroy(&mut self, resources: &[Stored]) {
        self.tell("destroy", resources.iter().map(text).collect()).await;
    }

    async fn hang_up(&mut self) {
        self.peer.ask(&json!({ "do": "hang up" })).await;
    }

    async fn crash(&mut self) {
        self.peer.kill().await;
        self.peer = Self::spawn(&self.program, self.folder.path(), self.history);
        for key in &self.trusted {
            self.peer.ask(&json!({ "do": "trust", "key": key })).await;
        }
    }

    async fn listen(&mut self) {
        let answer = self
            .peer
            .ask(&json!({ "do": "listen", "address": self.address }))
            .await;
        self.address = answer["address"].as_str().unwrap().to_owned();
    }
}

/// An address of its own for each server: while it is gone nobody else, not even a client by accident, gets its port.
fn own_address() -> SocketAddr {
    let [a, b] = rand::random::<[u8; 2]>();
    SocketAddr::from(([127, a | 1, b, 1], 0))
}

/// Our embedded Omni, without its controllers: what it does then is what COSI does.
pub(super) struct Embedded {
    omni: sandbox::Omni,
    address: SocketAddr,
    /// Takes the connections to the run of this moment.
    connections: Option<UnboundedSender<TcpStream>>,
    serving: JoinSet<()>,
    listening: JoinSet<()>,
}

impl Embedded {
    fn serve(&mut self) {
        let (sender, mut receiver) = unbounded_channel();
        self.connections = Some(sender);
        let accepted = stream::poll_fn(move |context| {
            receiver
                .poll_recv(context)
                .map(|stream| stream.map(std::io::Result::Ok))
        });
        self.serving.spawn(self.omni.serve(accepted));
    }
}

impl Server for Embedded {
    async fn start(history: usize) -> Option<Self> {
        let never = Duration::from_hours(1000);
        let omni = sandbox::Omni::new(OmniOptions {
            history,
            delays: Delays {
                request_finalizer: never,
                request_end: never,
                status_finalizer: never,
                react: never,
                drain: never,
                join: never,
                link_end: never,
            },
            ..OmniOptions::default()
        });
        omni.add_provider(PROVIDER).unwrap();
        let mut server = Self {
            omni,
            address: own_address(),
            connections: None,
            serving: JoinSet::new(),
            listening: JoinSet::new(),
        };
        server.listen().await;
        Some(server)
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn key(&mut self, order: Order) -> Secret {
        if !order.known {
            let stranger = sandbox::Omni::default();
            return stranger.add_provider(PROVIDER).unwrap();
        }
        let clock = |age| Clock::new(move || SystemTime::now() - age);
        self.omni.configure(|options| options.clock = clock(order.age));
        let key = self.omni.renew_key(PROVIDER, order.lifetime).unwrap();
        self.omni.configure(|options| options.clock = Clock::default());
        key
    }

    async fn put(&mut self, resources: &[Stored]) {
        for new in resources {
            let (namespace, kind, id) = (&new.namespace, &new.kind, &new.id);
            let replaced = self.omni.modify_raw(namespace, kind, id, |stored| {
                stored.owner.clone_from(&new.owner);
                stored.phase = new.phase;
                stored.finalizers.clone_from(&new.finalizers);
                stored.labels.clone_from(&new.labels);
                stored.annotations.clone_from(&new.annotations);
                stored.spec = new.spec.clone();
            });
            if replaced.is_err() {
                self.omni.put_raw(new.clone());
            }
        }
    }

    async fn destroy(&mut self, resources: &[Stored]) {
        for gone in resources {
            self.omni
                .force_destroy(&gone.namespace, &gone.kind, &gone.id)
                .unwrap();
        }
    }

    async fn hang_up(&mut self) {
        self.listening.shutdown().await;
        self.omni.break_connections();
    }

    async fn crash(&mut self) {
        self.listening.shutdown().await;
        self.serving.shutdown().await;
        self.connections = None;
    }

    async fn listen(&mut self) {
        if self.connections.is_none() {
            self.serve();
        }
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let connections = self.connections.clone().unwrap();
        self.listening.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if connections.send(stream).is_err() {
                    return;
                }
            }
        });
    }
}
