//! Keeps what a machine reads at its first boot (NoCloud) until it has read it: one file for each machine.
//!
//! *Names.* A seed holds a join token. Its address is random, and stands in the instance alone: whoever starts that instance reads
//! it there, so that nothing has to be remembered, and another process can go on.
//!
//! *Single use.* Talos reads its user data twice in one boot, for its configuration and for its network, and again at each boot
//! until it is installed (`AcquireController`, `PlatformConfigController`, `nocloud.acquireConfig`). So a seed is for one machine and
//! not for one reading: the first address that reads the user data has it, for an hour (`AFTERWARDS`); others are told that there is
//! none. What nobody reads goes after a day (`UNREAD`).
//!
//! *Afterwards.* An installed machine asks again at each boot, and takes no answer for a fault: without meta-data it would try for
//! three minutes, and so it is told that there is none to be had (204, `download.download`), for any name. User data that are not
//! there are an ordinary 404, upon which Talos goes on without.
//!
//! *Cancel safety.* What was cut off is a file that is not served, and that goes with the next sweep.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::fs;
use tokio::io::AsyncWriteExt;
use tracing::{info, warn};

use super::folder::{DIGITS, Folder, are_digits};
use crate::cloud::Result;

/// How long a seed stays that nobody reads: a machine boots within minutes of its start, and its node may be down for a while.
const UNREAD: Duration = Duration::from_secs(24 * 3600);
/// How long it stays for the machine that read it: until Talos is installed, with some boots in between.
const AFTERWARDS: Duration = Duration::from_secs(3600);
/// How long a file that is being written is left alone. It takes a moment.
const WRITING: Duration = Duration::from_secs(600);
/// What every name begins with. With this it is found in foreign texts.
const PREFIX: &str = "seed-";
const WHOLE: &str = "seed";
const PART: &str = "seed-part";

/// What a machine is told.
#[derive(Debug, Clone, Copy)]
pub struct Seed<'a> {
    /// Who it is. Another ID is another machine.
    pub instance_id: &'a str,
    /// Its name.
    pub hostname: &'a str,
    /// The documents that it boots with.
    pub user_data: &'a [u8],
}

/// One of the files that a machine asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Meta,
    Network,
    User,
}

/// The seeds. Clones are the same ones.
#[derive(Debug, Clone)]
pub struct Seeds {
    folder: Arc<Folder>,
    /// Without a trailing slash.
    url: String,
    /// Held while a file is changed.
    changing: Arc<tokio::sync::Mutex<()>>,
}

/// As it stands in its file.
#[derive(Serialize, Deserialize)]
struct Kept {
    instance_id: String,
    hostname: String,
    /// In base64.
    user_data: String,
    /// Seconds since the epoch, from which on it is not there.
    until: u64,
    /// Who read it first.
    reader: Option<IpAddr>,
}

impl Seeds {
    /// Seeds in a folder, which is made when it is needed; the server is reached at `url`.
    pub fn new(folder: impl Into<PathBuf>, url: impl Into<String>) -> Self {
        Self {
            folder: Arc::new(Folder(folder.into())),
            url: url.into().trim_end_matches('/').to_owned(),
            changing: Arc::default(),
        }
    }

    /// An address for a new machine, with the slash that it ends in. A secret.
    #[must_use]
    pub fn address(&self) -> String {
        let name: [u8; DIGITS / 2] = rand::random();
        format!("{}/{PREFIX}{}/", self.url, hex::encode(name))
    }

    /// Puts a seed where one of our addresses leads to, which stands somewhere in `text`. Whether there was one.
    ///
    /// # Errors
    ///
    /// `Unavailable`, where it cannot be written.
    pub async fn put(&self, text: &str, seed: Seed<'_>) -> Result<bool> {
        let Some(name) = find(text) else {
            return Ok(false);
        };
        let kept = Kept {
            instance_id: seed.instance_id.to_owned(),
            hostname: seed.hostname.to_owned(),
            user_data: STANDARD.encode(seed.user_data),
            until: since_epoch(SystemTime::now() + UNREAD),
            reader: None,
        };
        let _changing = self.changing.lock().await;
        let written = self.write(name, &kept).await;
        written.map_err(|error| self.folder.fault("keep a boot seed", &error))?;
        Ok(true)
    }

