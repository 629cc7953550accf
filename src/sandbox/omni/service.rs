//! The gRPC side of COSI's state: who calls, what the hook says, what the rules say, in that order.

use std::future::Future;

use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::calls::describe;
use super::resources::{from_wire, parse_phase, to_wire};
use super::rules::{self, Asked};
use super::signature::{self, Actor};
use super::watch::{Query, Watcher};
use super::{Call, FailCode, Inner, Moment, Omni, Rpc, Verdict};
use crate::omni::wire::cosi::{self, state_server::State};

/// Both services of one run.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) omni: Omni,
    /// Cancelled when the run is dropped.
    pub(super) life: CancellationToken,
}

/// What a call says before it is allowed.
pub(super) struct Intent {
    pub(super) rpc: Rpc,
    pub(super) namespace: String,
    pub(super) kind: String,
    pub(super) id: String,
}

impl Service {
    pub(super) fn new(omni: Omni, life: CancellationToken) -> Self {
        Self { omni, life }
    }

    /// Who calls. Every failure reads the same.
    pub(super) fn actor(&self, metadata: &MetadataMap, method: &str) -> Result<Actor, Status> {
        let (keys, now, full) = self
            .omni
            .with(|inner| (inner.keys.clone(), inner.now(), inner.options.check_signatures));
        // Outside of the lock: the arithmetic takes milliseconds in debug builds.
        signature::verify(&keys, metadata, method, now, full).map_err(|reason| {
            tracing::debug!(method, reason, "refused a signature");
            self.omni.with(|inner| {
                inner.refused_signatures.push(reason);
                inner.bump();
            });
            Status::unauthenticated("invalid signature")
        })
    }

    /// Counts a call and describes it.
    pub(super) fn call(&self, actor: &Actor, intent: Intent, detail: impl FnOnce(&Inner) -> String) -> Call {
        self.omni.with(|inner| {
            inner.total_calls = inner.total_calls.wrapping_add(1);
            *inner.calls.entry((intent.rpc, intent.kind.clone())).or_default() += 1;
            Call {
                detail: detail(inner),
                rpc: intent.rpc,
                namespace: intent.namespace,
                kind: intent.kind,
                id: intent.id,
                provider: actor.provider.clone().unwrap_or_else(|| actor.identity.clone()),
                number: inner.total_calls,
            }
        })
    }

    /// Asks the hook, acts, asks the hook again. Once the run is dropped nothing takes effect any more.
    pub(super) async fn act<T: Send>(
        &self,
        call: Call,
        effect: impl FnOnce(&mut Inner) -> Result<T, Status> + Send,
    ) -> Result<T, Status> {
        let work = async {
            self.ask(&call, Moment::Before).await?;
            // The hook may have crashed this Omni itself.
            if self.life.is_cancelled() {
                return Err(gone());
            }
            let result = self.omni.with(effect)?;
            self.ask(&call, Moment::After).await?;
            Ok(result)
        };
        self.alive(work).await
    }

    async fn ask(&self, call: &Call, moment: Moment) -> Result<(), Status> {
        let Some(hook) = self.omni.with(|inner| inner.hook.clone()) else {
            return Ok(());
        };
        match hook(call, moment).await {
            Verdict::Proceed => Ok(()),
            Verdict::Fail(code, message) => Err(Status::new(grpc(code), message)),
            Verdict::Drop => Err(Status::unavailable("connection reset by peer")),
            Verdict::Reset => {
                self.omni.break_connections();
                Err(Status::unavailable("connection reset by peer"))
            }
            Verdict::Hang => std::future::pending().await,
        }
    }

    async fn alive<T>(&self, work: impl Future<Output = Result<T, Status>> + Send) -> Result<T, Status> {
        tokio::select! {
            biased;
            () = self.life.cancelled() => Err(gone()),
            result = work => result,
        }
    }

    async fn open_list(
        &self,
        request: Request<cosi::ListRequest>,
    ) -> Result<Vec<cosi::ListResponse>, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/List")?;
        let request = request.into_inner();
        let options = request.options.unwrap_or_default();
        let query = Query::new(options.label_query, options.id_query)?;
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::List,
                namespace: request.namespace.clone(),
                kind: request.r#type.clone(),
                id: String::new(),
            },
            |_| String::new(),
        );
        let all = self
            .act(call, |inner| {
                rules::list(inner, &actor, &request.namespace, &request.r#type)
            })
            .await?;
        Ok(all
            .iter()
            .filter(|resource| query.matches(resource))
            .map(|resource| cosi::ListResponse {
                resource: Some(to_wire(resource)),
            })
            .collect())
    }

    async fn open_watch(&self, request: Request<cosi::WatchRequest>) -> Result<Watcher, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Watch")?;
        let request = request.into_inner();
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Watch,
                namespace: request.namespace.clone(),
                kind: request.r#type.clone(),
                id: request.id.clone().unwrap_or_default(),
            },
            |_| match request
                .options
                .as_ref()
                .and_then(|options| options.start_from_bookmark.as_ref())
            {
                Some(_) => "resume".to_owned(),
                None => String::new(),
            },
        );
        let (omni, life) = (self.omni.clone(), self.life.clone());
        let changes = self.omni.changes();
        self.act(call, |inner| {
            Watcher::open(omni, life, changes, inner, &actor, request)
        })
        .await
    }
}

fn gone() -> Status {
    Status::unavailable("Omni is gone")
}

