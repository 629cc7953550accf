//! Derives the name of an instance from its request, within a cloud's limits.

use sha2::{Digest, Sha256};

use crate::cloud::Limits;

/// Length of the hash that makes a shortened name unique, in hexadecimal digits: 40 bits.
const HASH: usize = 10;

/// The instance name for a request: the request ID itself where it is a valid name that fits, else a shortened form with a hash
/// of the whole ID. The same ID gives the same name for ever.
#[must_use]
pub fn instance_name(request: &str, limits: Limits) -> String {
    if request.len() <= limits.name && is_label(request) {
        return request.to_owned();
    }
    let digest = hex::encode(Sha256::digest(request.as_bytes()));
    let hash: String = digest.chars().take(HASH).collect();
    let mut stem: String = request
        .to_ascii_lowercase()
        .chars()
        .map(|c| {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                c
            } else {
                '-'
            }
        })
        .skip_while(|c| !c.is_ascii_lowercase())
        .take(limits.name.saturating_sub(HASH + 1))
        .collect();
    if stem.is_empty() {
        stem.push('m');
    }
    format!("{}-{hash}", stem.trim_end_matches('-'))
}

/// Lower-case letters, digits and dashes, beginning with a letter and not ending with a dash: valid in every cloud we know.
fn is_label(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        name: 54,
        user_data: 32_768,
    };

    #[test]
    fn an_ordinary_request_id_is_the_name() {
        assert_eq!(
            instance_name("talos-workers-x7f2qa", LIMITS),
            "talos-workers-x7f2qa"
        );
        let longest = format!("a{}", "b".repeat(53));
        assert_eq!(instance_name(&longest, LIMITS), longest);
    }

    #[test]
    fn a_long_or_odd_request_id_is_shortened_and_stays_unique() {
        let one = instance_name(&format!("{}-x7f2qa", "c".repeat(60)), LIMITS);
        let other = instance_name(&format!("{}-x7f2qb", "c".repeat(60)), LIMITS);
        assert_ne!(one, other);
        for name in [
            one,
            other,
            instance_name("Web_1", LIMITS),
            instance_name("9", LIMITS),
            instance_name("a-", LIMITS),
        ] {
            assert!(name.len() <= LIMITS.name, "{name}");
            assert!(is_label(&name), "{name}");
        }
    }
}
