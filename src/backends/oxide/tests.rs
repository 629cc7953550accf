//! The verbs against the sandbox's rack: what they do, in how many calls, and what becomes of them half-way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::cloud::{BoxFuture, ImageStream, InstanceState, UserData};
use crate::sandbox::oxide::{Hook, Moment, OxideApi, OxideOptions, OxidePace, Verdict};
use crate::secret::Secret;

const PROJECT: &str = "prod";
const TOKEN: &str = "oxide-token-sandbox";

struct World {
    api: OxideApi,
    oxide: Oxide,
    host: String,
    calls: BTreeMap<&'static str, u64>,
    _server: JoinSet<()>,
}

impl World {
    async fn start() -> Self {
        Self::with(OxideOptions {
            page: 2,
            seed: Some(1),
            pace: OxidePace::instant(),
            ..OxideOptions::default()
        })
        .await
    }

    async fn with(options: OxideOptions) -> Self {
        let api = OxideApi::new(options);
        api.add_project(PROJECT).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", listener.local_addr().unwrap());
        let mut server = JoinSet::new();
        let served = api.clone();
        server.spawn(async move { served.serve(listener).await.unwrap() });
        Self {
            oxide: backend(&host, TOKEN),
            api,
            host,
            calls: BTreeMap::new(),
            _server: server,
        }
    }

    /// The calls since the last time this was asked.
    fn calls(&mut self) -> String {
        let now = self.api.calls();
        let new: Vec<_> = now
            .iter()
            .map(|(call, count)| (call, count - self.calls.get(call).unwrap_or(&0)))
            .filter(|(_, count)| *count > 0)
            .map(|(call, count)| format!("{count} {call}"))
            .collect();
        self.calls = now;
        new.join(", ")
    }

    /// An image, so that instances can be made without an import.
    async fn image(&self) -> ImageRef {
        let (_, source) = source(0);
        self.oxide
            .import_image(&project(), &key(), &source)
            .await
            .unwrap()
    }

    async fn spec(&self, name: &str) -> InstanceSpec<Project, OxideClass> {
        InstanceSpec {
            instance: asked(name),
            class: serde_json::from_value(serde_json::json!({
                "project": PROJECT,
                "network_interfaces": [
                    {"ip_config": "v4", "subnet_name": "default", "vpc_name": "default"},
                ],
            }))
            .unwrap(),
            image: self.image().await,
            user_data: UserData(b"apiVersion: v1alpha1\nkind: SideroLinkConfig\n".to_vec()),
        }
    }

    async fn ours(&self, asked: &InstanceRef<Project>) -> Arc<Instance> {
        match self.oxide.find_instance(asked).await.unwrap() {
            Found::Ours(instance) => instance,
            other => panic!("not ours: {other:?}"),
        }
    }

