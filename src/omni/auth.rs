//! Turns a service account key into the signature that every call to Omni carries.
//!
//! *Guarantees*: no error, log or debug print shows the key. A key whose signature header would be malformed
//! is refused when it is read, because Omni 1.10 does not survive such a header gracefully.
//!
//! *Not here*: whether the account is the right one ([`super::Omni::who_am_i`]).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::HeaderMap;
use http::header::DATE;
use pgp::composed::{Deserializable, DetachedSignature, SignedSecretKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::ser::Serialize;
use pgp::types::{KeyDetails, Password};
use rand::rngs::OsRng;
use serde::Deserialize;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{GrpcMethod, Request, Status};
use tower::ServiceExt;

use super::kinds::wire_moment;
use crate::cloud::Timestamp;
use crate::secret::Secret;

/// The setting that holds the key, as errors name it.
const SETTING: &str = "OMNI_SERVICE_ACCOUNT_KEY";

/// What CLI-made keys put before the provider ID; keys made in the web interface lack it.
const NAME_PREFIX: &str = "infra-provider:";

/// How far Omni lets a clock be off.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// How long an explanation may wait for Omni's clock: it is better without than late.
const CLOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Why a service account key cannot be used. Names the setting, never shows the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Nothing there.
    #[error(
        "{SETTING} is empty: set it to the key that `omnictl infraprovider create <provider ID>` printed"
    )]
    Empty,
    /// Not base64.
    #[error("{SETTING} is not base64: copy the whole key, on one line, as Omni showed it")]
    NotBase64,
    /// Not the JSON that Omni makes.
    #[error(
        "{SETTING} holds no service account (JSON with `name` and `pgp_key`): is it another kind of key?"
    )]
    NotJson,
    /// A name that no signature header can carry.
    #[error("{SETTING} holds a service account whose name is empty or has spaces: make a new key")]
    BadName,
    /// Not an OpenPGP private key.
    #[error("{SETTING} holds no OpenPGP private key that can be read: make a new key")]
    BadKey,
    /// Cannot sign.
    #[error(
        "{SETTING} holds an OpenPGP key that cannot sign, or is locked with a passphrase: make a new key"
    )]
    CannotSign,
}

/// A service account's key, parsed.
pub struct ServiceAccount {
    name: String,
    fingerprint: String,
    created: Timestamp,
    expires: Option<Timestamp>,
    key: SignedSecretKey,
}

#[derive(Deserialize)]
struct Wire {
    name: String,
    pgp_key: String,
}

impl ServiceAccount {
    /// Reads a key as Omni hands it out: base64 of JSON with a name and an armoured OpenPGP private key.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it, and names the setting.
    pub fn parse(key: &Secret) -> Result<Self, KeyError> {
        // Keys travel through terminals and files: line breaks may be anywhere.
        let text: String = key.expose().split_ascii_whitespace().collect();
        if text.is_empty() {
            return Err(KeyError::Empty);
        }
        let json = STANDARD
            .decode(&text)
            .or_else(|_| STANDARD_NO_PAD.decode(&text))
            .map_err(|_| KeyError::NotBase64)?;
        let Wire { name, pgp_key } = serde_json::from_slice(&json).map_err(|_| KeyError::NotJson)?;
        if name.is_empty() || !name.chars().all(|char| char.is_ascii_graphic()) {
            return Err(KeyError::BadName);
        }
        let (key, _) = SignedSecretKey::from_string(&armour(&pgp_key)).map_err(|_| KeyError::BadKey)?;
        let public = key.primary_key.public_key();
        // Upstream's library, and with it Omni, knows a key by its user IDs.
        if !key
            .details
            .users
            .iter()
            .any(|user| user.verify_bindings(public).is_ok())
        {
            return Err(KeyError::BadKey);
        }
        let created = moment(key.primary_key.created_at().into());
        let account = Self {
            name,
            fingerprint: format!("{:x}", key.primary_key.fingerprint()),
            created,
            expires: lifetime(&key).map(|lifetime| created.after(lifetime)),
            key,
        };
        // A damaged key may still sign, with signatures that nobody accepts.
        let signature = account.detached(b"").map_err(|_| KeyError::CannotSign)?;
        signature
            .verify(account.key.primary_key.public_key(), b"")
            .map_err(|_| KeyError::BadKey)?;
        Ok(account)
    }

