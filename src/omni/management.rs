//! Schematics and boot assets, through Omni's management API, with the ladder of fallbacks for older servers.
//!
//! The ladder: a call that this Omni does not know is replaced by what upstream's clients did before it
//! existed, talking to the image factory that Omni is configured with. A factory that wants credentials needs
//! an Omni that knows the call: providers may not read them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;
use tokio::time::Instant;

use super::auth::Signer;
use super::channel::{Channels, MESSAGE_LIMIT, Signed, chain};
use super::error::{Call, OmniErrorKind, one_line};
use super::kinds::{FeaturesConfigSpec, FeaturesConfigs, TalosVersions};
use super::state::{Attempt, DEADLINE, Result, State, with_deadline};
use super::wire::management::management_service_client::ManagementServiceClient;
use super::wire::management::{BootAssetKind, BootAssetUrlRequest, CreateSchematicFromRawRequest};
use crate::secret::Secret;

/// The factory of an Omni that names none.
const PUBLIC_FACTORY: &str = "https://factory.talos.dev";

/// How long Omni's features are believed, and how long Omni is believed not to know a call: it may be
/// upgraded any time.
const BELIEVED: Duration = Duration::from_secs(5 * 60);

/// Most bytes of a factory's answer that are read: it is an ID, or a complaint.
const ANSWER_LIMIT: usize = 64 * 1024;

/// Longest segment of a factory's path, in bytes: four times an ID.
const MAX_SEGMENT: usize = 256;

/// How much of a factory's complaint is shown.
const COMPLAINT_CHARS: usize = 300;

/// Which disk image is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssetRequest {
    /// Without a leading "v".
    pub talos_version: String,
    /// The schematic ID as Omni returned it.
    pub schematic: String,
    /// Talos platform.
    pub platform: String,
    /// Architecture.
    pub arch: String,
    /// For example `raw.xz`, or `iso`.
    pub format: String,
}

/// Where a disk image can be downloaded. URL and headers are secrets: they may hold credentials.
#[derive(Debug, Clone)]
pub struct Asset {
    /// May be short-lived.
    pub url: Secret,
    /// To be sent with the request.
    pub headers: Vec<(String, Secret)>,
}

/// A client of Omni's management API. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Management {
    inner: Arc<Inner>,
    factory: reqwest::Client,
}

#[derive(Debug)]
struct Inner {
    client: ManagementServiceClient<Signed>,
    signer: Signer,
    state: State,
    /// Omni before 1.8.
    no_schematics: AtomicBool,
    /// Omni before 1.11, and its features instead.
    no_assets: Mutex<Option<Instant>>,
    features: Mutex<Option<(Instant, FeaturesConfigSpec)>>,
}

