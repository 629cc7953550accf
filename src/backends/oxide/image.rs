//! Brings a Talos image into a project: the decompressed stream goes to a scratch disk in chunks, the disk
//! becomes a snapshot, the snapshot an image.
//!
//! *Guarantees.* An image exists only when every byte of it was written and the stream's own checksums
//! agreed: creating it is the last thing that matters. Its description names the whole schematic and the
//! SHA-256 of its bytes, which the API keeps nowhere else. Memory is bounded by the number of writers.
//!
//! *Cancel safety.* Whatever a dropped import leaves is a scratch disk, marked and named `imp-…`, and at most
//! one snapshot of it with the same name. The next import that ends well sweeps those of its own image; any
//! import sweeps those that are old, and those whose image exists by now. A snapshot is deleted before its
//! disk, so that the disk's mark speaks for both.
//!
//! *Assumptions.* A chunk may be written again and again (it is the same chunk), and so is a scratch disk
//! cleared away: by what a new look shows of it. This file repeats these two, and no other mutation.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use oxide::prelude::*;
use oxide::types;
use rand::Rng;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::class::MAX_NAME;
use super::client;
use super::convert::{self, GIB, KIND};
use super::failure::{self, Failure, Sort};
use super::mark::{self, Owner};
use super::{Oxide, Project, absent_is_none, lock, unless_hidden};
use crate::cloud::{CloudError, ErrorKind, ImageKey, ImageRef, ImageSource, ImageStream, Result, Timestamp};

const VERB: &str = "import image";
/// Bytes of one write: the most that Crucible's pantry takes (`MAX_CHUNK_SIZE`).
const CHUNK: usize = 512 * 1024;
/// What need not be written.
static ZEROS: [u8; CHUNK] = [0; CHUNK];
/// Block size of a scratch disk, in bytes; offsets and lengths of writes are multiples of it.
const BLOCK: usize = 512;
/// Writes in flight: what the vendor's own tools use.
const WRITERS: usize = 8;
/// The first guess at an image's size: Talos's nocloud image takes 1246 MiB, and a disk is whole GiB.
const FIRST_GUESS: u64 = 2;
/// Longest wait for the answer to one chunk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(120);
/// How often one chunk is written before the import fails; with the pauses below this rides out half a minute
/// of outage.
const CHUNK_TRIES: u32 = 8;
/// Shortest pause before a chunk is written again; doubles each time.
const CHUNK_PAUSE: Duration = Duration::from_millis(250);
/// How often a scratch disk is cleared away before it is left to a later sweep: there may be none for long.
/// With the pauses above this gets over lost answers, not over an outage.
const CLEAR_TRIES: u32 = 4;
/// Longest pause before a chunk is written again.
const CHUNK_PAUSE_MOST: Duration = Duration::from_secs(8);
/// Age at which a scratch disk of another process is taken for abandoned: longer than any import takes.
const STALE: Duration = Duration::from_secs(2 * 60 * 60);
/// How the names of scratch disks and their snapshots begin.
const SCRATCH: &str = "imp-";

/// The name of an image: what its bytes depend on, as far as a name has room. The description has the rest.
pub(super) fn image_name(key: &ImageKey) -> String {
    let schematic: String = plain(&key.schematic).chars().take(16).collect();
    let rest = format!("-{schematic}-{}-{}", plain(&key.platform), plain(&key.arch));
    let mut version = plain(&key.talos_version);
    let room = MAX_NAME.saturating_sub("talos-".len() + rest.len());
    if version.len() > room {
        let digest: String = hex::encode(Sha256::digest(&key.talos_version))
            .chars()
            .take(8)
            .collect();
        version.truncate(room.saturating_sub(digest.len() + 1));
        version = format!("{version}-{digest}");
    }
    format!("talos-{version}{rest}")
}

/// What a name may hold: lower-case letters, digits, dashes.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect()
}