    /// Its name, without the prefix that some keys have: for people. The provider ID is what Omni says it is.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.strip_prefix(NAME_PREFIX).unwrap_or(&self.name)
    }

    /// The primary key's fingerprint, in lower-case hexadecimal digits: Omni's name for the key.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// When the key was made, by the clock of whoever made it.
    #[must_use]
    pub fn created(&self) -> Timestamp {
        self.created
    }

    /// When Omni stops accepting the key; `None` for a key that never expires.
    #[must_use]
    pub fn expires(&self) -> Option<Timestamp> {
        self.expires
    }

    /// Why Omni may have refused a signature: it never says. `server` is Omni's clock, where its answer told
    /// it.
    #[must_use]
    pub fn explain(&self, now: Timestamp, server: Option<Timestamp>) -> String {
        let name = self.name();
        let renew =
            format!("renew it with `omnictl infraprovider renewkey {name}` and set {SETTING} to the new one");
        if let Some(expires) = self.expires
            && expires <= server.unwrap_or(now)
        {
            return format!("the service account key expired at {}: {renew}", date(expires));
        }
        if let Some(server) = server {
            let (behind, ahead) = (server.since(now), now.since(server));
            // A date has a resolution of a second, and the answer took its time.
            let off = behind.max(ahead);
            if off + Duration::from_secs(5) > CLOCK_TOLERANCE {
                let way = if behind > ahead { "behind" } else { "ahead of" };
                return format!(
                    "this host's clock is {} minutes {way} Omni's, which tolerates five: set the clock",
                    off.as_secs() / 60
                );
            }
        }
        if self.created > now {
            return format!(
                "this host's clock says {}, but the service account key was made at {}: set the clock",
                date(now),
                date(self.created)
            );
        }
        let clock = match server {
            Some(_) => String::new(),
            None => format!(
                ", or this host's clock, which says {}, is more than five minutes off",
                date(now)
            ),
        };
        format!(
            "Omni does not accept the service account key {} (it was revoked, or belongs to another \
             Omni{clock}): {renew}",
            self.fingerprint
        )
    }

    /// A binary, detached OpenPGP signature, in base64.
    fn sign(&self, payload: &[u8]) -> Result<String, pgp::errors::Error> {
        Ok(STANDARD.encode(self.detached(payload)?.to_bytes()?))
    }

    fn detached(&self, payload: &[u8]) -> Result<DetachedSignature, pgp::errors::Error> {
        DetachedSignature::sign_binary_data(
            OsRng,
            &self.key.primary_key,
            &Password::empty(),
            HashAlgorithm::Sha512,
            payload,
        )
    }
}

impl fmt::Debug for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceAccount")
            .field("name", &self.name)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// Undoes what happens to armour on its way: CRLF, spaces at line ends, blank lines around it, a lost final
/// newline.
fn armour(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1);
    for line in text.trim().lines() {
        out.push_str(line.trim());
        out.push('\n');
    }
    out
}

/// How long after its making the key is good for: the self-signatures say so, of the key, of themselves, or
/// of both.
fn lifetime(key: &SignedSecretKey) -> Option<Duration> {
    let made: SystemTime = key.primary_key.created_at().into();
    let users = key.details.users.iter().flat_map(|user| &user.signatures);
    // The newest self-signature is the one that holds.
    let newest = users
        .chain(&key.details.direct_signatures)
        .max_by_key(|signature| signature.created())?;
    let signed: SystemTime = newest.created()?.into();
    let age = signed.duration_since(made).unwrap_or_default();
    // Zero means that it never expires.
    let of_key = newest
        .key_expiration_time()
        .map(Duration::from)
        .filter(|time| !time.is_zero());
    let of_signature = newest.signature_expiration_time().map(Duration::from);
    let of_signature = of_signature.filter(|time| !time.is_zero()).map(|time| age + time);
    [of_key, of_signature].into_iter().flatten().min()
}