impl Management {
    pub(super) fn new(channels: &Channels, state: State) -> Self {
        let client = ManagementServiceClient::new(channels.calls.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        Self {
            inner: Arc::new(Inner {
                client,
                signer: channels.signer.clone(),
                state,
                no_schematics: AtomicBool::new(false),
                no_assets: Mutex::new(None),
                features: Mutex::new(None),
            }),
            factory: channels.factory.clone(),
        }
    }

    /// Talks to image factories with another client.
    #[must_use]
    pub fn with_factory_client(mut self, client: reqwest::Client) -> Self {
        self.factory = client;
        self
    }

    /// Registers a schematic and returns its ID as the factory names it (an Enterprise factory's IDs differ
    /// from a local hash).
    pub async fn create_schematic(&self, yaml: &str, talos_version: &str) -> Result<String> {
        let attempt = self.attempt("register", "schematic", "");
        if self.inner.no_schematics.load(Ordering::Relaxed) {
            return self.upload_schematic(&attempt, yaml, talos_version).await;
        }
        let request = CreateSchematicFromRawRequest {
            raw_schematic: yaml.as_bytes().to_vec(),
            talos_version: bare(talos_version).to_owned(),
        };
        let mut client = self.inner.client.clone();
        let answer = attempt
            .unary(client.create_schematic_from_raw(with_deadline(request)))
            .await;
        let id = match answer {
            Ok(answer) => answer.schematic_id,
            Err(error) if error.kind == OmniErrorKind::Unimplemented => {
                self.inner.no_schematics.store(true, Ordering::Relaxed);
                return self.upload_schematic(&attempt, yaml, talos_version).await;
            }
            Err(error) => return Err(error),
        };
        schematic_id(id).map_err(|(kind, reason)| attempt.error(kind, reason))
    }

    /// Where the disk image of a schematic is.
    pub async fn disk_asset(&self, asset: &AssetRequest) -> Result<Asset> {
        let attempt = self.attempt("locate", "disk image of schematic", &asset.schematic);
        let path = asset_path(asset).map_err(|reason| attempt.error(OmniErrorKind::Invalid, reason))?;
        if self.inner.no_assets_lately() {
            return self.own_asset(asset, &path).await;
        }
        let kind = match asset.format.as_str() {
            "iso" => BootAssetKind::Iso,
            _ => BootAssetKind::Disk,
        };
        let request = BootAssetUrlRequest {
            talos_version: bare(&asset.talos_version).to_owned(),
            schematic_id: asset.schematic.clone(),
            standalone_url: false,
            boot_asset_kind: kind.into(),
            platform: asset.platform.clone(),
            architecture: asset.arch.clone(),
            format: asset.format.clone(),
            secure_boot: false,
        };
        let mut client = self.inner.client.clone();
        match attempt
            .unary(client.get_boot_asset_url(with_deadline(request)))
            .await
        {
            Ok(answer) if answer.url.is_empty() => {
                let reason = "the answer holds no URL".to_owned();
                Err(attempt.error(OmniErrorKind::Unavailable, reason))
            }
            Ok(answer) => Ok(Asset {
                url: Secret::new(answer.url),
                headers: secrets(answer.headers),
            }),
            Err(error) if error.kind == OmniErrorKind::Unimplemented => {
                *self
                    .inner
                    .no_assets
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                self.own_asset(asset, &path).await
            }
            Err(error) => Err(error),
        }
    }

    /// The image's address at the factory that Omni would use.
    async fn own_asset(&self, asset: &AssetRequest, path: &str) -> Result<Asset> {
        let base = self.factory_url(&asset.talos_version).await?;
        Ok(Asset {
            url: Secret::new(format!("{base}{path}")),
            headers: Vec::new(),
        })
    }

    /// Registers a schematic with the factory itself.
    async fn upload_schematic(&self, attempt: &Attempt, yaml: &str, talos_version: &str) -> Result<String> {
        let base = self.factory_url(talos_version).await?;
        let broken = |error: reqwest::Error| {
            let reason = format!("the image factory: {}", chain(&error.without_url()));
            attempt.error(OmniErrorKind::Unavailable, reason)
        };
        let mut answer = self
            .factory
            .post(format!("{base}/schematics"))
            .header("content-type", "application/yaml")
            .body(yaml.to_owned())
            .timeout(DEADLINE)
            .send()
            .await
            .map_err(broken)?;
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(broken)? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_LIMIT {
                let reason = format!("the image factory's answer has more than {ANSWER_LIMIT} bytes");
                return Err(attempt.error(OmniErrorKind::Unavailable, reason));
            }
        }
        schematic_answer(answer.status(), &body).map_err(|(kind, reason)| attempt.error(kind, reason))
    }

    /// The base URL of the factory that has a Talos version, without a trailing slash.
    async fn factory_url(&self, talos_version: &str) -> Result<String> {
        let features = self.features().await?;
        // Only where there are two factories does the version matter.
        let version = match features.secondary_image_factory_base_url.as_str() {
            "" => None,
            _ => self.inner.state.get::<TalosVersions>(bare(talos_version)).await?,
        };
        let of_version = version
            .map(|version| version.spec.image_factory_url)
            .unwrap_or_default();
        Ok(choose_factory(&features, &of_version))
    }