    async fn until(&self, asked: &InstanceRef<Project>, state: InstanceState) -> InstanceRef<Project> {
        for _ in 0..500 {
            let instance = self.ours(asked).await;
            if instance.state == state {
                return InstanceRef {
                    id: Some(instance.id.clone()),
                    ..asked.clone()
                };
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never {state:?}: {:?}", self.oxide.find_instance(asked).await);
    }

    /// What the engine does: find, delete what is there, again.
    async fn delete(&self, asked: &InstanceRef<Project>) {
        for _ in 0..500 {
            let id = match self.oxide.find_instance(asked).await.unwrap() {
                Found::Nothing | Found::Foreign { .. } => return,
                Found::Remains { .. } => None,
                Found::Ours(instance) => Some(instance.id.clone()),
            };
            match self
                .oxide
                .delete_instance(&InstanceRef { id, ..asked.clone() })
                .await
            {
                Ok(()) => {}
                Err(error) if error.kind == ErrorKind::Busy => {}
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never gone: {:?}", self.oxide.find_instance(asked).await);
    }

    fn hook(&self, decide: impl Fn(&str, Moment) -> Verdict + Send + Sync + 'static) {
        let hook: Hook = Arc::new(move |call, moment| {
            let verdict = decide(call.operation, moment);
            Box::pin(async { verdict })
        });
        self.api.set_hook(Some(hook));
    }

    fn nothing_but_images(&self) {
        assert_eq!(
            names(self.api.disks(PROJECT), |disk| disk.name.to_string()),
            [""; 0]
        );
        assert_eq!(
            names(self.api.snapshots(PROJECT), |it| it.name.to_string()),
            [""; 0]
        );
        assert_eq!(
            names(self.api.instances(PROJECT), |it| it.name.to_string()),
            [""; 0]
        );
    }
}

fn names<T>(items: Vec<T>, name: impl Fn(&T) -> String) -> Vec<String> {
    items.iter().map(name).collect()
}

fn backend(host: &str, token: &str) -> Oxide {
    Oxide::new(&Settings {
        host: host.to_owned(),
        token: Secret::new(token),
        ca_bundle: None,
        provider_id: "oxide".to_owned(),
    })
    .unwrap()
}

fn project() -> Project {
    Project(PROJECT.to_owned())
}

fn asked(name: &str) -> InstanceRef<Project> {
    InstanceRef {
        scope: project(),
        name: name.to_owned(),
        id: None,
        mark: Mark {
            provider: "oxide".to_owned(),
            request: name.to_owned(),
            installation: "9b7e1a62-0000-4000-8000-000000000001".to_owned(),
        },
        adopt_bare: false,
    }
}

fn bare(provider: &str) -> String {
    format!("Managed by the Oxide Omni infrastructure provider ({provider}).")
}

fn key() -> ImageKey {
    ImageKey {
        talos_version: "1.12.0".to_owned(),
        schematic: "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba".to_owned(),
        platform: "nocloud".to_owned(),
        arch: "amd64".to_owned(),
    }
}

const IMAGE: &str = "talos-1-12-0-376567988ad37013-nocloud-amd64";

/// An image in memory; counts its openings, and can break off.
struct Source {
    image: Bytes,
    zeros: u64,
    breaks_at: Option<usize>,
    opened: AtomicUsize,
}

struct Stream {
    left: Bytes,
    zeros: u64,
    breaks_at: Option<usize>,
    hasher: Sha256,
}

/// An image of about that many chunks, some of them zeros, and not a whole number of blocks.
fn source(chunks: usize) -> (Bytes, Source) {
    let chunk = 512 * 1024;
    let mut image = Vec::with_capacity(chunks * chunk + 7);
    for index in 0..chunks {
        image.resize(
            image.len() + chunk,
            if index % 3 == 1 {
                0
            } else {
                u8::try_from(index % 250).unwrap() + 1
            },
        );
    }
    image.extend(b"the end");
    let image = Bytes::from(image);
    let source = Source {
        image: image.clone(),
        zeros: 0,
        breaks_at: None,
        opened: AtomicUsize::new(0),
    };
    (image, source)
}

impl ImageSource for Source {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let stream = Stream {
            left: self.image.clone(),
            zeros: self.zeros,
            breaks_at: self.breaks_at,
            hasher: Sha256::new(),
        };
        Box::pin(async { Ok(Box::new(stream) as Box<dyn ImageStream>) })
    }
}

impl ImageStream for Stream {
    fn next(&mut self, size: usize) -> BoxFuture<'_, Result<Option<Bytes>>> {
        Box::pin(async move {
            if self.breaks_at.is_some_and(|at| self.left.len() <= at) {
                return Err(CloudError::new(
                    "test",
                    "read",
                    ErrorKind::Unavailable,
                    "broken on purpose",
                ));
            }
            let chunk = if self.left.is_empty() {
                static ZEROS: [u8; 512 * 1024] = [0; 512 * 1024];
                let zeros = usize::try_from(self.zeros.min(size as u64)).unwrap();
                self.zeros -= zeros as u64;
                // Not hashed: gigabytes of them take their time without optimisation.
                return Ok((zeros > 0).then(|| Bytes::from_static(&ZEROS[..zeros])));
            } else {
                self.left.split_to(size.min(self.left.len()))
            };
            self.hasher.update(&chunk);
            Ok((!chunk.is_empty()).then_some(chunk))
        })
    }

    fn sha256(&self) -> String {
        hex::encode(self.hasher.clone().finalize())
    }
}

#[tokio::test]
async fn a_machine_goes_up_and_down_in_few_calls() {
    let mut world = World::start().await;
    let spec = world.spec("web").await;
    world.calls();
    let web = spec.instance.clone();
    let (oxide, mut trace) = (backend(&world.host, TOKEN), Vec::new());
    let mut note = |world: &mut World, verb: &str| trace.push(format!("{verb}: {}", world.calls()));

    assert_eq!(oxide.find_instance(&web).await.unwrap(), Found::Nothing);
    note(&mut world, "nothing");
    oxide.find_image(&web.scope, &key()).await.unwrap().unwrap();
    note(&mut world, "image, for the first time");
    oxide.find_image(&web.scope, &key()).await.unwrap().unwrap();
    note(&mut world, "image");
    oxide.create_instance(&spec).await.unwrap();
    note(&mut world, "create");
    let stopped = world.until(&web, InstanceState::Stopped).await;
    world.calls();
    oxide
        .start_instance(&stopped, &UserData(Vec::new()))
        .await
        .unwrap();
    note(&mut world, "start");
    world.until(&web, InstanceState::Running).await;
    world.calls();

    assert!(matches!(oxide.find_instance(&web).await.unwrap(), Found::Ours(_)));
    note(&mut world, "ours");
    oxide.delete_instance(&stopped).await.unwrap();
    note(&mut world, "stop");
    world.until(&web, InstanceState::Stopped).await;
    world.calls();
    assert!(matches!(oxide.find_instance(&web).await.unwrap(), Found::Ours(_)));
    note(&mut world, "ours");
    oxide.delete_instance(&stopped).await.unwrap();
    note(&mut world, "delete");
    assert_eq!(oxide.find_instance(&web).await.unwrap(), Found::Nothing);
    note(&mut world, "nothing");
    world.nothing_but_images();
    expect_test::expect![[r#"
        nothing: 1 disk_list, 1 instance_view
        image, for the first time: 1 disk_list, 1 image_view
        image: 1 image_view
        create: 1 instance_create
        start: 1 instance_start
        ours: 1 instance_view
        stop: 1 instance_stop
        ours: 1 instance_view
        delete: 1 disk_delete, 1 instance_delete, 1 instance_disk_list
        nothing: 1 disk_list, 1 instance_view"#]]
    .assert_eq(&trace.join("\n"));
}

#[tokio::test]
async fn what_is_created_is_found_with_its_ids_mark_and_user_data() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    let stopped = world.until(&spec.instance, InstanceState::Stopped).await;
    let found = world.ours(&spec.instance).await;
    let id = found.id.clone();
    assert_eq!(found.uuid.as_ref(), Some(&id));
    assert_eq!(found.node_provider_id, Some(format!("oxide://{id}")));
    assert_eq!(found.mark.as_ref(), Some(&spec.instance.mark));
    assert_eq!(found.started, None);
    assert_eq!(
        world.api.user_data(PROJECT, "web"),
        Some(spec.user_data.0.clone())
    );
    world
        .oxide
        .start_instance(&stopped, &UserData(Vec::new()))
        .await
        .unwrap();
    world
        .oxide
        .start_instance(&stopped, &UserData(Vec::new()))
        .await
        .unwrap();
    world.until(&spec.instance, InstanceState::Running).await;
    assert!(world.ours(&spec.instance).await.started.is_some());
    // Once more: one instance.
    world.oxide.create_instance(&spec).await.unwrap();
    assert_eq!(world.api.instances(PROJECT).len(), 1);
    assert_eq!(world.ours(&spec.instance).await.id, id);
}

#[tokio::test]
async fn creating_twice_at_once_makes_one_instance() {
    let world = World::with(OxideOptions::default()).await;
    let spec = world.spec("web").await;
    let other = backend(&world.host, TOKEN);
    let (one, two) = tokio::join!(world.oxide.create_instance(&spec), other.create_instance(&spec));
    assert!(one.is_ok() || two.is_ok());
    for lost in [one, two].into_iter().filter_map(Result::err) {
        assert!(
            matches!(lost.kind, ErrorKind::Busy | ErrorKind::Unavailable),
            "{lost}"
        );
    }
    world.until(&spec.instance, InstanceState::Stopped).await;
    assert_eq!(world.api.instances(PROJECT).len(), 1);
}

#[tokio::test]
async fn every_machine_goes_whatever_it_does() {
    for with_disks in [false, true] {
        let world = World::with(OxideOptions {
            pace: OxidePace {
                stop: Duration::from_millis(30),
                create: Duration::from_millis(30),
                start: Duration::from_millis(30),
                ..OxidePace::instant()
            },
            ..OxideOptions::default()
        })
        .await;
        for state in [
            "creating", "stopped", "starting", "running", "stopping", "failed", "vanished",
        ] {
            let mut spec = world.spec(state).await;
            if with_disks {
                spec.class.disks = vec![
                    DataDisk {
                        kind: DiskKind::Distributed,
                        size: 3,
                    },
                    DataDisk {
                        kind: DiskKind::Local,
                        size: 4,
                    },
                ];
            }
            world.oxide.create_instance(&spec).await.unwrap();
            if state != "creating" {
                let stopped = world.until(&spec.instance, InstanceState::Stopped).await;
                if state != "stopped" {
                    world
                        .oxide
                        .start_instance(&stopped, &UserData(Vec::new()))
                        .await
                        .unwrap();
                }
            }
            match state {
                "running" => {
                    world.until(&spec.instance, InstanceState::Running).await;
                }
                "stopping" => {
                    world.until(&spec.instance, InstanceState::Running).await;
                    world.api.stop_instance(PROJECT, state);
                }
                "failed" => {
                    world.api.break_instance(PROJECT, state);
                    let failed = InstanceState::Broken("failed".to_owned());
                    assert_eq!(world.ours(&spec.instance).await.state, failed);
                }
                "vanished" => {
                    world.api.vanish_instance(PROJECT, state, false);
                    let found = world.oxide.find_instance(&spec.instance).await.unwrap();
                    assert!(matches!(found, Found::Remains { since: Some(_) }), "{found:?}");
                }
                _ => {}
            }
            world.delete(&spec.instance).await;
            assert_eq!(
                world.oxide.find_instance(&spec.instance).await.unwrap(),
                Found::Nothing
            );
            world.nothing_but_images();
        }
    }
}

#[tokio::test]
async fn deletions_alone_reach_nothing_and_repeat() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    let web = world.until(&spec.instance, InstanceState::Stopped).await;
    world
        .oxide
        .start_instance(&web, &UserData(Vec::new()))
        .await
        .unwrap();
    world.until(&spec.instance, InstanceState::Running).await;
    for _ in 0..100 {
        if let Err(error) = world.oxide.delete_instance(&web).await {
            assert_eq!(error.kind, ErrorKind::Busy, "{error}");
        }
    }
    world.nothing_but_images();
    world.oxide.delete_instance(&web).await.unwrap();
    world.oxide.delete_instance(&spec.instance).await.unwrap();
}

#[tokio::test]
async fn without_an_id_only_leftovers_are_deleted() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    world.until(&spec.instance, InstanceState::Stopped).await;
    let error = world
        .oxide
        .delete_instance(&spec.instance)
        .await
        .expect_err("it must wait");
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.to_string().contains("attached to instance"), "{error}");
    world.until(&spec.instance, InstanceState::Stopped).await;
}

