//! Where media lie until they are asked for: one file for each image, under a name that nobody can guess.
//!
//! *Names.* An ISO holds the join token, so that its address is a secret. Its path is a hash of the image, whose schematic is a hash
//! of, among others, that token: whoever does not know the schematic cannot guess the path, and whoever knows it could fetch the
//! image from the factory. A random secret beside the files would vanish with them, and a password is changed at times; this path
//! outlives both, and it is the same from every host. The address stands in the instance until its first start.
//!
//! *Cancel safety.* What was cut off is a file that is not served, and that the next import removes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use tracing::info;

use super::folder::{Folder, are_digits};
use crate::cloud::{ImageSource, Result};
use crate::secret::Secret;

/// How much is written at once.
const CHUNK: usize = 1024 * 1024;
/// How long a medium stays that nobody asks for: longer than a guest waits between its creation and its first boot, and short
/// enough that the folder holds a few.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);
/// What a whole medium's file ends in, and what one that is being written does.
const WHOLE: &str = "iso";
const PART: &str = "part";
/// How an address ends: QEMU and Ganeti look at nothing else of it.
const FILE: &str = "talos.iso";
/// Sets these names apart from any other hash of the same text.
const PURPOSE: &str = "omni-infra-provider media v1\n";

/// The shelf. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Shelf {
    folder: Arc<Folder>,
    /// Without a trailing slash.
    url: String,
    /// Held while a medium is written: one at a time, and none twice.
    writing: Arc<tokio::sync::Mutex<()>>,
}

impl Shelf {
    /// A shelf in a folder, which is made when it is needed; the server is reached at `url`.
    pub fn new(folder: impl Into<PathBuf>, url: impl Into<String>) -> Self {
        Self {
            folder: Arc::new(Folder(folder.into())),
            url: url.into().trim_end_matches('/').to_owned(),
            writing: Arc::default(),
        }
    }

    /// Makes the folder, so that one that cannot be made is known before anybody needs it.
    pub(super) async fn prepare(&self) -> Result<()> {
        let made = self.folder.make().await;
        made.map_err(|error| self.folder.fault("keep boot media", &error))
    }

    /// The address of an image's medium, whether it is there or not. A secret.
    #[must_use]
    pub fn address(&self, image: &str) -> String {
        format!("{}/{}/{FILE}", self.url, name(image))
    }

    /// Whether the medium of an image is there.
    ///
    /// # Errors
    ///
    /// `Unavailable`, where the folder cannot be looked into.
    pub async fn has(&self, image: &str) -> Result<bool> {
        self.is_there(&name(image)).await
    }

    /// Whether the medium of one of our addresses is missing. Of any other address nothing is known.
    ///
    /// # Errors
    ///
    /// As [`Self::has`].
    pub async fn misses(&self, address: &str) -> Result<bool> {
        let path = address.strip_prefix(&self.url).and_then(name_in);
        match path {
            Some(name) => {
                // It may be of a machine that another process made.
                Secret::new(name).guard();
                Ok(!self.is_there(name).await?)
            }
            None => Ok(false),
        }
    }

    /// Whether it is one of our addresses.
    #[must_use]
    pub fn is_ours(&self, address: &str) -> bool {
        address.strip_prefix(&self.url).and_then(name_in).is_some()
    }

    /// Brings the medium of an image, unless it is there. What nobody asked for in a long time goes.
    ///
    /// # Errors
    ///
    /// The source's; `Unavailable`, where it cannot be written.
    pub async fn put(&self, image: &str, source: &dyn ImageSource) -> Result<()> {
        let _writing = self.writing.lock().await;
        let name = name(image);
        if self.is_there(&name).await? {
            return Ok(());
        }
        let fault = |error| self.folder.fault("keep a boot medium", &error);
        self.folder.make().await.map_err(fault)?;
        self.sweep().await.map_err(fault)?;

        let part = self.folder.path(&name, PART);
        let mut stream = source.open().await?;
        let mut file = self.folder.write(&part).await.map_err(fault)?;
        while let Some(chunk) = stream.next(CHUNK).await? {
            file.write_all(&chunk).await.map_err(fault)?;
        }
        file.flush().await.map_err(fault)?;
        let whole = self.folder.path(&name, WHOLE);
        self.folder.place(file, &part, &whole).await.map_err(fault)
    }

    /// The file behind a path of the server, if it is one of a medium that is there. It is served to its end even if it vanishes
    /// meanwhile.
    pub(super) async fn open(&self, path: &str) -> io::Result<Option<File>> {
        let Some(name) = name_in(path) else {
            return Ok(None);
        };
        match File::open(self.folder.path(name, WHOLE)).await {
            Ok(file) => {
                let file = file.into_std().await;
                // Asked for: it stays. On a medium that nobody may write, it goes earlier and comes again.
                drop(file.set_modified(SystemTime::now()));
                Ok(Some(File::from_std(file)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn is_there(&self, name: &str) -> Result<bool> {
        let there = fs::try_exists(self.folder.path(name, WHOLE)).await;
        there.map_err(|error| self.folder.fault("look for a boot medium", &error))
    }

    /// Removes what was cut off, and what is old. Nothing else in the folder is touched.
    async fn sweep(&self) -> io::Result<()> {
        let mut entries = fs::read_dir(&self.folder.0).await?;
        while let Some(entry) = entries.next_entry().await? {
            let path = entry.path();
            let is_ours = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .is_some_and(are_digits);
            let goes = match path.extension().and_then(|end| end.to_str()) {
                Some(PART) => true,
                Some(WHOLE) => {
                    let age = entry.metadata().await?.modified()?.elapsed();
                    age.is_ok_and(|age| age > KEPT)
                }
                _ => false,
            };
            if is_ours && goes {
                fs::remove_file(&path).await?;
                info!("removed a boot medium that was cut off, or that nobody asked for");
            }
        }
        Ok(())
    }
}

/// What the medium of an image is called. Whoever shows it, in whatever words of a cloud, shows nothing.
fn name(image: &str) -> String {
    let name = Secret::new(hex::encode(Sha256::digest(format!("{PURPOSE}{image}"))));
    name.guard();
    name.expose().to_owned()
}

/// The name in the path of an address.
fn name_in(path: &str) -> Option<&str> {
    let name = path.strip_prefix('/')?.strip_suffix(FILE)?.strip_suffix('/')?;
    are_digits(name).then_some(name)
}
