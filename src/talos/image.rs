//! Decides which image a machine boots: the Talos version in the one spelling that we use, and the identity
//! of its image.

use crate::cloud::{BootProfile, ImageKey};

/// The oldest Talos that we serve, as major and minor version: resolver documents and request IDs in join
/// tokens need it.
pub const FLOOR: (u64, u64) = (1, 12);

/// A Talos version without its leading "v".
///
/// # Errors
///
/// Text that is no version, or a version below [`FLOOR`] (a pre-release counts as the release that it leads
/// to), in a sentence for the operator.
pub fn talos_version(text: &str) -> Result<String, String> {
    let trimmed = text.trim();
    let version = trimmed.strip_prefix('v').unwrap_or(trimmed);
    let (major, minor) = parse(version).ok_or_else(|| {
        format!("`{text}` is not a Talos version: expected for example 1.12.4 or 1.13.0-alpha.1")
    })?;
    let (floor_major, floor_minor) = FLOOR;
    if (major, minor) < FLOOR {
        return Err(format!(
            "Talos {version} is too old: choose {floor_major}.{floor_minor} or newer"
        ));
    }
    Ok(version.to_owned())
}

/// Major and minor of `major.minor.patch` or `major.minor.patch-pre.release`.
fn parse(version: &str) -> Option<(u64, u64)> {
    let (release, pre) = version
        .split_once('-')
        .map_or((version, None), |(release, pre)| (release, Some(pre)));
    let number = |part: &str| -> Option<u64> {
        // `parse` alone would let a sign pass.
        part.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| part.parse().ok())?
    };
    let mut parts = release.split('.').map(number);
    let (major, minor, _patch) = (parts.next()??, parts.next()??, parts.next()??);
    let pre_is_good = pre.is_none_or(|pre| {
        pre.split('.').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
    });
    (parts.next().is_none() && pre_is_good).then_some((major, minor))
}

/// The identity of the image that a cloud boots.
///
/// # Errors
///
/// A version as for [`talos_version`], or a schematic ID that could not be part of a URL, in a sentence for
/// the operator.
pub fn image_key(version: &str, schematic: &str, boot: &BootProfile) -> Result<ImageKey, String> {
    let is_segment = |text: &str| {
        !matches!(text, "" | "." | "..")
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    if !is_segment(schematic) {
        return Err(format!(
            "the image factory answered with an odd schematic ID: {schematic:?}"
        ));
    }
    Ok(ImageKey {
        talos_version: talos_version(version)?,
        schematic: schematic.to_owned(),
        platform: boot.platform.to_owned(),
        arch: boot.arch.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::{image_key, talos_version};
    use crate::cloud::BootProfile;

    #[test]
    fn versions_lose_their_v() {
        for (text, version) in [
            ("1.12.0", "1.12.0"),
            ("v1.12.4", "1.12.4"),
            (" v1.13.0-alpha.1 ", "1.13.0-alpha.1"),
            ("1.12.0-beta.0", "1.12.0-beta.0"),
            (
                "1.13.0-alpha.1-5-g0123abc-dirty",
                "1.13.0-alpha.1-5-g0123abc-dirty",
            ),
            ("2.0.0", "2.0.0"),
        ] {
            assert_eq!(talos_version(text).as_deref(), Ok(version));
        }
    }

    #[test]
    fn older_than_the_floor_is_refused() {
        for text in ["1.11.9", "v1.2.3", "0.14.0", "1.11.0-beta.2"] {
            let version = text.trim_start_matches('v');
            assert_eq!(
                talos_version(text),
                Err(format!("Talos {version} is too old: choose 1.12 or newer"))
            );
        }
    }

    #[test]
    fn what_is_no_version_is_refused() {
        for text in [
            "",
            "v",
            "latest",
            "1.12",
            "1.12.0.1",
            "1.12.x",
            "1.+12.0",
            "1.12.0-",
            "1.12.0-a..b",
            "1.12.0+build",
            "vv1.12.0",
            "1.12.0/../..",
            "99999999999999999999.0.0",
        ] {
            let refusal = talos_version(text).unwrap_err();
            assert!(refusal.contains("is not a Talos version"), "{text:?}: {refusal}");
        }
    }

    #[test]
    fn a_key_names_all_that_makes_the_bytes() {
        let boot = BootProfile {
            platform: "nocloud",
            arch: "amd64",
            format: Some("raw.xz"),
            kernel_args: Vec::new(),
            extensions: Vec::new(),
            nameservers: Vec::new(),
        };
        let key = image_key("v1.12.0", "abc123", &boot).unwrap();
        assert_eq!(
            (
                key.talos_version.as_str(),
                key.schematic.as_str(),
                key.platform.as_str(),
                key.arch.as_str()
            ),
            ("1.12.0", "abc123", "nocloud", "amd64")
        );
        for odd in ["", "..", "a/b", "a b", "a?b"] {
            assert!(image_key("1.12.0", odd, &boot).is_err());
        }
    }
}
