//! Answers HTTP for the rack: which operation a path means, who may ask, and what a test wants to go wrong.
//!
//! The order is dropshot's and nexus's: route, API version (`dropshot/src/versioning.rs`: newer than the
//! server's is a 400, none means the newest), bearer token, then the operation.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use oxide::types;
use uuid::Uuid;

use super::answer::{Ask, Outcome, Refusal, Reply, Result};
use super::rack::Rack;
use super::{Call, Hook, Moment, OxideApi, Verdict, create, disks, images, instances, projects};
use crate::sandbox::line::Line;

/// What nexus takes as a bulk-write body; everything else is far smaller.
const LARGEST_BODY: usize = 8 * 1024 * 1024;

type Operation = fn(&mut Rack, &Ask) -> Result<Outcome>;

struct Route {
    method: Method,
    /// Path segments after `/v1`; `*` is the variable one.
    path: &'static [&'static str],
    name: &'static str,
    run: Operation,
}

macro_rules! routes {
    ($($method:ident $($segment:literal)/ * => $name:literal $run:path;)*) => {
        /// Every call that the backend, the Go provider and the vendor's clients make, by the name of its
        /// builder in the SDK.
        static ROUTES: &[Route] = &[
            $(Route { method: Method::$method, path: &[$($segment),*], name: $name, run: $run },)*
        ];
    };
}

routes! {
    GET "ping" => "ping" projects::ping;
    GET "me" => "current_user_view" projects::current_user;
    GET "utilization" => "utilization_view" projects::utilization;
    GET "projects" => "project_list" projects::project_list;
    POST "projects" => "project_create" projects::project_create;
    GET "projects"/"*" => "project_view" projects::project_view;
    GET "vpcs" => "vpc_list" projects::vpc_list;
    GET "vpcs"/"*" => "vpc_view" projects::vpc_view;
    GET "vpc-subnets" => "vpc_subnet_list" projects::subnet_list;
    GET "vpc-subnets"/"*" => "vpc_subnet_view" projects::subnet_view;
    GET "anti-affinity-groups" => "anti_affinity_group_list" projects::group_list;
    POST "anti-affinity-groups" => "anti_affinity_group_create" projects::group_create;
    GET "anti-affinity-groups"/"*" => "anti_affinity_group_view" projects::group_view;
    GET "floating-ips" => "floating_ip_list" projects::floating_ip_list;
    GET "floating-ips"/"*" => "floating_ip_view" projects::floating_ip_view;
    GET "images" => "image_list" images::image_list;
    POST "images" => "image_create" images::image_create;
    GET "images"/"*" => "image_view" images::image_view;
    DELETE "images"/"*" => "image_delete" images::image_delete;
    POST "images"/"*"/"promote" => "image_promote" images::image_promote;
    GET "disks" => "disk_list" disks::disk_list;
    POST "disks" => "disk_create" disks::disk_create;
    GET "disks"/"*" => "disk_view" disks::disk_view;
    DELETE "disks"/"*" => "disk_delete" disks::disk_delete;
    POST "disks"/"*"/"bulk-write-start" => "disk_bulk_write_import_start" disks::bulk_write_start;
    POST "disks"/"*"/"bulk-write" => "disk_bulk_write_import" disks::bulk_write;
    POST "disks"/"*"/"bulk-write-stop" => "disk_bulk_write_import_stop" disks::bulk_write_stop;
    POST "disks"/"*"/"finalize" => "disk_finalize_import" disks::finalize;
    GET "snapshots" => "snapshot_list" images::snapshot_list;
    POST "snapshots" => "snapshot_create" images::snapshot_create;
    GET "snapshots"/"*" => "snapshot_view" images::snapshot_view;
    DELETE "snapshots"/"*" => "snapshot_delete" images::snapshot_delete;
    GET "instances" => "instance_list" instances::list;
    POST "instances" => "instance_create" create::create;
    GET "instances"/"*" => "instance_view" instances::view;
    PUT "instances"/"*" => "instance_update" instances::update;
    DELETE "instances"/"*" => "instance_delete" instances::delete;
    POST "instances"/"*"/"start" => "instance_start" instances::start;
    POST "instances"/"*"/"stop" => "instance_stop" instances::stop;
    POST "instances"/"*"/"reboot" => "instance_reboot" instances::reboot;
    GET "instances"/"*"/"serial-console" => "instance_serial_console" instances::serial_console;
    GET "instances"/"*"/"disks" => "instance_disk_list" instances::disk_list;
    GET "instances"/"*"/"external-ips" => "instance_external_ip_list" instances::external_ip_list;
    GET "network-interfaces" => "instance_network_interface_list" instances::nic_list;
}

/// Finds the route of a path, and the path's variable segment.
fn route(method: &Method, path: &str) -> Option<(&'static Route, String)> {
    let segments: Vec<_> = path.strip_prefix("/v1/")?.split('/').collect();
    ROUTES.iter().find_map(|route| {
        let same = route.method == *method
            && route.path.len() == segments.len()
            && route
                .path
                .iter()
                .zip(&segments)
                .all(|(wanted, given)| *wanted == "*" || wanted == given);
        let target = route
            .path
            .iter()
            .zip(&segments)
            .find(|(wanted, _)| **wanted == "*");
        same.then(|| {
            (
                route,
                target.map(|(_, given)| (*given).to_owned()).unwrap_or_default(),
            )
        })
    })
}