#[tokio::test]
async fn a_strangers_things_are_never_touched() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    let other = |change: fn(&mut Mark)| {
        let mut mark = spec.instance.mark.clone();
        change(&mut mark);
        mark::describe(&mark)
    };
    for description in [
        "a database".to_owned(),
        bare("oxide"),
        other(|mark| mark.provider = "two".to_owned()),
        other(|mark| mark.request = "db".to_owned()),
        other(|mark| mark.installation = "else".to_owned()),
    ] {
        let id = world.api.plant_instance(PROJECT, "web", &description).unwrap();
        let found = world.oxide.find_instance(&spec.instance).await.unwrap();
        assert!(matches!(found, Found::Foreign { .. }), "{description}: {found:?}");
        let error = world
            .oxide
            .create_instance(&spec)
            .await
            .expect_err("the name is taken");
        assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
        let error = world
            .oxide
            .start_instance(&spec.instance, &UserData(Vec::new()))
            .await
            .expect_err("not ours");
        assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
        world.oxide.delete_instance(&spec.instance).await.unwrap();
        let by_id = InstanceRef {
            id: Some(id.to_string()),
            ..spec.instance.clone()
        };
        let error = world.oxide.delete_instance(&by_id).await.expect_err("not ours");
        assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
        assert_eq!(world.api.instances(PROJECT).len(), 1);

        // It does not hide what is left of ours.
        let ours = mark::describe(&spec.instance.mark);
        world
            .api
            .plant_disk(PROJECT, "disk-00-web", &ours, types::DiskState::Detached)
            .unwrap();
        let found = world.oxide.find_instance(&spec.instance).await.unwrap();
        assert!(matches!(found, Found::Remains { .. }), "{found:?}");
        world.oxide.delete_instance(&spec.instance).await.unwrap();
        let found = world.oxide.find_instance(&spec.instance).await.unwrap();
        assert!(matches!(found, Found::Foreign { .. }), "{found:?}");
        assert_eq!(world.api.instances(PROJECT).len(), 1);
        world.api.vanish_instance(PROJECT, "web", true);
    }
}

