//! Renders what makes a machine join Omni: join token, API URL, kernel arguments, Talos documents.
//! Byte-exact, and pure.
//!
//! Omni decodes a token, writes its extra data anew and compares the signature of that, so the JSON has to be
//! the very bytes that Go's encoder makes. The rest follows suit: what upstream's programs render for the
//! same machine is the same.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use serde::Deserialize;
use sha2::Sha256;

use super::scalar::scalar;
use crate::secret::Secret;

/// Omni's end of the SideroLink network: the first address of a prefix that is the same for all.
const OMNI: &str = "[fdae:41e4:649b:9303::1]";

/// The members of a token's extra data.
const PROVIDER: &str = "omni.sidero.dev/infra-provider-id";
const REQUEST: &str = "omni.sidero.dev/machine-request";

/// What it takes for one machine to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinParams {
    /// The machine API's advertised URL.
    pub api_url: String,
    /// The raw join token; one that is encoded already is used as it is.
    pub token: Secret,
    /// 2 where Omni has provider join configs, else 1.
    pub token_version: u8,
    /// Port of the event sink.
    pub events_port: i32,
    /// Port of the kernel log receiver.
    pub logs_port: i32,
    /// The provider ID.
    pub provider: String,
    /// The machine request, so that Omni links the machine without knowing its UUID. `None` for what is baked
    /// into an image.
    pub request: Option<String>,
    /// Whether the request asks for the gRPC tunnel. Omni may force it by itself.
    pub tunnel: bool,
}

/// Why nothing can be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// No token.
    #[error("Omni gave no join token")]
    NoToken,
    /// A token that is encoded already, but not by Omni.
    #[error("Omni's join token is of no kind that is known")]
    BadToken,
    /// No usable URL.
    #[error("Omni's machine API URL cannot be used: {0}")]
    BadUrl(&'static str),
    /// No usable port of the event sink.
    #[error("Omni's events port {0} is none")]
    EventsPort(i32),
    /// No usable port of the kernel log receiver.
    #[error("Omni's logs port {0} is none")]
    LogsPort(i32),
    /// A token version that Omni does not know.
    #[error("join tokens of version {0} are unknown")]
    TokenVersion(u8),
    /// An image per machine.
    #[error(
        "kernel arguments are part of the image and must not name a machine request: every machine would get \
         its own image"
    )]
    RequestInImage,
}

type Result<T> = std::result::Result<T, JoinError>;

impl JoinParams {
    /// The join token with its signed extra data.
    ///
    /// # Errors
    ///
    /// Says what is missing.
    pub fn token(&self) -> Result<Secret> {
        let mut extra = BTreeMap::from([(PROVIDER, self.provider.as_str())]);
        if let Some(request) = &self.request {
            extra.insert(REQUEST, request);
        }
        encode_token(self.token.expose(), self.token_version, &extra).map(Secret::new)
    }

    /// The machine API's URL with the token in it.
    ///
    /// # Errors
    ///
    /// Says what is missing.
    pub fn url(&self) -> Result<Secret> {
        join_url(&self.api_url, self.token()?.expose(), self.tunnel).map(Secret::new)
    }

    /// Kernel arguments for an image; they serve every machine, so they must not name a request.
    ///
    /// # Errors
    ///
    /// Says what is missing, or that a request is named.
    pub fn kernel_args(&self) -> Result<Vec<Secret>> {
        if self.request.is_some() {
            return Err(JoinError::RequestInImage);
        }
        let (events, logs) = self.ports()?;
        Ok([
            format!("siderolink.api={}", self.url()?.expose()),
            format!("talos.events.sink={OMNI}:{events}"),
            format!("talos.logging.kernel=tcp://{OMNI}:{logs}"),
        ]
        .map(Secret::new)
        .to_vec())
    }

