//! Decides whose call it is: the per-request signature that go-api-signature's clients send, checked as Omni
//! checks it.
//!
//! Every failure is the same `Unauthenticated "invalid signature"` on the wire; the cause is for Omni's log
//! alone ([`super::Omni::signature_refusals`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pgp::composed::{
    Deserializable, DetachedSignature, EncryptionCaps, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
    SignedSecretKey, SubkeyParamsBuilder,
};
use pgp::crypto::ecc_curve::ECCCurve;
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::types::{KeyDetails as _, Password, Tag, Timestamp};
use rand::rngs::OsRng;
use tonic::metadata::MetadataMap;

use super::Role;

/// How far a client's clock may be off, either way.
const SKEW: Duration = Duration::from_secs(300);

/// The headers that a signature covers. One that the call has not may be missing or null in the payload, not
/// an empty list.
const SIGNED: [&str; 10] = [
    "x-sidero-timestamp",
    "nodes",
    "selectors",
    "fieldSelectors",
    "runtime",
    "context",
    "cluster",
    "namespace",
    "uid",
    "authorization",
];

/// A public key that was registered, by fingerprint.
#[derive(Debug, Clone)]
pub(super) struct PublicKey {
    key: SignedPublicKey,
    /// The full identity of the service account.
    pub(super) identity: String,
    /// What it may do.
    pub(super) role: Role,
    /// When it stops being accepted.
    pub(super) expires: SystemTime,
}

/// Registered keys, by lower-case fingerprint.
pub(super) type Keys = BTreeMap<String, Arc<PublicKey>>;

/// Who is calling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Actor {
    pub(super) identity: String,
    pub(super) role: Role,
    /// The provider ID, from the identity of the key: neither a header nor the key file's name counts.
    pub(super) provider: Option<String>,
}

/// The identity suffix of providers' service accounts.
const PROVIDER_ACCOUNT: &str = "@infra-provider.serviceaccount.omni.sidero.dev";
/// The identity suffix of all others.
const ACCOUNT: &str = "@serviceaccount.omni.sidero.dev";

/// The full identity of a service account: `infra-provider:<id>` is a provider's.
pub(super) fn identity(account: &str) -> String {
    match account.strip_prefix("infra-provider:") {
        Some(provider) => format!("{provider}{PROVIDER_ACCOUNT}"),
        None => format!("{account}{ACCOUNT}"),
    }
}

#[derive(serde::Deserialize)]
struct Payload {
    #[serde(default)]
    headers: BTreeMap<String, Option<Vec<String>>>,
    method: String,
}

/// Checks the signature of one call to `method`. `full` false believes the fingerprint and skips the OpenPGP
/// arithmetic alone.
pub(super) fn verify(
    keys: &Keys,
    metadata: &MetadataMap,
    method: &str,
    now: SystemTime,
    full: bool,
) -> Result<Actor, String> {
    let header = text(metadata, "x-sidero-signature").ok_or("no signature header")?;
    let mut parts = header.split(' ');
    let (Some(version), Some(claimed), Some(fingerprint), Some(signature), None) = (
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
    ) else {
        return Err("the signature header has not four parts".to_owned());
    };
    if version != "siderov1" {
        return Err(format!("unknown signature version {version:?}"));
    }
    if claimed.is_empty() || fingerprint.is_empty() || signature.is_empty() {
        return Err("a part of the signature header is empty".to_owned());
    }
    let key = keys
        .get(fingerprint)
        .ok_or_else(|| format!("unknown key {fingerprint}"))?;
    if now >= key.expires {
        return Err(format!("key {fingerprint} has expired"));
    }

    let timestamp = text(metadata, "x-sidero-timestamp").ok_or("no timestamp header")?;
    let seconds: u64 = timestamp
        .parse()
        .map_err(|_| "the timestamp is not a number".to_owned())?;
    let signed_at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    if signed_at > now + SKEW || signed_at + SKEW < now {
        return Err(format!(
            "the timestamp {timestamp} is off by more than five minutes"
        ));
    }

    let payload = text(metadata, "x-sidero-payload").ok_or("no payload header")?;
    let parsed: Payload =
        serde_json::from_str(payload).map_err(|error| format!("the payload is not JSON: {error}"))?;
    if parsed.method != method {
        return Err(format!("signed for {}, called {method}", parsed.method));
    }
    for name in SIGNED {
        let sent: Vec<&str> = metadata
            .get_all(name.to_ascii_lowercase())
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let signed = parsed.headers.get(name).and_then(Option::as_ref);
        let same = match signed {
            None => sent.is_empty(),
            Some(signed) => !sent.is_empty() && signed.iter().map(String::as_str).eq(sent),
        };
        if !same {
            return Err(format!("header {name} is not the signed one"));
        }
    }

    if full {
        let signature = STANDARD
            .decode(signature)
            .map_err(|error| format!("the signature is not base64: {error}"))?;
        check(&key.key, &signature, payload.as_bytes(), now)?;
    }
    Ok(Actor {
        identity: key.identity.clone(),
        role: key.role,
        provider: key.identity.strip_suffix(PROVIDER_ACCOUNT).map(str::to_owned),
    })
}

