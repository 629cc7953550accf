//! Get, list, create, update, teardown, destroy.

use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::join_all;
use omni_infra_provider::cloud::Timestamp;
use omni_infra_provider::omni::kinds::{
    LABEL_PROVIDER, LABEL_REQUEST, MachineRequestStatuses, MachineRequests, MachineResources, Stage,
};
use omni_infra_provider::omni::resource::Finalizers;
use omni_infra_provider::omni::wire::cosi::label_term::Operation;
use omni_infra_provider::omni::wire::cosi::{
    CreateOptions, CreateRequest, GetRequest, IdQuery, LabelQuery, LabelTerm, ListOptions, ListRequest,
    Resource as WireResource, UpdateOptions, UpdateRequest,
};
use omni_infra_provider::omni::{OmniErrorKind as Kind, Phase, Resource, Signer};
use tonic::{Code, Status};

use super::server::{OWNER, PROVIDER, Server, Wire};
use super::{
    OWN_NAMESPACE, OWN_TYPE, own, refusal, set, status, stored_own, stored_request, stored_status, within,
};

on_both! {
    a_resource_lives_from_create_to_destroy,
    a_writer_who_knows_an_old_version_is_told_so,
    a_resource_is_its_owners_to_write,
    a_finalizer_holds_a_resource_and_nothing_else_does,
    a_phase_that_is_not_as_expected_is_a_refusal,
    an_id_that_is_made_anew_is_another_incarnation,
    what_we_write_is_what_is_read,
    fields_that_nobody_knows_survive_the_way_to_the_server_and_back,
    an_update_replaces_all_there_was,
    who_writes_at_the_same_time_loses_nothing,
    a_request_is_held_and_let_go,
    lists_show_what_carries_the_labels,
    label_queries_select_as_their_operators_say,
    what_is_malformed_is_refused_in_words_that_we_know,
    more_calls_than_a_connection_has_streams_are_answered,
    a_server_that_went_away_is_unavailable_until_it_is_back,
}