/// What an image says about itself.
fn describe(key: &ImageKey, sha256: &str) -> String {
    let ImageKey {
        talos_version,
        schematic,
        platform,
        arch,
    } = key;
    format!("Talos Linux {talos_version} {platform} {arch}, schematic {schematic}, sha256 {sha256}")
}

/// Whether an image of the right name is the right image: the name holds a part of the schematic only.
fn is_image_of(image: &types::Image, key: &ImageKey) -> bool {
    image.version == key.talos_version
        && image
            .description
            .split([' ', ','])
            .any(|word| word == key.schematic)
}

fn image_ref(image: &types::Image) -> ImageRef {
    ImageRef {
        id: image.id.to_string(),
        name: image.name.to_string(),
    }
}

/// What came of one try at an import.
enum Attempt {
    /// The image.
    Made(ImageRef),
    /// The stream is longer than the scratch disk: this many GiB.
    TooLong(u64),
}

/// What was written to a scratch disk.
enum Written {
    /// All of the stream, whose SHA-256 this is.
    All(String),
    /// The stream is longer than the disk: this many bytes.
    TooLong(u64),
}

/// Tells the sweeps of this process that a scratch disk is in use.
struct InUse<'a> {
    oxide: &'a Oxide,
    name: String,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        lock(&self.oxide.scratch).retain(|name| *name != self.name);
    }
}

impl Oxide {
    /// The image of that key: the project's own, else the silo's.
    pub(super) async fn image(&self, scope: &Project, key: &ImageKey) -> Result<Option<ImageRef>> {
        const VERB: &str = "find image";
        let wanted = image_name(key);
        let what = || format!("image {wanted:?} in project {scope}");
        let rejected = |words| Failure::rejected(words).error(VERB, what());
        let name = convert::name(&wanted).map_err(rejected)?;
        let project = convert::name_or_id(&scope.0).map_err(rejected)?;
        let own = self
            .client()
            .image_view()
            .project(project)
            .image(name.clone())
            .send()
            .await;
        match own.map_err(Failure::from) {
            Ok(image) if is_image_of(&image, key) => return Ok(Some(image_ref(&image))),
            Ok(image) => {
                let what = format!(
                    "{} is another image, it says {:?}; delete or rename it",
                    what(),
                    image.description
                );
                return Err(CloudError::new(KIND, VERB, ErrorKind::Foreign, what));
            }
            Err(failure) if failure.sort == Sort::NotFound && !failure::is_about_project(&failure.words) => {}
            Err(failure) => return Err(unless_hidden(failure, VERB, scope)),
        }
        // A silo's image can be used in all its projects. Another one of that name does not bother ours.
        let shared = self.client().image_view().image(name).send().await;
        let shared = absent_is_none(shared).map_err(|failure| failure.error(VERB, what()))?;
        Ok(shared
            .filter(|image| is_image_of(image, key))
            .map(|image| image_ref(&image)))
    }

    /// Imports the image, unless it is there by now.
    pub(super) async fn import(
        &self,
        scope: &Project,
        key: &ImageKey,
        source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        if let Some(image) = self.image(scope, key).await? {
            return Ok(image);
        }
        let name = image_name(key);
        let rivals = self.sweep(scope, &name, false).await?;
        match self.import_new(scope, key, &name, source).await {
            Ok(image) => {
                if rivals && let Err(error) = self.sweep(scope, &name, true).await {
                    tracing::warn!(%error, image = name, "scratch disks of earlier imports stay for now");
                }
                Ok(image)
            }
            // Another import of the same image may have won, and swept our scratch disk away.
            Err(error) => match self.image(scope, key).await {
                Ok(Some(image)) => Ok(image),
                _ => Err(error),
            },
        }
    }

