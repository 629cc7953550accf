//! A class whose ISO the provider serves, at a RAPI that is played: one instance, and a job queue that is always empty.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::cloud::class::parse_class;
use crate::cloud::{BoxFuture, ImageStream, Mark, UserData};

const UUID: &str = "0b6ff3a2-0000-4000-8000-000000000001";

#[derive(Clone, Default)]
struct Rapi(Arc<Mutex<Cluster>>);

#[derive(Default)]
struct Cluster {
    /// Method, path and body of what changes something.
    submitted: Vec<(String, Value)>,
    /// What a creation made.
    instance: Option<Value>,
}

async fn answer(State(rapi): State<Rapi>, request: Request) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut state = rapi.0.lock().unwrap();
    let answer = match what.as_str() {
        "PUT /2/query/job" => json!({"data": []}),
        "GET /2/instances/web" => match &state.instance {
            Some(instance) => instance.clone(),
            None => return Response::builder().status(404).body(Body::from("{}")).unwrap(),
        },
        _ => {
            if what == "POST /2/instances" {
                state.instance = Some(json!({
                    "name": "web", "uuid": UUID, "tags": body["tags"], "status": "ADMIN_down",
                    "ctime": 1.0, "mtime": 1.0, "serial_no": 3, "custom_hvparams": body["hvparams"],
                }));
            }
            state.submitted.push((what, body));
            json!(state.submitted.len())
        }
    };
    Response::new(Body::from(answer.to_string()))
}

struct Iso(Option<Bytes>);

impl ImageSource for Iso {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        let iso = Self(self.0.clone());
        Box::pin(async { Ok(Box::new(iso) as Box<dyn ImageStream>) })
    }
}

impl ImageStream for Iso {
    fn next(&mut self, _: usize) -> BoxFuture<'_, Result<Option<Bytes>>> {
        Box::pin(async { Ok(self.0.take()) })
    }

    fn sha256(&self) -> String {
        String::new()
    }
}

struct World {
    rapi: Rapi,
    endpoint: String,
    folder: TempDir,
    _server: JoinSet<std::io::Result<()>>,
}

impl World {
    async fn open() -> Self {
        let rapi = Rapi::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(rapi.clone());
        let mut server = JoinSet::new();
        server.spawn(axum::serve(listener, router).into_future());
        Self {
            rapi,
            endpoint,
            folder: tempfile::tempdir().unwrap(),
            _server: server,
        }
    }

    fn shelf(&self) -> Shelf {
        Shelf::new(self.folder.path().join("media"), "http://10.0.0.1:8080")
    }

    fn ganeti(&self, media: Option<Shelf>) -> Ganeti {
        Ganeti::new(&Settings {
            endpoint: self.endpoint.clone(),
            user: "omni".to_owned(),
            password: Secret::new("hush"),
            trust: Trust::Authorities(None),
            media,
        })
        .unwrap()
    }

    fn submitted(&self) -> Vec<(String, Value)> {
        self.rapi.0.lock().unwrap().submitted.clone()
    }
}

fn group() -> Group {
    Group("default".to_owned())
}

fn key() -> ImageKey {
    ImageKey {
        talos_version: "1.12.0".to_owned(),
        schematic: "abc".to_owned(),
        platform: "metal".to_owned(),
        arch: "amd64".to_owned(),
    }
}

fn spec(class: &str, image: ImageRef) -> InstanceSpec<Group, GanetiClass> {
    InstanceSpec {
        instance: InstanceRef {
            scope: group(),
            name: "web".to_owned(),
            id: None,
            mark: Mark {
                provider: "ganeti".to_owned(),
                request: "web".to_owned(),
                installation: "i".to_owned(),
            },
            adopt_bare: false,
        },
        class: parse_class(class).unwrap(),
        image,
        user_data: UserData(Vec::new()),
    }
}

#[tokio::test]
async fn an_iso_that_the_provider_serves_is_there_when_its_machine_starts_and_no_longer() {
    let world = World::open().await;
    let ganeti = world.ganeti(Some(world.shelf()));
    let iso = Iso(Some(Bytes::from_static(b"iso")));
    assert_eq!(ganeti.find_image(&group(), &key()).await.unwrap(), None);
    let image = ganeti.import_image(&group(), &key(), &iso).await.unwrap();
    assert_eq!(
        ganeti.find_image(&group(), &key()).await.unwrap(),
        Some(image.clone())
    );

    let spec = spec("disk_template: plain\nnics: [{}]", image);
    ganeti.create_instance(&spec).await.unwrap();
    let address = world.shelf().address(&spec.image.id);
    let (what, body) = world.submitted().pop().unwrap();
    assert_eq!(
        (what.as_str(), &body["hvparams"]["cdrom_image_path"]),
        ("POST /2/instances", &json!(address))
    );
    assert_eq!(body["hvparams"]["boot_order"], "disk");

    // The folder vanishes, and so does the process.
    std::fs::remove_dir_all(world.folder.path().join("media")).unwrap();
    let ganeti = world.ganeti(Some(world.shelf()));
    let error = ganeti.start_instance(&spec.instance, &spec.user_data).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(
        error.to_string().contains("no longer in the media folder"),
        "{error}"
    );
    assert_eq!(world.submitted().len(), 1, "nothing was submitted");
    assert_eq!(ganeti.find_image(&group(), &key()).await.unwrap(), None);

    ganeti.import_image(&group(), &key(), &iso).await.unwrap();
    ganeti.start_instance(&spec.instance, &spec.user_data).await.unwrap();
    let submitted = world.submitted();
    assert_eq!(submitted[1].0, "PUT /2/instances/web/startup");
    // After that start, and only if it went well.
    assert_eq!(submitted[2].0, "PUT /2/instances/web/modify");
    assert_eq!(
        submitted[2].1,
        json!({"instance_uuid": UUID, "hvparams": {"cdrom_image_path": ""}, "depends": [[2, ["success"]]]})
    );
}

#[tokio::test]
async fn an_iso_of_the_operators_is_started_as_it_is_and_stays() {
    let world = World::open().await;
    let ganeti = world.ganeti(Some(world.shelf()));
    let class = "disk_template: plain\nnics: [{}]\nboot_iso: '/iso/{version}.iso'";
    let spec = spec(class, key().reference());
    assert_eq!(Ganeti::boot(&spec.class).format, None);
    ganeti.create_instance(&spec).await.unwrap();
    ganeti.start_instance(&spec.instance, &spec.user_data).await.unwrap();
    let submitted = world.submitted();
    assert_eq!(submitted[0].1["hvparams"]["cdrom_image_path"], "/iso/1.12.0.iso");
    assert_eq!(submitted.len(), 2);
}

#[tokio::test]
async fn who_names_no_iso_is_told_the_two_ways() {
    let world = World::open().await;
    let ganeti = world.ganeti(None);
    let class: GanetiClass = parse_class("disk_template: plain\nnics: [{}]").unwrap();
    assert!(Ganeti::boot(&class).is_medium());
    let error = ganeti.find_image(&group(), &key()).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Rejected);
    for way in ["boot_iso", "[ganeti.media]"] {
        assert!(error.to_string().contains(way), "{error}");
    }
    // What boots no ISO needs none.
    let fake: GanetiClass = parse_class("disk_template: file\nnics: [{}]\nhypervisor: fake").unwrap();
    assert_eq!(Ganeti::boot(&fake).format, None);
}
