//! Whose calls are accepted: keys as `omnictl` makes them, and what a person reads where one is refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use omni_infra_provider::cloud::Timestamp;
use omni_infra_provider::omni::kinds::MachineRequestStatuses;
use omni_infra_provider::omni::wire::cosi::{GetRequest, ListRequest, WatchRequest};
use omni_infra_provider::omni::{OmniErrorKind, ServiceAccount};
use omni_infra_provider::secret::Secret;
use pgp::composed::{Deserializable, DetachedSignature, SignedSecretKey, SubpacketConfig};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Subpacket, SubpacketData};
use pgp::ser::Serialize;
use pgp::types::{KeyDetails, Password};
use rand::rngs::OsRng;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::{Code, GrpcMethod, Request, Status};

use super::server::{Order, Server};
use super::{OWN_NAMESPACE, OWN_TYPE, status, stored_own, within};

on_both! {
    a_key_as_omnictl_makes_it_is_accepted,
    what_upstreams_keys_say_of_themselves_is_read,
    an_expired_key_is_refused_and_the_person_told_to_renew_it,
    a_foreign_key_is_refused_and_the_person_told_whose_it_may_be,
    a_key_that_expires_ends_calls_and_no_watch,
    a_renewed_key_takes_over,
    a_signature_holds_for_its_call_alone,
    a_clock_may_be_off_by_five_minutes_and_no_more,
}

const HOUR: Duration = Duration::from_hours(1);

async fn a_key_as_omnictl_makes_it_is_accepted(mut server: impl Server) {
    let orders = [
        Order::default(),
        // For upstream as short a life is no life: it allows for a clock that is off by minutes.
        Order {
            lifetime: HOUR,
            ..Order::default()
        },
        Order {
            age: 300 * 24 * HOUR,
            ..Order::default()
        },
    ];
    for (number, order) in orders.into_iter().enumerate() {
        let key = server.key(order).await;
        let state = server.login(&key).state;
        let created = state.create(&status(&number.to_string())).await.unwrap();
        // A unary call, a stream that ends, and one that does not.
        state.get::<MachineRequestStatuses>(created.id()).await.unwrap();
        let all = state.list::<MachineRequestStatuses>(&[]).await.unwrap();
        assert_eq!(all.len(), number + 1);
        let mut wire = server.wire_with(Forger::new(&key));
        let mut watch = wire.watch(watch_request()).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().event, []);
    }
}

fn watch_request() -> WatchRequest {
    WatchRequest {
        namespace: OWN_NAMESPACE.to_owned(),
        r#type: OWN_TYPE.to_owned(),
        api_version: 1,
        ..WatchRequest::default()
    }
}

async fn what_upstreams_keys_say_of_themselves_is_read(mut server: impl Server) {
    let before = SystemTime::now();
    let order = Order {
        lifetime: 24 * HOUR,
        age: HOUR,
        ..Order::default()
    };
    let account = ServiceAccount::parse(&server.key(order).await).unwrap();
    assert_eq!(account.name(), "test");
    assert_eq!(account.fingerprint().len(), 40);
    assert_eq!(account.expires(), Some(account.created().after(24 * HOUR)));
    // OpenPGP counts in seconds.
    let made = Timestamp::from(before - HOUR - Duration::from_secs(1));
    assert!(account.created() >= made, "{:?}", account.created());
    assert!(account.created() <= Timestamp::from(SystemTime::now()));
}

/// What a person reads where that key is used, without what is another each time.
async fn words(server: &impl Server, key: &Secret) -> String {
    let error = server
        .login(key)
        .state
        .get::<MachineRequestStatuses>("a")
        .await
        .unwrap_err();
    assert_eq!(error.kind, OmniErrorKind::Unauthenticated, "{error}");
    let account = ServiceAccount::parse(key).unwrap();
    let known = error.to_string().replace(account.fingerprint(), "<fingerprint>");
    let words: Vec<&str> = known
        .split(' ')
        .map(|word| match word.strip_suffix(':') {
            Some(time) if time.ends_with('Z') && time.contains('T') => "<time>:",
            _ => word,
        })
        .collect();
    words.join(" ")
}

