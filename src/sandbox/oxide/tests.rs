//! The vendor's own client against the fake.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{FutureExt as _, StreamExt as _};
use oxide::prelude::*;
use oxide::{Client, Error};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use super::*;

const TOKEN: &str = "oxide-token-sandbox";
const PROJECT: &str = "talos";

struct World {
    api: OxideApi,
    client: Client,
    host: String,
    _server: JoinSet<()>,
}

impl World {
    async fn start(options: OxideOptions) -> Self {
        let api = OxideApi::new(options);
        api.add_project(PROJECT).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", listener.local_addr().unwrap());
        let mut server = JoinSet::new();
        let served = api.clone();
        server.spawn(async move { served.serve(listener).await.unwrap() });
        let client = client(&host, TOKEN);
        Self {
            api,
            client,
            host,
            _server: server,
        }
    }

    async fn small() -> Self {
        Self::start(OxideOptions {
            page: 2,
            seed: Some(1),
            ..OxideOptions::default()
        })
        .await
    }

    /// Imports bytes as an image the way the backend does: zero chunks skipped.
    async fn import(&self, name: &str, bytes: &[u8]) -> types::Image {
        let disk = self.scratch_disk(&format!("imp-{name}")).await.unwrap();
        let c = &self.client;
        c.disk_bulk_write_import_start()
            .disk(disk.id)
            .send()
            .await
            .unwrap();
        for (index, chunk) in bytes.chunks(512 * 1024).enumerate() {
            if chunk.iter().all(|byte| *byte == 0) {
                continue;
            }
            let body = types::ImportBlocksBulkWrite {
                base64_encoded_data: STANDARD.encode(chunk),
                offset: index as u64 * 512 * 1024,
            };
            let write = c.disk_bulk_write_import().disk(disk.id).body(body);
            write.send().await.unwrap();
        }
        c.disk_bulk_write_import_stop()
            .disk(disk.id)
            .send()
            .await
            .unwrap();
        let finalize = types::FinalizeDisk {
            snapshot_name: Some(named(name)),
        };
        let sent = c.disk_finalize_import().disk(disk.id).body(finalize);
        sent.send().await.unwrap();
        let snapshot = c.snapshot_view().project(project()).snapshot(named(name));
        let snapshot = snapshot.send().await.unwrap().into_inner();
        let image = types::ImageCreate {
            description: "an image".to_owned(),
            name: named(name),
            os: "Talos Linux".to_owned(),
            source: types::ImageSource::Snapshot(snapshot.id),
            version: "1.12.0".to_owned(),
        };
        let image = c.image_create().project(project()).body(image);
        image.send().await.unwrap().into_inner()
    }

    async fn scratch_disk(&self, name: &str) -> Result<types::Disk, Error<types::Error>> {
        let body = types::DiskCreate {
            description: "scratch".to_owned(),
            disk_backend: types::DiskBackend::Distributed(types::DiskSource::ImportingBlocks {
                block_size: types::BlockSize::try_from(512).unwrap(),
            }),
            name: named(name),
            size: types::ByteCount(2 * disks::GIB),
        };
        let sent = self.client.disk_create().project(project()).body(body).send();
        sent.await.map(oxide::ResponseValue::into_inner)
    }

    fn instance(&self, name: &str, image: Uuid) -> types::InstanceCreate {
        types::InstanceCreate {
            anti_affinity_groups: Vec::new(),
            auto_restart_policy: None,
            boot_disk: Some(types::InstanceDiskAttachment::Create {
                description: "boot".to_owned(),
                disk_backend: types::DiskBackend::Distributed(types::DiskSource::Image {
                    image_id: image,
                    read_only: false,
                }),
                name: named(name),
                size: types::ByteCount(10 * disks::GIB),
            }),
            cpu_platform: None,
            description: "ours".to_owned(),
            disks: Vec::new(),
            enable_jumbo_frames: false,
            external_ips: Vec::new(),
            hostname: name.parse().unwrap(),
            memory: types::ByteCount(4 * disks::GIB),
            multicast_groups: Vec::new(),
            name: named(name),
            ncpus: types::InstanceCpuCount(2),
            network_interfaces: types::InstanceNetworkInterfaceAttachment::DefaultIpv4,
            ssh_public_keys: Some(Vec::new()),
            start: false,
            user_data: STANDARD.encode("hello: world\n"),
        }
    }