    async fn features(&self) -> Result<FeaturesConfigSpec> {
        if let Some((at, features)) = &*self.inner.features.lock().unwrap_or_else(PoisonError::into_inner)
            && at.elapsed() < BELIEVED
        {
            return Ok(features.clone());
        }
        // An Omni without the resource uses the public factory.
        let found = self.inner.state.get::<FeaturesConfigs>("features-config").await?;
        let features = found.map(|found| found.spec).unwrap_or_default();
        *self.inner.features.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), features.clone()));
        Ok(features)
    }

    fn attempt(&self, verb: &'static str, what: &'static str, id: &str) -> Attempt {
        Attempt::new(self.inner.signer.clone(), Call::Management, verb, what, id)
    }
}

impl Inner {
    fn no_assets_lately(&self) -> bool {
        let since = *self.no_assets.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() < BELIEVED)
    }
}

fn secrets(headers: HashMap<String, String>) -> Vec<(String, Secret)> {
    let mut headers: Vec<(String, Secret)> = headers
        .into_iter()
        .map(|(name, value)| (name, Secret::new(value)))
        .collect();
    headers.sort_by(|left, right| left.0.cmp(&right.0));
    headers
}

/// A refusal's meaning, and why.
type Refusal = (OmniErrorKind, String);

/// The schematic ID in a factory's answer.
///
/// # Errors
///
/// The factory's complaint, or that there is no usable ID.
#[doc(hidden)]
pub fn schematic_answer(status: StatusCode, body: &[u8]) -> std::result::Result<String, Refusal> {
    #[derive(Deserialize)]
    struct Created {
        id: String,
    }

    if !status.is_success() {
        let complaint: String = String::from_utf8_lossy(body)
            .chars()
            .take(COMPLAINT_CHARS)
            .collect();
        let message = format!("the image factory says {status}: {}", one_line(&complaint));
        return Err((http_meaning(status), message));
    }
    let created: Created = serde_json::from_slice(body).map_err(|_| {
        let reason = "the image factory's answer holds no schematic ID".to_owned();
        (OmniErrorKind::Unavailable, reason)
    })?;
    schematic_id(created.id)
}

fn schematic_id(id: String) -> std::result::Result<String, Refusal> {
    match is_segment(&id) {
        true => Ok(id),
        false => {
            let reason = "the answer holds no usable schematic ID".to_owned();
            Err((OmniErrorKind::Unavailable, reason))
        }
    }
}

fn http_meaning(status: StatusCode) -> OmniErrorKind {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => OmniErrorKind::Denied,
        StatusCode::PAYLOAD_TOO_LARGE => OmniErrorKind::TooLarge,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => OmniErrorKind::Unavailable,
        status if status.is_client_error() => OmniErrorKind::Invalid,
        _ => OmniErrorKind::Unavailable,
    }
}

/// A Talos version without its "v": requests usually have none, URLs need exactly one.
fn bare(talos_version: &str) -> &str {
    talos_version.strip_prefix('v').unwrap_or(talos_version)
}