async fn a_resource_lives_from_create_to_destroy(mut server: impl Server) {
    let state = server.client().await.state;
    assert_eq!(state.get::<MachineRequestStatuses>("a").await.unwrap(), None);
    let before = Timestamp::from(SystemTime::now());
    let mut new = status("a");
    // What the server stamps itself is not taken from us.
    new.metadata.version = 7;
    new.metadata.created = Timestamp(1);
    let created = state.create(&new).await.unwrap();
    assert_eq!(created.metadata.version, 1);
    assert_eq!(created.metadata.owner, OWNER);
    assert_eq!(created.metadata.phase, Phase::Running);
    assert_eq!(created.metadata.finalizers, set(&[]));
    assert_eq!(created.metadata.labels[&LABEL_PROVIDER.to_owned()], PROVIDER);
    assert!(created.metadata.created >= before, "{created:?}");
    assert_eq!(refusal(state.create(&new).await), Kind::AlreadyExists);
    assert_eq!(
        state.get::<MachineRequestStatuses>("a").await.unwrap(),
        Some(created.clone())
    );

    let mut wanted = created.clone();
    wanted.spec.stage = Stage::Provisioned;
    let updated = state.update(&wanted, None).await.unwrap();
    assert_eq!(updated.metadata.version, 2);
    assert_eq!(updated.metadata.created, created.metadata.created);
    assert_eq!(updated.spec.stage, Stage::Provisioned);
    // An update that changes nothing is an update.
    let same = state.update(&updated, None).await.unwrap();
    assert_eq!(same.metadata.version, 3);

    assert!(
        state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    let torn = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    assert_eq!(
        (torn.metadata.phase, torn.metadata.version),
        (Phase::TearingDown, 4)
    );
    // Again: it stays as it is.
    assert!(
        state
            .teardown::<MachineRequestStatuses>("a", OWNER)
            .await
            .unwrap()
    );
    let still = state.get::<MachineRequestStatuses>("a").await.unwrap();
    assert_eq!(still, Some(torn));
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();

    assert_eq!(state.get::<MachineRequestStatuses>("a").await.unwrap(), None);
    assert_eq!(state.list::<MachineRequestStatuses>(&[]).await.unwrap(), []);
    assert_eq!(refusal(state.update(&same, None).await), Kind::NotFound);
    let gone = state.teardown::<MachineRequestStatuses>("a", OWNER).await;
    assert_eq!(refusal(gone), Kind::NotFound);
    let gone = state.destroy::<MachineRequestStatuses>("a", OWNER).await;
    assert_eq!(refusal(gone), Kind::NotFound);
}

async fn a_writer_who_knows_an_old_version_is_told_so(mut server: impl Server) {
    let state = server.client().await.state;
    let created = state.create(&status("a")).await.unwrap();
    let updated = state.update(&created, None).await.unwrap();
    let error = state.update(&created, None).await.unwrap_err();
    assert_eq!(error.kind, Kind::Conflict);
    assert!(error.message.contains("update conflict"), "{error}");
    // A version that is undefined, and one that never was.
    for version in [0, 17] {
        let mut odd = created.clone();
        odd.metadata.version = version;
        assert_eq!(refusal(state.update(&odd, None).await), Kind::Conflict);
    }
    let read = state.get::<MachineRequestStatuses>("a").await.unwrap();
    assert_eq!(read, Some(updated));
}

async fn a_resource_is_its_owners_to_write(mut server: impl Server) {
    let state = server.client().await.state;
    let created = state.create(&status("a")).await.unwrap();
    for owner in ["", "other.ProvisionController"] {
        let mut theirs = created.clone();
        theirs.metadata.owner = owner.to_owned();
        let error = state.update(&theirs, None).await.unwrap_err();
        assert_eq!(error.kind, Kind::WrongOwner);
        assert!(
            error.message.contains(&format!("is owned by {OWNER:?}")),
            "{error}"
        );
        let teardown = state.teardown::<MachineRequestStatuses>("a", owner).await;
        assert_eq!(refusal(teardown), Kind::WrongOwner);
        let destroy = state.destroy::<MachineRequestStatuses>("a", owner).await;
        assert_eq!(refusal(destroy), Kind::WrongOwner);
    }
    // What nobody owns is as closed to somebody.
    let mut nobodys = status("b");
    nobodys.metadata.owner.clear();
    let mut nobodys = state.create(&nobodys).await.unwrap();
    nobodys.metadata.owner = OWNER.to_owned();
    assert_eq!(refusal(state.update(&nobodys, None).await), Kind::WrongOwner);
    let destroy = state.destroy::<MachineRequestStatuses>("b", OWNER).await;
    assert_eq!(refusal(destroy), Kind::WrongOwner);
    state.destroy::<MachineRequestStatuses>("b", "").await.unwrap();

    // To write it, its owner has to be told; what becomes of the owner is the update's to say.
    let mut wire = server.wire().await;
    let mut resource = get(&mut wire, "a").await;
    resource.metadata.as_mut().unwrap().owner = "heir".to_owned();
    let request = UpdateRequest {
        new_resource: Some(resource),
        options: Some(UpdateOptions {
            owner: OWNER.to_owned(),
            expected_phase: None,
        }),
    };
    wire.update(request).await.unwrap();
    let inherited = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    assert_eq!(inherited.metadata.owner, "heir");

    // Whoever creates is the owner, and may not name another.
    let mut resource = own("c", &[]);
    resource.metadata.as_mut().unwrap().owner = "somebody".to_owned();
    let request = CreateRequest {
        resource: Some(resource),
        options: Some(CreateOptions {
            owner: "somebody else".to_owned(),
        }),
    };
    assert_eq!(wire.create(request).await.unwrap_err().code(), Code::Unknown);
}

/// A status, as the wire has it.
async fn get(wire: &mut Wire<Signer>, id: &str) -> WireResource {
    let request = GetRequest {
        namespace: "infra-provider".to_owned(),
        r#type: "MachineRequestStatuses.omni.sidero.dev".to_owned(),
        id: id.to_owned(),
        options: None,
    };
    wire.get(request).await.unwrap().into_inner().resource.unwrap()
}

async fn a_finalizer_holds_a_resource_and_nothing_else_does(mut server: impl Server) {
    let state = server.client().await.state;
    let mut new = status("a");
    new.metadata.finalizers = set(&["ours"]);
    let created = state.create(&new).await.unwrap();
    assert_eq!(created.metadata.finalizers, set(&["ours"]));
    let mut held = created.clone();
    held.metadata.finalizers = set(&["theirs", "ours"]);
    let held = state.update(&held, None).await.unwrap();

    let error = state
        .destroy::<MachineRequestStatuses>("a", OWNER)
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::PendingFinalizers);
    assert!(
        error.message.contains("ours") && error.message.contains("theirs"),
        "{error}"
    );
    for _ in 0..2 {
        let ready = state.teardown::<MachineRequestStatuses>("a", OWNER).await;
        assert!(!ready.unwrap());
    }
    // Those who hold it may still write it, and let go one by one.
    for (left, ready) in [(set(&["theirs"]), false), (set(&[]), true)] {
        let mut wanted = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
        wanted.metadata.finalizers = left;
        state.update(&wanted, Some(Phase::TearingDown)).await.unwrap();
        let teardown = state.teardown::<MachineRequestStatuses>("a", OWNER).await;
        assert_eq!(teardown.unwrap(), ready);
    }
    assert!(held.metadata.version < 6);
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();

    // Destroying what nobody holds needs no teardown.
    state.create(&status("b")).await.unwrap();
    state.destroy::<MachineRequestStatuses>("b", OWNER).await.unwrap();
}

