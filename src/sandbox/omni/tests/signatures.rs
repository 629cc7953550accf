//! Whose call it is.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_signature_is_accepted_and_any_flaw_in_it_is_not() {
    let world = World::new();
    let client = &world.client;
    let method = "/cosi.resource.State/Get";
    let message = || cosi::GetRequest {
        namespace: types::VIRTUAL.to_owned(),
        r#type: types::CURRENT_USERS.to_owned(),
        id: "current".to_owned(),
        options: None,
    };
    let mut state = client.state();
    let user = state.get(client.sign(method, message())).await.unwrap();
    let spec = user.into_inner().resource.unwrap().spec.unwrap().proto_spec;
    let user = specs::CurrentUserSpec::decode(spec.as_slice()).unwrap();
    assert_eq!(
        user.identity,
        "test@infra-provider.serviceaccount.omni.sidero.dev"
    );
    assert_eq!(user.role, "InfraProvider");

    let edit = |name: &'static str, change: &dyn Fn(&str) -> String| {
        let mut request = client.sign(method, message());
        let value = request.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        request
            .metadata_mut()
            .insert(name, change(&value).parse().unwrap());
        request
    };
    let upper = |line: &str| {
        let mut parts: Vec<String> = line.split(' ').map(str::to_owned).collect();
        parts[2] = parts[2].to_uppercase();
        parts.join(" ")
    };
    let mut extra = client.sign(method, message());
    extra.metadata_mut().insert("runtime", "Talos".parse().unwrap());
    let flawed = [
        Request::new(message()),
        client.sign("/cosi.resource.State/List", message()),
        client.sign_at(method, message(), SystemTime::now() - Duration::from_secs(310)),
        client.sign_at(method, message(), SystemTime::now() + Duration::from_secs(310)),
        edit("x-sidero-payload", &|payload| payload.replace('{', "{ ")),
        edit("x-sidero-signature", &|line| line.replace("siderov1", "siderov2")),
        edit("x-sidero-signature", &upper),
        edit("x-sidero-signature", &|line| {
            line.replace("infra-provider:test ", "")
        }),
        extra,
    ];
    for (index, request) in flawed.into_iter().enumerate() {
        let answer = state.get(request).await;
        assert_refused(answer, Code::Unauthenticated, "invalid signature");
        assert_eq!(world.omni.signature_refusals().len(), index + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_expires_is_renewed_and_is_revoked() {
    let shift = Arc::new(Mutex::new(Duration::ZERO));
    let clock = {
        let shift = shift.clone();
        Clock::new(move || SystemTime::now() + *shift.lock().unwrap())
    };
    let world = World::with(OmniOptions {
        clock,
        ..OmniOptions::default()
    });
    let get = |client: Client, at: Duration| async move {
        let message = cosi::GetRequest {
            namespace: types::VIRTUAL.to_owned(),
            r#type: types::CURRENT_USERS.to_owned(),
            id: "current".to_owned(),
            options: None,
        };
        let request = client.sign_at("/cosi.resource.State/Get", message, SystemTime::now() + at);
        client.state().get(request).await
    };
    let hour = world.omni.renew_key("test", Duration::from_secs(3600)).unwrap();
    let hour = Client::new(&world.omni, "test", hour.expose());
    get(hour.clone(), Duration::ZERO).await.unwrap();

    let expiry = hour.key.details.users[0].signatures[0]
        .key_expiration_time()
        .unwrap();
    assert_eq!(expiry.as_secs(), 3600);
    let later = Duration::from_secs(3601);
    *shift.lock().unwrap() = later;
    assert_refused(get(hour, later).await, Code::Unauthenticated, "invalid signature");
    get(world.client.clone(), later).await.unwrap();

    world.omni.revoke_keys("test");
    assert_refused(
        get(world.client.clone(), later).await,
        Code::Unauthenticated,
        "invalid signature",
    );
}
