//! COSI State: get, list, create, update, teardown, destroy.
//!
//! *Guarantees*: no call is repeated behind the caller's back but in [`State::modify`], which reads again
//! first. What comes back is ours: in shared namespaces a resource without our label is as good as absent.
//!
//! *Cancel safety*: a dropped call may have taken effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rand::Rng;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, debug, debug_span};

use super::auth::Signer;
use super::channel::{Channels, MESSAGE_LIMIT, Signed, chain};
use super::error::{Call, OmniError, OmniErrorKind, meaning, one_line};
use super::kinds::{Kind, LABEL_PROVIDER};
use super::resource::{Phase, Resource};
use super::wire::cosi::label_term::Operation;
use super::wire::cosi::state_client::StateClient;
use super::wire::cosi::{
    CreateOptions, CreateRequest, DestroyOptions, DestroyRequest, GetRequest, LabelQuery, LabelTerm,
    ListOptions, ListRequest, TeardownOptions, TeardownRequest, UpdateOptions, UpdateRequest, WatchOptions,
    WatchRequest, WatchResponse,
};
use crate::cloud::Timestamp;

/// The result of a call to Omni.
pub type Result<T> = std::result::Result<T, OmniError>;

/// Deadline of a unary call, and of the next message of a list: above the 30 seconds that Omni's write
/// throttle may wait.
pub(super) const DEADLINE: Duration = Duration::from_secs(35);

/// How often `modify` tries in all.
const MODIFY_TRIES: u32 = 5;

/// The wait before `modify` tries again, doubled each time and jittered: Omni's own write that we lost to is
/// over in milliseconds.
const MODIFY_WAIT: Duration = Duration::from_millis(20);

/// A client of Omni's COSI state, signed in as one provider. Cheap to clone.
#[derive(Debug, Clone)]
pub struct State {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    provider: String,
    signer: Signer,
    calls: StateClient<Signed>,
    watches: StateClient<Signed>,
    /// Omni before 1.8 has no teardown call; once seen, it is not tried again.
    teardown_unknown: AtomicBool,
}

