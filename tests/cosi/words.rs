//! Whether upstream's types mean what ours mean: what it writes we read, and what we write it reads.
//!
//! Against upstream's server alone: what our embedded Omni knows of these types is what we know.

use expect_test::expect;
use omni_infra_provider::cloud::Timestamp;
use omni_infra_provider::omni::join::JoinInputs;
use omni_infra_provider::omni::kinds::CurrentUsers;
use omni_infra_provider::omni::kinds::{
    ConfigPatchRequestSpec, ConfigPatchRequests, ConnectionParams, FeaturesConfigs, GrpcTunnel,
    InfraProviderHealthStatusSpec, InfraProviderHealthStatuses, InfraProviderStatusSpec,
    InfraProviderStatuses, Kind, MachineRegistrations, MachineRequestSpec, MachineRequestStatusSpec,
    MachineRequestStatuses, MachineRequests, ProviderJoinConfigs, ResourceDefinitions, SiderolinkApiConfigs,
    Stage, TalosVersions,
};
use omni_infra_provider::omni::wire::cosi::GetRequest;
use omni_infra_provider::omni::{Join, Resource, Signer, State};
use omni_infra_provider::secret::Secret;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::server::{HISTORY, PROVIDER, Server, Upstream, Wire};
use super::{until, within};

/// Makes a test of each scenario.
macro_rules! upstream {
    ($($scenario:ident),* $(,)?) => {
        mod upstream {
            use super::{HISTORY, Server as _, Upstream};
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $scenario() {
                    if let Some(server) = Upstream::start(HISTORY).await {
                        super::$scenario(server).await;
                    }
                }
            )*
        }
    };
}

upstream! {
    our_kinds_are_upstreams_types_in_upstreams_namespaces,
    what_upstream_writes_we_read,
    what_we_write_upstream_reads,
    a_patch_that_upstream_compressed_is_not_ours_to_read,
    who_we_are_is_told_in_upstreams_words,
    join_inputs_are_what_upstreams_resources_say,
}

/// Writes a resource in upstream's words and reads it in ours.
async fn read<K: Kind>(server: &mut Upstream, state: &State, id: &str, fields: Value) -> K::Spec {
    let (namespace, kind) = (K::namespace(PROVIDER), K::type_name(PROVIDER));
    server.put_fields(&namespace, &kind, id, fields).await;
    state.get::<K>(id).await.unwrap().unwrap().spec
}

/// Writes a resource in our words and reads it in upstream's.
async fn written<K: Kind>(state: &State, wire: &mut Wire<Signer>, spec: K::Spec) -> String {
    state.create(&Resource::<K>::new("a", spec)).await.unwrap();
    yaml::<K>(wire, "a").await
}

/// A resource as upstream's own type renders it.
async fn yaml<K: Kind>(wire: &mut Wire<Signer>, id: &str) -> String {
    let request = GetRequest {
        namespace: K::namespace(PROVIDER),
        r#type: K::type_name(PROVIDER),
        id: id.to_owned(),
        options: None,
    };
    let answer = wire.get(request).await.unwrap().into_inner();
    answer.resource.unwrap().spec.unwrap().yaml_spec
}

async fn our_kinds_are_upstreams_types_in_upstreams_namespaces(mut server: Upstream) {
    async fn check<K: Kind>(wire: &mut Wire<Signer>) {
        let kind = K::type_name(PROVIDER);
        let definition = yaml::<ResourceDefinitions>(wire, &kind.to_lowercase()).await;
        for (field, value) in [("type", kind), ("defaultNamespace", K::namespace(PROVIDER))] {
            let line = format!("{field}: {value}");
            assert!(
                definition.lines().any(|found| found == line),
                "{line} in {definition}"
            );
        }
    }
    let mut wire = server.wire().await;
    check::<MachineRequests>(&mut wire).await;
    check::<MachineRequestStatuses>(&mut wire).await;
    check::<ConfigPatchRequests>(&mut wire).await;
    check::<MachineRegistrations>(&mut wire).await;
    check::<InfraProviderStatuses>(&mut wire).await;
    check::<InfraProviderHealthStatuses>(&mut wire).await;
    check::<ProviderJoinConfigs>(&mut wire).await;
    check::<SiderolinkApiConfigs>(&mut wire).await;
    check::<ConnectionParams>(&mut wire).await;
    check::<FeaturesConfigs>(&mut wire).await;
    check::<TalosVersions>(&mut wire).await;
    check::<CurrentUsers>(&mut wire).await;
    check::<ResourceDefinitions>(&mut wire).await;
}

