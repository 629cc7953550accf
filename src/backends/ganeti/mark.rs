//! Decides whose a thing is, by the tags of an instance and by the comment of the job that makes it.
//!
//! A tag has letters, digits and `.+*/:@_-` alone, and at most 128 of them (Ganeti: `TAG_REGEX`, `MAX_TAG_LEN`): other bytes are
//! written as `*` and two hexadecimal digits, and a long value is spread over several tags. The tags arrive with the instance, in
//! one step. A job carries the same words as its comment.

use super::Group;
use crate::cloud::{InstanceRef, Mark};

/// What our tags begin with.
pub(super) const PREFIX: &str = "omni:";
const PROVIDER: &str = "provider";
const REQUEST: &str = "request";
const INSTALLATION: &str = "installation";
const GROUP: &str = "group";
/// Most bytes of an escaped value in one tag; with the longest name and a two-digit number it stays below 128.
const CHUNK: usize = 100;

/// A mark, and the node group that the instance was made for. It may live in another one by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) mark: Mark,
    pub(super) group: String,
}

impl Owner {
    pub(super) fn of(instance: &InstanceRef<Group>) -> Self {
        Self {
            mark: instance.mark.clone(),
            group: instance.scope.0.clone(),
        }
    }

    /// Whether it is one of this provider's in this group and, where one is named, of this installation.
    pub(super) fn is_within(&self, group: &Group, provider: &str, installation: Option<&str>) -> bool {
        self.group == group.0
            && self.mark.provider == provider
            && installation.is_none_or(|installation| self.mark.installation == installation)
    }

    /// The tags that say so.
    pub(super) fn tags(&self) -> Vec<String> {
        let mut tags = Vec::new();
        for (name, value) in [
            (PROVIDER, &self.mark.provider),
            (REQUEST, &self.mark.request),
            (INSTALLATION, &self.mark.installation),
            (GROUP, &self.group),
        ] {
            tags.extend(written(name, value));
        }
        tags
    }

    /// The comment of a job that makes such an instance.
    pub(super) fn comment(&self) -> String {
        self.tags().join(" ")
    }

    /// Reads tags, or the words of a comment. `None`: they are not ours, or somebody changed them.
    pub(super) fn read<'a>(tags: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let ours: Vec<&str> = tags
            .into_iter()
            .filter_map(|tag| tag.strip_prefix(PREFIX))
            .collect();
        Some(Self {
            mark: Mark {
                provider: value(&ours, PROVIDER)?,
                request: value(&ours, REQUEST)?,
                installation: value(&ours, INSTALLATION)?,
            },
            group: value(&ours, GROUP)?,
        })
    }

    /// Reads the comment of a job.
    pub(super) fn of_comment(comment: &str) -> Option<Self> {
        Self::read(comment.split(' '))
    }
}

/// The tags that every instance of one provider in a group has, and no other; of one installation alone, where one is named.
pub(super) fn shared_tags(provider: &str, installation: Option<&str>, group: &str) -> Vec<String> {
    let installation = installation.map(|installation| (INSTALLATION, installation));
    [(PROVIDER, provider), (GROUP, group)]
        .into_iter()
        .chain(installation)
        .flat_map(|(name, value)| written(name, value))
        .collect()
}