impl State {
    pub(super) fn new(channels: &Channels, provider: &str) -> Self {
        let client = |channel: &Signed| {
            StateClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT)
        };
        Self {
            inner: Arc::new(Inner {
                provider: provider.to_owned(),
                signer: channels.signer.clone(),
                calls: client(&channels.calls),
                watches: client(&channels.watches),
                teardown_unknown: AtomicBool::new(false),
            }),
        }
    }

    /// The provider ID that this client acts for.
    #[must_use]
    pub fn provider(&self) -> &str {
        &self.inner.provider
    }

    /// Reads one resource; `None` if there is none, or it is another provider's.
    pub async fn get<K: Kind>(&self, id: &str) -> Result<Option<Resource<K>>> {
        let attempt = self.attempt::<K>(Call::Read, "read", id);
        let request = GetRequest {
            namespace: K::namespace(self.provider()),
            r#type: K::type_name(self.provider()),
            id: id.to_owned(),
            options: None,
        };
        let mut client = self.inner.calls.clone();
        let answer = attempt.unary(client.get(with_deadline(request))).await;
        let resource = match answer {
            Err(error) if error.kind == OmniErrorKind::NotFound => return Ok(None),
            answer => attempt.resource::<K>(answer?.resource)?,
        };
        Ok(resource.belongs_to(self.provider()).then_some(resource))
    }

    /// Reads all resources of a kind that carry the labels; in a shared namespace, our provider's label above
    /// all.
    pub async fn list<K: Kind>(&self, labels: &[(&str, &str)]) -> Result<Vec<Resource<K>>> {
        let attempt = self.attempt::<K>(Call::Read, "list", "");
        let mut terms: Vec<LabelTerm> = labels.iter().map(|(key, value)| equal(key, value)).collect();
        if K::SHARED {
            terms.push(equal(LABEL_PROVIDER, self.provider()));
        }
        let label_query = match terms.is_empty() {
            true => Vec::new(),
            false => vec![LabelQuery { terms }],
        };
        let request = ListRequest {
            namespace: K::namespace(self.provider()),
            r#type: K::type_name(self.provider()),
            options: Some(ListOptions {
                label_query,
                id_query: None,
            }),
        };
        let mut client = self.inner.calls.clone();
        let listing = async {
            let mut stream = attempt.bounded(client.list(request)).await?;
            let mut all = Vec::new();
            while let Some(message) = attempt.message(&mut stream).await? {
                let resource = attempt.resource::<K>(message.resource)?;
                let wanted = labels
                    .iter()
                    .all(|(key, value)| resource.metadata.labels.get(*key).is_some_and(|has| has == value));
                if wanted && resource.belongs_to(self.provider()) {
                    all.push(resource);
                }
            }
            Ok(all)
        };
        attempt.traced(listing).await
    }

    /// Creates the resource with the owner in its metadata; returns it as stored.
    pub async fn create<K: Kind>(&self, resource: &Resource<K>) -> Result<Resource<K>> {
        let attempt = self.attempt::<K>(Call::Create, "create", resource.id());
        let mut new = resource.clone();
        new.metadata.version = 0;
        new.metadata.phase = Phase::Running;
        if K::SHARED {
            // Omni forces the label on; sending it as well makes what we asked for and what is stored the
            // same.
            let labels = &mut new.metadata.labels;
            labels.insert(LABEL_PROVIDER.to_owned(), self.provider().to_owned());
        }
        let request = CreateRequest {
            resource: Some(new.to_wire(self.provider(), now())),
            options: Some(CreateOptions {
                owner: resource.metadata.owner.clone(),
            }),
        };
        let mut client = self.inner.calls.clone();
        let answer = attempt.unary(client.create(with_deadline(request))).await?;
        attempt.resource(answer.resource)
    }

    /// Replaces the resource whose version and owner are in its metadata; returns it as stored. Never
    /// repeated: a conflict is the caller's to look at.
    pub async fn update<K: Kind>(
        &self,
        resource: &Resource<K>,
        expected: Option<Phase>,
    ) -> Result<Resource<K>> {
        self.update_as(resource, &resource.metadata.owner, expected).await
    }

    /// The owner goes twice: as who acts, which must be the stored owner, and in the metadata, which is
    /// stored as sent.
    async fn update_as<K: Kind>(
        &self,
        resource: &Resource<K>,
        owner: &str,
        expected: Option<Phase>,
    ) -> Result<Resource<K>> {
        let attempt = self.attempt::<K>(Call::Update, "update", resource.id());
        let request = UpdateRequest {
            new_resource: Some(resource.to_wire(self.provider(), now())),
            options: Some(UpdateOptions {
                owner: owner.to_owned(),
                expected_phase: expected.map(|phase| phase.word().to_owned()),
            }),
        };
        let mut client = self.inner.calls.clone();
        let answer = attempt.unary(client.update(with_deadline(request))).await?;
        attempt.resource(answer.resource)
    }

    /// Reads, changes and updates, again on a plain version conflict, a bounded number of times. `change`
    /// returns false to leave the resource alone, and so does a change that changes nothing. `None` if there
    /// is no such resource.
    pub async fn modify<K: Kind>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut Resource<K>) -> bool + Send,
    ) -> Result<Option<Resource<K>>> {
        self.modify_as(id, None, &mut change).await
    }

    async fn modify_as<K: Kind>(
        &self,
        id: &str,
        owner: Option<&str>,
        change: &mut (impl FnMut(&mut Resource<K>) -> bool + Send),
    ) -> Result<Option<Resource<K>>> {
        let mut tries = 0;
        loop {
            let Some(stored) = self.get::<K>(id).await? else {
                return Ok(None);
            };
            let mut wanted = stored.clone();
            // An update that changes nothing would still cost a write and an event.
            if !change(&mut wanted) || wanted == stored {
                return Ok(Some(stored));
            }
            let owner = owner.unwrap_or(&stored.metadata.owner);
            let error = match self.update_as(&wanted, owner, None).await {
                Ok(updated) => return Ok(Some(updated)),
                Err(error) => error,
            };
            tries += 1;
            let stale = match error.kind {
                OmniErrorKind::Conflict => true,
                // Where finalizers are all we may change, Omni compares before it looks at the version.
                OmniErrorKind::Denied => K::FINALIZERS_ONLY,
                _ => false,
            };
            if !stale || tries == MODIFY_TRIES {
                return Err(error);
            }
            tokio::time::sleep(jittered(MODIFY_WAIT * 2_u32.pow(tries - 1))).await;
        }
    }

    /// Asks for the end of a resource; true if nothing holds it any more.
    pub async fn teardown<K: Kind>(&self, id: &str, owner: &str) -> Result<bool> {
        if self.inner.teardown_unknown.load(Ordering::Relaxed) {
            return self.teardown_by_update::<K>(id, owner).await;
        }
        let attempt = self.attempt::<K>(Call::End, "tear down", id);
        let request = TeardownRequest {
            namespace: K::namespace(self.provider()),
            r#type: K::type_name(self.provider()),
            id: id.to_owned(),
            options: Some(TeardownOptions {
                owner: owner.to_owned(),
            }),
        };
        let mut client = self.inner.calls.clone();
        match attempt.unary(client.teardown(with_deadline(request))).await {
            Ok(answer) => Ok(answer.destroy_ready),
            Err(error) if error.kind == OmniErrorKind::Unimplemented => {
                self.inner.teardown_unknown.store(true, Ordering::Relaxed);
                self.teardown_by_update::<K>(id, owner).await
            }
            Err(error) => Err(error),
        }
    }

    /// Teardown as it was before Omni 1.8: an update of the phase.
    async fn teardown_by_update<K: Kind>(&self, id: &str, owner: &str) -> Result<bool> {
        let mut change = |resource: &mut Resource<K>| {
            resource.metadata.phase = Phase::TearingDown;
            true
        };
        match self.modify_as(id, Some(owner), &mut change).await? {
            Some(resource) => Ok(resource.metadata.finalizers.is_empty()),
            None => Err(OmniError {
                kind: OmniErrorKind::NotFound,
                attempted: format!("tear down {} {id}", K::NAME),
                message: "not found".to_owned(),
            }),
        }
    }

    /// Ends a resource that nothing holds.
    pub async fn destroy<K: Kind>(&self, id: &str, owner: &str) -> Result<()> {
        let attempt = self.attempt::<K>(Call::End, "destroy", id);
        let request = DestroyRequest {
            namespace: K::namespace(self.provider()),
            r#type: K::type_name(self.provider()),
            id: id.to_owned(),
            options: Some(DestroyOptions {
                owner: owner.to_owned(),
            }),
        };
        let mut client = self.inner.calls.clone();
        attempt.unary(client.destroy(with_deadline(request))).await?;
        Ok(())
    }

    /// Opens a watch of a whole kind: with everything there is, or from a bookmark. Its first message has
    /// been consumed; that is where Omni refuses a bookmark, with a bare status for the watch to look at.
    pub(super) async fn open_watch<K: Kind>(
        &self,
        bookmark: Option<Vec<u8>>,
    ) -> std::result::Result<Streaming<WatchResponse>, WatchError> {
        let attempt = self.attempt::<K>(Call::Read, "watch", "");
        let request = WatchRequest {
            namespace: K::namespace(self.provider()),
            r#type: K::type_name(self.provider()),
            id: None,
            options: Some(WatchOptions {
                bootstrap_contents: bookmark.is_none(),
                // Or all there is, and all that was missed, would come as one message each: above the limit it
                // would be refused, each time anew.
                aggregated: false,
                start_from_bookmark: bookmark,
                ..WatchOptions::default()
            }),
            // With 0 the server keeps silent about the end of the bootstrap and about errors.
            api_version: 1,
        };
        let mut client = self.inner.watches.clone();
        let opening = async {
            let mut stream = client.watch(request).await?.into_inner();
            match stream.message().await? {
                Some(_) => Ok(stream),
                None => Err(Status::unavailable("the watch ended at once")),
            }
        };
        let span = debug_span!("omni", call = "watch", kind = K::NAME);
        let opened = tokio::time::timeout(DEADLINE, opening).instrument(span).await;
        match opened {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(status)) => Err(WatchError {
                refused_precondition: status.code() == tonic::Code::FailedPrecondition,
                error: attempt.failed(&status).await,
            }),
            Err(_) => Err(WatchError {
                refused_precondition: false,
                error: attempt.late(),
            }),
        }
    }

    /// What a broken watch means.
    pub(super) async fn watch_error<K: Kind>(&self, status: &Status) -> OmniError {
        self.attempt::<K>(Call::Read, "watch", "").failed(status).await
    }

    fn attempt<K: Kind>(&self, call: Call, verb: &'static str, id: &str) -> Attempt {
        Attempt::new(self.inner.signer.clone(), call, verb, K::NAME, id)
    }
}

