//! What the embedded Omni promises, asked over its own wire on a paused clock.

mod controllers;
mod faults;
mod rules;
mod signatures;
mod watches;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use pgp::composed::{Deserializable as _, DetachedSignature, SignedSecretKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::ser::Serialize as _;
use pgp::types::{KeyDetails as _, Password};
use prost::Message as _;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::*;
use crate::omni::kinds::MachineRequestSpec;
use crate::omni::wire::cosi::{self, EventType, state_client::StateClient};
use crate::omni::wire::management::management_service_client::ManagementServiceClient;
use crate::omni::wire::management::{BootAssetUrlRequest, CreateSchematicFromRawRequest};

const OWNER: &str = "test.ProvisionController";

/// An Omni that runs, and one provider's client of it.
struct World {
    omni: Omni,
    client: Client,
    run: JoinSet<()>,
}

#[derive(Clone)]
struct Client {
    key: Arc<SignedSecretKey>,
    name: String,
    provider: String,
    channel: Channel,
}

impl World {
    fn new() -> Self {
        Self::with(OmniOptions::default())
    }

    fn with(options: OmniOptions) -> Self {
        let omni = Omni::new(options);
        let key = omni.add_provider("test").unwrap();
        let client = Client::new(&omni, "test", key.expose());
        let mut world = Self {
            omni,
            client,
            run: JoinSet::new(),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        self.run.spawn(self.omni.run());
    }

    /// Drops the run as a crash would.
    async fn crash(&mut self) {
        self.run.shutdown().await;
    }

    async fn until<T>(&self, what: &str, look: impl FnMut(&Omni) -> Option<T>) -> T {
        timeout(Duration::from_secs(60), self.omni.until(look))
            .await
            .unwrap_or_else(|_| {
                panic!(
                    "never: {what}; there is {:#?}",
                    self.omni.list_raw(types::INFRA, types::MACHINE_REQUESTS)
                )
            })
    }

    /// Lets everything that is due happen.
    async fn settle(&self) {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    fn requests(&self) -> Vec<Arc<Stored>> {
        self.omni.list_raw(types::INFRA, types::MACHINE_REQUESTS)
    }

    fn request(&self, id: &str) -> Option<Arc<Stored>> {
        self.omni.get_raw(types::INFRA, types::MACHINE_REQUESTS, id)
    }

    fn status(&self, id: &str) -> Option<Arc<Stored>> {
        self.omni
            .get_raw(types::INFRA, types::MACHINE_REQUEST_STATUSES, id)
    }

    /// A request with our finalizer and a status that names a machine; the machine has joined.
    async fn joined(&self, id: &str, uuid: &str) {
        self.client.register().await;
        self.omni.create_request(id, "test", &template()).unwrap();
        self.settle().await;
        self.client.hold(id).await;
        self.client.report(id, uuid).await;
        self.settle().await;
        self.omni.machine_booted(uuid, &self.documents(Some(id)));
        self.until("joined", |omni| omni.is_joined(uuid).then_some(()))
            .await;
    }

    fn token(&self) -> String {
        self.omni
            .get_raw(types::INFRA, types::PROVIDER_JOIN_CONFIGS, "test")
            .unwrap()
            .decode::<specs::ProviderJoinConfigSpec>()
            .join_token
    }

    fn documents(&self, request: Option<&str>) -> Vec<u8> {
        documents(&self.token(), "test", request)
    }
}

/// Talos documents with a token signed by `secret`.
fn documents(secret: &str, provider: &str, request: Option<&str>) -> Vec<u8> {
    use hmac::Mac as _;
    let mut extra = BTreeMap::from([(types::LABEL_PROVIDER, provider)]);
    if let Some(request) = request {
        extra.insert(types::LABEL_REQUEST, request);
    }
    let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(serde_json::to_string(&extra).unwrap().as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    let token = serde_json::json!({ "extra_data": extra, "signature": signature });
    let token = format!("v2:{}", STANDARD.encode(token.to_string()));
    let token: String = url::form_urlencoded::byte_serialize(token.as_bytes()).collect();
    format!(
        "apiVersion: v1alpha1\nkind: SideroLinkConfig\n\
         apiUrl: https://omni.sandbox.internal:8090/?jointoken={token}\n---\n\
         apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: '[fdae:41e4:649b:9303::1]:8091'\n"
    )
    .into_bytes()
}

fn template() -> MachineRequestSpec {
    MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        provider_data: "project: demo\n".to_owned(),
        ..MachineRequestSpec::default()
    }
}

impl Client {
    fn new(omni: &Omni, provider: &str, key: &str) -> Self {
        let json: serde_json::Value = serde_json::from_slice(&STANDARD.decode(key).unwrap()).unwrap();
        let (key, _) = SignedSecretKey::from_string(json["pgp_key"].as_str().unwrap()).unwrap();
        let omni = omni.clone();
        let channel = Endpoint::from_static("http://omni.sandbox.internal").connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let dialled = omni.dial().map(hyper_util::rt::TokioIo::new);
                async move { dialled }
            }),
        );
        Self {
            key: Arc::new(key),
            name: json["name"].as_str().unwrap().to_owned(),
            provider: provider.to_owned(),
            channel,
        }
    }