    /// Removes the scratch disks of an image that exists, once in the life of this process.
    pub(super) async fn tidy_once(&self, scope: &Project, key: &ImageKey) {
        if !lock(&self.tidied).insert((scope.clone(), key.clone())) {
            return;
        }
        let name = image_name(key);
        if let Err(error) = self.sweep(scope, &name, true).await {
            tracing::warn!(%error, image = name, "scratch disks of earlier imports stay for now");
        }
    }

    async fn import_new(
        &self,
        scope: &Project,
        key: &ImageKey,
        name: &str,
        source: &dyn ImageSource,
    ) -> Result<ImageRef> {
        let length = match self.attempt(scope, key, name, source, FIRST_GUESS).await? {
            Attempt::Made(image) => return Ok(image),
            Attempt::TooLong(length) => length,
        };
        match self.attempt(scope, key, name, source, length).await? {
            Attempt::Made(image) => Ok(image),
            Attempt::TooLong(longer) => Err(CloudError::new(
                KIND,
                VERB,
                ErrorKind::Unavailable,
                format!("image {name:?} had {length} GiB at the first download and {longer} at the second"),
            )),
        }
    }

    /// One import by way of one scratch disk of that many GiB. Leaves no scratch, if it can help it.
    async fn attempt(
        &self,
        scope: &Project,
        key: &ImageKey,
        image: &str,
        source: &dyn ImageSource,
        gib: u64,
    ) -> Result<Attempt> {
        // First of all: where there is nothing to download, nothing needs to be made.
        let mut stream = source.open().await?;

        let random = Uuid::new_v4().simple().to_string();
        let name: String = [SCRATCH, &plain(&key.schematic), "-", &random]
            .iter()
            .zip([SCRATCH.len(), 8, 1, 8])
            .flat_map(|(part, most)| part.chars().take(most))
            .collect();
        lock(&self.scratch).push(name.clone());
        let in_use = InUse { oxide: self, name };
        let name = in_use.name.as_str();

        let what = || format!("scratch disk {name:?} for image {image:?} in project {scope}");
        let fault = |failure: Failure| failure.error(VERB, what());
        let rejected = |words| fault(Failure::rejected(words));
        let disk = self
            .client()
            .disk_create()
            .project(scope.param().map_err(fault)?)
            .body(types::DiskCreate {
                description: mark::describe_import(&self.provider, image),
                disk_backend: types::DiskBackend::Distributed(types::DiskSource::ImportingBlocks {
                    block_size: convert::block_size(512).map_err(rejected)?,
                }),
                name: convert::name(name).map_err(rejected)?,
                size: types::ByteCount(gib.saturating_mul(GIB)),
            })
            .send()
            .await
            .map_err(|error| match Failure::from(error) {
                failure if failure.sort == Sort::NotFound => unless_hidden(failure, VERB, scope),
                failure => fault(failure),
            })?
            .into_inner();

        let made = self
            .make_image(scope, key, image, &disk, stream.as_mut(), gib)
            .await;
        // The connection is of no more use, and clearing up takes a while.
        drop(stream);
        if let Err(failure) = self.clear_by_id(scope, disk.id).await {
            // It is marked, so a later import sweeps it.
            tracing::warn!(
                disk = name,
                image,
                failure = failure.words,
                "a scratch disk stays for now"
            );
        }
        made
    }

