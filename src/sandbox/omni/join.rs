//! Decides whether a booted machine may join: reads its Talos documents or kernel arguments, and checks the
//! token in them.
//!
//! Written without a look at [`crate::talos`]: two renderings and one reading of the same token check each
//! other.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use url::Url;
use url::form_urlencoded;

use super::types;
use crate::omni::wire::specs;

/// Where machines find Omni inside the tunnel: the first address of the SideroLink prefix, the same for every
/// Omni.
const TUNNEL: &str = "[fdae:41e4:649b:9303::1]";

/// A join token as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// 0 for a plain one.
    version: u8,
    /// What it says of the machine.
    pub(super) extra: BTreeMap<String, String>,
    signature: Vec<u8>,
    plain: String,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Encoded {
    extra_data: BTreeMap<String, String>,
    signature: String,
}

impl Token {
    /// Reads a token; nothing is believed yet.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (version, encoded) = if let Some(encoded) = text.strip_prefix("v1:") {
            (1, encoded)
        } else if let Some(encoded) = text.strip_prefix("v2:") {
            (2, encoded)
        } else {
            return Ok(Self {
                version: 0,
                extra: BTreeMap::new(),
                signature: Vec::new(),
                plain: text.to_owned(),
            });
        };
        let json = STANDARD
            .decode(encoded)
            .map_err(|error| format!("the join token is not base64: {error}"))?;
        let encoded: Encoded =
            serde_json::from_slice(&json).map_err(|error| format!("the join token is not JSON: {error}"))?;
        let signature = STANDARD
            .decode(&encoded.signature)
            .map_err(|error| format!("the signature of the join token is not base64: {error}"))?;
        Ok(Self {
            version,
            extra: encoded.extra_data,
            signature,
            plain: String::new(),
        })
    }

    /// The provider whose token has to have signed this one; `None`: the account's default token.
    pub(super) fn provider(&self) -> Option<&str> {
        self.extra
            .get(types::LABEL_PROVIDER)
            .filter(|_| self.version == 2)
            .map(String::as_str)
    }

    /// Whether `secret` signed it, or is it.
    pub(super) fn verify(&self, secret: &str) -> bool {
        if self.version == 0 {
            return self.plain == secret;
        }
        let Some(mac) = mac(secret, &self.extra) else {
            return false;
        };
        mac.verify_slice(&self.signature).is_ok()
    }
}

fn mac(secret: &str, extra: &BTreeMap<String, String>) -> Option<Hmac<Sha256>> {
    // As Go's encoder writes it: sorted, compact, and safe to put into HTML.
    let json = serde_json::to_string(extra)
        .ok()?
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026");
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok()?;
    mac.update(json.as_bytes());
    Some(mac)
}

/// A version 2 token that says which provider the machine belongs to.
fn encode(secret: &str, provider: &str) -> Option<String> {
    let extra_data = BTreeMap::from([(types::LABEL_PROVIDER.to_owned(), provider.to_owned())]);
    let signature = STANDARD.encode(mac(secret, &extra_data)?.finalize().into_bytes());
    let json = serde_json::to_string(&Encoded {
        extra_data,
        signature,
    })
    .ok()?;
    Some(format!("v2:{}", STANDARD.encode(json)))
}

/// The join config that Omni keeps for a provider.
pub(super) fn provider_join_config(
    provider: &str,
    secret: &str,
    api_url: &str,
    events_port: i32,
    logs_port: i32,
) -> specs::ProviderJoinConfigSpec {
    let token = encode(secret, provider).unwrap_or_default();
    let query: String = form_urlencoded::Serializer::new(String::new())
        .append_pair("jointoken", &token)
        .finish();
    let separator = if api_url.contains('?') { '&' } else { '?' };
    let url = format!("{api_url}{separator}{query}");
    let mut config = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        config,
        "apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: {url}\n---\n\
         apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: '{TUNNEL}:{events_port}'\n---\n\
         apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: omni-kmsg\nurl: tcp://{TUNNEL}:{logs_port}\n"
    );
    specs::ProviderJoinConfigSpec {
        config: Some(specs::JoinConfig {
            kernel_args: vec![
                format!("siderolink.api={url}"),
                format!("talos.events.sink={TUNNEL}:{events_port}"),
                format!("talos.logging.kernel=tcp://{TUNNEL}:{logs_port}"),
            ],
            config,
        }),
        join_token: secret.to_owned(),
    }
}

#[derive(serde::Deserialize)]
struct Document {
    #[serde(default)]
    kind: String,
    #[serde(default, rename = "apiUrl")]
    api_url: String,
}

