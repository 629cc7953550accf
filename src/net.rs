//! What the HTTP clients of clouds and factory have in common: whom they reach without a proxy, and whom they trust beside the
//! system's authorities.

use std::path::Path;

use reqwest::Certificate;
use url::{Host, Url};

use crate::cloud::CloudError;

/// Whether the URL names this very machine: no proxy can reach what listens on it alone.
#[must_use]
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// The certificates of a PEM file.
///
/// # Errors
///
/// `refused` of what is wrong with the file, with its name.
pub fn authorities(
    path: &Path,
    refused: impl Fn(String) -> CloudError,
) -> Result<Vec<Certificate>, CloudError> {
    let shown = path.display();
    let pem = std::fs::read(path)
        .map_err(|error| refused(format!("CA bundle {shown} cannot be read")).with_source(error))?;
    let certificates = Certificate::from_pem_bundle(&pem)
        .map_err(|error| refused(format!("CA bundle {shown} is not PEM")).with_source(error))?;
    if certificates.is_empty() {
        return Err(refused(format!("CA bundle {shown} has no certificate")));
    }
    Ok(certificates)
}