#[tokio::test]
async fn a_disk_in_the_way_is_told_apart_from_an_instance() {
    let world = World::start().await;
    let mut spec = world.spec("web").await;
    // A stranger's disk has the boot disk's name.
    world
        .api
        .plant_disk(PROJECT, "web", "backup", types::DiskState::Detached)
        .unwrap();
    let found = world.oxide.find_instance(&spec.instance).await.unwrap();
    assert!(
        matches!(&found, Found::Foreign { what } if what.contains("disk \"web\"")),
        "{found:?}"
    );
    let error = world
        .oxide
        .create_instance(&spec)
        .await
        .expect_err("the name is taken");
    assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
    world.oxide.delete_instance(&spec.instance).await.unwrap();
    assert_eq!(world.api.disks(PROJECT).len(), 1);
    world.api.vanish_disk(PROJECT, "web");

    // One has a data disk's name: of no interest to a class without data disks.
    world
        .api
        .plant_disk(PROJECT, "disk-00-web", "backup", types::DiskState::Detached)
        .unwrap();
    assert_eq!(
        world.oxide.find_instance(&spec.instance).await.unwrap(),
        Found::Nothing
    );
    spec.class.disks = vec![DataDisk {
        kind: DiskKind::Distributed,
        size: 1,
    }];
    let error = world
        .oxide
        .create_instance(&spec)
        .await
        .expect_err("the name is taken");
    assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
    spec.class.disks.clear();

    // Ours, of an earlier attempt.
    let ours = mark::describe(&spec.instance.mark);
    world
        .api
        .plant_disk(PROJECT, "web", &ours, types::DiskState::Detached)
        .unwrap();
    let error = world
        .oxide
        .create_instance(&spec)
        .await
        .expect_err("it is in the way");
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    world.oxide.delete_instance(&spec.instance).await.unwrap();
    world.oxide.create_instance(&spec).await.unwrap();
    world.until(&spec.instance, InstanceState::Stopped).await;
}

#[tokio::test]
async fn a_machine_of_the_go_provider_is_adopted_only_where_told_to() {
    let world = World::start().await;
    world.api.plant_instance(PROJECT, "web", &bare("oxide")).unwrap();
    let state = types::DiskState::Detached;
    for name in ["web", "disk-00-web", "other"] {
        world
            .api
            .plant_disk(PROJECT, name, &bare("oxide"), state.clone())
            .unwrap();
    }
    let adopting = InstanceRef {
        adopt_bare: true,
        ..asked("web")
    };
    let ours = world.ours(&adopting).await;
    assert_eq!(ours.mark, None);
    world.delete(&adopting).await;
    assert_eq!(
        names(world.api.disks(PROJECT), |disk| disk.name.to_string()),
        ["other"]
    );
    assert!(world.api.instances(PROJECT).is_empty());
}

