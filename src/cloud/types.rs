//! The words that the engine and every cloud share: scopes, instances, images, marks.

use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::Result;

/// Where names are unique inside a site: a project, a node group, a zone. Its serialised form is part of the claim.
pub trait Scope:
    Clone + Eq + Ord + Hash + fmt::Debug + fmt::Display + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

/// A moment, in milliseconds since the Unix epoch, by whatever clock the field's documentation names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The moment `later` after this one.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(later.as_millis()).unwrap_or(u64::MAX)),
        )
    }

    /// The moment `earlier` before this one.
    #[must_use]
    pub fn before(self, earlier: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(earlier.as_millis()).unwrap_or(u64::MAX)),
        )
    }

    /// The time from `earlier` to this moment; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let millis = time.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis());
        Self(u64::try_from(millis).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Timestamp {
    /// The time of day in UTC: status lines speak of the near past and the near future.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let second = self.0 / 1000 % 86_400;
        write!(
            f,
            "{:02}:{:02}:{:02} UTC",
            second / 3600,
            second / 60 % 60,
            second % 60
        )
    }
}

/// Who an instance belongs to: the ownership mark, written on everything that we create.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mark {
    /// The provider ID that this daemon serves.
    pub provider: String,
    /// The machine request that the thing was made for.
    pub request: String,
    /// One Omni account's provider, as a UUID: two accounts with the same provider ID in one site stay apart.
    pub installation: String,
}

/// One instance, as the engine names it to a cloud.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InstanceRef<S> {
    /// Where it lives.
    pub scope: S,
    /// Its name, unique in the scope and derived from the request.
    pub name: String,
    /// The vendor's own ID, once seen. Every mutation of an existing instance uses it.
    pub id: Option<String>,
    /// Our mark. What carries another is foreign.
    pub mark: Mark,
    /// Whether the bare sentence of the Go provider, which names no installation, counts as our mark here: only for a live
    /// request of that very name, or where its machine resource names the instance.
    pub adopt_bare: bool,
}

/// What it takes to create one instance.
#[derive(Debug, Clone)]
pub struct InstanceSpec<S, K> {
    /// Its name, place and mark.
    pub instance: InstanceRef<S>,
    /// What the user wrote in the machine class.
    pub class: K,
    /// The image that it boots, as `find_image` named it.
    pub image: ImageRef,
    /// Byte-exact user data: the join documents. Holds the join token.
    pub user_data: UserData,
}

/// User data: the Talos documents that a machine reads at its first boot. They hold the join token, so `Debug` hides them.
#[derive(Clone, PartialEq, Eq)]
pub struct UserData(pub Vec<u8>);

impl fmt::Debug for UserData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserData(<redacted>, {} bytes)", self.0.len())
    }
}

/// The end of an instance's serial console, with what is not UTF-8 replaced. It shows kernel arguments, and so may show join
/// tokens: `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Console(pub String);

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Console(<redacted>, {} bytes)", self.0.len())
    }
}

/// What is there of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Found {
    /// Nothing of it is left, and we were allowed to look.
    Nothing,
    /// No instance, but something that was made for it: a disk, an address.
    Remains {
        /// When the oldest of it was made, by the cloud's clock.
        since: Option<Timestamp>,
    },
    /// Our instance, or its creation in flight. Shared, since who looks at it keeps it beside the list that showed it.
    Ours(Arc<Instance>),
    /// The name is taken by something without our mark.
    Foreign {
        /// Whose it seems to be, for a person.
        what: String,
    },
}

/// An instance of ours, as the cloud shows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// The vendor's ID.
    pub id: String,
    /// The UUID that Talos will report to Omni (lower-case, canonical), where the cloud lets us know it.
    pub uuid: Option<String>,
    /// The kubelet's `providerID` for it, where Talos cannot find it out by itself.
    pub node_provider_id: Option<String>,
    /// What it does right now.
    pub state: InstanceState,
    /// When it last started, or a moment not long before, by the cloud's clock.
    pub started: Option<Timestamp>,
    /// The mark it carries; `None` for the bare sentence of the Go provider.
    pub mark: Option<Mark>,
}

