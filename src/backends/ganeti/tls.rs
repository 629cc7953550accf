//! Decides whether the one who answers is the cluster: by a pinned certificate, or not at all where the operator says so.
//!
//! The certificate that Ganeti makes for itself is X.509 version 1, without a name that could be checked: no verifier of the usual
//! kind takes it. A pin is the SHA-256 of the whole certificate; that the peer also holds its key is checked by the signature of
//! the handshake, with the key as it stands in the certificate. Only TLS 1.3 lets us do that.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest, Sha256};

/// Bytes of a SHA-256.
const PIN: usize = 32;

/// The SHA-256 of the cluster's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin([u8; PIN]);

impl Pin {
    /// Reads 64 hexadecimal digits, with or without colons, as `openssl x509 -fingerprint -sha256` prints them.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        let bytes = hex::decode(digits).ok()?;
        Some(Self(bytes.try_into().ok()?))
    }
}

impl std::fmt::Display for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// TLS for a cluster that is known by its certificate.
pub(super) fn pinned(pin: Pin) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Pinned {
        pin,
        provider: Arc::clone(&provider),
    };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

#[derive(Debug)]
struct Pinned {
    pin: Pin,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found: [u8; PIN] = Sha256::digest(end_entity).into();
        if found == self.pin.0 {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::General(format!(
            "the certificate's SHA-256 is {}, and {} is pinned",
            Pin(found),
            self.pin
        )))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Never offered.
        Err(Error::General("a pinned certificate needs TLS 1.3".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = public_key(certificate).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        verify_tls13_signature_with_raw_key(
            message,
            &SubjectPublicKeyInfoDer::from(key),
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

const SEQUENCE: u8 = 0x30;
/// The version, which certificates of version 1 leave out.
const VERSION: u8 = 0xa0;

/// The SubjectPublicKeyInfo of a certificate, whole: RFC 5280, 4.1. Only what stands before it is looked at.
fn public_key(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = element(certificate, Some(SEQUENCE))?;
    let (mut fields, _) =
        element(certificate.content, Some(SEQUENCE)).map(|(inner, rest)| (inner.content, rest))?;
    if fields.first() == Some(&VERSION) {
        fields = element(fields, None)?.1;
    }
    // Serial number, signature algorithm, issuer, validity, subject.
    for _ in 0..5 {
        fields = element(fields, None)?.1;
    }
    Some(element(fields, Some(SEQUENCE))?.0.whole)
}

struct Element<'a> {
    whole: &'a [u8],
    content: &'a [u8],
}

/// The first DER element, and what stands behind it.
fn element(der: &[u8], tag: Option<u8>) -> Option<(Element<'_>, &[u8])> {
    let (&[found, first], body) = der.split_first_chunk::<2>()?;
    if tag.is_some_and(|tag| tag != found) {
        return None;
    }
    let (length, content) = match first {
        0..=0x7f => (usize::from(first), body),
        // Two bytes of length are more than any certificate needs.
        0x81 | 0x82 => {
            let (digits, content) = body.split_at_checked(usize::from(first & 0x7f))?;
            let length = digits
                .iter()
                .fold(0, |length, digit| length << 8 | usize::from(*digit));
            (length, content)
        }
        _ => return None,
    };
    let (content, rest) = content.split_at_checked(length)?;
    let whole = der.get(..der.len() - rest.len())?;
    Some((Element { whole, content }, rest))
}