#[tokio::test]
async fn a_project_out_of_sight_is_never_an_absence() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    let web = world.until(&spec.instance, InstanceState::Stopped).await;
    world.api.hide_project(TOKEN, PROJECT, true);
    let oxide = &world.oxide;
    let denied = |verb: &str, error: Option<CloudError>| {
        let error = error.unwrap_or_else(|| panic!("{verb} worked"));
        assert_eq!(error.kind, ErrorKind::Denied, "{verb}: {error}");
    };
    denied("find", oxide.find_instance(&spec.instance).await.err());
    denied("find by id", oxide.find_instance(&web).await.err());
    denied("list", oxide.list_instances(&project(), "oxide", "x").await.err());
    denied("list", oxide.list_marked(&project(), "oxide").await.err());
    denied("image", oxide.find_image(&project(), &key()).await.err());
    denied("create", oxide.create_instance(&spec).await.err());
    denied("delete", oxide.delete_instance(&web).await.err());
    denied(
        "delete leftovers",
        oxide.delete_instance(&spec.instance).await.err(),
    );
    let import = oxide.import_image(&project(), &key(), &source(1).1).await;
    denied("import", import.err());
    oxide.check().await.unwrap();
    world.api.hide_project(TOKEN, PROJECT, false);
    world.until(&web, InstanceState::Stopped).await;

    world.api.revoke_token(TOKEN);
    denied("check", oxide.check().await.err());
    denied("find", oxide.find_instance(&spec.instance).await.err());
    denied("delete", oxide.delete_instance(&web).await.err());
    denied("list", oxide.list_instances(&project(), "oxide", "x").await.err());
}

#[tokio::test]
async fn a_rack_that_is_too_old_says_so_at_the_check() {
    let world = World::with(OxideOptions {
        newest_api: 2_026_010_100,
        ..OxideOptions::default()
    })
    .await;
    let error = world.oxide.check().await.expect_err("it must fail");
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(
        error.to_string().contains("rack is older than API 2026060800"),
        "{error}"
    );
}

#[tokio::test]
async fn a_list_has_all_of_ours_and_nobody_elses() {
    let world = World::start().await;
    let mark = asked("web").mark;
    let other = |change: fn(&mut Mark)| {
        let mut mark = mark.clone();
        change(&mut mark);
        mark::describe(&mark)
    };
    for (name, description) in [
        ("a", mark::describe(&asked("a").mark)),
        ("b", mark::describe(&asked("b").mark)),
        ("c", bare("oxide")),
        ("d", mark::describe(&asked("d").mark)),
        ("e", other(|mark| mark.provider = "two".to_owned())),
        ("f", other(|mark| mark.installation = "else".to_owned())),
        ("g", bare("two")),
        ("h", "a database".to_owned()),
    ] {
        world.api.plant_instance(PROJECT, name, &description).unwrap();
    }
    let listed = world
        .oxide
        .list_instances(&project(), "oxide", &mark.installation)
        .await
        .unwrap();
    let mut listed: Vec<_> = listed
        .into_iter()
        .map(|instance| (instance.name, instance.mark.map(|mark| mark.request)))
        .collect();
    listed.sort();
    let ours = |name: &str| (name.to_owned(), Some(name.to_owned()));
    assert_eq!(listed, [ours("a"), ours("b"), ("c".to_owned(), None), ours("d")]);
}

#[tokio::test]
async fn what_is_marked_is_listed_once_of_every_installation_and_with_what_is_left() {
    let world = World::start().await;
    let ours = asked("a").mark;
    let other = Mark {
        installation: "else".to_owned(),
        ..asked("b").mark
    };
    let left = asked("left").mark;
    for (name, description) in [
        ("a", mark::describe(&ours)),
        ("b", mark::describe(&other)),
        ("c", bare("oxide")),
        ("d", bare("two")),
        ("e", "a database".to_owned()),
    ] {
        world.api.plant_instance(PROJECT, name, &description).unwrap();
    }
    let detached = types::DiskState::Detached;
    for (name, description) in [
        // The instance is there: its disks are no news.
        ("disk-00-a", mark::describe(&ours)),
        ("left", mark::describe(&left)),
        ("disk-00-left", mark::describe(&left)),
        ("disk-07-gone", bare("oxide")),
        ("scratch", mark::describe_import("oxide", "talos-1")),
        ("backup", "backup".to_owned()),
    ] {
        world
            .api
            .plant_disk(PROJECT, name, description.as_str(), detached.clone())
            .unwrap();
    }
    assert_eq!(world.oxide.list_scopes().await.unwrap(), [project()]);
    let mut marked: Vec<_> = world
        .oxide
        .list_marked(&project(), "oxide")
        .await
        .unwrap()
        .into_iter()
        .map(|it| (it.name, it.id.is_some(), it.mark))
        .collect();
    marked.sort_by(|one, other| one.0.cmp(&other.0));
    let of = |name: &str, instance, mark| (name.to_owned(), instance, mark);
    assert_eq!(
        marked,
        [
            of("a", true, Some(ours)),
            of("b", true, Some(other)),
            of("c", true, None),
            of("gone", false, None),
            of("left", false, Some(left)),
        ]
    );
}

