//! Turns the text of one setting into its value, or into what is wrong with it. Pure.

use std::net::IpAddr;
#[cfg(feature = "ganeti")]
use std::net::SocketAddr;
use std::time::Duration;

use url::Url;

use super::{LogFormat, OrphanPolicy};
use crate::omni::channel::is_provider_id;
use crate::telemetry;

/// Workers that make sense at all; each costs memory and, when Omni comes back after an outage, a call.
const MAX_CONCURRENCY: usize = 1024;
/// Longest join deadline. A machine that takes longer has failed, whatever it does.
const MAX_JOIN_DEADLINE: Duration = Duration::from_secs(24 * 3600);

fn parse_url(text: &str, schemes: &[&str]) -> Result<Url, String> {
    let schemes_text = || format!("it must begin with {}", schemes.join(" or "));
    // Whatever stands before an @ may be a password: such a text is not quoted back.
    if text.contains('@') {
        return Err("a URL with a user name or password".to_owned());
    }
    let url =
        Url::parse(text).map_err(|error| format!("`{text}` is not a URL ({error}), {}", schemes_text()))?;
    if !schemes.contains(&format!("{}://", url.scheme()).as_str()) {
        return Err(format!("`{text}` is not usable, {}", schemes_text()));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(format!("`{text}` has no host"));
    }
    Ok(url)
}

/// Omni's endpoint: like its own client, without path and query.
pub(super) fn endpoint(text: &str) -> Result<String, String> {
    let url = parse_url(text, &["https://", "http://", "grpc://"])?;
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    Ok(format!(
        "{}://{}{port}",
        url.scheme(),
        url.host_str().unwrap_or_default()
    ))
}

pub(super) fn http_url(text: &str) -> Result<String, String> {
    let url = parse_url(text, &["https://", "http://"])?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("`{text}` has a query"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// Where to listen.
#[cfg(feature = "ganeti")]
pub(super) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not an IP address with a port, such as 0.0.0.0:8080"))
}

/// A fingerprint of a certificate, as `openssl x509 -fingerprint -sha256` prints it, or without its colons.
#[cfg(feature = "ganeti")]
pub(super) fn sha256(text: &str) -> Result<String, String> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    if digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok(digits.to_ascii_lowercase());
    }
    Err(format!("`{text}` is not a SHA-256: 64 hexadecimal digits"))
}

pub(super) fn is_loopback(url: &str) -> bool {
    Url::parse(url).is_ok_and(|url| match url.host() {
        Some(url::Host::Domain(name)) => {
            name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
        }
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    })
}

pub(super) fn provider_id(text: &str) -> Result<String, String> {
    if is_provider_id(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is not usable: Omni takes 1 to 63 lower-case letters, digits and hyphens, the first and the last no hyphen"
    ))
}

pub(super) fn orphans(text: &str) -> Result<OrphanPolicy, String> {
    match text {
        "report" => Ok(OrphanPolicy::Report),
        "delete" => Ok(OrphanPolicy::Delete),
        _ => Err(format!("`{text}` is neither report nor delete")),
    }
}

pub(super) fn concurrency(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=MAX_CONCURRENCY).contains(count))
        .ok_or_else(|| format!("`{text}` is not a number from 1 to {MAX_CONCURRENCY}"))
}

/// Seconds, or numbers with units as Go writes durations: `90s`, `15m`, `1h30m`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let length = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, behind) = rest.split_at_checked(length)?;
        let (seconds, behind) = [("h", 3600), ("m", 60), ("s", 1)]
            .into_iter()
            .find_map(|(unit, seconds)| Some((seconds, behind.strip_prefix(unit)?)))?;
        total = total.checked_add(digits.parse::<u64>().ok()?.checked_mul(seconds)?)?;
        rest = behind;
    }
    Some(Duration::from_secs(total))
}

pub(super) fn join_deadline(text: &str) -> Result<Duration, String> {
    duration(text)
        .filter(|duration| !duration.is_zero() && *duration <= MAX_JOIN_DEADLINE)
        .ok_or_else(|| format!("`{text}` is not a time from 1s to 24h, such as 15m or 1h30m"))
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

pub(super) fn filter(text: &str) -> Result<String, String> {
    telemetry::check_filter(text).map_err(|error| format!("`{text}` is not a log filter ({error})"))?;
    Ok(text.to_owned())
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("`{text}` is neither human nor json")),
    }
}
