//! Decides whose a thing is, by the mark in its description and by names that derive from an instance's.
//!
//! Oxide has no labels. The description is the only field that is ours on instances, disks and interfaces
//! alike, and no call can change it later. It begins with the Go provider's sentence, to the letter, and goes
//! on with what that lacks.

use super::Project;
use crate::cloud::{InstanceRef, Mark};

/// What a description says about who made the thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// Our mark in full.
    Marked(Mark),
    /// The Go provider's sentence, which names its provider ID and nothing else.
    Bare(String),
    /// A scratch disk of an image import.
    Import {
        /// The provider ID.
        provider: String,
        /// The name of the image that was being made.
        image: String,
    },
}

const SENTENCE_HEAD: &str = "Managed by the Oxide Omni infrastructure provider (";
const SENTENCE_TAIL: &str = ").";
const IMPORT: &str = "import of ";

/// The Go provider's sentence, to the letter: its tools and its users' eyes find our things as well.
fn sentence(provider: &str) -> String {
    format!("{SENTENCE_HEAD}{provider}{SENTENCE_TAIL}")
}

/// The description that carries a mark.
pub(super) fn describe(mark: &Mark) -> String {
    format!(
        "{} request={} installation={}",
        sentence(&mark.provider),
        mark.request,
        mark.installation
    )
}

/// The description of a scratch disk.
pub(super) fn describe_import(provider: &str, image: &str) -> String {
    format!("{} {IMPORT}{image}", sentence(provider))
}

/// Reads a description. `None`: neither ours nor the Go provider's.
pub(super) fn owner(description: &str) -> Option<Owner> {
    let (provider, rest) = description
        .strip_prefix(SENTENCE_HEAD)?
        .split_once(SENTENCE_TAIL)?;
    let provider = provider.to_owned();
    let rest = rest.trim();
    if rest.is_empty() {
        return Some(Owner::Bare(provider));
    }
    if let Some(image) = rest.strip_prefix(IMPORT) {
        return Some(Owner::Import {
            provider,
            image: image.to_owned(),
        });
    }
    let (request, installation) = rest.strip_prefix("request=")?.split_once(" installation=")?;
    Some(Owner::Marked(Mark {
        provider,
        request: request.to_owned(),
        installation: installation.to_owned(),
    }))
}

/// The mark of an instance, or of what was made for one, if it is this provider's: `Some(None)` for the bare sentence.
pub(super) fn of_provider(description: &str, provider: &str) -> Option<Option<Mark>> {
    match owner(description)? {
        Owner::Marked(mark) if mark.provider == provider => Some(Some(mark)),
        Owner::Bare(bare) if bare == provider => Some(None),
        Owner::Marked(_) | Owner::Bare(_) | Owner::Import { .. } => None,
    }
}

/// What a mark makes of an instance that has the name we asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is ours; the mark is absent where it carries the bare sentence.
    Ours(Option<Mark>),
    /// It is not, and whose it seems to be.
    Foreign(String),
}

/// Decides whose a thing of this name and description is.
pub(super) fn claim(name: &str, description: &str, asked: &InstanceRef<Project>) -> Claim {
    match owner(description) {
        Some(Owner::Marked(mark)) if mark == asked.mark => Claim::Ours(Some(mark)),
        // The sentence names no request: only the name says whose it is.
        Some(Owner::Bare(provider))
            if provider == asked.mark.provider && asked.adopt_bare && name == asked.name =>
        {
            Claim::Ours(None)
        }
        other => Claim::Foreign(stranger(other, &asked.mark)),
    }
}

/// Whose a thing seems to be, for a person.
fn stranger(owner: Option<Owner>, ours: &Mark) -> String {
    match owner {
        None => "it carries no mark of this provider".to_owned(),
        Some(Owner::Bare(provider)) => {
            format!("it was made by the Go provider {provider:?}, and nothing says that it is this request's")
        }
        Some(Owner::Import { provider, .. }) => {
            format!("it is a scratch disk of an image import by provider {provider:?}")
        }
        Some(Owner::Marked(mark)) if mark.provider != ours.provider => {
            format!(
                "it belongs to provider {:?}, request {:?}",
                mark.provider, mark.request
            )
        }
        Some(Owner::Marked(mark)) if mark.installation != ours.installation => format!(
            "it belongs to request {:?} of another Omni account with the same provider ID (installation {})",
            mark.request, mark.installation
        ),
        Some(Owner::Marked(mark)) => format!("it belongs to request {:?}", mark.request),
    }
}

/// Whether a disk of that name and description was made for this instance.
pub(super) fn is_disk_of(name: &str, description: &str, instance: &InstanceRef<Project>) -> bool {
    match owner(description) {
        Some(Owner::Marked(mark)) => mark == instance.mark,
        Some(Owner::Bare(provider)) => {
            instance.adopt_bare
                && provider == instance.mark.provider
                && is_derived_disk_name(name, &instance.name)
        }
        Some(Owner::Import { .. }) | None => false,
    }
}

/// The name of a data disk.
pub(super) fn data_disk_name(index: usize, instance: &str) -> String {
    format!("disk-{index:02}-{instance}")
}

/// The name of a network interface.
pub(super) fn interface_name(index: usize, instance: &str) -> String {
    format!("iface-{index:02}-{instance}")
}

/// Whether an instance of this name would give one of its disks that name.
fn is_derived_disk_name(disk: &str, instance: &str) -> bool {
    disk == instance || instance_of_disk(disk) == instance
}