/// Answers one request.
pub(super) async fn answer(
    State(api): State<OxideApi>,
    ConnectInfo(line): ConnectInfo<Line>,
    request: Request,
) -> Response {
    let (head, body) = request.into_parts();
    let Some((route, target)) = route(&head.method, head.uri.path()) else {
        return refuse(&Refusal {
            status: 404,
            code: None,
            message: "Not Found".to_owned(),
        });
    };
    let Ok(body) = axum::body::to_bytes(body, LARGEST_BODY).await else {
        return refuse(&Refusal::malformed("request body exceeded maximum size"));
    };
    let query = head.uri.query().unwrap_or_default();
    let mut ask = Ask {
        target,
        query: url::form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect(),
        body,
        ..Ask::default()
    };
    let call = call(route, &ask);
    let hook = api.count(route.name);

    if let Some(other) = interfere(hook.as_ref(), &call, Moment::Before, &line).await {
        return other;
    }
    let result = match perform(&api, route, &mut ask, &head.headers) {
        Ok(outcome) => settle(&api, outcome).await,
        Err(refusal) => Err(refusal),
    };
    if let Some(other) = interfere(hook.as_ref(), &call, Moment::After, &line).await {
        return other;
    }
    match result {
        Ok(reply) => send(reply),
        Err(refusal) => refuse(&refusal),
    }
}

fn call(route: &Route, ask: &Ask) -> Call {
    let named = || {
        let body: serde_json::Value = serde_json::from_slice(&ask.body).ok()?;
        body.get("name")?.as_str().map(str::to_owned)
    };
    let target = if ask.target.is_empty() {
        // What is made has its name in the body; a bulk write's body is large and has none.
        ask.query("instance").map(str::to_owned).or_else(named)
    } else {
        Some(ask.target.clone())
    };
    Call {
        method: route.method.clone(),
        operation: route.name,
        target,
        project: ask.query("project").map(str::to_owned),
    }
}

/// Lets the hook have its say. `None` means that the call goes on.
async fn interfere(hook: Option<&Hook>, call: &Call, moment: Moment, line: &Line) -> Option<Response> {
    let never: Infallible = match hook?(call, moment).await {
        Verdict::Proceed => return None,
        Verdict::Status {
            status,
            error_code,
            message,
        } => {
            let error = types::Error {
                error_code,
                message,
                request_id: Uuid::new_v4().to_string(),
            };
            return Some(respond(status, serde_json::to_vec(&error).ok()));
        }
        Verdict::Raw { status, body } => return Some(respond(status, Some(body.into_bytes()))),
        Verdict::Drop => line.cut().await,
        Verdict::Hang => std::future::pending().await,
    };
    match never {}
}

fn perform(api: &OxideApi, route: &Route, ask: &mut Ask, headers: &HeaderMap) -> Result<Outcome> {
    api.with(|rack| {
        check_version(rack.options.newest_api, headers)?;
        if route.name != "ping" {
            let token = headers
                .get(AUTHORIZATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|value| value.strip_prefix("Bearer "))
                .and_then(|token| rack.tokens.get(token))
                .ok_or_else(Refusal::unauthenticated)?;
            ask.hidden.clone_from(&token.hidden);
            ask.user.clone_from(&token.user);
        }
        (route.run)(rack, ask)
    })
}

fn check_version(newest: u64, headers: &HeaderMap) -> Result<()> {
    let Some(given) = headers.get("api-version") else {
        return Ok(());
    };
    let given = given.to_str().unwrap_or_default();
    let mut numbers = given.split('.').map(str::parse::<u64>);
    let (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) =
        (numbers.next(), numbers.next(), numbers.next(), numbers.next())
    else {
        return Err(Refusal::malformed(format!(
            "bad value for header \"api-version\": {given}"
        )));
    };
    if (major, minor, patch) > (newest, 0, 0) {
        return Err(Refusal::malformed(format!(
            "server does not support this API version: {given}"
        )));
    }
    Ok(())
}

/// Waits for the answer of an effect that is already in.
async fn settle(api: &OxideApi, outcome: Outcome) -> Result<Reply> {
    match outcome {
        Outcome::Ready(reply) => Ok(reply),
        Outcome::After(delay, reply) => {
            tokio::time::sleep(delay).await;
            Ok(reply)
        }
        Outcome::When(condition) => {
            let mut changes = api.changes();
            loop {
                changes.borrow_and_update();
                if let Some(result) = api.with(|rack| condition(rack)) {
                    return result;
                }
                // The sender lives as long as the rack, and this call holds the rack.
                changes.changed().await.map_err(|_| Refusal::internal())?;
            }
        }
    }
}

fn refuse(refusal: &Refusal) -> Response {
    let error = types::Error {
        error_code: refusal.code.map(str::to_owned),
        message: refusal.message.clone(),
        request_id: Uuid::new_v4().to_string(),
    };
    respond(refusal.status, serde_json::to_vec(&error).ok())
}

fn send(reply: Reply) -> Response {
    respond(reply.status, reply.body)
}

fn respond(status: u16, body: Option<Vec<u8>>) -> Response {
    let mut response = Response::new(body.map_or_else(Body::empty, Body::from));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}