async fn an_expired_key_is_refused_and_the_person_told_to_renew_it(mut server: impl Server) {
    let order = Order {
        lifetime: HOUR,
        age: 2 * HOUR,
        ..Order::default()
    };
    let key = server.key(order).await;
    assert_eq!(
        words(&server, &key).await,
        "Omni refused to read machine request status a: invalid signature: the service account key expired at \
         <time>: renew it with `omnictl infraprovider renewkey test` and set OMNI_SERVICE_ACCOUNT_KEY to the new \
         one"
    );
}

async fn a_foreign_key_is_refused_and_the_person_told_whose_it_may_be(mut server: impl Server) {
    let order = Order {
        known: false,
        ..Order::default()
    };
    let key = server.key(order).await;
    assert_eq!(
        words(&server, &key).await,
        "Omni refused to read machine request status a: invalid signature: Omni does not accept the service \
         account key <fingerprint> (it was revoked, or belongs to another Omni): renew it with `omnictl \
         infraprovider renewkey test` and set OMNI_SERVICE_ACCOUNT_KEY to the new one"
    );
}

async fn a_key_that_expires_ends_calls_and_no_watch(mut server: impl Server) {
    // Upstream's clocks may be off by half of such a life: the key is good for longer than it says.
    let life = Duration::from_secs(4);
    let key = server
        .key(Order {
            lifetime: life,
            ..Order::default()
        })
        .await;
    let expired = Instant::now() + life + Duration::from_secs(1);
    let mut wire = server.wire_with(Forger::new(&key));
    let mut watch = wire.watch(watch_request()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().event, []);
    let state = server.login(&key).state;
    state.get::<MachineRequestStatuses>("a").await.unwrap();

    sleep_until(expired).await;
    assert!(
        words(&server, &key)
            .await
            .contains("the service account key expired at")
    );
    server.put(&[stored_own("late")]).await;
    let seen = within("an event", watch.message()).await.unwrap().unwrap();
    assert_eq!(seen.event.len(), 1);
}

async fn a_renewed_key_takes_over(mut server: impl Server) {
    let expired = Order {
        lifetime: HOUR,
        age: 2 * HOUR,
        ..Order::default()
    };
    let old = server.key(expired).await;
    let omni = server.login(&old);
    omni.state.get::<MachineRequestStatuses>("a").await.unwrap_err();
    let new = server.key(Order::default()).await;
    omni.signer.replace(ServiceAccount::parse(&new).unwrap());
    omni.state.get::<MachineRequestStatuses>("a").await.unwrap();
}