/// The instance that would give one of its disks that name.
pub(super) fn instance_of_disk(disk: &str) -> &str {
    disk.strip_prefix("disk-")
        .and_then(|rest| rest.split_once('-'))
        .filter(|(index, _)| index.len() == 2 && index.bytes().all(|digit| digit.is_ascii_digit()))
        .map_or(disk, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::super::convert::{MAX_INSTANCE_NAME, name};
    use super::*;

    fn mark() -> Mark {
        Mark {
            provider: "oxide".to_owned(),
            request: "web-x7k".to_owned(),
            installation: "0b6ff3a2-0000-4000-8000-000000000001".to_owned(),
        }
    }

    fn asked() -> InstanceRef<Project> {
        InstanceRef {
            scope: Project("prod".to_owned()),
            name: "web-x7k".to_owned(),
            id: None,
            mark: mark(),
            adopt_bare: false,
        }
    }

    const BARE: &str = "Managed by the Oxide Omni infrastructure provider (oxide).";

    #[test]
    fn a_mark_is_the_go_providers_sentence_and_what_it_lacks() {
        let text = describe(&mark());
        assert_eq!(
            text,
            "Managed by the Oxide Omni infrastructure provider (oxide). request=web-x7k \
             installation=0b6ff3a2-0000-4000-8000-000000000001"
        );
        assert_eq!(owner(&text), Some(Owner::Marked(mark())));
        assert_eq!(owner(BARE), Some(Owner::Bare("oxide".to_owned())));
        assert_eq!(
            owner(&describe_import("oxide", "talos-1")),
            Some(Owner::Import {
                provider: "oxide".to_owned(),
                image: "talos-1".to_owned()
            })
        );
        for stranger in [
            "",
            "web server",
            "Managed by the Oxide Omni infrastructure provider (oxide",
            "managed by the oxide omni infrastructure provider (oxide).",
            "Managed by the Oxide Omni infrastructure provider (oxide). Do not touch!",
            "Managed by the Oxide Omni infrastructure provider (oxide). request=a",
            "mine. Managed by the Oxide Omni infrastructure provider (oxide).",
        ] {
            assert_eq!(owner(stranger), None, "{stranger:?}");
        }
    }

    #[test]
    fn only_the_whole_mark_or_an_adopted_sentence_makes_an_instance_ours() {
        let other = |change: fn(&mut Mark)| {
            let mut mark = mark();
            change(&mut mark);
            describe(&mark)
        };
        let adopting = InstanceRef {
            adopt_bare: true,
            ..asked()
        };
        assert_eq!(
            claim("web-x7k", &describe(&mark()), &asked()),
            Claim::Ours(Some(mark()))
        );
        assert_eq!(claim("web-x7k", BARE, &adopting), Claim::Ours(None));
        for (name, description, asked, whose) in [
            ("web-x7k", BARE.to_owned(), asked(), "made by the Go provider"),
            (
                "web-x7l",
                BARE.to_owned(),
                adopting.clone(),
                "made by the Go provider",
            ),
            (
                "web-x7k",
                BARE.replace("oxide", "two"),
                adopting.clone(),
                "made by the Go provider \"two\"",
            ),
            ("web-x7k", "a database".to_owned(), adopting.clone(), "no mark"),
            (
                "web-x7k",
                other(|mark| mark.provider = "two".to_owned()),
                adopting.clone(),
                "provider \"two\"",
            ),
            (
                "web-x7k",
                other(|mark| mark.request = "db".to_owned()),
                adopting.clone(),
                "request \"db\"",
            ),
            (
                "web-x7k",
                other(|mark| mark.installation = "x".to_owned()),
                adopting.clone(),
                "another Omni account",
            ),
            (
                "web-x7k",
                describe_import("oxide", "talos"),
                adopting,
                "scratch disk",
            ),
        ] {
            match claim(name, &description, &asked) {
                Claim::Foreign(told) => assert!(told.contains(whose), "{description}: {told}"),
                ours @ Claim::Ours(_) => panic!("{description}: {ours:?}"),
            }
        }
    }

    #[test]
    fn a_disk_is_ours_by_its_mark_or_by_an_adopted_sentence_and_a_derived_name() {
        let ours = describe(&mark());
        for (name, description, adopt_bare, mine) in [
            ("web-x7k", ours.as_str(), false, true),
            ("renamed", ours.as_str(), false, true),
            ("web-x7k", BARE, true, true),
            ("disk-07-web-x7k", BARE, true, true),
            ("web-x7k", BARE, false, false),
            ("disk-7-web-x7k", BARE, true, false),
            ("disk-07-web-x7kk", BARE, true, false),
            ("other", BARE, true, false),
            ("web-x7k", "", true, false),
            ("web-x7k", &describe_import("oxide", "talos"), true, false),
        ] {
            let asked = InstanceRef {
                adopt_bare,
                ..asked()
            };
            assert_eq!(
                is_disk_of(name, description, &asked),
                mine,
                "{name} {description}"
            );
        }
    }

    #[test]
    fn names_are_those_of_the_go_provider_and_fit_at_the_limit() {
        assert_eq!(data_disk_name(3, "web"), "disk-03-web");
        assert_eq!(interface_name(0, "web"), "iface-00-web");
        let longest = "a".repeat(MAX_INSTANCE_NAME);
        assert_eq!(MAX_INSTANCE_NAME, 54);
        assert_eq!(interface_name(7, &longest).len(), 63);
        assert!(name(&interface_name(7, &longest)).is_ok());
        assert!(is_derived_disk_name(
            &data_disk_name(10, "disk-01-x"),
            "disk-01-x"
        ));
    }
}