async fn what_upstream_writes_we_read(mut server: Upstream) {
    let state = server.client().await.state;
    let server = &mut server;
    let request = json!({
        "talos_version": "1.12.0",
        "overlay": { "name": "rpi_generic", "image": "siderolabs/sbc-raspberrypi" },
        "extensions": ["siderolabs/iscsi-tools", "siderolabs/hello-world-service"],
        "kernel_args": ["console=ttyS0"],
        "meta_values": [{ "key": 12, "value": "{}" }],
        "provider_data": "project: talos\n",
        "grpc_tunnel": "ENABLED",
    });
    let expected = MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        overlay: Some(("rpi_generic".to_owned(), "siderolabs/sbc-raspberrypi".to_owned())),
        extensions: vec![
            "siderolabs/iscsi-tools".to_owned(),
            "siderolabs/hello-world-service".to_owned(),
        ],
        kernel_args: vec!["console=ttyS0".to_owned()],
        meta_values: vec![(12, "{}".to_owned())],
        provider_data: "project: talos\n".to_owned(),
        grpc_tunnel: GrpcTunnel::Enabled,
    };
    assert_eq!(
        *read::<MachineRequests>(server, &state, "a", request).await,
        expected
    );
    for (word, tunnel) in [("UNSET", GrpcTunnel::Unset), ("DISABLED", GrpcTunnel::Disabled)] {
        let request = json!({ "grpc_tunnel": word });
        let spec = read::<MachineRequests>(server, &state, "b", request).await;
        assert_eq!(spec.grpc_tunnel, tunnel);
    }
    for (word, stage) in [
        ("UNKNOWN", Stage::Unknown),
        ("PROVISIONING", Stage::Provisioning),
        ("PROVISIONED", Stage::Provisioned),
        ("FAILED", Stage::Failed),
    ] {
        let status = json!({ "id": "uuid", "stage": word, "error": "e", "status": "s" });
        let expected = MachineRequestStatusSpec {
            id: "uuid".to_owned(),
            stage,
            error: "e".to_owned(),
            status: "s".to_owned(),
        };
        let spec = read::<MachineRequestStatuses>(server, &state, "a", status).await;
        assert_eq!(spec, expected);
    }
    let patch = json!({ "data": "machine: {}\n" });
    let spec = read::<ConfigPatchRequests>(server, &state, "a", patch).await;
    assert_eq!(spec.data.as_deref(), Some("machine: {}\n"));
    read::<MachineRegistrations>(server, &state, "uuid", json!({})).await;

    let join = json!({ "join_token": "t", "config": { "kernel_args": ["x"], "config": "y" } });
    let spec = read::<ProviderJoinConfigs>(server, &state, PROVIDER, join).await;
    assert_eq!(spec.join_token, "t");
    let api = json!({
        "machine_api_advertised_url": "https://omni.example.com:8090/",
        "wireguard_advertised_endpoint": "omni.example.com:50180",
        "enforce_grpc_tunnel": true,
        "events_port": 8091,
        "logs_port": 8092,
    });
    let spec = read::<SiderolinkApiConfigs>(server, &state, "siderolink-config", api).await;
    assert_eq!(spec.machine_api_advertised_url, "https://omni.example.com:8090/");
    assert_eq!((spec.events_port, spec.logs_port), (8091, 8092));
    let params = json!({
        "args": "a b",
        "api_endpoint": "https://omni.example.com:8090/",
        "wireguard_endpoint": "w",
        "join_token": "t",
        "use_grpc_tunnel": true,
        "events_port": 8091,
        "logs_port": 8092,
    });
    let spec = read::<ConnectionParams>(server, &state, "siderolink-config", params).await;
    assert_eq!(
        (spec.api_endpoint.as_str(), spec.join_token.as_str()),
        ("https://omni.example.com:8090/", "t")
    );
    assert_eq!((spec.events_port, spec.logs_port), (8091, 8092));
    let features = json!({ "image_factory_base_url": "https://factory.example.com" });
    let spec = read::<FeaturesConfigs>(server, &state, "features-config", features).await;
    assert_eq!(spec.image_factory_base_url, "https://factory.example.com");
    read::<TalosVersions>(server, &state, "1.12.0", json!({ "version": "1.12.0" })).await;
}