fn grpc(code: FailCode) -> Code {
    match code {
        FailCode::Cancelled => Code::Cancelled,
        FailCode::Unknown => Code::Unknown,
        FailCode::InvalidArgument => Code::InvalidArgument,
        FailCode::DeadlineExceeded => Code::DeadlineExceeded,
        FailCode::NotFound => Code::NotFound,
        FailCode::AlreadyExists => Code::AlreadyExists,
        FailCode::PermissionDenied => Code::PermissionDenied,
        FailCode::ResourceExhausted => Code::ResourceExhausted,
        FailCode::FailedPrecondition => Code::FailedPrecondition,
        FailCode::Aborted => Code::Aborted,
        FailCode::Unimplemented => Code::Unimplemented,
        FailCode::Internal => Code::Internal,
        FailCode::Unavailable => Code::Unavailable,
        FailCode::Unauthenticated => Code::Unauthenticated,
    }
}

/// The error of a server stream shows at its first message, not at the call (watched on Omni 1.10.4).
fn failed<T: Send + 'static>(status: Status) -> BoxStream<'static, Result<T, Status>> {
    stream::once(std::future::ready(Err(status))).boxed()
}

#[tonic::async_trait]
impl State for Service {
    async fn get(&self, request: Request<cosi::GetRequest>) -> Result<Response<cosi::GetResponse>, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Get")?;
        let request = request.into_inner();
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Get,
                namespace: request.namespace.clone(),
                kind: request.r#type.clone(),
                id: request.id.clone(),
            },
            |_| String::new(),
        );
        let stored = self
            .act(call, |inner| {
                rules::get(inner, &actor, &request.namespace, &request.r#type, &request.id)
            })
            .await?;
        Ok(Response::new(cosi::GetResponse {
            resource: Some(to_wire(&stored)),
        }))
    }

    type ListStream = BoxStream<'static, Result<cosi::ListResponse, Status>>;

    async fn list(&self, request: Request<cosi::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        Ok(Response::new(match self.open_list(request).await {
            Ok(all) => stream::iter(all.into_iter().map(Ok)).boxed(),
            Err(status) => failed(status),
        }))
    }

    async fn create(
        &self,
        request: Request<cosi::CreateRequest>,
    ) -> Result<Response<cosi::CreateResponse>, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Create")?;
        let request = request.into_inner();
        let (resource, _) = from_wire(request.resource).map_err(Status::unknown)?;
        let owner = request.options.unwrap_or_default().owner;
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Create,
                namespace: resource.namespace.clone(),
                kind: resource.kind.clone(),
                id: resource.id.clone(),
            },
            |_| describe(None, &resource),
        );
        let stored = self
            .act(call, |inner| rules::create(inner, &actor, resource, &owner))
            .await?;
        Ok(Response::new(cosi::CreateResponse {
            resource: Some(to_wire(&stored)),
        }))
    }

    async fn update(
        &self,
        request: Request<cosi::UpdateRequest>,
    ) -> Result<Response<cosi::UpdateResponse>, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Update")?;
        let request = request.into_inner();
        let (resource, version) = from_wire(request.new_resource).map_err(Status::unknown)?;
        let options = request.options.unwrap_or_default();
        let expected = options
            .expected_phase
            .map(|phase| parse_phase(&phase))
            .transpose()
            .map_err(Status::unknown)?;
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Update,
                namespace: resource.namespace.clone(),
                kind: resource.kind.clone(),
                id: resource.id.clone(),
            },
            |inner| {
                let old = inner.store.get(&resource.namespace, &resource.kind, &resource.id);
                describe(old.map(AsRef::as_ref), &resource)
            },
        );
        let stored = self
            .act(call, |inner| {
                rules::update(
                    inner,
                    &actor,
                    resource,
                    version,
                    &options.owner,
                    expected,
                    Asked::Update,
                )
            })
            .await?;
        Ok(Response::new(cosi::UpdateResponse {
            resource: Some(to_wire(&stored)),
        }))
    }

    async fn destroy(
        &self,
        request: Request<cosi::DestroyRequest>,
    ) -> Result<Response<cosi::DestroyResponse>, Status> {
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Destroy")?;
        let request = request.into_inner();
        let owner = request.options.unwrap_or_default().owner;
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Destroy,
                namespace: request.namespace.clone(),
                kind: request.r#type.clone(),
                id: request.id.clone(),
            },
            |_| String::new(),
        );
        self.act(call, |inner| {
            rules::destroy(
                inner,
                &actor,
                &request.namespace,
                &request.r#type,
                &request.id,
                &owner,
            )
        })
        .await?;
        Ok(Response::new(cosi::DestroyResponse {}))
    }

    type WatchStream = BoxStream<'static, Result<cosi::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<cosi::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(match self.open_watch(request).await {
            Ok(watcher) => watcher.into_stream(),
            Err(status) => failed(status),
        }))
    }

    async fn teardown(
        &self,
        request: Request<cosi::TeardownRequest>,
    ) -> Result<Response<cosi::TeardownResponse>, Status> {
        if !self.omni.with(|inner| inner.options.teardown_rpc) {
            return Err(Status::unimplemented(
                "unknown method Teardown for service cosi.resource.State",
            ));
        }
        let actor = self.actor(request.metadata(), "/cosi.resource.State/Teardown")?;
        let request = request.into_inner();
        let owner = request.options.unwrap_or_default().owner;
        let call = self.call(
            &actor,
            Intent {
                rpc: Rpc::Teardown,
                namespace: request.namespace.clone(),
                kind: request.r#type.clone(),
                id: request.id.clone(),
            },
            |_| String::new(),
        );
        let destroy_ready = self
            .act(call, |inner| {
                rules::teardown(
                    inner,
                    &actor,
                    &request.namespace,
                    &request.r#type,
                    &request.id,
                    &owner,
                )
            })
            .await?;
        Ok(Response::new(cosi::TeardownResponse { destroy_ready }))
    }
}