    async fn create(&self, body: types::InstanceCreate) -> Result<types::Instance, Error<types::Error>> {
        let sent = self.client.instance_create().project(project()).body(body).send();
        sent.await.map(oxide::ResponseValue::into_inner)
    }

    async fn state(&self, name: &str) -> types::InstanceState {
        let view = self
            .client
            .instance_view()
            .project(project())
            .instance(named(name));
        view.send().await.unwrap().run_state
    }

    async fn settles(&self, condition: impl Fn(&OxideApi) -> bool) {
        let mut changes = self.api.changes();
        while !condition(&self.api) {
            let change = tokio::time::timeout(Duration::from_secs(60), changes.changed());
            change.await.expect("the rack settles").unwrap();
        }
    }
}

fn client(host: &str, token: &str) -> Client {
    let mut headers = reqwest::header::HeaderMap::new();
    headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
    let http = reqwest::Client::builder()
        .default_headers(headers)
        .build()
        .unwrap();
    Client::new_with_client(host, http)
}

fn named(name: &str) -> types::Name {
    types::Name::try_from(name).unwrap()
}

fn project() -> types::NameOrId {
    types::NameOrId::Name(named(PROJECT))
}

/// Status, code and message of a refusal.
fn refusal<T: fmt::Debug>(result: Result<T, Error<types::Error>>) -> (u16, String, String) {
    match result {
        Err(Error::ErrorResponse(answer)) => (
            answer.status().as_u16(),
            answer.error_code.clone().unwrap_or_default(),
            answer.message.clone(),
        ),
        other => panic!("not a refusal: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_import_becomes_an_image_with_the_same_bytes() {
    let world = World::small().await;
    let mut bytes = vec![0; 3 * 512 * 1024];
    bytes[..1000].fill(1);
    bytes[1024 * 1024 + 5..1024 * 1024 + 9].fill(2);

    let image = world.import("talos", &bytes).await;

    assert_eq!(image.size.0, 2 * disks::GIB);
    assert_eq!(
        world.api.image_sha256(PROJECT, "talos", bytes.len() as u64),
        Some(hex::encode(Sha256::digest(&bytes)))
    );
    assert_eq!(world.api.image_writes(PROJECT, "talos"), Some(2));
    let disks = world.api.disks(PROJECT);
    assert!(
        matches!(disks[0].state, types::DiskState::Detached),
        "the scratch disk stays"
    );
    let c = &world.client;
    c.disk_delete().disk(disks[0].id).send().await.unwrap();
    let snapshot = world.api.snapshots(PROJECT)[0].id;
    c.snapshot_delete().snapshot(snapshot).send().await.unwrap();
    assert!(world.api.disks(PROJECT).is_empty() && world.api.snapshots(PROJECT).is_empty());

    c.image_promote().image(image.id).send().await.unwrap();
    let silo = c.image_view().image(named("talos")).send().await.unwrap();
    assert_eq!(silo.project_id, None);
}

#[tokio::test(start_paused = true)]
async fn a_disk_in_an_import_state_cannot_be_deleted_and_keeps_its_name() {
    let world = World::small().await;
    let disk = world.scratch_disk("scratch").await.unwrap();
    assert!(matches!(disk.state, types::DiskState::ImportReady));
    let c = &world.client;
    let delete = || c.disk_delete().disk(disk.id).send();
    assert_eq!(
        refusal(delete().await).2,
        "disk cannot be deleted in state \"import_ready\""
    );
    c.disk_bulk_write_import_start()
        .disk(disk.id)
        .send()
        .await
        .unwrap();
    assert_eq!(
        refusal(delete().await).2,
        "disk cannot be deleted in state \"importing_from_bulk_writes\""
    );
    assert_eq!(
        refusal(world.scratch_disk("scratch").await),
        (
            400,
            "ObjectAlreadyExists".to_owned(),
            "already exists: disk \"scratch\"".to_owned()
        )
    );
    let finalize = || c.disk_finalize_import().disk(disk.id);
    let body = types::FinalizeDisk { snapshot_name: None };
    let early = finalize().body(body.clone()).send().await;
    assert_eq!(
        refusal(early).2,
        "cannot finalize disk in state ImportingFromBulkWrites"
    );
    c.disk_bulk_write_import_stop()
        .disk(disk.id)
        .send()
        .await
        .unwrap();
    finalize().body(body).send().await.unwrap();
    delete().await.unwrap();
    assert!(world.api.disks(PROJECT).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_bulk_write_has_to_fit_chunk_block_and_disk() {
    let world = World::small().await;
    let disk = world.scratch_disk("scratch").await.unwrap();
    let c = &world.client;
    let write = |offset: u64, length: usize| {
        let body = types::ImportBlocksBulkWrite {
            base64_encoded_data: STANDARD.encode(vec![1; length]),
            offset,
        };
        c.disk_bulk_write_import().disk(disk.id).body(body).send()
    };
    assert!(refusal(write(0, 512).await).2.contains("in state ImportReady"));
    c.disk_bulk_write_import_start()
        .disk(disk.id)
        .send()
        .await
        .unwrap();
    write(512, 512 * 1024).await.unwrap();
    assert!(
        refusal(write(0, 512 * 1024 + 512).await)
            .2
            .contains("over maximum chunk size")
    );
    assert!(refusal(write(1, 512).await).2.contains("multiples of block size"));
    assert!(refusal(write(2 * disks::GIB, 512).await).2.contains("beyond"));
}

#[tokio::test(start_paused = true)]
async fn an_instance_goes_through_its_states_and_leaves_its_disk_behind() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    let mut happenings = world.api.happenings();

    let mut creating = JoinSet::new();
    creating.spawn({
        let (client, body) = (world.client.clone(), world.instance("web-1", image.id));
        async move {
            let sent = client.instance_create().project(project()).body(body);
            sent.send().await.unwrap().into_inner()
        }
    });
    world.settles(|api| !api.instances(PROJECT).is_empty()).await;
    assert_eq!(world.state("web-1").await, types::InstanceState::Creating);
    let created = creating.join_next().await.unwrap().unwrap();
    assert_eq!(created.run_state, types::InstanceState::Stopped);

    let c = &world.client;
    let id = created.id;
    let started = c.instance_start().instance(id).send().await.unwrap();
    assert_eq!(started.run_state, types::InstanceState::Starting);
    c.instance_start().instance(id).send().await.unwrap();
    assert_eq!(
        refusal(c.instance_delete().instance(id).send().await).2,
        "cannot delete instance: instance is running or has not yet fully stopped"
    );
    assert_eq!(
        happenings.recv().await,
        Some(Happening::Booted {
            id,
            user_data: b"hello: world\n".to_vec()
        })
    );
    assert_eq!(world.state("web-1").await, types::InstanceState::Running);
    c.instance_reboot().instance(id).send().await.unwrap();
    assert!(matches!(happenings.recv().await, Some(Happening::Booted { .. })));

    let stopping = c.instance_stop().instance(id).send().await.unwrap();
    assert_eq!(stopping.run_state, types::InstanceState::Stopping);
    assert_eq!(
        refusal(c.instance_start().instance(id).send().await),
        (
            409,
            "Conflict".to_owned(),
            "instance must finish stopping before it can be started".to_owned()
        )
    );
    assert_eq!(happenings.recv().await, Some(Happening::Stopped { id }));
    c.instance_stop().instance(id).send().await.unwrap();
    let disks: Vec<_> = c.instance_disk_list().instance(id).stream().collect().await;
    let disk = disks[0].as_ref().unwrap().id;
    assert!(
        refusal(c.disk_delete().disk(disk).send().await)
            .2
            .contains("\"attached\"")
    );

    c.instance_delete().instance(id).send().await.unwrap();
    assert_eq!(happenings.recv().await, Some(Happening::Gone { id }));
    assert_eq!(
        refusal(c.instance_view().instance(id).send().await),
        (
            404,
            "ObjectNotFound".to_owned(),
            format!("not found: instance with id \"{id}\"")
        )
    );
    let left = world.api.disks(PROJECT);
    assert!(
        left.iter()
            .any(|it| it.id == disk && matches!(it.state, types::DiskState::Detached))
    );
    c.disk_delete().disk(disk).send().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_start_on_creation_hides_that_there_is_no_room() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    world.api.set_limits(|limits| limits.sleds.clear());
    let mut body = world.instance("web-1", image.id);
    body.start = true;
    let created = world.create(body).await.unwrap();
    assert_eq!(created.run_state, types::InstanceState::Stopped);
    let start = || world.client.instance_start().instance(created.id).send();
    assert_eq!(
        refusal(start().await),
        (
            507,
            "InsufficientCapacity".to_owned(),
            "Insufficient capacity: Failed to place instance: Could not find any valid sled on which this \
             instance can be placed"
                .to_owned()
        )
    );
    world.api.set_limits(|limits| {
        *limits = Limits {
            vcpus: 1,
            ..Limits::default()
        }
    });
    assert!(refusal(start().await).2.contains("vCPU Limit Exceeded"));
    world.api.set_limits(|limits| {
        limits.vcpus = 2;
        limits.memory = 1;
    });
    assert!(refusal(start().await).2.contains("Memory Limit Exceeded"));
    world.api.set_limits(|limits| limits.memory = 4 * disks::GIB);
    start().await.unwrap();
    world.api.set_limits(|limits| limits.storage = 12 * disks::GIB);
    let other = world.create(world.instance("web-2", image.id)).await;
    let (status, _, message) = refusal(other);
    assert_eq!(status, 507);
    assert!(message.contains("Storage Limit Exceeded"), "{message}");
    assert_eq!(world.api.instances(PROJECT).len(), 1, "the saga left nothing");
}

#[tokio::test(start_paused = true)]
async fn placement_minds_cpu_platform_affinity_and_local_disks() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    let sled = |family, local_storage| Sled {
        family,
        vcpus: 64,
        memory: 1024 * disks::GIB,
        local_storage,
    };
    world.api.set_limits(|limits| {
        limits.sleds = vec![
            sled(SledFamily::Milan, 100 * disks::GIB),
            sled(SledFamily::Turin, 0),
        ];
    });
    let group = world.api.add_group(PROJECT, "apart", types::AffinityPolicy::Fail);
    let group = types::NameOrId::Id(group.unwrap());
    let start = |id| world.client.instance_start().instance(id).send();

    for (name, fits) in [("turin-1", true), ("milan-1", true), ("third", false)] {
        let mut body = world.instance(name, image.id);
        body.anti_affinity_groups = vec![group.clone()];
        if name == "turin-1" {
            body.cpu_platform = Some(types::InstanceCpuPlatform::AmdTurinV2);
        }
        let created = world.create(body).await.unwrap();
        let started = start(created.id).await;
        assert_eq!(started.is_ok(), fits, "{name}: {started:?}");
    }
    let mut body = world.instance("local", image.id);
    body.disks = vec![types::InstanceDiskAttachment::Create {
        description: "local".to_owned(),
        disk_backend: types::DiskBackend::Local,
        name: named("disk-00-local"),
        size: types::ByteCount(80 * disks::GIB),
    }];
    let first = world.create(body.clone()).await.unwrap();
    start(first.id).await.unwrap();
    body.name = named("local-2");
    body.boot_disk = None;
    if let types::InstanceDiskAttachment::Create { name, .. } = &mut body.disks[0] {
        *name = named("disk-00-local-2");
    }
    let second = world.create(body).await.unwrap();
    assert_eq!(refusal(start(second.id).await).0, 507);
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_cannot_be_is_refused_and_leaves_nothing() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    let before = world.api.disks(PROJECT).len();
    type Spoil = fn(&mut types::InstanceCreate);
    let nic = |vpc: &str, subnet: &str, name: &str| types::InstanceNetworkInterfaceCreate {
        description: String::new(),
        ip_config: types::PrivateIpStackCreate::V4(types::PrivateIpv4StackCreate {
            ip: types::Ipv4Assignment::Auto,
            transit_ips: Vec::new(),
        }),
        name: named(name),
        subnet_name: named(subnet),
        vpc_name: named(vpc),
    };
    let cases: [(Spoil, u16, &str); 8] = [
        (
            |it| it.ncpus.0 = 255,
            400,
            "cannot have more than 254 vCPUs per instance",
        ),
        (|it| it.memory.0 += 1, 400, "memory must be divisible by 1 GiB"),
        (|it| it.enable_jumbo_frames = true, 400, "jumbo-frames opt-in"),
        (
            |it| it.user_data = STANDARD.encode(vec![b'#'; 32 * 1024 + 1]),
            400,
            "maximum length is 32768",
        ),
        (|it| it.user_data = "%".to_owned(), 400, "user_data"),
        (
            |it| it.anti_affinity_groups = vec![project()],
            404,
            "anti-affinity-group with name \"talos\"",
        ),
        (
            |it| it.ssh_public_keys = Some(vec![project()]),
            404,
            "ssh-key with name \"talos\"",
        ),
        (
            |it| {
                if let Some(types::InstanceDiskAttachment::Create { size, .. }) = &mut it.boot_disk {
                    size.0 = disks::GIB;
                }
            },
            400,
            "disk size 1073741824 must be greater than or equal to image size 2147483648",
        ),
    ];
    for (spoil, status, text) in cases {
        let mut body = world.instance("web-1", image.id);
        spoil(&mut body);
        let (got, _, message) = refusal(world.create(body).await);
        assert_eq!((got, message.contains(text)), (status, true), "{message}");
    }
    let nics = [
        (vec![], "All interfaces must be in the same VPC"),
        (
            vec![nic("default", "default", "a"), nic("other", "default", "b")],
            "All interfaces must be in the same VPC",
        ),
        (
            vec![nic("nowhere", "default", "a")],
            "not found: vpc with name \"nowhere\"",
        ),
        (
            vec![nic("default", "nowhere", "a")],
            "not found: vpc-subnet with name \"nowhere\"",
        ),
        (
            vec![nic("default", "default", "a"), nic("default", "default", "b")],
            "Each interface must be in a distinct VPC Subnet",
        ),
    ];
    for (nics, text) in nics {
        let mut body = world.instance("web-1", image.id);
        body.network_interfaces = types::InstanceNetworkInterfaceAttachment::Create(nics);
        assert_eq!(refusal(world.create(body).await).2, text);
    }
    let missing = world.instance("web-1", Uuid::nil());
    assert_eq!(
        refusal(world.create(missing).await).2,
        format!("not found: image with id \"{}\"", Uuid::nil())
    );
    assert!(world.api.instances(PROJECT).is_empty());
    assert_eq!(world.api.disks(PROJECT).len(), before);

    world.create(world.instance("web-1", image.id)).await.unwrap();
    let again = refusal(world.create(world.instance("web-1", image.id)).await);
    assert_eq!(again.2, "already exists: instance \"web-1\"");
}

#[tokio::test(start_paused = true)]
async fn names_need_their_project_and_ids_must_not_have_one() {
    let world = World::small().await;
    let id = world.api.plant_instance(PROJECT, "web-1", "planted").unwrap();
    let view = || world.client.instance_view();
    view().instance(id).send().await.unwrap();
    view()
        .project(project())
        .instance(named("web-1"))
        .send()
        .await
        .unwrap();
    assert_eq!(
        refusal(view().project(project()).instance(id).send().await),
        (
            400,
            "InvalidRequest".to_owned(),
            "when providing instance as an ID project should not be specified".to_owned()
        )
    );
    assert_eq!(
        refusal(view().instance(named("web-1")).send().await).2,
        "instance should either be UUID or project should be specified"
    );
    let list = world.client.instance_list().send().await;
    assert!(refusal(list).2.contains("missing field `project`"));
    // The SDK lets upper case through, nexus does not.
    let body = types::ProjectCreate {
        description: String::new(),
        name: named("aB"),
    };
    let (status, code, message) = refusal(world.client.project_create().body(body).send().await);
    assert_eq!((status, code.as_str()), (400, ""));
    assert!(message.contains("invalid character: \"B\""), "{message}");
}

#[tokio::test(start_paused = true)]
async fn lists_are_sorted_and_paged_and_the_token_remembers_the_question() {
    let world = World::small().await;
    for name in ["c", "a", "e", "b", "d"] {
        world.api.plant_instance(PROJECT, name, "planted").unwrap();
    }
    let list = || world.client.instance_list().project(project());
    let names: Vec<_> = list()
        .stream()
        .map(|it| it.unwrap().name.to_string())
        .collect()
        .await;
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
    assert_eq!(world.api.called("instance_list"), 4, "3 pages, and an empty one");
    let down = list().sort_by(types::NameOrIdSortMode::NameDescending);
    let names: Vec<_> = down
        .stream()
        .map(|it| it.unwrap().name.to_string())
        .collect()
        .await;
    assert_eq!(names, ["e", "d", "c", "b", "a"]);
    let one = list().limit(std::num::NonZeroU32::MIN).send().await.unwrap();
    assert_eq!(one.items.len(), 1);
    let bad = world.client.instance_list().page_token("nonsense").send().await;
    assert!(refusal(bad).2.contains("corrupted token"));
}

#[tokio::test(start_paused = true)]
async fn tokens_and_versions_are_checked_before_anything_else() {
    let world = World::start(OxideOptions {
        newest_api: 2_026_010_100,
        ..OxideOptions::default()
    })
    .await;
    assert_eq!(
        refusal(world.client.current_user_view().send().await),
        (
            400,
            String::new(),
            "server does not support this API version: 2026060800.0.0".to_owned()
        )
    );
    let world = World::small().await;
    world.client.current_user_view().send().await.unwrap();
    let stranger = client(&world.host, "other");
    stranger.ping().send().await.unwrap();
    assert_eq!(
        refusal(stranger.current_user_view().send().await),
        (
            401,
            "Unauthorized".to_owned(),
            "credentials missing or invalid".to_owned()
        )
    );
    world.api.add_token("other", "somebody");
    let me = stranger.current_user_view().send().await.unwrap();
    assert_eq!(me.display_name, "somebody");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_lost_a_project_sees_nothing_of_it() {
    let world = World::small().await;
    let id = world.api.plant_instance(PROJECT, "web-1", "planted").unwrap();
    world.api.hide_project(TOKEN, PROJECT, true);
    let c = &world.client;
    assert_eq!(refusal(c.instance_view().instance(id).send().await).0, 404);
    let list = c.instance_list().project(project()).send().await;
    assert_eq!(refusal(list).2, "not found: project with name \"talos\"");
    assert_eq!(refusal(c.project_view().project(project()).send().await).0, 404);
    assert!(c.project_list().send().await.unwrap().items.is_empty());
    world.api.hide_project(TOKEN, PROJECT, false);
    c.instance_view().instance(id).send().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hook_can_refuse_drop_hang_and_lose_answers() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    let seen = Arc::new(AtomicUsize::new(0));
    let nth = seen.clone();
    world.api.set_hook(Some(Arc::new(move |call, moment| {
        let verdict = match (call.operation, moment) {
            ("instance_create", Moment::Before) => match nth.fetch_add(1, Ordering::Relaxed) {
                0 => Verdict::Status {
                    status: 503,
                    error_code: Some("ServiceNotAvailable".to_owned()),
                    message: "Service Unavailable".to_owned(),
                },
                1 => Verdict::Drop,
                2 => Verdict::Hang,
                _ => Verdict::Proceed,
            },
            ("instance_create", Moment::After) => {
                assert_eq!(call.target.as_deref(), Some("web-1"));
                Verdict::Drop
            }
            ("project_list", _) => Verdict::Raw {
                status: 502,
                body: "<html>".to_owned(),
            },
            _ => Verdict::Proceed,
        };
        async move { verdict }.boxed()
    })));
    let create = || world.create(world.instance("web-1", image.id));
    assert_eq!(refusal(create().await).0, 503);
    assert!(matches!(create().await, Err(Error::CommunicationError(_))));
    let hung = tokio::time::timeout(Duration::from_secs(5), create()).await;
    assert!(hung.is_err() && world.api.instances(PROJECT).is_empty());
    assert!(matches!(create().await, Err(Error::CommunicationError(_))));
    assert_eq!(world.api.instances(PROJECT).len(), 1, "it took effect");
    assert_eq!(world.api.called("instance_create"), 4);
    let raw = world.client.project_list().send().await;
    assert!(matches!(raw, Err(Error::InvalidResponsePayload(..))), "{raw:?}");
    world.api.set_hook(None);
    world.client.project_list().send().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_creation_goes_on_when_its_caller_goes_away() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    let create = world.create(world.instance("web-1", image.id));
    let gone = tokio::time::timeout(Duration::from_millis(20), create).await;
    assert!(gone.is_err());
    let stopped = |api: &OxideApi| {
        api.instances(PROJECT)
            .iter()
            .any(|it| it.run_state == types::InstanceState::Stopped)
    };
    world.settles(stopped).await;
}

#[tokio::test(start_paused = true)]
async fn what_happens_behind_the_back_is_seen_on_the_wire() {
    let world = World::start(OxideOptions {
        pace: OxidePace {
            auto_restart: Some(Duration::from_secs(60)),
            ..OxidePace::default()
        },
        ..OxideOptions::default()
    })
    .await;
    let image = world.import("talos", &[1; 512]).await;
    let created = world.create(world.instance("web-1", image.id)).await.unwrap();
    assert!(world.api.start_instance(PROJECT, "web-1"));
    let is = |state| move |api: &OxideApi| api.instances(PROJECT).iter().any(|it| it.run_state == state);
    world.settles(is(types::InstanceState::Running)).await;
    assert!(world.api.break_instance(PROJECT, "web-1"));
    assert_eq!(world.state("web-1").await, types::InstanceState::Failed);
    world.settles(is(types::InstanceState::Running)).await;
    assert!(world.api.stop_instance(PROJECT, "web-1"));
    world.settles(is(types::InstanceState::Stopped)).await;

    let update = types::InstanceUpdate {
        auto_restart_policy: None,
        boot_disk: created.boot_disk_id.map(types::NameOrId::Id),
        cpu_platform: None,
        enable_jumbo_frames: false,
        memory: types::ByteCount(8 * disks::GIB),
        multicast_groups: None,
        ncpus: types::InstanceCpuCount(4),
    };
    let updated = world.client.instance_update().instance(created.id).body(update);
    assert_eq!(updated.send().await.unwrap().ncpus.0, 4);

    assert!(world.api.vanish_instance(PROJECT, "web-1", true));
    assert!(world.api.instances(PROJECT).is_empty());
    let left: BTreeSet<_> = world
        .api
        .disks(PROJECT)
        .iter()
        .map(|it| it.name.to_string())
        .collect();
    assert_eq!(left, BTreeSet::from(["imp-talos".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn interfaces_addresses_and_utilization_are_shown() {
    let world = World::small().await;
    let image = world.import("talos", &[1; 512]).await;
    world.api.add_floating_ip(PROJECT, "front").unwrap();
    let mut body = world.instance("web-1", image.id);
    body.external_ips = vec![
        types::ExternalIpCreate::Ephemeral {
            pool_selector: types::PoolSelector::Auto { ip_version: None },
        },
        types::ExternalIpCreate::Floating {
            floating_ip: types::NameOrId::Name(named("front")),
        },
    ];
    let created = world.create(body).await.unwrap();
    let c = &world.client;
    c.instance_start().instance(created.id).send().await.unwrap();
    let nics = c.instance_network_interface_list().instance(created.id).stream();
    let nics: Vec<_> = nics.collect().await;
    assert!(nics.len() == 1 && nics[0].as_ref().unwrap().primary);
    let ips = c
        .instance_external_ip_list()
        .instance(created.id)
        .send()
        .await
        .unwrap();
    assert_eq!(ips.items.len(), 3);
    let used = c.utilization_view().send().await.unwrap();
    assert_eq!(
        (used.provisioned.cpus, used.provisioned.memory.0),
        (2, 4 * disks::GIB)
    );
    // The scratch disk and its snapshot, and the boot disk.
    assert_eq!(used.provisioned.storage.0, 14 * disks::GIB);

    let vpc = c.vpc_view().project(project()).vpc(named("default"));
    let vpc = vpc.send().await.unwrap().id;
    let subnet = c.vpc_subnet_view().vpc(vpc).subnet(named("default"));
    subnet.send().await.unwrap();
    let missing = c.vpc_subnet_view().vpc(vpc).subnet(named("other")).send().await;
    assert_eq!(refusal(missing).2, "not found: vpc-subnet with name \"other\"");
    let group = c.anti_affinity_group_view().project(project());
    let group = group.anti_affinity_group(named("apart")).send().await;
    assert_eq!(
        refusal(group).2,
        "not found: anti-affinity-group with name \"apart\""
    );
    c.floating_ip_view()
        .project(project())
        .floating_ip(named("front"))
        .send()
        .await
        .unwrap();
}