    /// Talos documents for a machine's user data. More documents may follow: they start with a separator
    /// line.
    ///
    /// # Errors
    ///
    /// Says what is missing.
    pub fn documents(&self) -> Result<Secret> {
        let (events, logs) = self.ports()?;
        let url = self.url()?;
        let url = url.expose();
        Ok(Secret::new(format!(
            "apiVersion: v1alpha1\n\
             kind: SideroLinkConfig\n\
             apiUrl: {}\n\
             ---\n\
             apiVersion: v1alpha1\n\
             kind: EventSinkConfig\n\
             endpoint: '{OMNI}:{events}'\n\
             ---\n\
             apiVersion: v1alpha1\n\
             kind: KmsgLogConfig\n\
             name: omni-kmsg\n\
             url: tcp://{OMNI}:{logs}\n",
            scalar(url, 2)
        )))
    }

    fn ports(&self) -> Result<(u16, u16)> {
        let port = |port: i32| u16::try_from(port).ok().filter(|port| *port != 0);
        let events = port(self.events_port).ok_or(JoinError::EventsPort(self.events_port))?;
        let logs = port(self.logs_port).ok_or(JoinError::LogsPort(self.logs_port))?;
        Ok((events, logs))
    }
}

/// A token's text: raw where there is nothing to tell, else version, extra data and signature.
fn encode_token(raw: &str, version: u8, extra: &BTreeMap<&str, &str>) -> Result<String> {
    if raw.is_empty() {
        return Err(JoinError::NoToken);
    }
    if let Some(encoded) = raw.strip_prefix("v1:").or_else(|| raw.strip_prefix("v2:")) {
        check_encoded(encoded).ok_or(JoinError::BadToken)?;
        return Ok(raw.to_owned());
    }
    if extra.is_empty() {
        return Ok(raw.to_owned());
    }
    if !matches!(version, 1 | 2) {
        return Err(JoinError::TokenVersion(version));
    }
    let members: Vec<String> = extra
        .iter()
        .map(|(key, value)| format!("{}:{}", go_json(key), go_json(value)))
        .collect();
    let extra = format!("{{{}}}", members.join(","));
    // HMAC takes keys of any length; the error is of other MACs.
    let mut mac = Hmac::<Sha256>::new_from_slice(raw.as_bytes()).map_err(|_| JoinError::NoToken)?;
    mac.update(extra.as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    let json = format!(r#"{{"extra_data":{extra},"signature":"{signature}"}}"#);
    Ok(format!("v{version}:{}", STANDARD.encode(json)))
}

/// What an encoded token holds.
#[derive(Deserialize)]
struct Encoded {
    #[serde(rename = "extra_data")]
    _extra: Option<BTreeMap<String, String>>,
    signature: Option<String>,
}

/// A machine with a token that nobody can read would boot, and never join.
fn check_encoded(encoded: &str) -> Option<()> {
    let json = STANDARD.decode(encoded).ok()?;
    let token: Encoded = serde_json::from_slice(&json).ok()?;
    STANDARD.decode(token.signature.unwrap_or_default()).ok()?;
    Some(())
}

/// A JSON string as Go's encoder writes it: safe inside HTML.
fn go_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    for char in serde_json::Value::from(text).to_string().chars() {
        match char {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", u32::from(char))),
            char => out.push(char),
        }
    }
    out
}

/// Adds token and tunnel to the query of the URL, which is then sorted by key; everything else stays as it
/// is. Upstream's programs would spell some URLs in another way than Omni says them: those are refused.
fn join_url(api_url: &str, token: &str, tunnel: bool) -> Result<String> {
    let (rest, fragment) = api_url.split_once('#').unwrap_or((api_url, ""));
    let (base, query) = rest.split_once('?').unwrap_or((rest, ""));
    check_base(base).map_err(JoinError::BadUrl)?;
    check_text(query, None).map_err(JoinError::BadUrl)?;
    check_text(fragment, Some("!$&'()*+,;=:@/?[]")).map_err(JoinError::BadUrl)?;
    let mut pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    if pairs.iter().any(|(key, _)| key == "jointoken") {
        return Err(JoinError::BadUrl("it has a join token already"));
    }
    // What the parser puts where an escape is no text.
    if query.contains('%')
        && pairs
            .iter()
            .any(|(key, value)| format!("{key}{value}").contains('\u{fffd}'))
    {
        return Err(JoinError::BadUrl("its query has an escape that is no text"));
    }
    pairs.push(("jointoken".to_owned(), token.to_owned()));
    if tunnel {
        pairs.push(("grpc_tunnel".to_owned(), "true".to_owned()));
    }
    // Stable: values of one key keep their order.
    pairs.sort_by(|left, right| left.0.cmp(&right.0));
    let query: Vec<String> = pairs
        .iter()
        .map(|(key, value)| format!("{}={}", go_query(key), go_query(value)))
        .collect();
    let mut out = format!("{base}?{}", query.join("&"));
    if !fragment.is_empty() {
        out.push('#');
        out.push_str(fragment);
    }
    Ok(out)
}

/// Scheme, host and path of a URL.
fn check_base(base: &str) -> std::result::Result<(), &'static str> {
    let (scheme, rest) = base
        .split_once("://")
        .ok_or("it is not written as scheme://host:port")?;
    let scheme_is_good = scheme.starts_with(|char: char| char.is_ascii_lowercase())
        && scheme
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.'));
    if !scheme_is_good {
        return Err("its scheme is not one in lower case");
    }
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("its IPv6 address has no end")?;
            if address.parse::<Ipv6Addr>().is_err() {
                return Err("its IPv6 address is none");
            }
            (address, port)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b':');
    if host.is_empty() || !host.bytes().all(is_host) {
        return Err("its host is not a name or address");
    }
    let port_is_good = port.is_empty()
        || port.strip_prefix(':').is_some_and(|digits| {
            digits.is_empty()
                || digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u16>().is_ok()
        });
    if !port_is_good {
        return Err("its port is none");
    }
    check_text(path, Some("!$&'()*+,;=:@/[]"))
}