/// Whether a value can be one segment of a factory's path.
fn is_segment(value: &str) -> bool {
    !matches!(value, "" | "." | "..")
        && value.len() <= MAX_SEGMENT
        && value
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// The path of a disk image at any factory.
fn asset_path(asset: &AssetRequest) -> std::result::Result<String, String> {
    let AssetRequest {
        talos_version,
        schematic,
        platform,
        arch,
        format,
    } = asset;
    let version = bare(talos_version);
    for (what, value) in [
        ("Talos version", version),
        ("schematic ID", schematic),
        ("platform", platform),
        ("architecture", arch),
        ("format", format),
    ] {
        if !is_segment(value) {
            return Err(format!(
                "the {what} {value:?} cannot be part of an image's address"
            ));
        }
    }
    Ok(format!(
        "/image/{schematic}/v{version}/{platform}-{arch}.{format}"
    ))
}

/// The second factory where the version is its own, else the first.
fn choose_factory(features: &FeaturesConfigSpec, of_version: &str) -> String {
    let trimmed = |url: &str| url.trim_end_matches('/').to_owned();
    let first = match trimmed(&features.image_factory_base_url) {
        none if none.is_empty() => PUBLIC_FACTORY.to_owned(),
        first => first,
    };
    let second = trimmed(&features.secondary_image_factory_base_url);
    if !second.is_empty() && second == trimmed(of_version) {
        second
    } else {
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asset() -> AssetRequest {
        AssetRequest {
            talos_version: "1.13.0".into(),
            schematic: "376567988ad3".into(),
            platform: "nocloud".into(),
            arch: "amd64".into(),
            format: "raw.xz".into(),
        }
    }

    #[test]
    fn an_address_has_exactly_one_v() {
        let path = Ok("/image/376567988ad3/v1.13.0/nocloud-amd64.raw.xz".to_owned());
        assert_eq!(asset_path(&asset()), path);
        let with_v = AssetRequest {
            talos_version: "v1.13.0".into(),
            ..asset()
        };
        assert_eq!(asset_path(&with_v), path);
    }

    #[test]
    fn nothing_climbs_out_of_an_address() {
        for bad in ["", ".", "..", "a/b", "a?b", "a b", "a%2f", "ä"] {
            assert!(!is_segment(bad), "{bad}");
            let schematic = AssetRequest {
                schematic: bad.into(),
                ..asset()
            };
            assert!(asset_path(&schematic).is_err(), "{bad}");
            let format = AssetRequest {
                format: bad.into(),
                ..asset()
            };
            assert!(asset_path(&format).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_second_factory_serves_only_its_own_versions() {
        let features = |first: &str, second: &str| FeaturesConfigSpec {
            image_factory_base_url: first.into(),
            secondary_image_factory_base_url: second.into(),
        };
        for (first, second, of_version, chosen) in [
            ("", "", "", PUBLIC_FACTORY),
            ("https://f/", "", "", "https://f"),
            ("https://f", "https://s/", "https://s", "https://s"),
            ("https://f", "https://s", "https://s//", "https://s"),
            ("https://f", "https://s", "https://f", "https://f"),
            ("https://f", "https://s", "", "https://f"),
            ("", "https://s", "", PUBLIC_FACTORY),
        ] {
            assert_eq!(choose_factory(&features(first, second), of_version), chosen);
        }
    }

    #[test]
    fn a_factorys_answer_is_an_id_or_says_why_not() {
        let answer = |status: u16, body: &str| {
            schematic_answer(StatusCode::from_u16(status).unwrap_or_default(), body.as_bytes())
        };
        assert_eq!(answer(201, r#"{"id":"a1"}"#), Ok("a1".to_owned()));
        let long = format!(r#"{{"id":"{}"}}"#, "a".repeat(MAX_SEGMENT + 1));
        for bad in ["", "[]", r#"{"id":"../x"}"#, &long] {
            assert_eq!(
                answer(200, bad).map_err(|(kind, _)| kind),
                Err(OmniErrorKind::Unavailable)
            );
        }
        let (kind, reason) = answer(400, &format!("line 1:\n{}", "x".repeat(5000))).unwrap_err();
        assert_eq!(kind, OmniErrorKind::Invalid);
        assert!(
            reason.len() < 400 && reason.contains("says 400 Bad Request: line 1: x"),
            "{reason}"
        );
    }

    #[test]
    fn a_factorys_refusal_is_told_from_its_outage() {
        for (status, kind) in [
            (400, OmniErrorKind::Invalid),
            (401, OmniErrorKind::Denied),
            (429, OmniErrorKind::Unavailable),
            (502, OmniErrorKind::Unavailable),
        ] {
            let status = StatusCode::from_u16(status).unwrap_or_default();
            assert_eq!(http_meaning(status), kind);
        }
    }

    #[test]
    fn headers_come_in_a_fixed_order_and_hidden() {
        let headers = [("b", "2"), ("a", "1")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let headers = secrets(headers.into());
        assert_eq!(
            format!("{headers:?}"),
            r#"[("a", <redacted>), ("b", <redacted>)]"#
        );
    }
}