#[tokio::test]
async fn a_list_that_leads_in_a_circle_ends() {
    let world = World::start().await;
    for page in [r#"{"items":[],"next_page":"a"}"#.to_owned(), String::new()] {
        let asked = AtomicUsize::new(0);
        world.hook(move |_, _| Verdict::Raw {
            status: 200,
            body: match page.as_str() {
                // Always another page.
                "" => format!(
                    r#"{{"items":[],"next_page":"{}"}}"#,
                    asked.fetch_add(1, Ordering::SeqCst)
                ),
                page => page.to_owned(),
            },
        });
        let error = world
            .oxide
            .list_instances(&project(), "oxide", "x")
            .await
            .unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unexpected);
        assert!(error.to_string().contains("does not end"), "{error}");
    }
}

#[tokio::test]
async fn a_start_that_cannot_be_placed_says_why() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    let web = world.until(&spec.instance, InstanceState::Stopped).await;
    world.api.set_limits(|limits| limits.vcpus = 0);
    let error = world
        .oxide
        .start_instance(&web, &UserData(Vec::new()))
        .await
        .expect_err("no quota");
    assert_eq!(error.kind, ErrorKind::Exhausted);
    assert!(error.to_string().contains("quota"), "{error}");
    world.api.set_limits(|limits| {
        limits.vcpus = 100;
        limits.sleds.clear();
    });
    let error = world
        .oxide
        .start_instance(&web, &UserData(Vec::new()))
        .await
        .expect_err("no sled");
    assert_eq!(error.kind, ErrorKind::Exhausted);
    assert!(error.to_string().contains("capacity"), "{error}");
    world.api.set_limits(|limits| limits.storage = 0);
    let error = world
        .oxide
        .create_instance(&InstanceSpec {
            instance: asked("db"),
            ..spec.clone()
        })
        .await
        .expect_err("no storage");
    assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
}

#[tokio::test]
async fn the_end_of_a_console_is_read_while_the_machine_runs() {
    let mut world = World::start().await;
    let spec = world.spec("web").await;
    world.oxide.create_instance(&spec).await.unwrap();
    let stopped = world.until(&spec.instance, InstanceState::Stopped).await;
    assert_eq!(world.oxide.read_console(&stopped).await.unwrap(), None);
    world
        .oxide
        .start_instance(&stopped, &UserData(Vec::new()))
        .await
        .unwrap();
    let running = world.until(&spec.instance, InstanceState::Running).await;
    world.api.write_console(PROJECT, "web", &"early\n".repeat(4000));
    world
        .api
        .write_console(PROJECT, "web", "Domain: \u{fc}ber.example\nlate\n");
    world.calls();
    let console = world.oxide.read_console(&running).await.unwrap().unwrap();
    assert_eq!(world.calls(), "1 instance_serial_console");
    assert_eq!(console.0.len(), 16 * 1024);
    assert!(console.0.ends_with("early\nDomain: \u{fc}ber.example\nlate\n"));
    assert_eq!(format!("{console:?}"), "Console(<redacted>, 16384 bytes)");
    // Nobody's, or nobody's that we know.
    assert_eq!(world.oxide.read_console(&spec.instance).await.unwrap(), None);
    let unknown = InstanceRef {
        id: Some(Uuid::new_v4().to_string()),
        ..running.clone()
    };
    assert_eq!(world.oxide.read_console(&unknown).await.unwrap(), None);
    world.api.revoke_token(TOKEN);
    let refused = world.oxide.read_console(&running).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Denied);
}

#[tokio::test]
async fn what_a_class_refers_to_in_vain_is_rejected() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    for change in [
        (|class| class.network_interfaces[0].vpc_name = "gone".to_owned()) as fn(&mut OxideClass),
        |class| class.network_interfaces[0].subnet_name = "gone".to_owned(),
        |class| class.anti_affinity_groups = vec!["gone".to_owned()],
        |class| class.enable_jumbo_frames = true,
    ] {
        let mut spec = spec.clone();
        change(&mut spec.class);
        let error = world
            .oxide
            .create_instance(&spec)
            .await
            .expect_err("it must fail");
        assert_eq!(error.kind, ErrorKind::Rejected, "{error}");
    }
    assert_eq!(
        world.oxide.find_instance(&spec.instance).await.unwrap(),
        Found::Nothing
    );
}