async fn what_we_write_upstream_reads(mut server: Upstream) {
    let state = server.client().await.state;
    let mut wire = server.wire().await;
    let status = MachineRequestStatusSpec {
        id: "uuid".to_owned(),
        stage: Stage::Failed,
        error: "the error".to_owned(),
        status: "the status".to_owned(),
    };
    expect![[r#"
        id: uuid
        stage: 3
        error: the error
        status: the status
    "#]]
    .assert_eq(&written::<MachineRequestStatuses>(&state, &mut wire, status).await);
    let patch = ConfigPatchRequestSpec {
        data: Some("machine: {}\n".to_owned()),
    };
    expect![[r#"
        data: |
            machine: {}
        compresseddata: []
    "#]]
    .assert_eq(&written::<ConfigPatchRequests>(&state, &mut wire, patch).await);
    let registration = InfraProviderStatusSpec {
        schema: "{}".to_owned(),
        name: "Oxide".to_owned(),
        description: "the description".to_owned(),
        icon: "PHN2Zy8+".to_owned(),
        version: "0.1.0".to_owned(),
    };
    // The version has no place in the types of this release: it is kept as a field that is not known.
    expect![[r#"
        schema: '{}'
        name: Oxide
        description: the description
        icon: PHN2Zy8+
    "#]]
    .assert_eq(&written::<InfraProviderStatuses>(&state, &mut wire, registration).await);
    let health = InfraProviderHealthStatusSpec {
        last_heartbeat: Timestamp(1_700_000_000_123),
        error: "no cloud".to_owned(),
    };
    expect![[r#"
        lastheartbeattimestamp:
            seconds: 1700000000
            nanos: 123000000
        error: no cloud
    "#]]
    .assert_eq(&written::<InfraProviderHealthStatuses>(&state, &mut wire, health).await);
}

async fn a_patch_that_upstream_compressed_is_not_ours_to_read(mut server: Upstream) {
    let state = server.client().await.state;
    // Above 2 KiB upstream compresses, with a dictionary of its own.
    let patch = json!({ "data": "machine: {}\n".repeat(500) });
    let spec = read::<ConfigPatchRequests>(&mut server, &state, "a", patch).await;
    assert_eq!(spec.data, None);
    // Ours is plain however long it is, and replaces it.
    let ours = "machine: {} # ours\n".repeat(500);
    state
        .modify::<ConfigPatchRequests>("a", |patch| {
            patch.spec.data = Some(ours.clone());
            true
        })
        .await
        .unwrap()
        .unwrap();
    let yaml = yaml::<ConfigPatchRequests>(&mut server.wire().await, "a").await;
    assert_eq!(yaml.matches("# ours").count(), 500, "{yaml}");
}

async fn who_we_are_is_told_in_upstreams_words(mut server: Upstream) {
    let omni = server.client().await;
    // A server that cannot tell is believed.
    omni.who_am_i().await.unwrap();
    for (identity, role, good) in [
        (
            "test@infra-provider.serviceaccount.omni.sidero.dev",
            "InfraProvider",
            true,
        ),
        (
            "test@infra-provider.serviceaccount.omni.sidero.dev",
            "Reader",
            false,
        ),
        ("test@serviceaccount.omni.sidero.dev", "InfraProvider", false),
    ] {
        let user = json!({ "identity": identity, "role": role });
        let spec = read::<CurrentUsers>(&mut server, &omni.state, "current", user).await;
        assert_eq!((spec.identity.as_str(), spec.role.as_str()), (identity, role));
        assert_eq!(omni.who_am_i().await.is_ok(), good, "{identity} {role}");
    }
}

async fn join_inputs_are_what_upstreams_resources_say(mut server: Upstream) {
    let state = server.client().await.state;
    let join = Join::new(state.clone());
    let mut running = JoinSet::new();
    running.spawn(join.clone().run());
    within("the bootstrap", join.bootstrapped()).await;
    let missing = join.inputs().unwrap_err();
    assert_eq!(missing, "Omni has no provider join config test (yet)");

    let api = json!({
        "machine_api_advertised_url": "https://omni.example.com:8090/",
        "events_port": 8091,
        "logs_port": 8092,
    });
    read::<SiderolinkApiConfigs>(&mut server, &state, "siderolink-config", api).await;
    for token in ["the first", "the second"] {
        let provider = json!({ "join_token": token });
        read::<ProviderJoinConfigs>(&mut server, &state, PROVIDER, provider).await;
        let expected = JoinInputs {
            api_url: "https://omni.example.com:8090/".to_owned(),
            token: Secret::new(token),
            events_port: 8091,
            logs_port: 8092,
            token_version: 2,
        };
        until(token, || match join.inputs() {
            Ok(inputs) if inputs == expected => Ok(()),
            found => Err(found),
        })
        .await;
    }
}