    /// A signed call.
    fn sign<T>(&self, method: &str, message: T) -> Request<T> {
        self.sign_at(method, message, SystemTime::now())
    }

    fn sign_at<T>(&self, method: &str, message: T, now: SystemTime) -> Request<T> {
        let seconds = now.duration_since(UNIX_EPOCH).unwrap().as_secs().to_string();
        let payload = serde_json::json!({ "headers": { "x-sidero-timestamp": [seconds] }, "method": method })
            .to_string();
        let signature = DetachedSignature::sign_binary_data(
            rand::rngs::OsRng,
            &self.key.primary_key,
            &Password::empty(),
            HashAlgorithm::Sha512,
            payload.as_bytes(),
        )
        .unwrap()
        .to_bytes()
        .unwrap();
        let fingerprint = hex::encode(self.key.primary_key.fingerprint().as_bytes());
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert("x-sidero-timestamp", seconds.parse().unwrap());
        headers.insert("x-sidero-payload", payload.parse().unwrap());
        let line = format!(
            "siderov1 {} {fingerprint} {}",
            self.name,
            STANDARD.encode(signature)
        );
        headers.insert("x-sidero-signature", line.parse().unwrap());
        request
    }

    fn state(&self) -> StateClient<Channel> {
        StateClient::new(self.channel.clone())
    }

    async fn get(&self, kind: &str, id: &str) -> Result<cosi::Resource, Status> {
        self.get_in(types::INFRA, kind, id).await
    }

    async fn get_in(&self, namespace: &str, kind: &str, id: &str) -> Result<cosi::Resource, Status> {
        let message = cosi::GetRequest {
            namespace: namespace.to_owned(),
            r#type: kind.to_owned(),
            id: id.to_owned(),
            options: None,
        };
        let request = self.sign("/cosi.resource.State/Get", message);
        Ok(self.state().get(request).await?.into_inner().resource.unwrap())
    }

    async fn list(&self, namespace: &str, kind: &str) -> Result<Vec<String>, Status> {
        let message = cosi::ListRequest {
            namespace: namespace.to_owned(),
            r#type: kind.to_owned(),
            options: None,
        };
        let request = self.sign("/cosi.resource.State/List", message);
        let mut stream = self.state().list(request).await?.into_inner();
        let mut ids = Vec::new();
        while let Some(response) = stream.message().await? {
            ids.push(response.resource.unwrap().metadata.unwrap().id);
        }
        Ok(ids)
    }

    async fn create(&self, resource: cosi::Resource, owner: &str) -> Result<cosi::Resource, Status> {
        let message = cosi::CreateRequest {
            resource: Some(resource),
            options: Some(cosi::CreateOptions {
                owner: owner.to_owned(),
            }),
        };
        let request = self.sign("/cosi.resource.State/Create", message);
        Ok(self.state().create(request).await?.into_inner().resource.unwrap())
    }

    async fn update(
        &self,
        resource: cosi::Resource,
        owner: &str,
        expected: Option<&str>,
    ) -> Result<cosi::Resource, Status> {
        let message = cosi::UpdateRequest {
            new_resource: Some(resource),
            options: Some(cosi::UpdateOptions {
                owner: owner.to_owned(),
                expected_phase: expected.map(str::to_owned),
            }),
        };
        let request = self.sign("/cosi.resource.State/Update", message);
        Ok(self.state().update(request).await?.into_inner().resource.unwrap())
    }

    async fn teardown(&self, kind: &str, id: &str, owner: &str) -> Result<bool, Status> {
        let message = cosi::TeardownRequest {
            namespace: types::INFRA.to_owned(),
            r#type: kind.to_owned(),
            id: id.to_owned(),
            options: Some(cosi::TeardownOptions {
                owner: owner.to_owned(),
            }),
        };
        let request = self.sign("/cosi.resource.State/Teardown", message);
        Ok(self.state().teardown(request).await?.into_inner().destroy_ready)
    }

