//! Older servers, hooks, crashes, and the management service.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_older_omni_does_not_know_teardown() {
    let world = World::with(OmniOptions {
        teardown_rpc: false,
        ..OmniOptions::default()
    });
    let kind = types::MACHINE_REQUEST_STATUSES;
    assert_refused(
        world.client.teardown(kind, "a", OWNER).await,
        Code::Unimplemented,
        "unknown method",
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_hears_of_calls_and_decides_them() {
    let world = World::new();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let hook: Hook = {
        let lines = lines.clone();
        Arc::new(move |call: &Call, moment| {
            lines.lock().unwrap().push(format!("{moment:?} {call}"));
            let verdict = match (call.id.as_str(), moment) {
                ("refused", Moment::Before) => Verdict::Fail(FailCode::Aborted, "no".to_owned()),
                ("lost", Moment::After) => Verdict::Drop,
                ("hung", Moment::Before) => Verdict::Hang,
                _ => Verdict::Proceed,
            };
            async move { verdict }.boxed()
        })
    };
    world.omni.set_hook(hook);
    let create = |id: &'static str| {
        let spec = specs::MachineRequestStatusSpec {
            stage: 1,
            ..Default::default()
        };
        let resource = resource(types::MACHINE_REQUEST_STATUSES, id, &spec.encode_to_vec());
        let client = world.client.clone();
        async move { client.create(resource, OWNER).await }
    };
    let (fine, refused, lost, hung) = (create("fine"), create("refused"), create("lost"), create("hung"));
    fine.await.unwrap();
    assert_refused(refused.await, Code::Aborted, "no");
    assert_refused(lost.await, Code::Unavailable, "reset");
    assert!(timeout(Duration::from_secs(3600), hung).await.is_err());
    assert!(world.status("refused").is_none() && world.status("hung").is_none());
    assert!(
        world.status("lost").is_some(),
        "it took effect, the answer was lost"
    );
    expect_test::expect![[r#"
        Before create MachineRequestStatuses/fine: stage PROVISIONING
        After create MachineRequestStatuses/fine: stage PROVISIONING
        Before create MachineRequestStatuses/refused: stage PROVISIONING
        Before create MachineRequestStatuses/lost: stage PROVISIONING
        After create MachineRequestStatuses/lost: stage PROVISIONING
        Before create MachineRequestStatuses/hung: stage PROVISIONING"#]]
    .assert_eq(&lines.lock().unwrap().join("\n"));
    assert_eq!(world.omni.count(Rpc::Create), 4);

    world.omni.clear_hook();
    world.client.hold_described(&world.omni, &lines).await;
}

impl Client {
    /// One finalizer update, as a hook sees it.
    async fn hold_described(&self, omni: &Omni, lines: &Arc<Mutex<Vec<String>>>) {
        omni.create_request("r", "test", &template()).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        lines.lock().unwrap().clear();
        let hook: Hook = {
            let lines = lines.clone();
            Arc::new(move |call: &Call, moment| {
                if moment == Moment::Before {
                    lines.lock().unwrap().push(call.to_string());
                }
                async { Verdict::Proceed }.boxed()
            })
        };
        omni.set_hook(hook);
        self.hold("r").await;
        assert_eq!(
            *lines.lock().unwrap(),
            [
                "get MachineRequests/r",
                "update MachineRequests/r: +finalizer test.ProvisionController"
            ]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn no_call_takes_effect_after_a_crash_in_its_middle() {
    let mut world = World::new();
    let (reached, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let release = Arc::new(tokio::sync::Notify::new());
    let hook: Hook = {
        let release = release.clone();
        Arc::new(move |_: &Call, _| {
            let (reached, release) = (reached.clone(), release.clone());
            async move {
                reached.send(()).unwrap();
                release.notified().await;
                Verdict::Proceed
            }
            .boxed()
        })
    };
    world.omni.set_hook(hook);
    let client = world.client.clone();
    let mut calls = JoinSet::new();
    calls.spawn(async move {
        client
            .create(resource(types::MACHINE_REQUEST_STATUSES, "a", &[]), OWNER)
            .await
    });
    seen.recv().await.unwrap();
    world.crash().await;
    release.notify_one();
    assert!(calls.join_next().await.unwrap().unwrap().is_err());
    assert!(world.status("a").is_none());
}

#[tokio::test(start_paused = true)]
async fn schematics_are_checked_and_named_by_their_hash() {
    let world = World::new();
    let create = |raw: &'static str| {
        let client = world.client.clone();
        async move {
            let message = CreateSchematicFromRawRequest {
                raw_schematic: raw.as_bytes().to_vec(),
                talos_version: "1.12.0".to_owned(),
            };
            let method = "/management.ManagementService/CreateSchematicFromRaw";
            ManagementServiceClient::new(client.channel.clone())
                .create_schematic_from_raw(client.sign(method, message))
                .await
        }
    };
    for (raw, id) in [
        (
            "customization: {}\n",
            "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba",
        ),
        (
            "customization:\n    extraKernelArgs:\n        - noapic\n        - nolapic\n",
            "9cba8e32753f91a16c1837ab8abf356af021706ef284aef07380780177d9a06c",
        ),
        (
            "customization:\n    meta:\n        - key: 10\n          value: foo\n",
            "d308a2a5ee2277bed5fbaa104fcbc8d59122abfa737df987a95b4ca763459a7f",
        ),
        (
            "overlay:\n    image: siderolabs/sbc-raspberrypi\n    name: rpi_generic\ncustomization: {}\n",
            "ee21ef4a5ef808a9b7484cc0dda0f25075021691c8c09a276591eedb638ea1f9",
        ),
    ] {
        assert_eq!(create(raw).await.unwrap().into_inner().schematic_id, id);
        assert_eq!(world.omni.schematic(id).unwrap(), raw);
    }
    assert_refused(create("customisation: {}\n").await, Code::Unknown, "schematic");

    let asset = |client: Client| async move {
        let message = BootAssetUrlRequest {
            talos_version: "v1.12.0".to_owned(),
            schematic_id: "abc".to_owned(),
            boot_asset_kind: 3,
            platform: "nocloud".to_owned(),
            architecture: "amd64".to_owned(),
            format: "raw.xz".to_owned(),
            ..Default::default()
        };
        let method = "/management.ManagementService/GetBootAssetURL";
        ManagementServiceClient::new(client.channel.clone())
            .get_boot_asset_url(client.sign(method, message))
            .await
    };
    assert_refused(
        asset(world.client.clone()).await,
        Code::Unimplemented,
        "unknown method",
    );
    world
        .omni
        .configure(|options| options.boot_asset_base_url = Some("http://factory".to_owned()));
    let url = asset(world.client.clone()).await.unwrap().into_inner().url;
    assert_eq!(url, "http://factory/image/abc/v1.12.0/nocloud-amd64.raw.xz");
}

#[tokio::test]
async fn it_serves_on_loopback_too() {
    let omni = Omni::default();
    let key = omni.add_provider("test").unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut run = JoinSet::new();
    run.spawn(omni.serve(tokio_stream::wrappers::TcpListenerStream::new(listener)));
    let mut client = Client::new(&omni, "test", key.expose());
    client.channel = Endpoint::new(format!("http://{address}")).unwrap().connect_lazy();
    client.register().await;
}

#[tokio::test(start_paused = true)]
async fn a_reset_breaks_all_connections_and_omni_can_be_dialled_again() {
    let world = World::new();
    let mut watch = world.client.watch(types::MACHINE_REQUESTS, bootstrap()).await;
    watch.opened().await;
    watch.event().await;
    let hook: Hook = Arc::new(|call: &Call, moment| {
        let reset = call.rpc == Rpc::Create && moment == Moment::After;
        async move { if reset { Verdict::Reset } else { Verdict::Proceed } }.boxed()
    });
    world.omni.set_hook(hook);
    let status = resource(types::MACHINE_REQUEST_STATUSES, "a", &[]);
    assert!(world.client.create(status, OWNER).await.is_err());
    assert!(watch.next().await.is_err());
    world
        .client
        .get(types::MACHINE_REQUEST_STATUSES, "a")
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_stored_can_be_read_as_the_clients_kinds() {
    let world = World::new();
    world.omni.create_request("a", "test", &template()).unwrap();
    world.settle().await;
    let request = world
        .omni
        .get::<crate::omni::kinds::MachineRequests>("test", "a")
        .unwrap();
    assert_eq!(*request.spec, template());
    assert_eq!(request.metadata.version, 2);
    assert_eq!(
        world.omni.list::<crate::omni::kinds::MachineRequests>("test"),
        [request]
    );
}
