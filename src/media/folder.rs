//! Where media lie: a folder that nobody else can look into, and that may vanish at any time.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tokio::fs::{self, DirBuilder, File, OpenOptions};

use crate::cloud::{CloudError, ErrorKind};

/// Who failed, in errors: no cloud, but shown in the same place.
const WHO: &str = "the media folder";

/// Hexadecimal digits of a file's name.
pub(super) const DIGITS: usize = 64;

/// Whether it is digits as the names of files have them.
pub(super) fn are_digits(text: &str) -> bool {
    text.len() == DIGITS
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[derive(Debug)]
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    /// Makes it, unless it is there.
    pub(super) async fn make(&self) -> io::Result<()> {
        let mut making = DirBuilder::new();
        making.recursive(true).mode(0o700);
        making.create(&self.0).await?;
        let owner = fs::symlink_metadata(&self.0).await?.uid();
        // Where everybody may make folders, somebody may have been faster.
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("it belongs to another user"));
        }
        Ok(())
    }

    pub(super) fn path(&self, name: &str, end: &str) -> PathBuf {
        self.0.join(format!("{name}.{end}"))
    }

    /// A new file, that nobody else can read.
    pub(super) async fn write(&self, path: &Path) -> io::Result<File> {
        let mut opening = OpenOptions::new();
        opening.write(true).create(true).truncate(true).mode(0o600);
        opening.open(path).await
    }

    /// Puts a file that is whole in its place, for good.
    pub(super) async fn place(&self, file: File, part: &Path, whole: &Path) -> io::Result<()> {
        file.sync_all().await?;
        drop(file);
        fs::rename(part, whole).await?;
        File::open(&self.0).await?.sync_all().await
    }

    pub(super) fn fault(&self, verb: &'static str, error: &io::Error) -> CloudError {
        let what = format!(
            "{}: {error}: make room there, let the provider write there, or set another folder",
            self.0.display()
        );
        CloudError::new(WHO, verb, ErrorKind::Unavailable, what)
    }
}
