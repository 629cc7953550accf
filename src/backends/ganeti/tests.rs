//! Classes whose ISO or seed the provider serves, at a RAPI that is played: one instance, and a job queue that is always empty.

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

const DOCUMENTS: &[u8] = b"kind: SideroLinkConfig\n";
const UUID: &str = "0b6ff3a2-0000-4000-8000-000000000001";

#[derive(Clone, Default)]
struct Rapi(Arc<Mutex<Cluster>>);

#[derive(Default)]
struct Cluster {
    /// Method, path and body of what changes something.
    submitted: Vec<(String, Value)>,
    /// What a creation made.
    instance: Option<Value>,
    /// Whether changes are never answered, and have no effect.
    hangs: bool,
}

fn request_changes(what: &str) -> bool {
    !what.starts_with("GET") && what != "PUT /2/query/job"
}

async fn answer(State(rapi): State<Rapi>, request: Request) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let changes = request_changes(&what);
    if changes && rapi.0.lock().unwrap().hangs {
        return std::future::pending().await;
    }
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

    fn media(&self) -> Media {
        Media::new(self.folder.path().join("media"), "http://10.0.0.1:8080")
    }

    fn ganeti(&self, media: Option<Media>) -> Ganeti {
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
        user_data: UserData(DOCUMENTS.to_vec()),
    }
}

#[tokio::test]
async fn an_iso_that_the_provider_serves_is_there_when_its_machine_starts_and_no_longer() {
    let world = World::open().await;
    let ganeti = world.ganeti(Some(world.media()));
    let iso = Iso(Some(Bytes::from_static(b"iso")));
    assert_eq!(ganeti.find_image(&group(), &key()).await.unwrap(), None);
    let image = ganeti.import_image(&group(), &key(), &iso).await.unwrap();
    assert_eq!(
        ganeti.find_image(&group(), &key()).await.unwrap(),
        Some(image.clone())
    );

    let spec = spec("disk_template: plain\nnics: [{}]", image);
    ganeti.create_instance(&spec).await.unwrap();
    let address = world.media().shelf.address(&spec.image.id);
    let (what, body) = world.submitted().pop().unwrap();
    assert_eq!(
        (what.as_str(), &body["hvparams"]["cdrom_image_path"]),
        ("POST /2/instances", &json!(address))
    );
    assert_eq!(body["hvparams"]["boot_order"], "disk");

    // The folder vanishes, and so does the process.
    std::fs::remove_dir_all(world.folder.path().join("media")).unwrap();
    let ganeti = world.ganeti(Some(world.media()));
    let error = ganeti
        .start_instance(&spec.instance, &spec.user_data)
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(
        error.to_string().contains("no longer in the media folder"),
        "{error}"
    );
    assert_eq!(world.submitted().len(), 1, "nothing was submitted");
    assert_eq!(ganeti.find_image(&group(), &key()).await.unwrap(), None);

    ganeti.import_image(&group(), &key(), &iso).await.unwrap();
    ganeti
        .start_instance(&spec.instance, &spec.user_data)
        .await
        .unwrap();
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
    let ganeti = world.ganeti(Some(world.media()));
    let class = "disk_template: plain\nnics: [{}]\nboot_iso: '/iso/{version}.iso'";
    let spec = spec(class, key().reference());
    assert_eq!(Ganeti::boot(&spec.class).format, None);
    ganeti.create_instance(&spec).await.unwrap();
    ganeti
        .start_instance(&spec.instance, &spec.user_data)
        .await
        .unwrap();
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

impl World {
    /// The files of seeds, as text.
    fn seeds(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.folder.path().join("media")) else {
            return Vec::new();
        };
        entries
            .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect()
    }

    fn is_submitted(&self, call: &str) -> bool {
        self.submitted().iter().any(|(what, _)| what == call)
    }
}

const IMAGE: &str = "disk_template: plain\nnics: [{}]\nboot_image: '/srv/{version}.raw'";

