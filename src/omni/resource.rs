//! A COSI resource as plain data: metadata, a decoded spec, and the raw spec bytes that it came with.
//!
//! Omni compares the bytes of a spec: a request whose unknown fields were lost on the way back is refused, and a status written by a
//! newer program must not be cut down to what we know of it. They are kept where the decoded spec does not give the same again.

use litemap::LiteMap;

use super::kinds::{Kind, LABEL_PROVIDER, moment, wire_moment};
use super::wire::cosi;
use crate::cloud::Timestamp;

/// Where a resource is in its life. Teardown asks for the end; destroy is the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// In use.
    #[default]
    Running,
    /// Somebody asked for its end; finalizers hold it.
    TearingDown,
}

/// Labels or annotations. A flat map: nearly all have one or two entries, and whatever is alive is kept in memory.
pub type Labels = LiteMap<String, String>;

/// Who still holds a resource.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Finalizers(LiteMap<String, ()>);

impl Finalizers {
    /// Adds a holder; whether it is new.
    pub fn insert(&mut self, holder: String) -> bool {
        self.0.insert(holder, ()).is_none()
    }

    /// Takes a holder away; whether it was there.
    pub fn remove(&mut self, holder: &str) -> bool {
        self.0.remove(holder).is_some()
    }

    /// Whether that one holds it.
    #[must_use]
    pub fn contains(&self, holder: &str) -> bool {
        self.0.contains_key(holder)
    }

    /// Whether nobody holds it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The holders, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl<S: Into<String>> FromIterator<S> for Finalizers {
    fn from_iter<I: IntoIterator<Item = S>>(holders: I) -> Self {
        Self(sized(holders.into_iter().map(|holder| (holder.into(), ()))))
    }
}

/// A flat map with no room to spare.
fn sized<V>(entries: impl Iterator<Item = (String, V)>) -> LiteMap<String, V> {
    let mut map = LiteMap::with_capacity(entries.size_hint().0);
    map.extend(entries);
    map
}

/// What COSI knows of every resource.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Unique within namespace and type.
    pub id: String,
    /// The version the server gave it; 0 for a resource that was never stored. Starts anew when an ID is made
    /// anew.
    pub version: u64,
    /// The controller that may write it; empty for resources of users.
    pub owner: String,
    /// Running, or tearing down.
    pub phase: Phase,
    /// When this incarnation of the ID was made, by Omni's clock.
    pub created: Timestamp,
    /// Who still holds it.
    pub finalizers: Finalizers,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
}

/// What the wire calls a version that was never stored. The empty string is a parse error there.
const UNDEFINED: &str = "undefined";

impl Phase {
    /// The wire's word. The empty string is a parse error there.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::TearingDown => "tearingDown",
        }
    }
}

/// A resource of one kind.
#[derive(Debug, Clone)]
pub struct Resource<K: Kind> {
    /// What COSI knows of it.
    pub metadata: Metadata,
    /// The decoded spec.
    pub spec: K::Spec,
    /// The spec as it was received; empty for a new resource, and where the decoded spec says it all. Never printed.
    pub raw: RawSpec,
}

// By hand, because a derive would ask the kind itself to be comparable.
impl<K: Kind> PartialEq for Resource<K> {
    fn eq(&self, other: &Self) -> bool {
        self.metadata == other.metadata && self.spec == other.spec && self.raw == other.raw
    }
}

/// Spec bytes as received. `Debug` shows their length alone: some specs hold join tokens.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct RawSpec(pub Box<[u8]>);

impl std::fmt::Debug for RawSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RawSpec({} bytes)", self.0.len())
    }
}

impl<K: Kind> Resource<K> {
    /// A new resource, running and not yet stored.
    pub fn new(id: impl Into<String>, spec: K::Spec) -> Self {
        Self {
            metadata: Metadata {
                id: id.into(),
                ..Metadata::default()
            },
            spec,
            raw: RawSpec::default(),
        }
    }

    /// Its ID.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.metadata.id
    }

    /// Whether somebody asked for its end.
    #[must_use]
    pub fn tearing_down(&self) -> bool {
        self.metadata.phase == Phase::TearingDown
    }

    /// Whether this is the same incarnation of the ID, and not a later one of the same name.
    #[must_use]
    pub fn same_incarnation(&self, other: &Self) -> bool {
        self.metadata.created == other.metadata.created
    }
}

impl<K: Kind> Resource<K> {
    /// Whether it may be ours: in a namespace that providers share it has to carry our label, because a
    /// suspended account and Omni's cached reads show everybody's.
    pub(super) fn belongs_to(&self, provider: &str) -> bool {
        !K::SHARED || self.metadata.labels.get(LABEL_PROVIDER).map(String::as_str) == Some(provider)
    }

    /// Reads a resource off the wire; the error says what is wrong with it, and shows nothing of its spec.
    pub(super) fn from_wire(wire: cosi::Resource) -> Result<Self, String> {
        let metadata = wire.metadata.ok_or("it has no metadata")?;
        let spec = wire.spec.ok_or("it has no spec")?;
        let raw = spec.proto_spec;
        let spec = K::decode(&raw)?;
        let says_it_all = K::encode(&spec, &[]) == raw;
        Ok(Self {
            spec,
            metadata: Metadata::from_wire(metadata)?,
            raw: RawSpec(if says_it_all { Box::default() } else { raw.into() }),
        })
    }