async fn a_phase_that_is_not_as_expected_is_a_refusal(mut server: impl Server) {
    let state = server.client().await.state;
    let created = state.create(&status("a")).await.unwrap();
    let error = state
        .update(&created, Some(Phase::TearingDown))
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::WrongPhase);
    assert!(error.message.contains("is not in phase tearingDown"), "{error}");
    let updated = state.update(&created, Some(Phase::Running)).await.unwrap();

    let mut torn = updated.clone();
    torn.metadata.phase = Phase::TearingDown;
    let torn = state.update(&torn, Some(Phase::Running)).await.unwrap();
    assert_eq!(
        refusal(state.update(&torn, Some(Phase::Running)).await),
        Kind::WrongPhase
    );
    let torn = state.update(&torn, None).await.unwrap();
    // No law forbids the way back.
    let mut back = torn;
    back.metadata.phase = Phase::Running;
    let back = state.update(&back, None).await.unwrap();
    assert_eq!(back.metadata.phase, Phase::Running);
}

async fn an_id_that_is_made_anew_is_another_incarnation(mut server: impl Server) {
    let state = server.client().await.state;
    let first = state.create(&status("a")).await.unwrap();
    let first = state.update(&first, None).await.unwrap();
    state.destroy::<MachineRequestStatuses>("a", OWNER).await.unwrap();
    // Ours are clocks of milliseconds.
    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    let second = state.create(&status("a")).await.unwrap();
    assert_eq!(second.metadata.version, 1);
    assert!(!second.same_incarnation(&first));
    assert!(second.metadata.created > first.metadata.created);
}

