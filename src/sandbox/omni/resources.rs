//! A resource as Omni stores it, to and from the wire as cosi-project/runtime's parser reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::store::Key;
use super::types;
use crate::omni::Phase;
use crate::omni::wire::cosi;

/// A resource as Omni stores it, with its spec undecoded.
#[derive(Clone, PartialEq)]
pub struct Stored {
    /// COSI namespace.
    pub namespace: String,
    /// COSI type.
    pub kind: String,
    /// Unique within namespace and type.
    pub id: String,
    /// Counts from 1, and from 1 again when the ID is made anew.
    pub version: u64,
    /// The controller that may write it.
    pub owner: String,
    /// Running, or tearing down.
    pub phase: Phase,
    /// When this incarnation was made. No two resources share it.
    pub created: SystemTime,
    /// When it was last updated.
    pub updated: SystemTime,
    /// Who holds it.
    pub finalizers: BTreeSet<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Spec bytes. `Debug` hides them: some hold join tokens.
    pub spec: Bytes,
    /// The YAML rendering that came with a type which Omni does not know.
    pub yaml: String,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("resource", &self.to_string())
            .field("owner", &self.owner)
            .field("phase", &self.phase)
            .field("finalizers", &self.finalizers)
            .field("labels", &self.labels)
            .field("annotations", &self.annotations)
            .field("spec_bytes", &self.spec.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Stored {
    /// As cosi-project/runtime writes a resource in its messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}({}/{}@{})",
            self.kind, self.namespace, self.id, self.version
        )
    }
}

impl Stored {
    /// A new resource, running, ownerless, not yet stored.
    #[must_use]
    pub fn new(namespace: &str, kind: &str, id: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            kind: kind.to_owned(),
            id: id.to_owned(),
            version: 0,
            owner: String::new(),
            phase: Phase::Running,
            created: UNIX_EPOCH,
            updated: UNIX_EPOCH,
            finalizers: BTreeSet::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            spec: Bytes::new(),
            yaml: String::new(),
        }
    }

    /// With that spec.
    #[must_use]
    pub fn spec(mut self, message: &impl prost::Message) -> Self {
        self.spec = message.encode_to_vec().into();
        self
    }

    /// With that label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// With that owner.
    #[must_use]
    pub fn owner(mut self, owner: &str) -> Self {
        owner.clone_into(&mut self.owner);
        self
    }

    /// The spec as that message; its default where the bytes are not one.
    #[must_use]
    pub fn decode<M: prost::Message + Default>(&self) -> M {
        M::decode(self.spec.clone()).unwrap_or_default()
    }

    /// Whether somebody asked for its end.
    #[must_use]
    pub fn tearing_down(&self) -> bool {
        self.phase == Phase::TearingDown
    }

    /// The value of a label.
    #[must_use]
    pub fn get_label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    pub(super) fn key(&self) -> Key {
        (self.namespace.clone(), self.kind.clone())
    }
}

/// The wire's word for a phase.
pub(super) fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::TearingDown => "tearingDown",
    }
}

/// Reads a phase as cosi-project/runtime does: the empty string is none.
pub(super) fn parse_phase(text: &str) -> Result<Phase, String> {
    match text {
        "running" => Ok(Phase::Running),
        "tearingDown" => Ok(Phase::TearingDown),
        other => Err(format!("unknown phase: {other}")),
    }
}

/// A resource from the wire, with the version that its sender believes in (`None` is `undefined`).
pub(super) fn from_wire(resource: Option<cosi::Resource>) -> Result<(Stored, Option<u64>), String> {
    let resource = resource.unwrap_or_default();
    let Some(metadata) = resource.metadata else {
        return Err("metadata is missing".to_owned());
    };
    let Some(spec) = resource.spec else {
        return Err("spec is missing".to_owned());
    };
    let version = match metadata.version.as_str() {
        "undefined" => None,
        text => {
            let version: i64 = text.parse().map_err(|_| {
                format!("error parsing version: strconv.ParseInt: parsing {text:?}: invalid syntax")
            })?;
            Some(u64::from_ne_bytes(version.to_ne_bytes()))
        }
    };
    let phase = parse_phase(&metadata.phase)?;
    let stored = Stored {
        namespace: metadata.namespace,
        kind: metadata.r#type,
        id: metadata.id,
        version: version.unwrap_or(0),
        owner: metadata.owner,
        phase,
        created: time_from_wire(metadata.created),
        updated: time_from_wire(metadata.updated),
        finalizers: metadata.finalizers.into_iter().collect(),
        labels: metadata.labels.into_iter().collect(),
        annotations: metadata.annotations.into_iter().collect(),
        spec: spec.proto_spec.into(),
        yaml: spec.yaml_spec,
    };
    Ok((stored, version))
}