fn check(key: &SignedPublicKey, signature: &[u8], payload: &[u8], now: SystemTime) -> Result<(), String> {
    let signature = DetachedSignature::from_bytes(signature)
        .map_err(|error| format!("the signature is not an OpenPGP packet: {error}"))?;
    let packet = &signature.signature;
    if packet.typ() != Some(SignatureType::Binary) {
        return Err("not a signature over a binary document".to_owned());
    }
    let strong = [
        HashAlgorithm::Sha224,
        HashAlgorithm::Sha256,
        HashAlgorithm::Sha384,
        HashAlgorithm::Sha512,
    ];
    if !packet.hash_alg().is_some_and(|hash| strong.contains(&hash)) {
        return Err("a weak hash".to_owned());
    }
    if packet.issuer_key_id().is_empty() && packet.issuer_fingerprint().is_empty() {
        return Err("the signature names no issuer".to_owned());
    }
    let created: SystemTime = packet
        .created()
        .ok_or("the signature has no creation time")?
        .into();
    if created < key.primary_key.created_at().into() {
        return Err("the signature is older than the key".to_owned());
    }
    if created > now + SKEW {
        return Err("the signature is from the future".to_owned());
    }
    signature
        .verify(&key.primary_key, payload)
        .map_err(|error| format!("the signature does not verify: {error}"))
}

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> Option<&'a str> {
    metadata.get(name)?.to_str().ok()
}

/// A new key pair for a service account: its key text, as `omnictl` prints it, and what Omni registers of it.
pub(super) fn generate(
    account: &str,
    role: Role,
    now: SystemTime,
    lifetime: Duration,
) -> pgp::errors::Result<(String, String, PublicKey)> {
    let identity = identity(account);
    let created = Timestamp::try_from(now).unwrap_or_else(|_| Timestamp::from_secs(0));
    // The shape of omnictl's keys: EdDSA over Ed25519 in the legacy encoding, which certifies and signs, and
    // an unused encryption subkey.
    let params = SecretKeyParamsBuilder::default()
        .key_type(KeyType::Ed25519Legacy)
        .can_certify(true)
        .can_sign(true)
        .created_at(created)
        .primary_user_id(format!("{account} <{identity}>"))
        .subkey(
            SubkeyParamsBuilder::default()
                .key_type(KeyType::ECDH(ECCCurve::Curve25519Legacy))
                .can_encrypt(EncryptionCaps::All)
                .created_at(created)
                .build()
                .map_err(|error| pgp::errors::Error::from(error.to_string()))?,
        )
        .build()
        .map_err(|error| pgp::errors::Error::from(error.to_string()))?;
    let mut key = params.generate(OsRng)?;
    set_expiry(&mut key, created, lifetime)?;

    let armored = key.to_armored_string(None.into())?;
    let json = serde_json::json!({ "name": account, "pgp_key": armored });
    let public = key.to_public_key();
    let fingerprint = hex::encode(public.primary_key.fingerprint().as_bytes());
    let registered = PublicKey {
        key: public,
        identity,
        role,
        expires: now + lifetime,
    };
    Ok((STANDARD.encode(json.to_string()), fingerprint, registered))
}

/// Signs the user IDs anew with a key expiration: rPGP's builder has no setting for it.
fn set_expiry(key: &mut SignedSecretKey, created: Timestamp, lifetime: Duration) -> pgp::errors::Result<()> {
    let lifetime = pgp::types::Duration::from_secs(u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX));
    for user in &mut key.details.users {
        let mut config = SignatureConfig::from_key(OsRng, &key.primary_key, SignatureType::CertPositive)?;
        let mut flags = pgp::packet::KeyFlags::default();
        flags.set_certify(true);
        flags.set_sign(true);
        config.hashed_subpackets = vec![
            Subpacket::regular(SubpacketData::SignatureCreationTime(created))?,
            Subpacket::regular(SubpacketData::IssuerFingerprint(key.primary_key.fingerprint()))?,
            Subpacket::regular(SubpacketData::KeyFlags(flags))?,
            Subpacket::regular(SubpacketData::KeyExpirationTime(lifetime))?,
            Subpacket::regular(SubpacketData::IsPrimary(true))?,
        ];
        config.unhashed_subpackets = vec![Subpacket::regular(SubpacketData::IssuerKeyId(
            key.primary_key.legacy_key_id(),
        ))?];
        let signature = config.sign_certification(
            &key.primary_key,
            key.primary_key.public_key(),
            &Password::empty(),
            Tag::UserId,
            &user.id,
        )?;
        user.signatures = vec![signature];
    }
    Ok(())
}