/// Something that carries a mark of our provider ID: an instance, or what is left of one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Marked {
    /// The instance's name, or the name of the instance that it was made for.
    pub name: String,
    /// The vendor's ID of the instance; `None` for what is left of one.
    pub id: Option<String>,
    /// The mark, of whichever installation; `None` for the bare sentence of the Go provider.
    pub mark: Option<Mark>,
}

/// The states that the planner tells apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum InstanceState {
    /// It does not run and nothing is under way.
    Stopped,
    /// Under way: creating, starting, stopping, rebooting, migrating, deleting.
    Starting,
    /// It runs.
    Running,
    /// The cloud says that it is broken, in its own words.
    Broken(String),
}

/// The identity of a bootable image: everything that makes its bytes what they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey {
    /// Talos version without a leading "v".
    pub talos_version: String,
    /// The whole schematic ID, as the factory returned it.
    pub schematic: String,
    /// Talos platform, for example `nocloud`.
    pub platform: String,
    /// `amd64` or `arm64`.
    pub arch: String,
}

impl ImageKey {
    /// The image as nothing but its key names it: schematic, version, platform and architecture, as in a factory's path.
    #[must_use]
    pub fn reference(&self) -> ImageRef {
        let id = format!(
            "{}/v{}/{}-{}",
            self.schematic, self.talos_version, self.platform, self.arch
        );
        ImageRef { name: id.clone(), id }
    }
}

/// An image in a cloud.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageRef {
    /// The vendor's ID.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// Where the bytes of an image come from: it can be opened, and opened again.
pub trait ImageSource: Send + Sync {
    /// Starts a new stream of the decompressed image, from its first byte.
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>>;
}

/// One pass over a decompressed image, in bounded memory.
pub trait ImageStream: Send {
    /// The next chunk: `size` bytes, fewer only at the end of the image; `None` after that. The end is only reported once the
    /// whole stream was received and its checksums, where the format has them, agreed.
    fn next(&mut self, size: usize) -> BoxFuture<'_, Result<Option<Bytes>>>;

    /// Lower-case hex SHA-256 of everything that `next` returned; meaningful after the end.
    fn sha256(&self) -> String;
}

/// A boxed future, for the few traits that are used as objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a cloud needs to know about an image to boot it, and what it adds to a schematic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootProfile {
    /// Talos platform.
    pub platform: &'static str,
    /// Architecture, in Talos's spelling.
    pub arch: &'static str,
    /// Format of the image at the factory, for example `raw.xz` or `iso`. `None`: the operator has put it where the class says,
    /// and nothing is imported.
    pub format: Option<&'static str>,
    /// Kernel arguments, appended in this order.
    pub kernel_args: Vec<String>,
    /// Official extensions that every image gets.
    pub extensions: Vec<String>,
    /// Nameservers that the class asks for; empty: the daemon's own.
    pub nameservers: Vec<IpAddr>,
}

impl BootProfile {
    /// Whether the image is a medium that the machine reads while it boots for the first time: it has to be there at the start, and
    /// not only when the instance is made.
    #[must_use]
    pub fn is_medium(&self) -> bool {
        self.format == Some("iso")
    }

    /// Whether the machine learns from its kernel's arguments how to join: the `metal` platform knows no user data. They are part
    /// of the image, then, and one image serves all machines, so that they name no request.
    #[must_use]
    pub fn joins_by_kernel_args(&self) -> bool {
        self.platform == "metal"
    }
}

/// What names and user data may be in a cloud.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest instance name, in bytes, that leaves room for the names derived from it.
    pub name: usize,
    /// Most bytes of user data, before any encoding.
    pub user_data: usize,
}

/// What the Go library's machine resource of one request says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Legacy<S> {
    /// Where the instance was made.
    pub scope: S,
    /// The vendor's ID of the instance.
    pub id: Option<String>,
}