async fn a_signature_holds_for_its_call_alone(mut server: impl Server) {
    let key = server.key(Order::default()).await;
    let other = server.key(Order::default()).await;
    let fingerprint = ServiceAccount::parse(&other).unwrap().fingerprint().to_owned();
    let change = |spoil: Spoil| Forger::new(&key).spoil(spoil);
    let spoilt = [
        ("nothing is signed", change(unsign)),
        (
            "no signature",
            change(|headers| {
                headers.remove("x-sidero-signature");
            }),
        ),
        (
            "no payload",
            change(|headers| {
                headers.remove("x-sidero-payload");
            }),
        ),
        (
            "no timestamp",
            change(|headers| {
                headers.remove("x-sidero-timestamp");
            }),
        ),
        (
            "another time",
            change(|headers| replace(headers, "x-sidero-timestamp", |time| format!("{time}0"))),
        ),
        (
            "another payload",
            change(|headers| replace(headers, "x-sidero-payload", |payload| payload.replace("{", "{ "))),
        ),
        (
            "another method",
            change(|headers| {
                replace(headers, "x-sidero-payload", |payload| {
                    payload.replace("State/Get", "State/Destroy")
                });
            }),
        ),
        (
            "a header that was not signed",
            change(|headers| {
                headers.insert("cluster", "talos".parse().unwrap());
            }),
        ),
        (
            "a flipped bit",
            change(|headers| {
                replace(headers, "x-sidero-signature", |line| {
                    let (head, signature) = line.rsplit_once(' ').unwrap();
                    let mut bytes = STANDARD.decode(signature).unwrap();
                    *bytes.last_mut().unwrap() ^= 1;
                    format!("{head} {}", STANDARD.encode(bytes))
                });
            }),
        ),
        (
            "no OpenPGP",
            change(|headers| {
                replace(headers, "x-sidero-signature", |line| {
                    format!("{} AAAA", line.rsplit_once(' ').unwrap().0)
                });
            }),
        ),
        (
            "another version",
            change(|headers| {
                replace(headers, "x-sidero-signature", |line| {
                    line.replace("siderov1", "siderov2")
                })
            }),
        ),
        (
            "an upper-case fingerprint",
            change(|headers| {
                replace(headers, "x-sidero-signature", |line| {
                    let mut parts: Vec<String> = line.split(' ').map(str::to_owned).collect();
                    parts[2] = parts[2].to_uppercase();
                    parts.join(" ")
                });
            }),
        ),
        ("another key's fingerprint", Forger::new(&key).named(&fingerprint)),
    ];
    for (what, forger) in spoilt {
        let refused = get(&server, forger).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{what}");
        assert_eq!(refused.message(), "invalid signature", "{what}");
    }
    // The name in the header is for logs: it is the key that tells who calls.
    for (what, forger) in [
        ("as it is", Forger::new(&key)),
        (
            "another name",
            change(|headers| {
                replace(headers, "x-sidero-signature", |line| {
                    line.replace("infra-provider:test", "infra-provider:other")
                });
            }),
        ),
        (
            "another provider",
            change(|headers| {
                headers.insert("providerid", "other".parse().unwrap());
            }),
        ),
    ] {
        let answer = get(&server, forger).await;
        assert_eq!(answer.unwrap_err().code(), Code::NotFound, "{what}");
    }

    // The streams are guarded like the calls.
    let nothing = || change(unsign);
    let request = ListRequest {
        namespace: OWN_NAMESPACE.to_owned(),
        r#type: OWN_TYPE.to_owned(),
        options: None,
    };
    let list = server.wire_with(nothing()).list(request).await;
    let watch = server.wire_with(nothing()).watch(watch_request()).await;
    let refusals = [
        match list {
            Ok(stream) => stream.into_inner().message().await.map(|_| ()),
            Err(status) => Err(status),
        },
        match watch {
            Ok(stream) => stream.into_inner().message().await.map(|_| ()),
            Err(status) => Err(status),
        },
    ];
    for refused in refusals {
        assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
    }
}