    /// Writes it for the wire. A spec that was not changed is sent as it came.
    pub(super) fn to_wire(&self, provider: &str, updated: Timestamp) -> cosi::Resource {
        let metadata = &self.metadata;
        cosi::Resource {
            metadata: Some(cosi::Metadata {
                namespace: K::namespace(provider),
                r#type: K::type_name(provider),
                id: metadata.id.clone(),
                version: match metadata.version {
                    0 => UNDEFINED.to_owned(),
                    version => version.to_string(),
                },
                owner: metadata.owner.clone(),
                phase: metadata.phase.word().to_owned(),
                created: Some(wire_moment(metadata.created)),
                updated: Some(wire_moment(updated)),
                finalizers: metadata.finalizers.iter().map(str::to_owned).collect(),
                labels: metadata.labels.clone().into_iter().collect(),
                annotations: metadata.annotations.clone().into_iter().collect(),
            }),
            // Always there, even when empty: a missing spec is refused.
            spec: Some(cosi::Spec {
                proto_spec: K::encode(&self.spec, &self.raw.0),
                yaml_spec: String::new(),
            }),
        }
    }
}

impl Metadata {
    fn from_wire(wire: cosi::Metadata) -> Result<Self, String> {
        let version = match wire.version.as_str() {
            UNDEFINED => 0,
            // The server counts in signed numbers.
            version => version
                .parse::<i64>()
                .ok()
                .and_then(|version| u64::try_from(version).ok())
                .ok_or_else(|| format!("its version is {version:?}"))?,
        };
        let phase = [Phase::Running, Phase::TearingDown]
            .into_iter()
            .find(|phase| phase.word() == wire.phase)
            .ok_or_else(|| format!("its phase is {:?}", wire.phase))?;
        Ok(Self {
            id: wire.id,
            version,
            owner: wire.owner,
            phase,
            created: wire.created.as_ref().map(moment).unwrap_or_default(),
            finalizers: wire.finalizers.into_iter().collect(),
            labels: sized(wire.labels.into_iter()),
            annotations: sized(wire.annotations.into_iter()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::kinds::{MachineRequestStatusSpec, MachineRequestStatuses};
    use super::*;

    fn stored() -> Resource<MachineRequestStatuses> {
        let mut resource = Resource::new("web-x7k", MachineRequestStatusSpec::default());
        resource.metadata = Metadata {
            id: "web-x7k".into(),
            version: 7,
            owner: "oxide.ProvisionController".into(),
            phase: Phase::TearingDown,
            created: Timestamp(1_700_000_000_123),
            finalizers: ["b", "a"].into_iter().collect(),
            labels: sized([("l".to_owned(), "1".to_owned())].into_iter()),
            annotations: sized([("a".to_owned(), "2".to_owned())].into_iter()),
        };
        resource
    }

    #[test]
    fn metadata_survives_the_wire() {
        let resource = stored();
        let wire = resource.to_wire("oxide", Timestamp(0));
        assert_eq!(wire.metadata.as_ref().unwrap().namespace, "infra-provider");
        assert_eq!(
            Resource::<MachineRequestStatuses>::from_wire(wire).unwrap(),
            resource
        );
    }

    #[test]
    fn a_new_resource_has_no_version_and_an_empty_spec_and_says_so() {
        let resource =
            Resource::<MachineRequestStatuses>::new("web-x7k", MachineRequestStatusSpec::default());
        let wire = resource.to_wire("oxide", Timestamp(0));
        let metadata = wire.metadata.unwrap();
        assert_eq!(
            (metadata.version.as_str(), metadata.phase.as_str()),
            ("undefined", "running")
        );
        assert_eq!(wire.spec.unwrap(), cosi::Spec::default());
    }

    #[test]
    fn what_is_no_resource_is_refused() {
        for spoil in [
            |wire: &mut cosi::Resource| wire.metadata = None,
            |wire: &mut cosi::Resource| wire.spec = None,
            |wire: &mut cosi::Resource| wire.metadata.as_mut().unwrap().version = String::new(),
            |wire: &mut cosi::Resource| wire.metadata.as_mut().unwrap().version = "-1".into(),
            |wire: &mut cosi::Resource| wire.metadata.as_mut().unwrap().phase = String::new(),
        ] {
            let mut wire = stored().to_wire("oxide", Timestamp(0));
            spoil(&mut wire);
            assert!(Resource::<MachineRequestStatuses>::from_wire(wire).is_err());
        }
    }

    #[test]
    fn only_our_label_makes_a_shared_resource_ours() {
        let mut resource = stored();
        assert!(!resource.belongs_to("oxide"));
        resource
            .metadata
            .labels
            .insert(LABEL_PROVIDER.into(), "ganeti".into());
        assert!(!resource.belongs_to("oxide"));
        resource
            .metadata
            .labels
            .insert(LABEL_PROVIDER.into(), "oxide".into());
        assert!(resource.belongs_to("oxide"));
    }

    #[test]
    fn a_debug_print_hides_the_raw_spec() {
        assert_eq!(format!("{:?}", RawSpec((*b"token").into())), "RawSpec(5 bytes)");
    }
}