/// Whether part of a URL reads the same whoever writes it anew: of a path or fragment these characters, letters and digits
/// alone; of a query everything, but its escapes have to make text, and semicolons mean nothing to Go.
fn check_text(part: &str, allowed: Option<&str>) -> std::result::Result<(), &'static str> {
    let mut rest = part;
    while let Some(char) = rest.chars().next() {
        rest = rest.get(char.len_utf8()..).unwrap_or_default();
        let good = match char {
            '%' => {
                let digits = rest.get(..2);
                rest = rest.get(2..).unwrap_or_default();
                digits.is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            }
            char if char.is_ascii_control() => false,
            char => match allowed {
                None => char != ';',
                Some(allowed) => {
                    char.is_ascii_alphanumeric() || "-_.~".contains(char) || allowed.contains(char)
                }
            },
        };
        if !good {
            return Err("it has characters that have to be escaped, or an escape that is none");
        }
    }
    Ok(())
}

/// A query component as Go escapes it.
fn go_query(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b' ' => out.push('+'),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use sha2::Digest;

    use super::*;

    /// Upstream's vectors for token `abcd`.
    const OF_PROVIDER: &str = "\
        v2:eyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1wcm92aWRlci1pZCI6InRlc3QifSwic2lnbmF0dXJl\
        IjoiWTNpZ285V2xJSVZOWWpXZmgyWlg5NnpnWW5UQjlwWTI3ZEJaVnJwNDJMZz0ifQ==";
    const OF_REQUEST: &str = "\
        v2:eyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1wcm92aWRlci1pZCI6InRlc3QiLCJvbW5pLnNpZGVy\
        by5kZXYvbWFjaGluZS1yZXF1ZXN0IjoicmVxdWVzdDEifSwic2lnbmF0dXJlIjoiellrTFRwOUVIanlwTGxrZG1mZjV2Z1A\
        1SERXRktUUXBGR281REp2TDV4MD0ifQ==";

    fn params() -> JoinParams {
        JoinParams {
            api_url: "http://127.0.0.1:8099".into(),
            token: Secret::new("abcd"),
            token_version: 2,
            events_port: 8091,
            logs_port: 8092,
            provider: "test".into(),
            request: None,
            tunnel: false,
        }
    }

    fn escaped(token: &str) -> String {
        token
            .replace(':', "%3A")
            .replace('=', "%3D")
            .replace('+', "%2B")
            .replace('/', "%2F")
    }

    #[test]
    fn tokens_are_upstreams_to_the_byte() {
        assert_eq!(params().token().unwrap().expose(), OF_PROVIDER);
        let of_request = JoinParams {
            request: Some("request1".into()),
            ..params()
        };
        assert_eq!(of_request.token().unwrap().expose(), OF_REQUEST);
        let first = JoinParams {
            token_version: 1,
            ..params()
        };
        assert_eq!(
            first.token().unwrap().expose(),
            OF_PROVIDER.replacen("v2", "v1", 1)
        );
    }

    #[test]
    fn an_encoded_token_passes_through() {
        for token in [OF_REQUEST, &OF_PROVIDER.replacen("v2", "v1", 1)] {
            let params = JoinParams {
                token: Secret::new(token),
                ..params()
            };
            assert_eq!(params.token().unwrap().expose(), token);
            assert_eq!(
                params.url().unwrap().expose(),
                format!("http://127.0.0.1:8099?jointoken={}", escaped(token))
            );
        }
    }

    #[test]
    fn what_only_looks_like_an_encoded_token_is_refused() {
        for token in ["v1:", "v2:abc=", "v2:W10=", "v2:eyJzaWduYXR1cmUiOiItIn0="] {
            let params = JoinParams {
                token: Secret::new(token),
                ..params()
            };
            assert_eq!(params.token(), Err(JoinError::BadToken), "{token}");
        }
    }

    #[test]
    fn a_token_with_nothing_to_tell_stays_raw() {
        assert_eq!(encode_token("abcd", 2, &BTreeMap::new()), Ok("abcd".to_owned()));
    }

    #[test]
    fn urls_keep_their_path_and_sort_their_query() {
        for (url, tunnel, expected) in [
            ("https://omni:8090", false, "https://omni:8090?jointoken=abcd"),
            ("https://omni:8090/", false, "https://omni:8090/?jointoken=abcd"),
            (
                "grpc://127.0.0.1:8090",
                true,
                "grpc://127.0.0.1:8090?grpc_tunnel=true&jointoken=abcd",
            ),
            (
                "https://Omni/a/b?z=1&a=x+y&a=%2F",
                false,
                "https://Omni/a/b?a=x+y&a=%2F&jointoken=abcd&z=1",
            ),
            (
                "https://[2001:db8::1]:8090/%2f?grpc_tunnel=no#x",
                true,
                "https://[2001:db8::1]:8090/%2f?grpc_tunnel=no&grpc_tunnel=true&jointoken=abcd#x",
            ),
            ("https://omni?~=*", false, "https://omni?jointoken=abcd&~=%2A"),
        ] {
            assert_eq!(join_url(url, "abcd", tunnel), Ok(expected.to_owned()));
        }
        assert_eq!(
            join_url("https://omni", "v2:a+b/c=", false),
            Ok("https://omni?jointoken=v2%3Aa%2Bb%2Fc%3D".to_owned())
        );
    }

    #[test]
    fn a_url_that_go_would_spell_in_another_way_is_refused() {
        for url in [
            "",
            "omni:8090",
            "HTTPS://omni",
            "https://",
            "https://user@omni",
            "https://bücher",
            "https://[fe80::1%25eth0]",
            "https://[::1",
            "https://omni:http",
            "https://omni:65536",
            "https://a:b:1",
            "https://omni/a b",
            "https://omni/%2",
            "https://omni/ü",
            "https://omni?a;b",
            "https://omni?a=%",
            "https://omni?a=%ff",
            "https://omni?jointoken=old",
            "https://omni#ü",
            "https://omni\n",
        ] {
            let refused = join_url(url, "abcd", false);
            assert!(matches!(refused, Err(JoinError::BadUrl(_))), "{url}: {refused:?}");
        }
    }

    #[test]
    fn a_url_that_yaml_would_misread_is_quoted() {
        let params = JoinParams {
            api_url: "https://omni#a:".into(),
            ..params()
        };
        let documents = params.documents().unwrap();
        let line = documents.expose().lines().nth(2).unwrap();
        assert_eq!(
            line,
            format!("apiUrl: 'https://omni?jointoken={}#a:'", escaped(OF_PROVIDER))
        );
    }

    #[test]
    fn kernel_arguments_make_upstreams_schematic() {
        let args = params().kernel_args().unwrap();
        let args: Vec<&str> = args.iter().map(Secret::expose).collect();
        let api = format!(
            "siderolink.api=http://127.0.0.1:8099?jointoken={}",
            escaped(OF_PROVIDER)
        );
        assert_eq!(
            args,
            [
                api.as_str(),
                "talos.events.sink=[fdae:41e4:649b:9303::1]:8091",
                "talos.logging.kernel=tcp://[fdae:41e4:649b:9303::1]:8092",
            ]
        );
        let mut yaml = "customization:\n    extraKernelArgs:\n".to_owned();
        for arg in args {
            yaml.push_str(&format!("        - {arg}\n"));
        }
        assert_eq!(
            hex::encode(Sha256::digest(yaml)),
            "4e2a2ec4368100c1b21d4fa7be47f3d38ddab9185f34fc187f82400b1e20da17"
        );
    }

    #[test]
    fn kernel_arguments_never_name_a_request() {
        let params = JoinParams {
            request: Some("request1".into()),
            ..params()
        };
        assert_eq!(params.kernel_args(), Err(JoinError::RequestInImage));
    }

    #[test]
    fn documents_are_upstreams_to_the_byte() {
        let params = JoinParams {
            request: Some("request1".into()),
            tunnel: true,
            ..params()
        };
        let expected = format!(
            "apiVersion: v1alpha1
kind: SideroLinkConfig
apiUrl: http://127.0.0.1:8099?grpc_tunnel=true&jointoken={}
---
apiVersion: v1alpha1
kind: EventSinkConfig
endpoint: '[fdae:41e4:649b:9303::1]:8091'
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: omni-kmsg
url: tcp://[fdae:41e4:649b:9303::1]:8092
",
            escaped(OF_REQUEST)
        );
        assert_eq!(params.documents().unwrap().expose(), expected);
    }

    #[test]
    fn whatever_is_missing_is_named() {
        type Spoil = fn(&mut JoinParams);
        let cases: [(Spoil, JoinError); 5] = [
            (|params| params.token = Secret::default(), JoinError::NoToken),
            (|params| params.events_port = 0, JoinError::EventsPort(0)),
            (|params| params.logs_port = 70_000, JoinError::LogsPort(70_000)),
            (|params| params.token_version = 3, JoinError::TokenVersion(3)),
            (
                |params| params.api_url.clear(),
                JoinError::BadUrl("it is not written as scheme://host:port"),
            ),
        ];
        for (spoil, error) in cases {
            let mut params = params();
            spoil(&mut params);
            assert_eq!(params.documents(), Err(error));
        }
    }

    #[test]
    fn json_is_escaped_as_go_does() {
        assert_eq!(go_json("a<b>&\"\u{2028}"), r#""a\u003cb\u003e\u0026\"\u2028""#);
    }

    #[test]
    fn a_debug_print_hides_the_token() {
        assert!(!format!("{:?}", params()).contains("abcd"));
    }
}