async fn a_clock_may_be_off_by_five_minutes_and_no_more(mut server: impl Server) {
    let key = server
        .key(Order {
            age: 24 * HOUR,
            ..Order::default()
        })
        .await;
    let at = |seconds| Forger::new(&key).off_by(seconds);
    for seconds in [-290, -60, 0, 60, 290] {
        let answer = get(&server, at(seconds)).await;
        assert_eq!(answer.unwrap_err().code(), Code::NotFound, "{seconds}");
    }
    // What our client makes of the refusal on a host with such a clock.
    let omni = server.login(&key);
    let account = omni.signer.account();
    let told = async |seconds: i64, words: &str| {
        let refused = get(&server, at(seconds)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{seconds}");
        let theirs = omni.signer.server_time().await;
        assert!(theirs.is_some());
        assert_eq!(account.explain(off_by(seconds).into(), theirs), words);
    };
    let behind = "this host's clock is 10 minutes behind Omni's, which tolerates five: set the clock";
    told(-630, behind).await;
    let ahead = "this host's clock is 10 minutes ahead of Omni's, which tolerates five: set the clock";
    told(630, ahead).await;

    // Nothing can have been signed before its key was made.
    let fresh = server.key(Order::default()).await;
    let refused = get(&server, Forger::new(&fresh).off_by(-60)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let words = ServiceAccount::parse(&fresh)
        .unwrap()
        .explain(off_by(-60).into(), omni.signer.server_time().await);
    assert!(
        words.contains("but the service account key was made at"),
        "{words}"
    );
}

/// Reads what is not there: an accepted call is told so.
async fn get(server: &impl Server, forger: Forger) -> Result<(), Status> {
    let request = GetRequest {
        namespace: OWN_NAMESPACE.to_owned(),
        r#type: OWN_TYPE.to_owned(),
        id: "nothing".to_owned(),
        options: None,
    };
    server.wire_with(forger).get(request).await.map(|_| ())
}

type Spoil = fn(&mut MetadataMap);

fn unsign(headers: &mut MetadataMap) {
    for name in ["x-sidero-timestamp", "x-sidero-payload", "x-sidero-signature"] {
        headers.remove(name);
    }
}

fn replace(headers: &mut MetadataMap, name: &'static str, change: fn(&str) -> String) {
    let old = headers.get(name).unwrap().to_str().unwrap();
    let new = change(old);
    assert_ne!(old, new);
    headers.insert(name, new.parse().unwrap());
}

fn off_by(seconds: i64) -> SystemTime {
    let (now, by) = (SystemTime::now(), Duration::from_secs(seconds.unsigned_abs()));
    if seconds < 0 { now - by } else { now + by }
}

/// Signs as our client does, on a host whose clock is off; what it signed can be spoilt on the way.
#[derive(Clone)]
struct Forger {
    key: SignedSecretKey,
    name: String,
    fingerprint: String,
    seconds: i64,
    spoil: Spoil,
}

impl Forger {
    fn new(key: &Secret) -> Self {
        let json: Value = serde_json::from_slice(&STANDARD.decode(key.expose()).unwrap()).unwrap();
        let (key, _) = SignedSecretKey::from_string(json["pgp_key"].as_str().unwrap()).unwrap();
        Self {
            fingerprint: key.primary_key.fingerprint().to_string(),
            key,
            name: json["name"].as_str().unwrap().to_owned(),
            seconds: 0,
            spoil: |_| {},
        }
    }

    fn off_by(self, seconds: i64) -> Self {
        Self { seconds, ..self }
    }

    fn spoil(self, spoil: Spoil) -> Self {
        Self { spoil, ..self }
    }

    fn named(self, fingerprint: &str) -> Self {
        Self {
            fingerprint: fingerprint.to_owned(),
            ..self
        }
    }
}

impl Interceptor for Forger {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let now = off_by(self.seconds);
        let seconds = now.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let method = request.extensions().get::<GrpcMethod<'_>>().unwrap();
        let payload = format!(
            r#"{{"headers":{{"x-sidero-timestamp":["{seconds}"]}},"method":"/{}/{}"}}"#,
            method.service(),
            method.method()
        );
        let primary = &self.key.primary_key;
        let hashed = [
            SubpacketData::SignatureCreationTime(now.try_into().unwrap()),
            SubpacketData::IssuerFingerprint(primary.fingerprint()),
        ];
        let signature = DetachedSignature::sign_binary_data_with_subpackets(
            OsRng,
            primary,
            &Password::empty(),
            HashAlgorithm::Sha512,
            payload.as_bytes(),
            SubpacketConfig::UserDefined {
                hashed: hashed.map(|data| Subpacket::regular(data).unwrap()).to_vec(),
                unhashed: vec![
                    Subpacket::regular(SubpacketData::IssuerKeyId(primary.legacy_key_id())).unwrap(),
                ],
            },
        )
        .unwrap();
        let line = format!(
            "siderov1 {} {} {}",
            self.name,
            self.fingerprint,
            STANDARD.encode(signature.to_bytes().unwrap())
        );
        let headers = request.metadata_mut();
        headers.insert("x-sidero-timestamp", seconds.into());
        headers.insert("x-sidero-payload", payload.parse().unwrap());
        headers.insert("x-sidero-signature", line.parse().unwrap());
        (self.spoil)(headers);
        Ok(request)
    }
}
