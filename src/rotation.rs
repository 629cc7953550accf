//! Follows the files that secrets are given as: what is new in one is used without a restart.
//!
//! *Guarantees.* What cannot be read or used changes nothing: the old secret stays in use, and one line, which names the file and
//! not its content, says why.
//!
//! *Cancel safety.* Nothing is lost: the next look reads the whole file.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::{error, info};

use crate::config;
use crate::secret::Secret;

/// How often the files are looked at. They are small; a key that was replaced because it leaked should not be used for long.
const LOOK: Duration = Duration::from_secs(10);

/// Puts a new secret into use; the error says why it cannot be.
type Use = Box<dyn Fn(&Secret) -> Result<(), String> + Send>;

/// A file that holds a secret.
pub struct SecretFile {
    path: PathBuf,
    /// What was last read of it: each content, and each failure, is told once.
    seen: Result<Secret, String>,
    replace: Use,
}

impl fmt::Debug for SecretFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretFile")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl SecretFile {
    /// A file whose secret is in use.
    pub fn new(
        path: PathBuf,
        in_use: Secret,
        replace: impl Fn(&Secret) -> Result<(), String> + Send + 'static,
    ) -> Self {
        Self {
            path,
            seen: Ok(in_use),
            replace: Box::new(replace),
        }
    }

    async fn look(&mut self) {
        let path = self.path.clone();
        // A file may lie on a slow disk, or be a pipe.
        let read = tokio::task::spawn_blocking(move || config::read_secret(&path)).await;
        let found = read.unwrap_or_else(|error| Err(error.to_string()));
        if found == self.seen {
            return;
        }
        let file = self.path.display();
        match found.clone().and_then(|secret| {
            secret.guard();
            (self.replace)(&secret)
        }) {
            Ok(()) => info!(%file, "the secret in this file is new, and in use from now on"),
            Err(reason) => {
                error!(%file, reason, "the secret in this file cannot be used; the old one stays in use")
            }
        }
        self.seen = found;
    }
}

/// Looks at the files for ever: from time to time, and when told to.
pub async fn follow(mut files: Vec<SecretFile>, told: &Notify) {
    loop {
        // Told or not: both are a reason to look.
        let _ = timeout(LOOK, told.notified()).await;
        for file in &mut files {
            file.look().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A file with a secret, and what was put into use.
    fn file(content: &str) -> (tempfile::NamedTempFile, Arc<Mutex<Vec<String>>>, SecretFile) {
        let mut on_disk = tempfile::NamedTempFile::new().unwrap();
        write!(on_disk, "{content}").unwrap();
        let used: Arc<Mutex<Vec<String>>> = Arc::default();
        let uses = used.clone();
        let replace = move |secret: &Secret| {
            if secret.expose().starts_with("bad") {
                return Err("it is bad".to_owned());
            }
            uses.lock().unwrap().push(secret.expose().to_owned());
            Ok(())
        };
        let file = SecretFile::new(on_disk.path().to_owned(), Secret::new(content), replace);
        (on_disk, used, file)
    }

    #[tokio::test]
    async fn only_what_is_new_and_good_is_put_into_use() {
        let (on_disk, used, mut file) = file("first");
        for content in ["first\n", "second", "second\n", "bad", "", "second", "third"] {
            std::fs::write(on_disk.path(), content).unwrap();
            file.look().await;
        }
        std::fs::remove_file(on_disk.path()).unwrap();
        file.look().await;
        assert_eq!(*used.lock().unwrap(), ["second", "second", "third"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_is_looked_at_without_being_told() {
        let (on_disk, used, file) = file("first");
        std::fs::write(on_disk.path(), "second").unwrap();
        let told = Notify::new();
        let following = timeout(LOOK * 3, follow(vec![file], &told));
        assert!(following.await.is_err(), "it follows for ever");
        assert_eq!(*used.lock().unwrap(), ["second"]);
    }
}
