//! Decides what the daemon runs with: defaults < file < environment < command line, all of it checked before
//! anything starts.
//!
//! *Guarantees*: a bad configuration is one message that names every fault, and how to mend each; no message,
//! debug print or printed configuration shows a secret.

use std::collections::BTreeMap;
use std::fmt;
use std::io::IsTerminal;
use std::net::IpAddr;
#[cfg(feature = "ganeti")]
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::secret::Secret;
use crate::words::one_line;

mod parse;
mod reader;
pub mod setting;
#[cfg(test)]
mod tests;

use reader::Reader;
pub use reader::read_secret;
use setting::Flags;

/// Most characters of one fault: it may quote what stands in a file.
const FAULT_CHARS: usize = 1000;

/// All that the daemon runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// How to reach Omni.
    pub omni: OmniConfig,
    /// Who we are in Omni.
    pub provider: ProviderConfig,
    /// How many machine requests are worked on at once.
    pub concurrency: usize,
    /// Nameservers for machines whose class names none.
    pub nameservers: Vec<IpAddr>,
    /// How long after its start a machine may take to join.
    pub join_deadline: Duration,
    /// What happens to instances that no machine request wants.
    pub orphans: OrphanPolicy,
    /// Whether several daemons of one provider ID take turns.
    pub high_availability: bool,
    /// The cloud, and how to reach it.
    pub cloud: CloudConfig,
    /// Certificate authorities, in PEM, to trust for the image factory besides the system's.
    pub factory_ca_bundle: Option<PathBuf>,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// What happens to instances that no machine request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrphanPolicy {
    /// They are reported.
    Report,
    /// They are reported and deleted.
    Delete,
}

/// How to reach Omni.
#[derive(Debug, Clone)]
pub struct OmniConfig {
    /// `https://`, `http://` or `grpc://` (both without TLS), a host, and a port where it is not the scheme's
    /// own.
    pub endpoint: String,
    /// The key of the provider's service account, as Omni gave it.
    pub service_account_key: Secret,
    /// The file that the key came from, to be followed.
    pub service_account_key_file: Option<PathBuf>,
    /// Certificate authorities, in PEM, to trust besides the system's.
    pub ca_bundle: Option<PathBuf>,
    /// Whether any certificate is trusted.
    pub insecure: bool,
}

/// Who we are in Omni.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    /// The provider ID.
    pub id: String,
    /// The name in Omni's screens.
    pub name: String,
    /// The description in Omni's screens.
    pub description: String,
}

/// The one cloud that this daemon serves.
#[derive(Debug, Clone)]
pub enum CloudConfig {
    /// An Oxide silo.
    #[cfg(feature = "oxide")]
    Oxide(OxideConfig),
    /// A Ganeti cluster.
    #[cfg(feature = "ganeti")]
    Ganeti(GanetiConfig),
}

/// How to reach an Oxide silo.
#[cfg(feature = "oxide")]
#[derive(Debug, Clone)]
pub struct OxideConfig {
    /// URL of the API, without a trailing slash.
    pub host: String,
    /// The API token.
    pub token: Secret,
    /// The file that the token came from, to be followed.
    pub token_file: Option<PathBuf>,
    /// Certificate authorities, in PEM, to trust besides the system's.
    pub ca_bundle: Option<PathBuf>,
}

/// How to reach a Ganeti cluster.
#[cfg(feature = "ganeti")]
#[derive(Debug, Clone)]
pub struct GanetiConfig {
    /// URL of the RAPI, without a trailing slash.
    pub endpoint: String,
    /// The RAPI user.
    pub user: String,
    /// The user's password.
    pub password: Secret,
    /// The file that the password came from, to be followed.
    pub password_file: Option<PathBuf>,
    /// Certificate authorities, in PEM, to trust besides the system's.
    pub ca_bundle: Option<PathBuf>,
    /// 64 hexadecimal digits, perhaps with colons: the one certificate that is trusted.
    pub certificate_sha256: Option<String>,
    /// Whether any certificate is trusted.
    pub insecure: bool,
    /// Where ISOs are served to the nodes. `None`: nowhere.
    pub media: Option<MediaConfig>,
}

/// Where ISOs are served.
#[cfg(feature = "ganeti")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaConfig {
    /// Where to listen.
    pub address: SocketAddr,
    /// How it is reached, without a trailing slash.
    pub url: String,
    /// Where they are kept meanwhile.
    pub folder: PathBuf,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// In `tracing`'s filter language.
    pub filter: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object per line.
    Json,
}