    /// From a fresh scratch disk to the image.
    async fn make_image(
        &self,
        scope: &Project,
        key: &ImageKey,
        image: &str,
        disk: &types::Disk,
        stream: &mut dyn ImageStream,
        gib: u64,
    ) -> Result<Attempt> {
        let scratch = disk.name.as_str();
        let what = || format!("scratch disk {scratch:?} for image {image:?} in project {scope}");
        let fault = |failure: Failure| failure.busy_if_refused().error(VERB, what());
        let client = self.client();
        let start = client.disk_bulk_write_import_start().disk(disk.id);
        start.send().await.map_err(|error| fault(error.into()))?;
        let sha256 = match self
            .write_all(disk, &what(), stream, gib.saturating_mul(GIB))
            .await?
        {
            Written::All(sha256) => sha256,
            Written::TooLong(bytes) => return Ok(Attempt::TooLong(bytes.div_ceil(GIB))),
        };
        // The stream took its time: the token may be another one by now.
        let client = self.client();
        let stop = client.disk_bulk_write_import_stop().disk(disk.id);
        stop.send().await.map_err(|error| fault(error.into()))?;
        let finalize = client
            .disk_finalize_import()
            .disk(disk.id)
            .body(types::FinalizeDisk {
                snapshot_name: Some(disk.name.clone()),
            });
        finalize.send().await.map_err(|error| fault(error.into()))?;
        let snapshot = self
            .client()
            .snapshot_view()
            .project(disk.project_id)
            .snapshot(disk.name.clone())
            .send()
            .await
            .map_err(|error| fault(error.into()))?;

        let what = || format!("image {image:?} in project {scope}");
        let rejected = |words| Failure::rejected(words).error(VERB, what());
        let create = client
            .image_create()
            .project(disk.project_id)
            .body(types::ImageCreate {
                description: describe(key, &sha256),
                name: convert::name(image).map_err(rejected)?,
                os: "Talos Linux".to_owned(),
                source: types::ImageSource::Snapshot(snapshot.id),
                version: key.talos_version.clone(),
            });
        match create.send().await.map_err(Failure::from) {
            Ok(image) => Ok(Attempt::Made(image_ref(&image))),
            // Another import was quicker. Theirs will do, if it is the same image.
            Err(failure) if failure.sort == Sort::AlreadyExists => match self.image(scope, key).await? {
                Some(image) => Ok(Attempt::Made(image)),
                None => Err(failure.error_of(ErrorKind::Busy, VERB, what())),
            },
            Err(failure) => Err(failure.error(VERB, what())),
        }
    }

    /// Writes the whole stream to the disk, several chunks at once, but for chunks of zeros: the disk begins
    /// as zeros.
    async fn write_all(
        &self,
        disk: &types::Disk,
        what: &str,
        stream: &mut dyn ImageStream,
        size: u64,
    ) -> Result<Written> {
        let received = AtomicU64::new(0);
        let fits = &received;
        let chunks = stream::try_unfold(&mut *stream, |stream| async move {
            let Some(chunk) = stream.next(CHUNK).await? else {
                return Ok(None);
            };
            let offset = fits.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            // Past the end of the disk only the length of the stream is of interest.
            let end = offset.saturating_add(chunk.len() as u64);
            Ok((end <= size).then_some(((offset, chunk), stream)))
        });
        chunks
            .try_for_each_concurrent(WRITERS, |(offset, chunk)| async move {
                if ZEROS.get(..chunk.len()) == Some(&*chunk) {
                    return Ok(());
                }
                self.write_chunk(disk.id, what, offset, &chunk).await
            })
            .await?;
        let mut length = received.load(Ordering::Relaxed);
        if length > size {
            while let Some(chunk) = stream.next(CHUNK).await? {
                length = length.saturating_add(chunk.len() as u64);
            }
            return Ok(Written::TooLong(length));
        }
        if length == 0 {
            return Err(CloudError::new(
                KIND,
                VERB,
                ErrorKind::Unavailable,
                format!("{what}: the image that was downloaded is empty"),
            ));
        }
        Ok(Written::All(stream.sha256()))
    }

