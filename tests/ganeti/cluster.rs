//! The cluster that `tests/ganeti/cluster.sh` started, and its own command line.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Once;
use std::time::Duration;

use omni_infra_provider::backends::ganeti::{Ganeti, Pin, Settings, Trust};
use omni_infra_provider::secret::Secret;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::sleep;

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
    /// Where its guests reach whoever serves them media.
    pub(crate) media_address: String,
    http: reqwest::Client,
}

/// Between two looks.
const STEP: Duration = Duration::from_millis(100);

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
                media_address: variable("MEDIA_ADDRESS")?,
                http: reqwest::Client::builder()
                    .no_proxy()
                    .pool_max_idle_per_host(0)
                    .tls_danger_accept_invalid_certs(true)
                    .build()
                    .unwrap(),
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
            media: None,
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

    /// Rows of fields of all instances, networks or jobs, by the RAPI: its own programs take half a second of processor time each.
    pub(crate) async fn query(&self, what: &str, fields: &[&str]) -> Vec<Vec<Value>> {
        let answer = self
            .http
            .put(format!("{}/2/query/{what}", self.endpoint))
            .basic_auth(&self.user, Some(&self.password))
            .json(&json!({"fields": fields}))
            .send()
            .await
            .unwrap();
        let answer: Value = answer.json().await.unwrap();
        let cells = |row: &Value| {
            let cells = row.as_array().unwrap().iter();
            cells.map(|cell| cell[1].clone()).collect()
        };
        answer["data"].as_array().unwrap().iter().map(cells).collect()
    }

    /// The values of fields of an instance; `None` where there is no such instance.
    pub(crate) async fn instance(&self, name: &str, fields: &[&str]) -> Option<Vec<Value>> {
        let rows = self.query("instance", &[&["name"], fields].concat()).await;
        let mut row = rows.into_iter().find(|row| row[0] == name)?;
        row.remove(0);
        Some(row)
    }

    pub(crate) async fn is_there(&self, name: &str) -> bool {
        self.instance(name, &[]).await.is_some()
    }

    pub(crate) async fn uuid(&self, name: &str) -> Option<String> {
        let fields = self.instance(name, &["uuid"]).await?;
        Some(fields[0].as_str().unwrap().to_owned())
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
        for _ in 0..600 {
            let jobs = self.query("job", &["id", "status", "summary"]).await;
            let ended = jobs.iter().find(|job| {
                job[2].to_string().contains(summary) && (job[1] == "success" || job[1] == "error")
            });
            if let Some(job) = ended {
                return job[0].to_string();
            }
            sleep(STEP).await;
        }
        panic!("no job ended that did {summary}");
    }

    pub(crate) async fn job_status(&self, id: &str) -> String {
        let jobs = self.query("job", &["id", "status"]).await;
        let job = jobs
            .iter()
            .find(|job| job[0].as_u64() == id.parse().ok())
            .unwrap();
        job[1].as_str().unwrap().to_owned()
    }

    /// All that there is of an instance: the instance, its disks, its addresses.
    pub(crate) async fn left(&self, name: &str) -> Vec<String> {
        let there = self.is_there(name).await;
        let mut left: Vec<String> = there.then(|| name.to_owned()).into_iter().collect();
        let disks = self.base.join("file").join(name);
        if disks.exists() {
            left.push(format!("disks in {}", disks.display()));
        }
        left.extend(self.addresses_of(name).await);
        left
    }

    /// Addresses of pools that an instance has, or that nobody has any more and that are still taken.
    async fn addresses_of(&self, name: &str) -> Vec<String> {
        let fields = ["name", "inst_list", "reserved_count", "external_reservations"];
        let mut found = Vec::new();
        // Somebody else's creation has taken one, and its instance is not there yet.
        for _ in 0..100 {
            let networks = self.query("network", &fields).await;
            found = networks.iter().filter_map(|row| in_use(row, name)).collect();
            if found.is_empty() {
                break;
            }
            sleep(STEP).await;
        }
        found
    }
}

/// What a network says of an instance, and of addresses that no instance has.
fn in_use(row: &[Value], name: &str) -> Option<String> {
    let instances = row[1].as_array().unwrap();
    if instances.iter().any(|instance| instance == name) {
        return Some(format!("{}: an address of {name}", row[0]));
    }
    let external = row[3].as_str().unwrap().split(',').count();
    let known = u64::try_from(instances.len() + external).unwrap();
    (row[2] != known).then(|| format!("addresses that no instance has: {row:?}"))
}