/// The SideroLink API URL in a machine's Talos documents.
pub(super) fn api_url_of_documents(user_data: &[u8]) -> Result<String, String> {
    let text =
        std::str::from_utf8(user_data).map_err(|error| format!("the user data is not text: {error}"))?;
    let mut document = String::new();
    for line in text.lines().chain(["---"]) {
        if line.trim_end() != "---" {
            document.push_str(line);
            document.push('\n');
            continue;
        }
        if !document.trim().is_empty() {
            let parsed: Document = serde_saphyr::from_str(&document)
                .map_err(|error| format!("a document of the user data is not YAML: {error}"))?;
            if parsed.kind == "SideroLinkConfig" {
                return Ok(parsed.api_url);
            }
        }
        document.clear();
    }
    Err("the user data has no SideroLinkConfig".to_owned())
}

/// The SideroLink API URL on a kernel command line.
pub(super) fn api_url_of_kernel_args(args: &str) -> Result<String, String> {
    args.split_ascii_whitespace()
        .find_map(|arg| arg.strip_prefix("siderolink.api="))
        .map(str::to_owned)
        .ok_or_else(|| "the kernel arguments have no siderolink.api".to_owned())
}

/// The token in a SideroLink API URL that leads to `ours`.
pub(super) fn token_of_url(api_url: &str, ours: &str) -> Result<Token, String> {
    let url = Url::parse(api_url).map_err(|error| format!("the API URL is none: {error}"))?;
    let ours = Url::parse(ours).map_err(|error| format!("Omni's own API URL is none: {error}"))?;
    let place = |url: &Url| {
        (
            url.scheme().to_owned(),
            url.host_str().map(str::to_owned),
            url.port_or_known_default(),
        )
    };
    if place(&url) != place(&ours) {
        return Err("the API URL leads to another Omni".to_owned());
    }
    let token = url
        .query_pairs()
        .find(|(key, _)| key == "jointoken")
        .ok_or("the API URL has no join token")?
        .1
        .into_owned();
    Token::parse(&token)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Upstream's vectors, for the raw token `abcd`.
    const PROVIDER: &str = "\
        v2:eyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1wcm92aWRlci1pZCI6InRlc3Qif\
        Swic2lnbmF0dXJlIjoiWTNpZ285V2xJSVZOWWpXZmgyWlg5NnpnWW5UQjlwWTI3ZEJaVnJwNDJMZz0if\
        Q==";
    const REQUEST: &str = "\
        v2:eyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1wcm92aWRlci1pZCI6InRlc3QiL\
        CJvbW5pLnNpZGVyby5kZXYvbWFjaGluZS1yZXF1ZXN0IjoicmVxdWVzdDEifSwic2lnbmF0dXJlIjoie\
        llrTFRwOUVIanlwTGxrZG1mZjV2Z1A1SERXRktUUXBGR281REp2TDV4MD0ifQ==";

    #[test]
    fn upstreams_tokens_verify_and_a_tampered_one_does_not() {
        for text in [PROVIDER, REQUEST] {
            let token = Token::parse(text).unwrap();
            assert_eq!(token.provider(), Some("test"));
            assert!(token.verify("abcd"));
            assert!(!token.verify("abce"));
        }
        let mut token = Token::parse(REQUEST).unwrap();
        token
            .extra
            .insert(types::LABEL_REQUEST.to_owned(), "request2".to_owned());
        assert!(!token.verify("abcd"));
    }

    #[test]
    fn a_version_1_or_plain_token_is_the_accounts_whatever_provider_it_names() {
        let old = Token::parse(&PROVIDER.replacen("v2:", "v1:", 1)).unwrap();
        assert_eq!(old.provider(), None);
        assert_eq!(old.extra.get(types::LABEL_PROVIDER).unwrap(), "test");
        assert!(old.verify("abcd"));
        let plain = Token::parse("abcd").unwrap();
        assert!(plain.verify("abcd") && !plain.verify("abc"));
    }

    #[test]
    fn a_provider_join_config_has_upstreams_token_in_documents_and_kernel_arguments() {
        let spec = provider_join_config("test", "abcd", "http://127.0.0.1:8099", 8091, 8092);
        let config = spec.config.unwrap();
        let token = Token::parse(PROVIDER).unwrap();
        let url = api_url_of_documents(config.config.as_bytes()).unwrap();
        assert_eq!(token_of_url(&url, "http://127.0.0.1:8099/").unwrap(), token);
        let url = api_url_of_kernel_args(&config.kernel_args.join(" ")).unwrap();
        assert_eq!(token_of_url(&url, "http://127.0.0.1:8099").unwrap(), token);
        assert!(url.starts_with("http://127.0.0.1:8099?jointoken=v2%3A"));
        assert!(token_of_url(&url, "http://127.0.0.1:8098").is_err());
    }
}