/// A resource for the wire.
pub(super) fn to_wire(stored: &Stored) -> cosi::Resource {
    cosi::Resource {
        metadata: Some(cosi::Metadata {
            namespace: stored.namespace.clone(),
            r#type: stored.kind.clone(),
            id: stored.id.clone(),
            version: stored.version.to_string(),
            owner: stored.owner.clone(),
            phase: phase_text(stored.phase).to_owned(),
            created: Some(stored.created.into()),
            updated: Some(stored.updated.into()),
            finalizers: stored.finalizers.iter().cloned().collect(),
            labels: stored
                .labels
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            annotations: stored
                .annotations
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        }),
        spec: Some(cosi::Spec {
            proto_spec: stored.spec.to_vec(),
            // Types that Omni knows are rendered for display; nobody may depend on the text.
            yaml_spec: if types::DEFINED.contains(&stored.kind.as_str()) {
                "{}\n".to_owned()
            } else {
                stored.yaml.clone()
            },
        }),
    }
}

/// What the wire shows where there is no resource: the subject of a BOOTSTRAPPED, or of a DESTROYED for what
/// never was.
pub(super) fn placeholder(namespace: &str, kind: &str, id: &str) -> cosi::Resource {
    // Go's zero time.
    let never = prost_types::Timestamp {
        seconds: -62_135_596_800,
        nanos: 0,
    };
    cosi::Resource {
        metadata: Some(cosi::Metadata {
            namespace: namespace.to_owned(),
            r#type: kind.to_owned(),
            id: id.to_owned(),
            version: "undefined".to_owned(),
            phase: "running".to_owned(),
            created: Some(never),
            updated: Some(never),
            ..cosi::Metadata::default()
        }),
        spec: Some(cosi::Spec::default()),
    }
}

fn time_from_wire(time: Option<prost_types::Timestamp>) -> SystemTime {
    time.and_then(|time| SystemTime::try_from(time).ok())
        .unwrap_or(UNIX_EPOCH)
}

/// The fields of a protobuf message by number, in the order of the wire within each number: equal for equal
/// messages whatever order their fields were written in, and with unknown fields kept. `None` if the bytes
/// are not a message.
pub(super) fn fields(mut bytes: &[u8]) -> Option<BTreeMap<u32, Vec<Vec<u8>>>> {
    let mut fields: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
    while !bytes.is_empty() {
        let (tag, rest) = varint(bytes)?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| *number > 0)?;
        let (length, skip) = match tag & 7 {
            0 => (rest.len().checked_sub(varint(rest)?.1.len())?, 0),
            1 => (8, 0),
            2 => {
                let (length, tail) = varint(rest)?;
                (usize::try_from(length).ok()?, rest.len().checked_sub(tail.len())?)
            }
            5 => (4, 0),
            _ => return None,
        };
        let (value, tail) = rest.get(skip..)?.split_at_checked(length)?;
        fields.entry(number).or_default().push(value.to_vec());
        bytes = tail;
    }
    Some(fields)
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fields_in_another_order_are_equal_and_an_unknown_one_counts() {
        // Field 1 is "a", field 2 is the varint 300, field 1000 the varint 1.
        let known = [0x0a, 0x01, b'a', 0x10, 0xac, 0x02];
        let swapped = [0x10, 0xac, 0x02, 0x0a, 0x01, b'a'];
        let unknown = [0x0a, 0x01, b'a', 0x10, 0xac, 0x02, 0xc0, 0x3e, 0x01];
        assert!(fields(&known).is_some());
        assert_eq!(fields(&known), fields(&swapped));
        assert_ne!(fields(&known), fields(&unknown));
        assert_eq!(fields(&[0x0a, 0x05, b'a']), None, "shorter than it says");
        assert_eq!(fields(&[0x0b]), None, "a group");
    }
}