    async fn destroy(&self, kind: &str, id: &str, owner: &str) -> Result<(), Status> {
        let message = cosi::DestroyRequest {
            namespace: types::INFRA.to_owned(),
            r#type: kind.to_owned(),
            id: id.to_owned(),
            options: Some(cosi::DestroyOptions {
                owner: owner.to_owned(),
            }),
        };
        let request = self.sign("/cosi.resource.State/Destroy", message);
        self.state().destroy(request).await.map(|_| ())
    }

    async fn watch(&self, kind: &str, options: cosi::WatchOptions) -> Watch {
        self.watch_in(types::INFRA, kind, None, options).await
    }

    async fn watch_in(
        &self,
        namespace: &str,
        kind: &str,
        id: Option<&str>,
        options: cosi::WatchOptions,
    ) -> Watch {
        let message = cosi::WatchRequest {
            namespace: namespace.to_owned(),
            r#type: kind.to_owned(),
            id: id.map(str::to_owned),
            options: Some(options),
            api_version: 1,
        };
        let request = self.sign("/cosi.resource.State/Watch", message);
        Watch(self.state().watch(request).await.unwrap().into_inner())
    }

    /// Registers the provider, without which no machine is accepted.
    async fn register(&self) {
        let resource = resource(types::INFRA_PROVIDER_STATUSES, &self.provider, &[]);
        self.create(resource, "").await.unwrap();
    }

    /// Puts our finalizer on a request.
    async fn hold(&self, id: &str) {
        let mut request = self.get(types::MACHINE_REQUESTS, id).await.unwrap();
        request
            .metadata
            .as_mut()
            .unwrap()
            .finalizers
            .push(OWNER.to_owned());
        self.update(request, "", None).await.unwrap();
    }

    /// Takes it off.
    async fn release(&self, id: &str) {
        let mut request = self.get(types::MACHINE_REQUESTS, id).await.unwrap();
        request
            .metadata
            .as_mut()
            .unwrap()
            .finalizers
            .retain(|finalizer| finalizer != OWNER);
        self.update(request, "", None).await.unwrap();
    }

    async fn report(&self, id: &str, uuid: &str) {
        let spec = specs::MachineRequestStatusSpec {
            id: uuid.to_owned(),
            ..Default::default()
        };
        let mut status = resource(types::MACHINE_REQUEST_STATUSES, id, &spec.encode_to_vec());
        status
            .metadata
            .as_mut()
            .unwrap()
            .labels
            .insert(types::LABEL_SET.to_owned(), "web".to_owned());
        self.create(status, OWNER).await.unwrap();
    }
}

fn resource(kind: &str, id: &str, spec: &[u8]) -> cosi::Resource {
    cosi::Resource {
        metadata: Some(cosi::Metadata {
            namespace: types::INFRA.to_owned(),
            r#type: kind.to_owned(),
            id: id.to_owned(),
            version: "undefined".to_owned(),
            phase: "running".to_owned(),
            ..Default::default()
        }),
        spec: Some(cosi::Spec {
            proto_spec: spec.to_vec(),
            yaml_spec: String::new(),
        }),
    }
}

fn metadata(resource: &mut cosi::Resource) -> &mut cosi::Metadata {
    resource.metadata.as_mut().unwrap()
}

struct Watch(Streaming<cosi::WatchResponse>);

impl Watch {
    async fn next(&mut self) -> Result<Option<cosi::WatchResponse>, Status> {
        timeout(Duration::from_secs(60), self.0.message())
            .await
            .expect("the watch sends nothing")
    }

    async fn event(&mut self) -> cosi::Event {
        let response = self.next().await.unwrap().unwrap();
        assert_eq!(response.event.len(), 1, "{response:?}");
        response.event.into_iter().next().unwrap()
    }

    /// Type and ID of the next event.
    async fn line(&mut self) -> (EventType, String) {
        let event = self.event().await;
        (
            event.event_type(),
            event.resource.unwrap_or_default().metadata.unwrap_or_default().id,
        )
    }

    async fn opened(&mut self) {
        assert!(self.next().await.unwrap().unwrap().event.is_empty());
    }

    async fn is_silent(&mut self) -> bool {
        timeout(Duration::from_secs(3600), self.0.message())
            .await
            .is_err()
    }
}

fn bootstrap() -> cosi::WatchOptions {
    cosi::WatchOptions {
        bootstrap_contents: true,
        ..Default::default()
    }
}

fn resume(bookmark: Vec<u8>) -> cosi::WatchOptions {
    cosi::WatchOptions {
        start_from_bookmark: Some(bookmark),
        ..Default::default()
    }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, fragment: &str) {
    let status = result.expect_err("was not refused");
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(fragment), "{status:?}");
}