/// Why a watch did not open.
#[derive(Debug)]
pub(super) struct WatchError {
    /// Omni refused a precondition: with a bookmark, the bookmark.
    pub(super) refused_precondition: bool,
    /// What it means otherwise.
    pub(super) error: OmniError,
}

/// One call: what is attempted, on what, and how its end is told.
#[derive(Debug)]
pub(super) struct Attempt {
    signer: Signer,
    call: Call,
    verb: &'static str,
    kind: &'static str,
    id: String,
}

impl Attempt {
    pub(super) fn new(signer: Signer, call: Call, verb: &'static str, kind: &'static str, id: &str) -> Self {
        let id = id.to_owned();
        Self {
            signer,
            call,
            verb,
            kind,
            id,
        }
    }

    /// A unary call, with deadline, span and meaning.
    pub(super) async fn unary<T>(
        &self,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        self.traced(self.bounded(call)).await
    }

    /// The deadline on our side: the header alone covers neither a body that never comes nor a connection
    /// that hangs.
    async fn bounded<T>(
        &self,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        match tokio::time::timeout(DEADLINE, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(&status).await),
            Err(_) => Err(self.late()),
        }
    }

    async fn message<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>> {
        match tokio::time::timeout(DEADLINE, stream.message()).await {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(status)) => Err(self.failed(&status).await),
            Err(_) => Err(self.late()),
        }
    }

    async fn traced<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let span = debug_span!("omni", call = self.verb, kind = self.kind, id = self.id);
        async {
            let result = call.await;
            match &result {
                Ok(_) => debug!("done"),
                Err(error) => debug!(meaning = ?error.kind, message = error.message, "failed"),
            }
            result
        }
        .instrument(span)
        .await
    }

    fn resource<K: Kind>(&self, wire: Option<super::wire::cosi::Resource>) -> Result<Resource<K>> {
        wire.ok_or_else(|| "it is missing".to_owned())
            .and_then(Resource::from_wire)
            .map_err(|reason| {
                // Whatever it was, it says nothing that can be used, and a write may have taken effect.
                let message = format!("the resource in the answer cannot be read: {reason}");
                self.error(OmniErrorKind::Unavailable, message)
            })
    }

    fn late(&self) -> OmniError {
        self.error(
            OmniErrorKind::Unavailable,
            format!("no answer within {} seconds", DEADLINE.as_secs()),
        )
    }

    async fn failed(&self, status: &Status) -> OmniError {
        let kind = meaning(self.call, status.code(), status.message());
        let message = match kind {
            OmniErrorKind::Unauthenticated => {
                let why = self.signer.explain(status).await;
                format!("{}: {why}", one_line(status.message()))
            }
            // The transport's own causes are in the chain: "transport error" alone helps nobody.
            OmniErrorKind::Unavailable => one_line(&transport_words(status)),
            _ => one_line(status.message()),
        };
        self.error(kind, message)
    }

    pub(super) fn error(&self, kind: OmniErrorKind, message: String) -> OmniError {
        let attempted = match self.id.as_str() {
            "" => format!("{} {}", self.verb, self.kind),
            id => format!("{} {} {id}", self.verb, self.kind),
        };
        OmniError {
            kind,
            attempted,
            message,
        }
    }
}

fn transport_words(status: &Status) -> String {
    let mut words = status.message().to_owned();
    if let Some(source) = std::error::Error::source(status) {
        let cause = chain(source);
        // tonic puts its own word before the chain, and the chain begins with the same.
        let cause = cause.strip_prefix("transport error: ").unwrap_or(&cause);
        if !words.contains(cause) {
            words.push_str(": ");
            words.push_str(cause);
        }
    }
    words
}

/// The deadline for Omni's side: it bounds the wait of its write throttle too.
pub(super) fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

fn equal(key: &str, value: &str) -> LabelTerm {
    LabelTerm {
        key: key.to_owned(),
        op: Operation::Equal.into(),
        value: vec![value.to_owned()],
        invert: false,
    }
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

/// Between half of a wait and all of it.
pub(super) fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(rand::thread_rng().gen_range(0.5..1.0))
}