#[tokio::test]
async fn a_machine_of_an_image_has_its_seed_before_it_starts_and_until_it_is_deleted() {
    let world = World::open().await;
    let ganeti = world.ganeti(Some(world.media()));
    let mut spec = spec(IMAGE, key().reference());
    let boot = Ganeti::boot(&spec.class);
    assert_eq!((boot.platform, boot.format), ("nocloud", None));
    ganeti.create_instance(&spec).await.unwrap();
    let (_, body) = world.submitted().pop().unwrap();
    assert_eq!(body["osparams"]["os-image"], "/srv/1.12.0.raw");
    let extra = body["hvparams"]["kvm_extra"].as_str().unwrap();
    let address = "-smbios type=1,serial=ds=nocloud-net;s=http://10.0.0.1:8080/seed-";
    assert!(extra.starts_with(address) && extra.ends_with('/'), "{extra}");
    assert_eq!(world.seeds(), [""; 0], "no machine reads it yet");

    // Another process starts it; it knows nothing but the instance, and its folder is an empty one.
    let ganeti = world.ganeti(Some(world.media()));
    ganeti
        .start_instance(&spec.instance, &spec.user_data)
        .await
        .unwrap();
    let [seed] = &world.seeds()[..] else {
        panic!("one seed")
    };
    assert!(seed.contains(UUID) && seed.contains("web"), "{seed}");
    assert!(world.is_submitted("PUT /2/instances/web/startup"));
    assert!(
        !world.is_submitted("PUT /2/instances/web/modify"),
        "it stays until it is installed"
    );

    spec.instance.id = Some(UUID.to_owned());
    ganeti.delete_instance(&spec.instance).await.unwrap();
    assert_eq!(world.seeds(), [""; 0]);
}

#[tokio::test]
async fn a_start_that_was_cut_off_is_repeated_with_the_user_data_of_now() {
    let world = World::open().await;
    let ganeti = world.ganeti(Some(world.media()));
    let spec = spec(IMAGE, key().reference());
    ganeti.create_instance(&spec).await.unwrap();
    let created = world.submitted().len();
    // The daemon dies when the seed is written, and nothing is submitted.
    world.rapi.0.lock().unwrap().hangs = true;
    let starting = ganeti.start_instance(&spec.instance, &spec.user_data);
    let cut_off = tokio::select! {
        _ = starting => false,
        () = async { while world.seeds().is_empty() { tokio::task::yield_now().await } } => true,
    };
    assert!(cut_off);
    assert_eq!(world.submitted().len(), created);
    world.rapi.0.lock().unwrap().hangs = false;

    let ganeti = world.ganeti(Some(world.media()));
    let rotated = UserData(b"kind: Rotated\n".to_vec());
    ganeti.start_instance(&spec.instance, &rotated).await.unwrap();
    use base64::Engine as _;
    let wanted = base64::engine::general_purpose::STANDARD.encode(&rotated.0);
    let seeds = world.seeds();
    assert!(seeds.len() == 1 && seeds[0].contains(&wanted), "{seeds:?}");
    assert!(world.is_submitted("PUT /2/instances/web/startup"));
}

#[tokio::test]
async fn an_image_without_anybody_to_serve_its_seed_is_told() {
    let world = World::open().await;
    let ganeti = world.ganeti(None);
    let error = ganeti
        .create_instance(&spec(IMAGE, key().reference()))
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Rejected);
    assert!(error.to_string().contains("[ganeti.media]"), "{error}");
    assert_eq!(world.submitted(), []);
}

#[test]
fn the_address_of_a_seed_is_in_no_error() {
    let media = Media::new("/nowhere", "http://10.0.0.1:8080");
    let address = media.seeds.address();
    let text =
        format!("qemu-system-x86_64 -smbios type=1,serial=ds=nocloud-net;s={address} -m 64: no memory");
    let failed = Failure::of_job(7, &json!(["OpExecError", [text]])).error("start instance", "web");
    let shown = failed.to_string();
    assert!(
        shown.contains("s=http://10.0.0.1:8080/<redacted>/ -m 64: no memory"),
        "{shown}"
    );
}