    /// Removes the seed of an address in `text`, if there is one.
    ///
    /// # Errors
    ///
    /// `Unavailable`, where it cannot be removed.
    pub async fn remove(&self, text: &str) -> Result<()> {
        let Some(name) = find(text) else {
            return Ok(());
        };
        let _changing = self.changing.lock().await;
        match fs::remove_file(self.folder.path(name, WHOLE)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.folder.fault("remove a boot seed", &error))
            }
            _ => Ok(()),
        }
    }

    /// What a machine at this address is answered. `None`: nothing is there for it.
    pub(super) async fn read(&self, name: &str, part: Part, reader: IpAddr) -> io::Result<Option<Vec<u8>>> {
        let _changing = self.changing.lock().await;
        let now = SystemTime::now();
        let mut kept = match fs::read(self.folder.path(name, WHOLE)).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            kept => serde_json::from_slice::<Kept>(&kept?)?,
        };
        if kept.until <= since_epoch(now) {
            return Ok(None);
        }
        Ok(Some(match part {
            // YAML takes JSON.
            Part::Meta => {
                let meta = json!({"instance-id": kept.instance_id, "local-hostname": kept.hostname});
                format!("{meta}\n").into_bytes()
            }
            // Nothing of its own: Talos takes the hostname with a network configuration alone.
            Part::Network => b"{\"version\": 1, \"config\": []}\n".to_vec(),
            Part::User => {
                match kept.reader {
                    None => {
                        kept.reader = Some(reader);
                        kept.until = since_epoch(now + AFTERWARDS);
                        // It counts as read before it is: nobody reads it uncounted.
                        self.write(name, &kept).await?;
                    }
                    Some(first) if first == reader => {}
                    Some(first) => {
                        warn!(
                            instance = kept.hostname, %first, %reader,
                            "a second address asked for the user data of a machine, and was given none"
                        );
                        return Ok(None);
                    }
                }
                STANDARD.decode(&kept.user_data).map_err(io::Error::other)?
            }
        }))
    }

    async fn write(&self, name: &str, kept: &Kept) -> io::Result<()> {
        self.folder.make().await?;
        let part = self.folder.path(name, PART);
        let mut file = self.folder.write(&part).await?;
        file.write_all(&serde_json::to_vec(kept)?).await?;
        file.flush().await?;
        let whole = self.folder.path(name, WHOLE);
        self.folder.place(file, &part, &whole).await
    }

    /// Removes what is over, and what was cut off. Nothing else in the folder is touched.
    pub(super) async fn sweep(&self) -> io::Result<()> {
        let mut entries = match fs::read_dir(&self.folder.0).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        let now = SystemTime::now();
        while let Some(entry) = entries.next_entry().await? {
            let path = entry.path();
            let is_ours = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .is_some_and(is_name);
            if !is_ours {
                continue;
            }
            let _changing = self.changing.lock().await;
            let goes = match path.extension().and_then(|end| end.to_str()) {
                Some(PART) => {
                    let age = entry.metadata().await?.modified()?.elapsed();
                    age.is_ok_and(|age| age > WRITING)
                }
                Some(WHOLE) => {
                    let kept = fs::read(&path).await?;
                    let kept = serde_json::from_slice::<Kept>(&kept);
                    kept.is_ok_and(|kept| kept.until <= since_epoch(now))
                }
                _ => false,
            };
            if goes {
                fs::remove_file(&path).await?;
                info!("removed a boot seed that is over");
            }
        }
        Ok(())
    }
}

/// What a path of the server asks for, if it is about a seed.
pub(super) fn asked(path: &str) -> Option<(&str, Part)> {
    let (name, file) = path.strip_prefix('/')?.split_once('/')?;
    let part = match file {
        "meta-data" => Part::Meta,
        "network-config" => Part::Network,
        "user-data" => Part::User,
        _ => return None,
    };
    is_name(name).then_some((name, part))
}

/// The text without the names of seeds: for what others quote.
#[must_use]
pub fn hide(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(name) = find(&text).map(str::to_owned) {
        text = text.replace(&name, "<redacted>");
    }
    text
}

/// The first name of a seed in a text.
fn find(text: &str) -> Option<&str> {
    text.match_indices(PREFIX).find_map(|(at, _)| {
        let name = text.get(at..at + PREFIX.len() + DIGITS)?;
        is_name(name).then_some(name)
    })
}

fn is_name(text: &str) -> bool {
    text.strip_prefix(PREFIX).is_some_and(are_digits)
}

fn since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