    /// Writes one chunk, again where that can help.
    async fn write_chunk(&self, disk: Uuid, what: &str, offset: u64, chunk: &Bytes) -> Result<()> {
        let mut blocks = Cow::Borrowed(&**chunk);
        if !chunk.len().is_multiple_of(BLOCK) {
            blocks.to_mut().resize(chunk.len().next_multiple_of(BLOCK), 0);
        }
        let mut pause = CHUNK_PAUSE;
        for left in (0..CHUNK_TRIES).rev() {
            let client = self.client();
            let write = client::write_blocks(&client, disk, offset, &blocks);
            let failure = match tokio::time::timeout(CHUNK_TIMEOUT, write).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(failure)) => failure,
                Err(_) => Failure::unanswered(),
            };
            let asked = match failure.sort {
                Sort::Kind(ErrorKind::Unavailable) => None,
                Sort::Kind(ErrorKind::Throttled { after }) => after,
                // The chunk is as good as the others: what changed is the disk.
                _ => return Err(self.why_refused(failure, disk, what).await),
            };
            if left == 0 {
                return Err(failure.error(VERB, format!("{what}, at byte {offset}")));
            }
            let jittered = pause.mul_f64(rand::thread_rng().gen_range(0.5..1.0));
            tokio::time::sleep(asked.map_or(jittered, |asked| asked.max(jittered))).await;
            pause = CHUNK_PAUSE_MOST.min(pause * 2);
        }
        Ok(())
    }

    /// Why a chunk was refused: the disk may have been taken from under us.
    async fn why_refused(&self, failure: Failure, disk: Uuid, what: &str) -> CloudError {
        let seen = self.client().disk_view().disk(disk).send().await;
        match absent_is_none(seen) {
            Ok(None) => failure.error_of(ErrorKind::Busy, VERB, format!("{what} is gone")),
            Ok(Some(disk)) if !matches!(disk.state, types::DiskState::ImportingFromBulkWrites) => {
                let state = convert::disk_state(&disk.state);
                failure.error_of(ErrorKind::Busy, VERB, format!("{what} is {state}"))
            }
            Ok(Some(_)) | Err(_) => failure.error(VERB, what),
        }
    }

    /// Removes what cut-off imports left in the project, where nobody can still need it. With `done`, an
    /// image of this name exists, and its scratch disks go whatever their age. Tells whether scratch disks of
    /// this image stay.
    async fn sweep(&self, scope: &Project, image: &str, done: bool) -> Result<bool> {
        let disks = self
            .disks(scope)
            .await
            .map_err(|failure| unless_hidden(failure, VERB, scope))?;
        let now = Timestamp::from(SystemTime::now());
        let mut rivals = false;
        for disk in disks.iter() {
            let Some(Owner::Import {
                provider,
                image: theirs,
            }) = mark::owner(&disk.description)
            else {
                continue;
            };
            let in_use = lock(&self.scratch).contains(&disk.name);
            if provider != self.provider || in_use || !disk.name.starts_with(SCRATCH) {
                continue;
            }
            let stale = now.since(disk.created) > STALE;
            let over = stale
                || if theirs == image {
                    done
                } else {
                    self.is_there(scope, &theirs).await
                };
            if !over {
                rivals |= theirs == image;
                continue;
            }
            if let Err(failure) = self.clear_by_id(scope, disk.id).await {
                tracing::warn!(
                    disk = disk.name,
                    failure = failure.words,
                    "a scratch disk stays for now"
                );
            }
        }
        Ok(rivals)
    }

    /// Whether the project has an image of this name, as far as can be told.
    async fn is_there(&self, scope: &Project, image: &str) -> bool {
        let (Ok(project), Ok(image)) = (scope.param(), convert::name(image)) else {
            return false;
        };
        let client = self.client();
        let view = client.image_view().project(project).image(image);
        view.send().await.is_ok()
    }

    /// Removes a scratch disk in whatever state it is by now. Where an answer does not come, a new look shows
    /// what there is left to do.
    async fn clear_by_id(&self, scope: &Project, disk: Uuid) -> std::result::Result<(), Failure> {
        let mut pause = CHUNK_PAUSE;
        for _ in 1..CLEAR_TRIES {
            match self.look_and_clear(scope, disk).await {
                Err(failure) if failure.sort == Sort::Kind(ErrorKind::Unavailable) => {}
                cleared => return cleared,
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.look_and_clear(scope, disk).await
    }

    async fn look_and_clear(&self, scope: &Project, disk: Uuid) -> std::result::Result<(), Failure> {
        let seen = self.client().disk_view().disk(disk).send().await;
        match absent_is_none(seen)? {
            Some(disk) => self.clear(scope, &disk).await,
            None => Ok(()),
        }
    }

    /// Removes a scratch disk and its snapshot, as far as the disk's state allows: nexus deletes detached and
    /// faulted disks alone, and the way from an import to detached is to finalize it.
    async fn clear(&self, scope: &Project, disk: &types::Disk) -> std::result::Result<(), Failure> {
        use types::DiskState as State;
        match disk.state {
            State::Detached | State::Faulted => {
                let snapshot = self
                    .client()
                    .snapshot_view()
                    .project(scope.param()?)
                    .snapshot(disk.name.clone())
                    .send()
                    .await;
                if let Some(snapshot) = absent_is_none(snapshot)?
                    && snapshot.disk_id == disk.id
                {
                    let client = self.client();
                    let delete = client.snapshot_delete().snapshot(snapshot.id);
                    absent_is_none(delete.send().await)?;
                }
            }
            State::ImportingFromBulkWrites => {
                let client = self.client();
                let stop = client.disk_bulk_write_import_stop().disk(disk.id);
                stop.send().await?;
                self.finalize(disk.id).await?;
            }
            State::ImportReady => self.finalize(disk.id).await?,
            // In the middle of something that ends by itself; a later sweep meets it again.
            _ => return Ok(()),
        }
        absent_is_none(self.client().disk_delete().disk(disk.id).send().await)?;
        Ok(())
    }

    /// Ends an import without a snapshot.
    async fn finalize(&self, disk: Uuid) -> std::result::Result<(), Failure> {
        let client = self.client();
        let finalize = client
            .disk_finalize_import()
            .disk(disk)
            .body(types::FinalizeDisk { snapshot_name: None });
        finalize.send().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(version: &str) -> ImageKey {
        ImageKey {
            talos_version: version.to_owned(),
            schematic: "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba".to_owned(),
            platform: "nocloud".to_owned(),
            arch: "amd64".to_owned(),
        }
    }

    #[test]
    fn an_images_name_tells_what_it_is_and_always_fits() {
        for (version, name) in [
            ("1.12.0", "talos-1-12-0-376567988ad37013-nocloud-amd64"),
            (
                "1.13.0-beta.1+x",
                "talos-1-13-0-beta-1-x-376567988ad37013-nocloud-amd64",
            ),
        ] {
            assert_eq!(image_name(&key(version)), name);
        }
        let long = |tail: &str| image_name(&key(&format!("1.13.0-alpha.2-37-gdeadbeef-{tail}")));
        assert_eq!(long("dirty").len(), MAX_NAME);
        assert_ne!(long("dirty"), long("clean"));
        assert!(convert::name(&long("dirty")).is_ok());
    }

    #[test]
    fn an_image_is_known_by_its_whole_schematic() {
        let key = key("1.12.0");
        let image = |description: &str, version: &str| -> types::Image {
            serde_json::from_value(serde_json::json!({
                "block_size": 512, "description": description, "id": Uuid::nil(), "name": "talos",
                "os": "Talos",
                "size": 1, "version": version,
                "time_created": "2026-11-21T00:00:00Z", "time_modified": "2026-11-21T00:00:00Z",
            }))
            .unwrap()
        };
        let description = describe(&key, "c0ffee");
        assert!(is_image_of(&image(&description, "1.12.0"), &key));
        assert!(!is_image_of(&image(&description, "1.12.1"), &key));
        let (other, _) = key.schematic.split_at(63);
        assert!(!is_image_of(
            &image(&description.replace(&key.schematic, other), "1.12.0"),
            &key
        ));
        assert!(description.len() <= 512, "nexus's limit");
    }
}