#[tokio::test]
async fn a_lost_answer_is_unavailable_and_the_next_call_converges() {
    let world = World::start().await;
    let spec = world.spec("web").await;
    world.hook(|operation, moment| match (operation, moment) {
        ("instance_create", Moment::After) => Verdict::Drop,
        _ => Verdict::Proceed,
    });
    let error = world.oxide.create_instance(&spec).await.expect_err("no answer");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    world.api.set_hook(None);
    world.oxide.create_instance(&spec).await.unwrap();
    world.until(&spec.instance, InstanceState::Stopped).await;
    for (status, kind) in [
        (500, ErrorKind::Unavailable),
        (503, ErrorKind::Unavailable),
        (429, ErrorKind::Throttled { after: None }),
    ] {
        world.hook(move |_, _| Verdict::Status {
            status,
            error_code: None,
            message: "on purpose".to_owned(),
        });
        let error = world
            .oxide
            .find_instance(&spec.instance)
            .await
            .expect_err("it must fail");
        assert_eq!(error.kind, kind);
    }
    world.hook(|_, _| Verdict::Raw {
        status: 502,
        body: "<html>bad gateway".to_owned(),
    });
    let error = world
        .oxide
        .find_instance(&spec.instance)
        .await
        .expect_err("it must fail");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn an_import_makes_the_image_byte_for_byte_and_leaves_nothing_else() {
    let mut world = World::start().await;
    let (image, source) = source(13);
    assert_eq!(world.oxide.find_image(&project(), &key()).await.unwrap(), None);
    world.calls();
    let made = world
        .oxide
        .import_image(&project(), &key(), &source)
        .await
        .unwrap();
    expect_test::expect![[r#"
        10 disk_bulk_write_import
        1 disk_bulk_write_import_start
        1 disk_bulk_write_import_stop
        1 disk_create
        1 disk_delete
        1 disk_finalize_import
        1 disk_list
        1 disk_view
        1 image_create
        2 image_view
        1 snapshot_delete
        2 snapshot_view"#]]
    .assert_eq(&world.calls().replace(", ", "\n"));
    assert_eq!(made.name, IMAGE);
    assert_eq!(
        world.oxide.find_image(&project(), &key()).await.unwrap(),
        Some(made.clone())
    );
    let sha256 = hex::encode(Sha256::digest(&image));
    assert_eq!(
        world.api.image_sha256(PROJECT, IMAGE, image.len() as u64),
        Some(sha256.clone())
    );
    let [shown] = <[_; 1]>::try_from(world.api.images(PROJECT)).unwrap();
    assert_eq!(
        shown.description,
        format!(
            "Talos Linux 1.12.0 nocloud amd64, schematic {}, sha256 {sha256}",
            key().schematic
        )
    );
    assert_eq!(
        (shown.os.as_str(), shown.version.as_str()),
        ("Talos Linux", "1.12.0")
    );
    world.nothing_but_images();
    // Once more: nothing to do.
    assert_eq!(
        world
            .oxide
            .import_image(&project(), &key(), &source)
            .await
            .unwrap(),
        made
    );
    assert_eq!(source.opened.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_import_leaves_no_scratch_even_if_an_answer_is_lost_while_it_clears_up() {
    for call in ["disk_view", "snapshot_delete", "disk_delete"] {
        let world = World::start().await;
        let lost = AtomicUsize::new(0);
        world.hook(move |operation, moment| {
            let first =
                (operation, moment) == (call, Moment::After) && lost.fetch_add(1, Ordering::Relaxed) == 0;
            if first { Verdict::Drop } else { Verdict::Proceed }
        });
        let (_, source) = source(0);
        let imported = world.oxide.import_image(&project(), &key(), &source).await;
        assert!(imported.is_ok(), "{call}: {imported:?}");
        assert!(world.api.called(call) > 0, "{call}");
        world.nothing_but_images();
    }
}

#[tokio::test]
async fn chunks_are_written_again_until_they_are_written() {
    let world = World::start().await;
    let writes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&writes);
    world.hook(move |operation, moment| {
        if operation != "disk_bulk_write_import" {
            return Verdict::Proceed;
        }
        match (counted.fetch_add(1, Ordering::Relaxed) % 7, moment) {
            (0, Moment::Before) => Verdict::Drop,
            (1, Moment::After) => Verdict::Drop,
            (2, _) => Verdict::Status {
                status: 500,
                error_code: None,
                message: "on purpose".to_owned(),
            },
            (3, Moment::Before) => Verdict::Status {
                status: 429,
                error_code: None,
                message: "on purpose".to_owned(),
            },
            _ => Verdict::Proceed,
        }
    });
    let (image, source) = source(9);
    world
        .oxide
        .import_image(&project(), &key(), &source)
        .await
        .unwrap();
    let sha256 = hex::encode(Sha256::digest(&image));
    assert_eq!(
        world.api.image_sha256(PROJECT, IMAGE, image.len() as u64),
        Some(sha256)
    );
    world.nothing_but_images();
}

#[tokio::test]
async fn a_cut_off_stream_makes_no_image_and_leaves_nothing() {
    let world = World::start().await;
    let (_, mut source) = source(9);
    source.breaks_at = Some(700_000);
    let error = world
        .oxide
        .import_image(&project(), &key(), &source)
        .await
        .expect_err("it must fail");
    assert!(error.to_string().contains("broken on purpose"), "{error}");
    assert!(world.api.images(PROJECT).is_empty());
    world.nothing_but_images();
}

#[tokio::test]
async fn an_image_that_is_larger_than_expected_gets_a_larger_disk() {
    let world = World::start().await;
    let (_, mut source) = source(3);
    source.zeros = 2 * convert::GIB;
    world
        .oxide
        .import_image(&project(), &key(), &source)
        .await
        .unwrap();
    let [image] = <[_; 1]>::try_from(world.api.images(PROJECT)).unwrap();
    assert_eq!(image.size.0, 3 * convert::GIB);
    assert_eq!(source.opened.load(Ordering::Relaxed), 2);
    world.nothing_but_images();
}

#[tokio::test]
async fn two_imports_at_once_leave_one_image() {
    let world = World::start().await;
    let other = backend(&world.host, TOKEN);
    let ((_, one), (_, two), (_, three)) = (source(9), source(9), source(0));
    let (scope, key) = (project(), key());
    let (first, second, third) = tokio::join!(
        world.oxide.import_image(&scope, &key, &one),
        world.oxide.import_image(&scope, &key, &two),
        other.import_image(&scope, &key, &three),
    );
    assert_eq!(first.unwrap(), second.unwrap());
    third.unwrap();
    assert_eq!(world.api.images(PROJECT).len(), 1);
    world.nothing_but_images();
}

/// Every call of an import, in turn, is the last one before the daemon dies: before it took effect, and
/// after.
#[tokio::test]
async fn an_import_that_is_cut_off_anywhere_can_be_repeated() {
    for moment in [Moment::Before, Moment::After] {
        for fatal in 0.. {
            let world = World::start().await;
            let calls = Arc::new(AtomicUsize::new(0));
            let (counted, died) = (Arc::clone(&calls), Arc::new(tokio::sync::Notify::new()));
            let dying = Arc::clone(&died);
            let hook: Hook = Arc::new(move |_, now| {
                let (counted, dying) = (Arc::clone(&counted), Arc::clone(&dying));
                Box::pin(async move {
                    if now == moment && counted.fetch_add(1, Ordering::Relaxed) == fatal {
                        dying.notify_one();
                        return Verdict::Hang;
                    }
                    Verdict::Proceed
                })
            });
            world.api.set_hook(Some(hook));
            let (image, source) = source(0);
            let (scope, key) = (project(), key());
            let finished = tokio::select! {
                made = world.oxide.import_image(&scope, &key, &source) => made.is_ok(),
                () = died.notified() => false,
            };
            world.api.set_hook(None);
            // Another process; it looks for the image first, as the engine does.
            let again = backend(&world.host, TOKEN);
            let there = again.find_image(&scope, &key).await.unwrap();
            if there.is_none() {
                again.import_image(&scope, &key, &source).await.unwrap();
            }
            let sha256 = hex::encode(Sha256::digest(&image));
            assert_eq!(
                world.api.image_sha256(PROJECT, IMAGE, image.len() as u64),
                Some(sha256)
            );
            if there.is_none() || finished {
                world.nothing_but_images();
            } else {
                // It died between the image and the broom: the next import sweeps.
                let next = ImageKey {
                    talos_version: "1.12.1".to_owned(),
                    ..key
                };
                again.import_image(&scope, &next, &source).await.unwrap();
                world.nothing_but_images();
            }
            if finished {
                break;
            }
        }
    }
}

#[tokio::test]
async fn what_an_import_left_after_its_image_was_made_goes_when_the_image_is_found() {
    let world = World::start().await;
    let image = world.image().await;
    world
        .api
        .plant_disk(
            PROJECT,
            "imp-44444444-aaaaaaaa",
            &mark::describe_import("oxide", IMAGE),
            types::DiskState::Detached,
        )
        .unwrap();
    let found = world.oxide.find_image(&project(), &key()).await.unwrap();
    assert_eq!(found, Some(image));
    assert!(world.api.disks(PROJECT).is_empty());
    let calls = world.api.called("disk_list");
    world.oxide.find_image(&project(), &key()).await.unwrap();
    assert_eq!(world.api.called("disk_list"), calls);
}

#[tokio::test]
async fn scratch_disks_of_others_and_young_ones_of_other_images_stay() {
    let world = World::start().await;
    let plant = |name: &str, description: &str| {
        let state = types::DiskState::ImportingFromBulkWrites;
        world.api.plant_disk(PROJECT, name, description, state).unwrap();
    };
    plant("imp-11111111-aaaaaaaa", &mark::describe_import("two", IMAGE));
    plant("imp-22222222-aaaaaaaa", "somebody's disk");
    plant(
        "imp-33333333-aaaaaaaa",
        &mark::describe_import("oxide", "talos-being-imported"),
    );
    plant("imp-44444444-aaaaaaaa", &mark::describe_import("oxide", IMAGE));
    plant(
        "imp-55555555-aaaaaaaa",
        &mark::describe_import("oxide", "talos-long-there"),
    );
    world
        .api
        .plant_image(PROJECT, "talos-long-there", "an image")
        .unwrap();
    world
        .oxide
        .import_image(&project(), &key(), &source(2).1)
        .await
        .unwrap();
    assert_eq!(
        names(world.api.disks(PROJECT), |disk| disk.name.to_string()),
        [
            "imp-11111111-aaaaaaaa",
            "imp-22222222-aaaaaaaa",
            "imp-33333333-aaaaaaaa"
        ]
    );
}

#[tokio::test]
async fn an_image_of_that_name_with_another_schematic_is_foreign() {
    let world = World::start().await;
    world
        .api
        .plant_image(PROJECT, IMAGE, "Talos, of some kind")
        .unwrap();
    let error = world
        .oxide
        .find_image(&project(), &key())
        .await
        .expect_err("another image");
    assert_eq!(error.kind, ErrorKind::Foreign, "{error}");
    let error = world.oxide.import_image(&project(), &key(), &source(1).1).await;
    assert_eq!(error.expect_err("another image").kind, ErrorKind::Foreign);
}