/// Whose an instance with these tags seems to be, for a person.
pub(super) fn stranger(tags: &[String], asked: &InstanceRef<Group>) -> String {
    match Owner::read(tags.iter().map(String::as_str)) {
        None => "it carries no mark of this provider".to_owned(),
        Some(Owner { mark, .. }) if mark.provider != asked.mark.provider => format!(
            "it belongs to provider {:?}, request {:?}",
            mark.provider, mark.request
        ),
        Some(Owner { mark, .. }) if mark.installation != asked.mark.installation => format!(
            "it belongs to request {:?} of another Omni account with the same provider ID (installation {})",
            mark.request, mark.installation
        ),
        Some(Owner { mark, .. }) if mark.request != asked.mark.request => {
            format!("it belongs to request {:?}", mark.request)
        }
        Some(Owner { group, .. }) => format!("it was made for this request in node group {group:?}"),
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

fn written(name: &str, value: &str) -> Vec<String> {
    let mut chunks = vec![String::new()];
    for byte in value.bytes() {
        let piece = if is_plain(byte) {
            char::from(byte).to_string()
        } else {
            format!("*{byte:02x}")
        };
        match chunks.last_mut() {
            Some(last) if last.len() + piece.len() <= CHUNK => last.push_str(&piece),
            _ => chunks.push(piece),
        }
    }
    chunks
        .into_iter()
        .enumerate()
        .map(|(number, chunk)| match number {
            0 => format!("{PREFIX}{name}:{chunk}"),
            number => format!("{PREFIX}{name}.{number}:{chunk}"),
        })
        .collect()
}

/// The value of a name; `None` where it is absent, there twice, or not what we write.
fn value(tags: &[&str], name: &str) -> Option<String> {
    let mut escaped = String::new();
    for number in 0.. {
        let head = match number {
            0 => format!("{name}:"),
            number => format!("{name}.{number}:"),
        };
        let mut chunks = tags.iter().filter_map(|tag| tag.strip_prefix(&head));
        match (chunks.next(), chunks.next(), number) {
            (Some(chunk), None, _) => escaped.push_str(chunk),
            (None, _, 1..) => break,
            _ => return None,
        }
    }
    let mut bytes = Vec::new();
    let mut rest = escaped.as_bytes();
    while let Some((byte, behind)) = rest.split_first() {
        rest = behind;
        if *byte == b'*' {
            let (digits, behind) = rest.split_at_checked(2)?;
            bytes.extend(hex::decode(digits).ok()?);
            rest = behind;
        } else {
            bytes.push(*byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(request: &str) -> Owner {
        Owner {
            mark: Mark {
                provider: "ganeti".to_owned(),
                request: request.to_owned(),
                installation: "0b6ff3a2-0000-4000-8000-000000000001".to_owned(),
            },
            group: "default".to_owned(),
        }
    }

    fn read(tags: &[String]) -> Option<Owner> {
        Owner::read(tags.iter().map(String::as_str))
    }

    #[test]
    fn an_ordinary_mark_can_be_read_by_people() {
        assert_eq!(
            owner("web-x7k").comment(),
            "omni:provider:ganeti omni:request:web-x7k \
             omni:installation:0b6ff3a2-0000-4000-8000-000000000001 omni:group:default"
        );
    }

    #[test]
    fn every_mark_is_read_back_from_tags_that_ganeti_takes() {
        for request in ["", "a b", "*", "größer", "a:b", &"x".repeat(300), &"ä".repeat(64)] {
            let owner = owner(request);
            let tags = owner.tags();
            for tag in &tags {
                assert!(tag.len() <= 128, "{tag}");
                let good = |byte: u8| byte.is_ascii_alphanumeric() || b".+*/:@_-".contains(&byte);
                assert!(tag.bytes().all(good), "{tag}");
            }
            let mut shuffled = tags.clone();
            shuffled.reverse();
            shuffled.push("somebody's".to_owned());
            assert_eq!(read(&shuffled), Some(owner.clone()), "{request}");
            assert_eq!(Owner::of_comment(&owner.comment()), Some(owner));
        }
    }

    #[test]
    fn a_mark_that_is_not_whole_is_none() {
        let tags = owner("web").tags();
        for missing in 0..tags.len() {
            let mut tags = tags.clone();
            tags.remove(missing);
            assert_eq!(read(&tags), None, "{tags:?}");
        }
        let twice = [tags.clone(), vec!["omni:request:other".to_owned()]].concat();
        assert_eq!(read(&twice), None);
        for broken in ["omni:request:*", "omni:request:*zz", "omni:request:*ff"] {
            let mut tags = tags.clone();
            tags[1] = broken.to_owned();
            assert_eq!(read(&tags), None, "{broken}");
        }
    }
}