fn moment(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// A moment with its date, for people.
fn date(moment: Timestamp) -> String {
    wire_moment(Timestamp(moment.0 / 1000 * 1000)).to_string()
}

/// The time of an answer, if Omni or the proxy before it told it.
fn server_date(headers: &HeaderMap) -> Option<Timestamp> {
    let date = headers.get(DATE)?.to_str().ok()?;
    httpdate::parse_http_date(date).ok().map(Timestamp::from)
}

/// Signs calls with the key that it holds right now. Cheap to clone; all clones share the key.
#[derive(Clone)]
pub struct Signer {
    account: Arc<RwLock<Arc<ServiceAccount>>>,
    provider: MetadataValue<Ascii>,
    omni: Channel,
}

impl Signer {
    pub(super) fn new(account: ServiceAccount, provider: MetadataValue<Ascii>, omni: Channel) -> Self {
        Self {
            account: Arc::new(RwLock::new(Arc::new(account))),
            provider,
            omni,
        }
    }

    /// Why Omni may have refused a signature: it never says. Asks Omni for the time, where its answer does not
    /// tell.
    pub(super) async fn explain(&self, refused: &Status) -> String {
        let server = match server_date(refused.metadata().as_ref()) {
            Some(date) => Some(date),
            None => self.server_time().await,
        };
        self.account().explain(SystemTime::now().into(), server)
    }

    /// Omni's clock. Answers of its gRPC side carry no date, because grpc-go takes it out; those of its web side
    /// do, and need no signature.
    pub async fn server_time(&self) -> Option<Timestamp> {
        let request = http::Request::head("/").body(Body::empty()).ok()?;
        let answer = timeout(CLOCK_DEADLINE, self.omni.clone().oneshot(request)).await;
        server_date(answer.ok()?.ok()?.headers())
    }

    /// The account whose key signs right now.
    #[must_use]
    pub fn account(&self) -> Arc<ServiceAccount> {
        Arc::clone(&self.account.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Signs all later calls with another key. Open watches go on as they are.
    pub fn replace(&self, account: ServiceAccount) {
        *self.account.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(account);
    }

    /// Puts the signature of one call into its metadata.
    fn sign<T>(&self, request: &mut Request<T>, path: &str, now: SystemTime) -> Result<(), SignError> {
        let account = self.account();
        let seconds = Timestamp::from(now).0 / 1000;
        let payload = payload(seconds, path);
        let signature = account.sign(payload.as_bytes())?;
        let signature = format!("siderov1 {} {} {signature}", account.name, account.fingerprint);
        let metadata = request.metadata_mut();
        metadata.insert("x-sidero-timestamp", ascii(seconds.to_string())?);
        metadata.insert("x-sidero-payload", ascii(payload)?);
        metadata.insert("x-sidero-signature", ascii(signature)?);
        metadata.insert("providerid", self.provider.clone());
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum SignError {
    #[error("the call cannot be signed: {0}")]
    Pgp(#[from] pgp::errors::Error),
    #[error("the signature does not fit into a header")]
    Header,
}

fn ascii(text: String) -> Result<MetadataValue<Ascii>, SignError> {
    MetadataValue::try_from(text).map_err(|_| SignError::Header)
}

/// What is signed: Omni checks these very bytes, so their form is free; nothing but these two members is
/// needed. Method paths need no escaping.
fn payload(seconds: u64, path: &str) -> String {
    format!(r#"{{"headers":{{"x-sidero-timestamp":["{seconds}"]}},"method":"{path}"}}"#)
}

impl tonic::service::Interceptor for Signer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let path = match request.extensions().get::<GrpcMethod<'_>>() {
            Some(method) => format!("/{}/{}", method.service(), method.method()),
            None => return Err(Status::internal("a call without a method cannot be signed")),
        };
        self.sign(&mut request, &path, SystemTime::now())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(request)
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("account", &self.account())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use pgp::composed::{ArmorOptions, EncryptionCaps, KeyType, SecretKeyParamsBuilder, SubkeyParamsBuilder};
    use pgp::crypto::ecc_curve::ECCCurve;
    use pgp::packet::{SignatureConfig, SignatureType, Subpacket, SubpacketData};
    use pgp::types::Tag;
    use tonic::service::Interceptor;
    use tonic::transport::Endpoint;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// A key as omnictl makes it, good for so long.
    fn key(lifetime: Option<Duration>) -> SignedSecretKey {
        let encryption = SubkeyParamsBuilder::default()
            .key_type(KeyType::ECDH(ECCCurve::Curve25519Legacy))
            .can_encrypt(EncryptionCaps::All)
            .build()
            .unwrap();
        let mut key = SecretKeyParamsBuilder::default()
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("<oxide@infra-provider.serviceaccount.omni.sidero.dev>".into())
            .subkey(encryption)
            .build()
            .unwrap()
            .generate(OsRng)
            .unwrap();
        if let Some(lifetime) = lifetime {
            let primary = &key.primary_key;
            let mut config = SignatureConfig::from_key(OsRng, primary, SignatureType::CertPositive).unwrap();
            config.hashed_subpackets = [
                SubpacketData::SignatureCreationTime(primary.created_at()),
                SubpacketData::KeyExpirationTime(lifetime.try_into().unwrap()),
                SubpacketData::SignatureExpirationTime((lifetime + DAY).try_into().unwrap()),
            ]
            .map(|data| Subpacket::regular(data).unwrap())
            .to_vec();
            let user = key.details.users.first_mut().unwrap();
            let public = primary.public_key();
            let signature = config
                .sign_certification(primary, public, &Password::empty(), Tag::UserId, &user.id)
                .unwrap();
            user.signatures = vec![signature];
        }
        key
    }

    /// Where no Omni is.
    fn nowhere() -> Channel {
        Endpoint::from_static("http://[::1]:1").connect_lazy()
    }

    fn wrap(name: &str, armoured: &str) -> Secret {
        let json = serde_json::json!({ "name": name, "pgp_key": armoured }).to_string();
        Secret::new(STANDARD.encode(json))
    }

    fn armoured(key: &SignedSecretKey) -> String {
        key.to_armored_string(ArmorOptions::default()).unwrap()
    }

    fn account(lifetime: Option<Duration>) -> ServiceAccount {
        ServiceAccount::parse(&wrap("infra-provider:oxide", &armoured(&key(lifetime)))).unwrap()
    }

    #[test]
    fn every_shape_in_which_a_key_travels_is_read() {
        let key = key(None);
        let plain = armoured(&key);
        let without_checksum = key
            .to_armored_string(ArmorOptions {
                headers: None,
                include_checksum: false,
            })
            .unwrap();
        let fingerprint = key.primary_key.fingerprint().to_string();
        for armoured in [
            plain.clone(),
            plain.trim_end().to_owned(),
            plain.replace('\n', "\r\n"),
            plain.replace('\n', "\n  "),
            format!("\n\n{plain}\n\n"),
            without_checksum,
        ] {
            for name in ["oxide", "infra-provider:oxide"] {
                let secret = wrap(name, &armoured);
                for text in [secret.expose().to_owned(), format!("  {}\n", secret.expose())] {
                    let account = ServiceAccount::parse(&Secret::new(text)).unwrap();
                    assert_eq!(account.name(), "oxide");
                    assert_eq!(account.fingerprint(), fingerprint.to_lowercase());
                    assert_eq!(account.expires(), None);
                }
            }
        }
        let secret = wrap("oxide", &plain);
        let (head, tail) = secret.expose().split_at(100);
        assert!(ServiceAccount::parse(&Secret::new(format!("{head}\n{tail}"))).is_ok());
        assert!(ServiceAccount::parse(&Secret::new(secret.expose().trim_end_matches('='))).is_ok());
    }

    #[test]
    fn keys_that_the_real_programs_made_are_read() {
        macro_rules! key {
            ($file:literal) => {
                ServiceAccount::parse(&Secret::new(include_str!(concat!("testdata/keys/", $file)))).unwrap()
            };
        }
        let year = Duration::from_secs(365 * 24 * 3600);
        let minute = Duration::from_secs(60);
        for (key, name) in [
            (key!("omnictl-create.txt"), "oxide"),
            (key!("omnictl-renew.txt"), "oxide"),
            (key!("web-ui.txt"), "oxide"),
            (key!("go-api-signature.txt"), "oxide"),
        ] {
            assert_eq!(key.name(), name);
            assert_eq!(key.fingerprint().len(), 40);
            let lifetime = key.expires().unwrap().since(key.created());
            assert!(
                lifetime <= year + minute && lifetime >= year - minute,
                "{name}: {lifetime:?}"
            );
        }
        let expired = key!("go-api-signature-expired.txt");
        assert_eq!(
            expired.expires().unwrap().since(expired.created()),
            Duration::from_secs(30)
        );
        assert_eq!(key!("go-api-signature-never-expires.txt").expires(), None);
    }

    #[test]
    fn a_key_whose_halves_do_not_belong_together_is_refused() {
        // Of a version 4 key in the old format: two bytes of header, six of version, time and algorithm, ten of the curve, two
        // of length; then the public half.
        const PUBLIC: std::ops::Range<usize> = 21..53;
        let bytes = key(None).to_bytes().unwrap();
        for place in PUBLIC {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1;
            let armoured = format!(
                "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{}\n-----END PGP PRIVATE KEY BLOCK-----\n",
                STANDARD.encode(damaged)
            );
            let read = ServiceAccount::parse(&wrap("oxide", &armoured));
            assert_eq!(read.err(), Some(KeyError::BadKey), "byte {place}");
        }
    }

    #[test]
    fn a_key_without_a_user_id_of_its_own_is_refused() {
        let mut nobodys = key(None);
        nobodys.details.users.clear();
        let mut anothers = key(None);
        anothers.details.users = key(None).details.users;
        let mut unsigned = key(None);
        for user in &mut unsigned.details.users {
            user.signatures.clear();
        }
        for key in [nobodys, anothers, unsigned] {
            let read = ServiceAccount::parse(&wrap("oxide", &armoured(&key)));
            assert_eq!(read.err(), Some(KeyError::BadKey));
        }
    }

    #[test]
    fn what_is_no_key_is_refused_without_showing_it() {
        let armoured = armoured(&key(None));
        let public = key(None)
            .to_public_key()
            .to_armored_string(ArmorOptions::default())
            .unwrap();
        for (secret, error) in [
            (Secret::new(" \n"), KeyError::Empty),
            (Secret::new("geheim!"), KeyError::NotBase64),
            (Secret::new(STANDARD.encode("geheim")), KeyError::NotJson),
            (
                Secret::new(STANDARD.encode(r#"{"name":"geheim"}"#)),
                KeyError::NotJson,
            ),
            (wrap("", &armoured), KeyError::BadName),
            (wrap("ge heim", &armoured), KeyError::BadName),
            (wrap("oxide", "geheim"), KeyError::BadKey),
            (wrap("oxide", &public), KeyError::BadKey),
        ] {
            let found = ServiceAccount::parse(&secret).unwrap_err();
            assert_eq!(found, error);
            assert!(found.to_string().contains("OMNI_SERVICE_ACCOUNT_KEY"));
            assert!(!found.to_string().contains("geheim"));
        }
    }

    #[test]
    fn the_expiry_is_the_earliest_that_the_key_knows() {
        let account = account(Some(DAY * 365));
        assert_eq!(account.expires(), Some(account.created().after(DAY * 365)));
    }

    #[tokio::test]
    async fn a_signed_call_carries_what_the_server_verifies() {
        let account = account(None);
        let public = account.key.to_public_key();
        let fingerprint = account.fingerprint.clone();
        let mut signer = Signer::new(account, MetadataValue::from_static("oxide"), nowhere());

        let mut request = Request::new(());
        request
            .extensions_mut()
            .insert(GrpcMethod::new("cosi.resource.State", "Get"));
        let request = signer.call(request).unwrap();
        let header = |name| request.metadata().get(name).unwrap().to_str().unwrap();

        let seconds = header("x-sidero-timestamp");
        assert_eq!(
            header("x-sidero-payload"),
            format!(
                r#"{{"headers":{{"x-sidero-timestamp":["{seconds}"]}},"method":"/cosi.resource.State/Get"}}"#
            )
        );
        assert_eq!(header("providerid"), "oxide");
        let parts: Vec<&str> = header("x-sidero-signature").split(' ').collect();
        let [version, name, by, signature] = parts.try_into().unwrap();
        assert_eq!(
            (version, name, by),
            ("siderov1", "infra-provider:oxide", fingerprint.as_str())
        );
        let signature = STANDARD.decode(signature).unwrap();
        let signature = DetachedSignature::from_bytes(signature.as_slice()).unwrap();
        let payload = header("x-sidero-payload").as_bytes();
        signature.verify(&public.primary_key, payload).unwrap();
        assert!(signature.verify(&public.primary_key, b"tampered").is_err());
        assert_eq!(signature.signature.typ(), Some(SignatureType::Binary));
        assert_eq!(signature.signature.hash_alg(), Some(HashAlgorithm::Sha512));
    }

    #[tokio::test]
    async fn a_call_without_a_method_is_not_sent() {
        let mut signer = Signer::new(account(None), MetadataValue::from_static("oxide"), nowhere());
        assert!(signer.call(Request::new(())).is_err());
    }

    #[tokio::test]
    async fn a_replaced_key_signs_for_every_clone() {
        let signer = Signer::new(account(None), MetadataValue::from_static("oxide"), nowhere());
        let clone = signer.clone();
        let new = account(None);
        let fingerprint = new.fingerprint.clone();
        signer.replace(new);
        assert_eq!(clone.account().fingerprint(), fingerprint);
    }

    #[test]
    fn a_refused_signature_is_explained() {
        let account = account(Some(DAY));
        let made = account.created();
        let now = made.after(Duration::from_secs(3600));
        for (now, server, words) in [
            (now, None, "renew it with `omnictl infraprovider renewkey oxide`"),
            (now, None, "clock, which says"),
            (now, Some(now), "belongs to another Omni)"),
            (made.after(DAY), None, "expired at"),
            (now, Some(made.after(DAY)), "expired at"),
            (
                now,
                Some(now.after(Duration::from_secs(600))),
                "10 minutes behind Omni's",
            ),
            (
                now.after(Duration::from_secs(600)),
                Some(now),
                "10 minutes ahead of Omni's",
            ),
            (Timestamp(made.0 - 60_000), None, "set the clock"),
        ] {
            let explained = account.explain(now, server);
            assert!(explained.contains(words), "{explained}");
        }
    }

    #[test]
    fn the_servers_clock_is_read_from_its_answer() {
        let mut status = Status::unauthenticated("invalid signature");
        assert_eq!(server_date(status.metadata().as_ref()), None);
        let date = MetadataValue::from_static("Tue, 14 Nov 2023 22:13:20 GMT");
        status.metadata_mut().insert("date", date);
        let told = server_date(status.metadata().as_ref());
        assert_eq!(told, Some(Timestamp(1_700_000_000_000)));
        assert_eq!(super::date(Timestamp(1_700_000_000_123)), "2023-11-14T22:13:20Z");
    }

    #[tokio::test]
    async fn a_debug_print_shows_no_key() {
        let signer = Signer::new(account(None), MetadataValue::from_static("oxide"), nowhere());
        let print = format!("{signer:?}");
        assert!(
            print.contains("fingerprint") && !print.to_lowercase().contains("secret"),
            "{print}"
        );
    }
}