async fn what_we_write_is_what_is_read(mut server: impl Server) {
    let state = server.client().await.state;
    let mut new = status("a");
    new.spec.id = "5f9b9d1c-7c0b-4b9e-8e1d-0d6a4c1f7a11".to_owned();
    new.spec.stage = Stage::Failed;
    new.spec.error = "no \"capacity\" · é 語".to_owned();
    new.spec.status = "x".repeat(10_000);
    new.metadata.finalizers = set(&["b", "a"]);
    let labels = &mut new.metadata.labels;
    labels.insert("empty".to_owned(), String::new());
    labels.insert(LABEL_REQUEST.to_owned(), "a".to_owned());
    let annotations = &mut new.metadata.annotations;
    annotations.insert("placement".to_owned(), r#"{"scopes":["é/語"]}"#.to_owned());
    annotations.insert("large".to_owned(), "y".repeat(16 << 10));
    let created = state.create(&new).await.unwrap();
    let read = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    assert_eq!(read, created);
    assert_eq!(read.spec, new.spec);
    assert_eq!(read.metadata.finalizers, new.metadata.finalizers);
    assert_eq!(read.metadata.annotations, new.metadata.annotations);
    new.metadata
        .labels
        .insert(LABEL_PROVIDER.to_owned(), PROVIDER.to_owned());
    assert_eq!(read.metadata.labels, new.metadata.labels);
    assert_eq!(state.list::<MachineRequestStatuses>(&[]).await.unwrap(), [read]);

    // What the server has no type for is kept byte for byte, whatever it is.
    let bytes = Bytes::from_static(b"\xff\x00no message");
    let mut machine = Resource::<MachineResources>::new("m", bytes.clone());
    machine.metadata.owner = OWNER.to_owned();
    state.create(&machine).await.unwrap();
    let read = state.get::<MachineResources>("m").await.unwrap().unwrap();
    assert_eq!(read.spec, bytes);
}

async fn fields_that_nobody_knows_survive_the_way_to_the_server_and_back(mut server: impl Server) {
    // Fields 99 and 1000 of messages that have neither: what a newer program, or a newer Omni, wrote.
    let newer = [0x9a, 0x06, 0x03, b'n', b'e', b'w', 0xc0, 0x3e, 0x01];
    let mut request = stored_request("a");
    request.spec = [&request.spec[..], &newer].concat().into();
    let mut answer = stored_status("a");
    answer.spec = Bytes::copy_from_slice(&newer);
    server.put(&[request, answer]).await;

    let state = server.client().await.state;
    let has_them = |raw: &[u8]| raw.windows(newer.len()).any(|window| window == newer);
    let changed = state
        .modify::<MachineRequestStatuses>("a", |status| {
            status.spec.stage = Stage::Provisioned;
            true
        })
        .await
        .unwrap()
        .unwrap();
    assert!(has_them(&changed.raw.0), "{:?}", &changed.raw.0[..]);
    let held = state
        .modify::<MachineRequests>("a", |request| request.metadata.finalizers.insert("f".to_owned()))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(held.metadata.version, 2);
    assert_eq!(held.spec.talos_version, "1.12.0");
    assert!(has_them(&held.raw.0), "{:?}", &held.raw.0[..]);
}

async fn an_update_replaces_all_there_was(mut server: impl Server) {
    let state = server.client().await.state;
    let mut new = status("a");
    new.spec.error = "lost".to_owned();
    new.metadata.labels.insert("old".to_owned(), String::new());
    new.metadata.annotations.insert("old".to_owned(), String::new());
    new.metadata.finalizers = set(&["old"]);
    let mut wanted = state.create(&new).await.unwrap();
    wanted.spec.error.clear();
    wanted.metadata.labels.remove("old");
    wanted.metadata.annotations.clear();
    wanted.metadata.finalizers = Finalizers::default();
    let updated = state.update(&wanted, None).await.unwrap();
    assert_eq!(updated.spec.error, "");
    assert_eq!(updated.metadata.labels.len(), 1);
    assert_eq!(updated.metadata.annotations.len(), 0);
    assert_eq!(updated.metadata.finalizers, set(&[]));
}

async fn who_writes_at_the_same_time_loses_nothing(mut server: impl Server) {
    let state = server.client().await.state;
    state.create(&status("a")).await.unwrap();
    // As many as there are tries: whoever loses a round loses it to one who is through.
    let writers = (0..5).map(|number| {
        let state = state.clone();
        async move {
            state
                .modify::<MachineRequestStatuses>("a", |status| {
                    let annotations = &mut status.metadata.annotations;
                    annotations.insert(number.to_string(), String::new()).is_none()
                })
                .await
                .unwrap()
                .unwrap()
        }
    });
    join_all(writers).await;
    let all = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    assert_eq!(all.metadata.annotations.len(), 5);
    assert_eq!(all.metadata.version, 6);
}

async fn a_request_is_held_and_let_go(mut server: impl Server) {
    server.put(&[stored_request("a")]).await;
    let state = server.client().await.state;
    let held = state
        .modify::<MachineRequests>("a", |request| {
            request.metadata.finalizers.insert(OWNER.to_owned())
        })
        .await
        .unwrap()
        .unwrap();
    assert_eq!(held.metadata.finalizers, set(&[OWNER]));

    // Omni tears it down; our finalizer stays until we take it off.
    let mut torn = stored_request("a");
    torn.phase = Phase::TearingDown;
    torn.finalizers = set(&[OWNER, "theirs"]);
    server.put(&[torn]).await;
    let error = state.update(&held, None).await.unwrap_err();
    // Omni compares with what it has before it looks at the version, and says no; COSI alone sees a conflict.
    assert!(matches!(error.kind, Kind::Conflict | Kind::Denied), "{error}");
    let let_go = state
        .modify::<MachineRequests>("a", |request| request.metadata.finalizers.remove(OWNER))
        .await
        .unwrap()
        .unwrap();
    assert!(let_go.tearing_down());
    assert_eq!(let_go.metadata.finalizers, set(&["theirs"]));
    server.destroy(&[stored_request("a")]).await;
    let gone = state.modify::<MachineRequests>("a", |_| true).await.unwrap();
    assert_eq!(gone, None);
}

async fn lists_show_what_carries_the_labels(mut server: impl Server) {
    let mut theirs = stored_status("theirs");
    theirs
        .labels
        .insert(LABEL_PROVIDER.to_owned(), "other".to_owned());
    let mut nobodys = stored_status("nobodys");
    nobodys.labels.clear();
    let of = |id: &str, request: &str| stored_status(id).label(LABEL_REQUEST, request);
    server
        .put(&[
            theirs,
            nobodys,
            of("c", "web-2"),
            of("a", "web-1"),
            of("b", "web-1"),
        ])
        .await;
    let state = server.client().await.state;
    let list = async |labels: &[(&str, &str)]| -> Vec<String> {
        let all = state.list::<MachineRequestStatuses>(labels).await.unwrap();
        all.iter().map(|status| status.id().to_owned()).collect()
    };
    assert_eq!(list(&[]).await, ["a", "b", "c"]);
    assert_eq!(list(&[(LABEL_REQUEST, "web-1")]).await, ["a", "b"]);
    assert_eq!(list(&[(LABEL_REQUEST, "web-3")]).await, [""; 0]);
    assert_eq!(list(&[(LABEL_REQUEST, "web-2"), ("other", "")]).await, [""; 0]);
    for id in ["theirs", "nobodys"] {
        assert_eq!(state.get::<MachineRequestStatuses>(id).await.unwrap(), None);
    }
}

async fn label_queries_select_as_their_operators_say(mut server: impl Server) {
    let labelled = |id: &str, labels: &[(&str, &str)]| {
        labels
            .iter()
            .fold(stored_own(id), |stored, (key, value)| stored.label(key, value))
    };
    server
        .put(&[
            labelled("bare", &[]),
            labelled("red-9", &[("colour", "red"), ("size", "9")]),
            labelled("blue-10", &[("colour", "blue"), ("size", "10")]),
            labelled("blank", &[("colour", ""), ("size", "big")]),
        ])
        .await;
    let mut wire = server.wire().await;
    let term = |key: &str, op: Operation, values: &[&str]| LabelTerm {
        key: key.to_owned(),
        op: op.into(),
        value: values.iter().map(|value| (*value).to_owned()).collect(),
        invert: false,
    };
    let not = |term: LabelTerm| LabelTerm { invert: true, ..term };
    let all = ["bare", "blank", "blue-10", "red-9"];
    for (queries, expected) in [
        (vec![], all.as_slice()),
        (vec![vec![]], &all),
        (
            vec![vec![term("colour", Operation::Exists, &[])]],
            &["blank", "blue-10", "red-9"],
        ),
        (vec![vec![not(term("colour", Operation::Exists, &[]))]], &["bare"]),
        (vec![vec![term("colour", Operation::NotExists, &[])]], &["bare"]),
        (vec![vec![term("colour", Operation::Equal, &["red"])]], &["red-9"]),
        (vec![vec![term("colour", Operation::Equal, &[""])]], &["blank"]),
        (
            vec![vec![not(term("colour", Operation::Equal, &["red"]))]],
            &["bare", "blank", "blue-10"],
        ),
        (
            vec![vec![term("colour", Operation::In, &["red", "blue"])]],
            &["blue-10", "red-9"],
        ),
        (
            vec![vec![not(term("colour", Operation::In, &["red", "blue"]))]],
            &["bare", "blank"],
        ),
        (vec![vec![term("size", Operation::Lt, &["9"])]], &["blue-10"]),
        (
            vec![vec![term("size", Operation::Lte, &["9"])]],
            &["blue-10", "red-9"],
        ),
        (
            vec![vec![term("size", Operation::LtNumeric, &["10"])]],
            &["red-9"],
        ),
        (
            vec![vec![term("size", Operation::LteNumeric, &["10"])]],
            &["blue-10", "red-9"],
        ),
        (
            vec![vec![not(term("size", Operation::LteNumeric, &["9"]))]],
            &["blue-10"],
        ),
        // Terms of one query are all meant, and any query of several.
        (
            vec![vec![
                term("colour", Operation::Exists, &[]),
                term("size", Operation::Equal, &["10"]),
            ]],
            &["blue-10"],
        ),
        (
            vec![
                vec![term("size", Operation::Equal, &["10"])],
                vec![term("size", Operation::Equal, &["9"])],
            ],
            &["blue-10", "red-9"],
        ),
    ] {
        let query = format!("{queries:?}");
        let options = ListOptions {
            label_query: queries.into_iter().map(|terms| LabelQuery { terms }).collect(),
            id_query: None,
        };
        assert_eq!(list(&mut wire, options).await.unwrap(), expected, "{query}");
    }
    for (regexp, expected) in [
        ("^b", ["bare", "blank", "blue-10"].as_slice()),
        ("10$", &["blue-10"]),
        ("e-", &["blue-10"]),
        ("^red-9$", &["red-9"]),
    ] {
        let options = ListOptions {
            label_query: vec![],
            id_query: Some(IdQuery {
                regexp: regexp.to_owned(),
            }),
        };
        assert_eq!(list(&mut wire, options).await.unwrap(), expected, "{regexp}");
    }
    let unknown = LabelTerm {
        op: 42,
        ..term("colour", Operation::Exists, &[])
    };
    let options = ListOptions {
        label_query: vec![LabelQuery { terms: vec![unknown] }],
        id_query: None,
    };
    assert_eq!(
        list(&mut wire, options).await.unwrap_err().code(),
        Code::Unimplemented
    );
}

/// The IDs of our own type.
async fn list(wire: &mut Wire<Signer>, options: ListOptions) -> Result<Vec<String>, Status> {
    let request = ListRequest {
        namespace: OWN_NAMESPACE.to_owned(),
        r#type: OWN_TYPE.to_owned(),
        options: Some(options),
    };
    let mut stream = wire.list(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(message) = stream.message().await? {
        ids.push(message.resource.unwrap().metadata.unwrap().id);
    }
    Ok(ids)
}

async fn what_is_malformed_is_refused_in_words_that_we_know(mut server: impl Server) {
    type Spoil = fn(&mut WireResource);
    let mut wire = server.wire().await;
    let spoils: [(Spoil, &str); 5] = [
        (
            |resource| resource.metadata.as_mut().unwrap().version.clear(),
            "error parsing version",
        ),
        (
            |resource| resource.metadata.as_mut().unwrap().version = "one".to_owned(),
            "error parsing version",
        ),
        (
            |resource| resource.metadata.as_mut().unwrap().phase.clear(),
            "unknown phase",
        ),
        (|resource| resource.metadata = None, "metadata is missing"),
        (|resource| resource.spec = None, "spec is missing"),
    ];
    for (spoil, words) in spoils {
        let mut resource = own("a", &[]);
        spoil(&mut resource);
        let create = CreateRequest {
            resource: Some(resource.clone()),
            options: None,
        };
        let update = UpdateRequest {
            new_resource: Some(resource),
            options: None,
        };
        for refused in [
            wire.create(create).await.map(|_| ()).unwrap_err(),
            wire.update(update).await.map(|_| ()).unwrap_err(),
        ] {
            assert_eq!(refused.code(), Code::Unknown, "{refused}");
            assert!(refused.message().contains(words), "{refused}");
        }
    }
}

async fn more_calls_than_a_connection_has_streams_are_answered(mut server: impl Server) {
    server.put(&[stored_status("a")]).await;
    let state = server.client().await.state;
    let calls = (0..600).map(|_| state.get::<MachineRequestStatuses>("a"));
    let answers = within("the answers", join_all(calls)).await;
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Some(_)))));
}

async fn a_server_that_went_away_is_unavailable_until_it_is_back(mut server: impl Server) {
    server.put(&[stored_status("a")]).await;
    let state = server.client().await.state;
    assert!(state.get::<MachineRequestStatuses>("a").await.unwrap().is_some());
    server.hang_up().await;
    for _ in 0..2 {
        let error = state.get::<MachineRequestStatuses>("a").await.unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable, "{error}");
        assert!(
            error
                .to_string()
                .starts_with("no answer from Omni to read machine request status a: "),
            "{error}"
        );
        let error = state.create(&status("b")).await.unwrap_err();
        assert!(error.outcome_unknown(), "{error}");
    }
    server.listen().await;
    assert!(state.get::<MachineRequestStatuses>("a").await.unwrap().is_some());
    server.crash().await;
    let error = state.get::<MachineRequestStatuses>("a").await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
    server.listen().await;
    let kept = state.get::<MachineRequestStatuses>("a").await.unwrap().unwrap();
    assert_eq!(kept.metadata.version, 1);
    assert_eq!(state.get::<MachineRequestStatuses>("b").await.unwrap(), None);
}
