//! The cluster that `tests/ganeti/cluster.sh` started, and its own command line.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Once;

use omni_infra_provider::backends::ganeti::{Ganeti, Pin, Settings, Trust};
use omni_infra_provider::secret::Secret;
use tokio::process::Command;

use crate::support::peer::say;

/// A cluster.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub(crate) endpoint: String,
    pub(crate) user: String,
    pub(crate) password: String,
    pub(crate) sha256: String,
    /// Runs a command of Ganeti's on it.
    gnt: PathBuf,
    /// Its folder.
    pub(crate) base: PathBuf,
}

impl Cluster {
    /// The running cluster, or `None` where there is none.
    pub(crate) fn find() -> Option<Self> {
        let variable = |name: &str| env::var(format!("GANETI_TEST_{name}")).ok();
        let found = || {
            Some(Self {
                endpoint: variable("ENDPOINT")?,
                user: variable("USER")?,
                password: variable("PASSWORD")?,
                sha256: variable("SHA256")?,
                gnt: variable("GNT")?.into(),
                base: variable("BASE")?.into(),
            })
        };
        let cluster = found();
        if cluster.is_none() {
            assert!(
                env::var_os("GANETI_TEST").as_deref() != Some(OsStr::new("required")),
                "there is no cluster to test with"
            );
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                say("the tests on a real Ganeti did not run: make test-ganeti");
            });
        }
        cluster
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            endpoint: self.endpoint.clone(),
            user: self.user.clone(),
            password: Secret::new(self.password.clone()),
            trust: Trust::Pinned(Pin::parse(&self.sha256).unwrap()),
        }
    }

    pub(crate) fn backend(&self) -> Ganeti {
        Ganeti::new(&self.settings()).unwrap()
    }

    /// Runs one of Ganeti's commands; its output, or its complaint.
    pub(crate) async fn try_gnt(&self, command: &[&str]) -> Result<String, String> {
        let output = Command::new(&self.gnt).args(command).output().await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(format!("{}{}", text(&output.stdout), text(&output.stderr))),
        }
    }

    pub(crate) async fn gnt(&self, command: &[&str]) -> String {
        self.try_gnt(command)
            .await
            .unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// The value of fields of an instance; `None` where there is no such instance.
    pub(crate) async fn instance(&self, name: &str, fields: &str) -> Option<String> {
        // A filter by a name that is not there is an error.
        let fields = format!("name,{fields}");
        let listed = self
            .gnt(&[
                "gnt-instance",
                "list",
                "--no-headers",
                "--separator=|",
                "-o",
                &fields,
            ])
            .await;
        let mut rows = listed
            .lines()
            .filter_map(|row| row.strip_prefix(&format!("{name}|")));
        rows.next().map(str::to_owned)
    }

    /// An instance of somebody else's.
    pub(crate) async fn add(&self, name: &str, more: &[&str]) {
        let command = [
            &[
                "gnt-instance",
                "add",
                "-t",
                "file",
                "--disk",
                "0:size=16M",
                "-o",
                "noop",
                "-B",
                "memory=64M",
                "--no-name-check",
                "--no-ip-check",
                "--no-start",
                "-n",
                "n1.gt",
            ],
            more,
            &[name],
        ]
        .concat();
        self.gnt(&command).await;
    }

    pub(crate) async fn remove(&self, name: &str) {
        self.gnt(&["gnt-instance", "remove", "-f", name]).await;
    }

    /// The ID of the job that did this, once it has ended.
    pub(crate) async fn ended_job(&self, summary: &str) -> String {
        for _ in 0..200 {
            let jobs = self
                .gnt(&[
                    "gnt-job",
                    "list",
                    "--no-headers",
                    "--separator=|",
                    "-o",
                    "id,status,summary",
                ])
                .await;
            let ended = jobs.lines().find_map(|job| {
                let (id, rest) = job.split_once('|')?;
                (rest.contains(summary) && (rest.starts_with("success") || rest.starts_with("error")))
                    .then_some(id)
            });
            if let Some(id) = ended {
                return id.to_owned();
            }
        }
        panic!("no job ended that did {summary}");
    }

    /// All that there is of an instance: the instance, its disks, its addresses.
    pub(crate) async fn left(&self, name: &str) -> Vec<String> {
        let mut left: Vec<String> = self.instance(name, "name").await.into_iter().collect();
        let disks = self.base.join("file").join(name);
        if disks.exists() {
            left.push(format!("disks in {}", disks.display()));
        }
        left.extend(self.addresses_of(name).await);
        left
    }

    /// Addresses of pools that an instance has, or that nobody has any more and that are still taken.
    async fn addresses_of(&self, name: &str) -> Vec<String> {
        // Somebody else's creation has taken one, and its instance is not there yet.
        const PATIENCE: usize = 20;
        let mut found = Vec::new();
        for _ in 0..PATIENCE {
            let fields = "name,inst_list,inst_cnt,reserved_count,external_reservations";
            let listed = self
                .gnt(&[
                    "gnt-network",
                    "list",
                    "--no-headers",
                    "--separator=|",
                    "-o",
                    fields,
                ])
                .await;
            found = listed.lines().filter_map(|row| in_use(row, name)).collect();
            if found.is_empty() {
                break;
            }
        }
        found
    }
}

/// What a network says of an instance, and of addresses that no instance has.
fn in_use(row: &str, name: &str) -> Option<String> {
    let columns: Vec<&str> = row.split('|').collect();
    let [network, instances, count, reserved, external] = columns.as_slice() else {
        return Some(row.to_owned());
    };
    if instances.split(',').any(|instance| instance == name) {
        return Some(format!("{network}: an address of {name}"));
    }
    let number = |text: &str| text.parse::<usize>().unwrap();
    let lost = number(reserved).checked_sub(number(count) + external.split(',').count());
    (lost != Some(0)).then(|| format!("{network}: addresses that no instance has: {row}"))
}