/// A configuration, and what an operator should know about it.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Sentences for the log: loose permissions, connections that anybody can read.
    pub warnings: Vec<String>,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("these settings have to be mended:")?;
        for fault in &self.0 {
            write!(f, "\n  - {fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// Loads the configuration from the flags, the given environment, and the file that one of them names.
///
/// # Errors
///
/// Every fault there is.
pub fn load(flags: &Flags, environment: &BTreeMap<String, String>) -> Result<Loaded, Faults> {
    let mut reader = Reader::new(flags, environment);
    let omni = reader.omni();
    let clouds = reader.clouds();
    let log = LogConfig {
        filter: reader
            .parsed(&setting::LOG, parse::filter)
            .unwrap_or_else(|| "info".to_owned()),
        format: reader
            .parsed(&setting::LOG_FORMAT, parse::log_format)
            .unwrap_or_else(|| {
                if std::io::stderr().is_terminal() {
                    LogFormat::Human
                } else {
                    LogFormat::Json
                }
            }),
    };
    let concurrency = reader
        .parsed(&setting::CONCURRENCY, parse::concurrency)
        .unwrap_or(16);
    let join_deadline = reader
        .parsed(&setting::JOIN_DEADLINE, parse::join_deadline)
        .unwrap_or(Duration::from_secs(15 * 60));
    let orphans = reader
        .parsed(&setting::ORPHANS, parse::orphans)
        .unwrap_or(OrphanPolicy::Report);
    let high_availability = reader
        .parsed(&setting::HIGH_AVAILABILITY, parse::switch)
        .unwrap_or(false);
    let nameservers = reader.nameservers();
    let factory_ca_bundle = reader.ca_bundle(&setting::FACTORY_CA_BUNDLE);
    let id = reader.parsed(&setting::PROVIDER_ID, parse::provider_id);
    let name = reader.text(&setting::PROVIDER_NAME);
    let description = reader.text(&setting::PROVIDER_DESCRIPTION);

    let Reader { faults, warnings, .. } = reader;
    match (omni, clouds) {
        (Some(omni), Some(cloud)) if faults.is_empty() => {
            let (default_id, default_name) = cloud.names();
            let provider = ProviderConfig {
                id: id.unwrap_or_else(|| default_id.to_owned()),
                name: name.unwrap_or_else(|| default_name.to_owned()),
                description: description
                    .unwrap_or_else(|| format!("{default_name} Omni infrastructure provider.")),
            };
            let config = Config {
                omni,
                provider,
                concurrency,
                nameservers,
                join_deadline,
                orphans,
                high_availability,
                cloud,
                factory_ca_bundle,
                log,
            };
            Ok(Loaded { config, warnings })
        }
        _ => {
            let told = |fault: String| one_line(&fault, FAULT_CHARS);
            Err(Faults(faults.into_iter().map(told).collect()))
        }
    }
}

impl CloudConfig {
    /// Its name in the file and as a default provider ID, and its name for people.
    #[must_use]
    pub fn names(&self) -> (&'static str, &'static str) {
        match *self {
            #[cfg(feature = "oxide")]
            Self::Oxide(_) => ("oxide", "Oxide"),
            #[cfg(feature = "ganeti")]
            Self::Ganeti(_) => ("ganeti", "Ganeti"),
        }
    }
}

/// The configuration as a file would say it, without its secrets.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = |f: &mut fmt::Formatter<'_>, path: &Option<PathBuf>| match path {
            Some(path) => writeln!(f, "ca_bundle = {:?}", path.display().to_string()),
            None => Ok(()),
        };
        let nameservers: Vec<String> = self.nameservers.iter().map(ToString::to_string).collect();
        let format = match self.log.format {
            LogFormat::Human => "human",
            LogFormat::Json => "json",
        };
        writeln!(f, "nameserver = {nameservers:?}")?;
        writeln!(f, "join_deadline = \"{}s\"", self.join_deadline.as_secs())?;
        let orphans = match self.orphans {
            OrphanPolicy::Report => "report",
            OrphanPolicy::Delete => "delete",
        };
        writeln!(f, "orphans = {orphans:?}")?;
        writeln!(f, "high_availability = {}", self.high_availability)?;
        writeln!(f, "log = {:?}", self.log.filter)?;
        writeln!(f, "log_format = {format:?}")?;
        writeln!(f, "\n[omni]\nendpoint = {:?}", self.omni.endpoint)?;
        writeln!(f, "service_account_key = \"{}\"", self.omni.service_account_key)?;
        path(f, &self.omni.ca_bundle)?;
        writeln!(f, "insecure_skip_tls_verify = {}", self.omni.insecure)?;
        match &self.cloud {
            #[cfg(feature = "oxide")]
            CloudConfig::Oxide(oxide) => {
                writeln!(
                    f,
                    "\n[oxide]\nhost = {:?}\ntoken = \"{}\"",
                    oxide.host, oxide.token
                )?;
                path(f, &oxide.ca_bundle)?;
            }
            #[cfg(feature = "ganeti")]
            CloudConfig::Ganeti(ganeti) => {
                writeln!(
                    f,
                    "\n[ganeti]\nendpoint = {:?}\nuser = {:?}\npassword = \"{}\"",
                    ganeti.endpoint, ganeti.user, ganeti.password
                )?;
                path(f, &ganeti.ca_bundle)?;
                if let Some(sha256) = &ganeti.certificate_sha256 {
                    writeln!(f, "certificate_sha256 = {sha256:?}")?;
                }
                writeln!(f, "insecure_skip_tls_verify = {}", ganeti.insecure)?;
                if let Some(media) = &ganeti.media {
                    writeln!(
                        f,
                        "\n[ganeti.media]\naddress = {:?}\nurl = {:?}\nfolder = {:?}",
                        media.address.to_string(),
                        media.url,
                        media.folder.display().to_string()
                    )?;
                }
            }
        }
        writeln!(f, "\n[provider]\nid = {:?}", self.provider.id)?;
        writeln!(
            f,
            "name = {:?}\ndescription = {:?}",
            self.provider.name, self.provider.description
        )?;
        writeln!(f, "\n[provisioner]\nconcurrency = {}", self.concurrency)?;
        if self.factory_ca_bundle.is_some() {
            writeln!(f, "\n[factory]")?;
            path(f, &self.factory_ca_bundle)?;
        }
        Ok(())
    }
}
