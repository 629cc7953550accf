//! Reads settings from the merged layers, and takes down all that is wrong with them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Value};

#[cfg(feature = "oxide")]
use super::OxideConfig;
use super::setting::{self, Flags, Form, LAYERS, Layer, SETTINGS, Setting};
use super::{CloudConfig, OmniConfig, parse};
#[cfg(feature = "ganeti")]
use super::{GanetiConfig, MediaConfig};
use crate::omni::auth::ServiceAccount;
use crate::secret::Secret;

/// Most bytes of a file that is given as a secret, a settings file or a CA bundle. The largest real one is a
/// distribution's CA bundle, below a quarter of a megabyte.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// The merged layers, and what was found wrong with them so far.
pub(super) struct Reader {
    layers: Figment,
    /// The file could not be read: what seems to be missing may stand there.
    file_unread: bool,
    /// One sentence for each.
    pub(super) faults: Vec<String>,
    /// What is good enough to run, but should be known.
    pub(super) warnings: Vec<String>,
}

impl Reader {
    pub(super) fn new(flags: &Flags, environment: &BTreeMap<String, String>) -> Self {
        let mut faults = Vec::new();
        let mut warnings = Vec::new();
        for setting in flags.refused() {
            let file = file_of(setting)
                .map(|file| format!(" or --{}", file.flag))
                .unwrap_or_default();
            faults.push(format!(
                "--{} is refused, everybody on this machine could read it: use {}{file}",
                setting.flag,
                setting.variables.join(" or ")
            ));
        }
        let path = flags.value(&setting::CONFIG).or_else(|| {
            let path = environment.get("CONFIG")?.trim();
            (!path.is_empty()).then_some(path)
        });
        let mut layers = Figment::new();
        let mut file_unread = false;
        if let Some(path) = path {
            match read_tables(Path::new(path)) {
                Ok(tables) => {
                    let holds_secret = |setting: &&Setting| {
                        setting.form == Form::Secret && table_has(&tables, setting.section, setting.key)
                    };
                    if SETTINGS.iter().any(holds_secret) {
                        warnings.extend(loose_permissions(Path::new(path)));
                    }
                    let (layer, unknown) = Layer::file(tables);
                    faults.extend(unknown);
                    layers = layers.merge(layer);
                }
                Err(fault) => {
                    file_unread = true;
                    faults.push(format!("{}: {fault}", setting::CONFIG.names()));
                }
            }
        }
        layers = layers
            .merge(Layer::environment(environment))
            .merge(Layer::command_line(flags));
        Self {
            layers,
            file_unread,
            faults,
            warnings,
        }
    }

    /// The values of a setting; none if nothing is said, or what is said has no shape of a value.
    fn values(&mut self, setting: &Setting) -> Vec<String> {
        fn texts(value: &Value) -> Option<Vec<String>> {
            match value {
                Value::String(_, text) => Some(vec![text.trim().to_owned()]),
                Value::Bool(_, switch) => Some(vec![switch.to_string()]),
                Value::Num(_, number) => {
                    let text = number
                        .to_i128()
                        .map(|number| number.to_string())
                        .or_else(|| number.to_u128().map(|number| number.to_string()))
                        .or_else(|| number.to_f64().map(|number| number.to_string()));
                    Some(vec![text?])
                }
                Value::Array(_, items) => items
                    .iter()
                    .map(texts)
                    .collect::<Option<Vec<_>>>()
                    .map(|texts| texts.concat()),
                Value::Char(..) | Value::Empty(..) | Value::Dict(..) => None,
            }
        }
        let Ok(value) = self.layers.find_value(&setting.path()) else {
            return Vec::new();
        };
        match texts(&value) {
            Some(values) if setting.form == Form::Several || !matches!(value, Value::Array(..)) => {
                values.into_iter().filter(|value| !value.is_empty()).collect()
            }
            _ => {
                self.wrong(setting, "not a single value");
                Vec::new()
            }
        }
    }

    pub(super) fn text(&mut self, setting: &Setting) -> Option<String> {
        self.values(setting).pop()
    }

    fn wrong(&mut self, setting: &Setting, fault: &str) {
        self.faults.push(format!("{}: {fault}", setting.names()));
    }

    fn missing(&mut self, setting: &Setting, or: &str) {
        if !self.file_unread {
            self.faults.push(format!(
                "{} is missing: set {}{or}",
                setting.what,
                setting.names()
            ));
        }
    }

    /// The parsed value; a fault that quotes the value, if it cannot be. Not for secrets.
    pub(super) fn parsed<T>(
        &mut self,
        setting: &Setting,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(setting)?;
        parse(&text).map_err(|fault| self.wrong(setting, &fault)).ok()
    }

    fn layer_of(&self, setting: &Setting) -> Option<usize> {
        let metadata = self.layers.find_metadata(&setting.path())?;
        LAYERS.iter().position(|layer| *layer == metadata.name)
    }

    fn is_set(&self, setting: &Setting) -> bool {
        self.layers.find_value(&setting.path()).is_ok()
    }

    /// A secret, from its value or from its file, whichever stands in the stronger layer.
    fn secret(
        &mut self,
        setting: &'static Setting,
        file: &'static Setting,
    ) -> Option<(Secret, Option<PathBuf>)> {
        let (by_value, by_file) = (self.layer_of(setting), self.layer_of(file));
        if by_value.is_none() && by_file.is_none() {
            // A refused flag has its fault already.
            let refusal = format!("--{} is refused", setting.flag);
            if !self.faults.iter().any(|fault| fault.starts_with(&refusal)) {
                self.missing(
                    setting,
                    &format!("; or name a file that holds it by {}", file.names()),
                );
            }
            return None;
        }
        if by_value == by_file {
            let (what, names) = (setting.what, setting.names());
            self.faults.push(format!(
                "{what} is there twice, as a value ({names}) and as a file ({})",
                file.names()
            ));
            return None;
        }
        if by_value > by_file {
            let secret = Secret::new(self.text(setting)?);
            secret.guard();
            return Some((secret, None));
        }
        let path = PathBuf::from(self.text(file)?);
        match read_secret(&path) {
            Ok(secret) => {
                secret.guard();
                self.warnings.extend(loose_permissions(&path));
                Some((secret, Some(path)))
            }
            Err(fault) => {
                self.wrong(file, &fault);
                None
            }
        }
    }

    /// The key of the service account, if it can be used.
    fn key(&mut self) -> Option<(Secret, Option<PathBuf>)> {
        let (key, file) = self.secret(&setting::OMNI_KEY, &setting::OMNI_KEY_FILE)?;
        if let Err(error) = ServiceAccount::parse(&key) {
            let place = file
                .map(|file| format!("{}: ", file.display()))
                .unwrap_or_default();
            self.faults.push(format!("{place}{error}"));
            return None;
        }
        Some((key, file))
    }

    pub(super) fn ca_bundle(&mut self, setting: &Setting) -> Option<PathBuf> {
        self.parsed(setting, |path| {
            let path = PathBuf::from(path);
            let text = read_file(&path)?;
            if !text.contains("-----BEGIN CERTIFICATE-----") {
                return Err(format!("{} has no PEM certificate", path.display()));
            }
            Ok(path)
        })
    }

    pub(super) fn nameservers(&mut self) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for value in self.values(&setting::NAMESERVER) {
            for text in value
                .split([',', ' ', '\t', '\n'])
                .filter(|text| !text.is_empty())
            {
                match text.parse() {
                    Ok(address) if addresses.contains(&address) => {}
                    Ok(address) => addresses.push(address),
                    Err(_) => self.wrong(&setting::NAMESERVER, &format!("`{text}` is not an IP address")),
                }
            }
        }
        addresses
    }

    pub(super) fn omni(&mut self) -> Option<OmniConfig> {
        if !self.is_set(&setting::OMNI_ENDPOINT) {
            self.missing(&setting::OMNI_ENDPOINT, "");
        }
        let endpoint = self.parsed(&setting::OMNI_ENDPOINT, parse::endpoint);
        let key = self.key();
        let ca_bundle = self.ca_bundle(&setting::OMNI_CA_BUNDLE);
        let insecure = self
            .parsed(&setting::OMNI_INSECURE, parse::switch)
            .unwrap_or(false);
        let endpoint = endpoint?;
        if insecure {
            self.warnings
                .push("any certificate is accepted from Omni: whoever answers gets machines".to_owned());
        } else if !endpoint.starts_with("https://") && !parse::is_loopback(&endpoint) {
            self.warnings.push(format!(
                "{endpoint} has no TLS: join tokens can be read on the way"
            ));
        }
        let (service_account_key, service_account_key_file) = key?;
        Some(OmniConfig {
            endpoint,
            service_account_key,
            service_account_key_file,
            ca_bundle,
            insecure,
        })
    }

    /// The one cloud that something is said about.
    pub(super) fn clouds(&mut self) -> Option<CloudConfig> {
        type Read = fn(&mut Reader) -> Option<CloudConfig>;
        let clouds: &[(&str, &str, Read)] = &[
            #[cfg(feature = "oxide")]
            ("oxide", "Oxide", Reader::oxide),
            #[cfg(feature = "ganeti")]
            ("ganeti", "Ganeti", Reader::ganeti),
        ];
        fn of(section: &str) -> impl Iterator<Item = &'static Setting> {
            SETTINGS
                .iter()
                .copied()
                .filter(move |setting| setting.section.split('.').next() == Some(section))
        }
        let is_chosen = |(section, ..): &&(&str, &str, Read)| of(section).any(|setting| self.is_set(setting));
        let chosen: Vec<_> = clouds.iter().filter(is_chosen).collect();
        match (chosen.as_slice(), clouds) {
            // Where there is but one to choose, it is more help to say what it misses.
            ([(_, _, read)], _) | ([], [(_, _, read)]) => read(self),
            // It may stand in the file.
            ([], _) if self.file_unread => None,
            ([], _) => {
                let clouds: Vec<String> = clouds
                    .iter()
                    .map(|(section, title, _)| {
                        let variables: Vec<&str> = of(section)
                            .filter(|setting| setting.section == *section)
                            .filter_map(|setting| setting.variables.first().copied())
                            .collect();
                        format!("{title} ([{section}] of the file, or {})", variables.join(", "))
                    })
                    .collect();
                self.faults.push(format!(
                    "no cloud is chosen; this program knows {}",
                    clouds.join("; ")
                ));
                None
            }
            (several, _) => {
                let names: Vec<&str> = several.iter().map(|(_, title, _)| *title).collect();
                self.faults.push(format!(
                    "one process serves one cloud, but there are settings for {}: remove all but one",
                    names.join(" and ")
                ));
                None
            }
        }
    }

    #[cfg(feature = "oxide")]
    fn oxide(&mut self) -> Option<CloudConfig> {
        if !self.is_set(&setting::OXIDE_HOST) {
            self.missing(&setting::OXIDE_HOST, "");
        }
        let host = self.parsed(&setting::OXIDE_HOST, parse::http_url);
        let token = self.secret(&setting::OXIDE_TOKEN, &setting::OXIDE_TOKEN_FILE);
        let ca_bundle = self.ca_bundle(&setting::OXIDE_CA_BUNDLE);
        let host = host?;
        if !host.starts_with("https://") && !parse::is_loopback(&host) {
            self.warnings.push(format!(
                "{host} has no TLS: the Oxide token can be read on the way"
            ));
        }
        let (token, token_file) = token?;
        Some(CloudConfig::Oxide(OxideConfig {
            host,
            token,
            token_file,
            ca_bundle,
        }))
    }
}

#[cfg(feature = "ganeti")]
impl Reader {
    fn ganeti(&mut self) -> Option<CloudConfig> {
        for setting in [&setting::GANETI_ENDPOINT, &setting::GANETI_USER] {
            if !self.is_set(setting) {
                self.missing(setting, "");
            }
        }
        let endpoint = self.parsed(&setting::GANETI_ENDPOINT, parse::http_url);
        let user = self.text(&setting::GANETI_USER);
        let password = self.secret(&setting::GANETI_PASSWORD, &setting::GANETI_PASSWORD_FILE);
        let ca_bundle = self.ca_bundle(&setting::GANETI_CA_BUNDLE);
        let certificate_sha256 = self.parsed(&setting::GANETI_SHA256, parse::sha256);
        let insecure = self
            .parsed(&setting::GANETI_INSECURE, parse::switch)
            .unwrap_or(false);
        if certificate_sha256.is_some() && (ca_bundle.is_some() || insecure) {
            self.wrong(
                &setting::GANETI_SHA256,
                "a pinned certificate is trusted alone: remove the CA bundle and insecure_skip_tls_verify",
            );
        }
        let media = self.ganeti_media();
        let endpoint = endpoint?;
        if insecure {
            self.warnings.push(
                "any certificate is accepted from Ganeti: whoever answers gets the password".to_owned(),
            );
        } else if !endpoint.starts_with("https://") && !parse::is_loopback(&endpoint) {
            self.warnings.push(format!(
                "{endpoint} has no TLS: the Ganeti password can be read on the way"
            ));
        }
        let (password, password_file) = password?;
        Some(CloudConfig::Ganeti(GanetiConfig {
            endpoint,
            user: user?,
            password,
            password_file,
            ca_bundle,
            certificate_sha256,
            insecure,
            media,
        }))
    }

    /// Where ISOs are served, if they are.
    fn ganeti_media(&mut self) -> Option<MediaConfig> {
        let (address, url) = (&setting::GANETI_MEDIA_ADDRESS, &setting::GANETI_MEDIA_URL);
        if !self.is_set(address) {
            for setting in [url, &setting::GANETI_MEDIA_FOLDER] {
                if self.is_set(setting) {
                    let fault = format!("nothing is served: set {} as well, or remove it", address.names());
                    self.wrong(setting, &fault);
                }
            }
            return None;
        }
        let listen = self.parsed(address, parse::listen_address);
        let given = self.parsed(url, parse::http_url);
        let folder = self.text(&setting::GANETI_MEDIA_FOLDER).map(PathBuf::from);
        let listen = listen?;
        let url = match given {
            Some(url) => url,
            None if self.is_set(url) => return None,
            None if listen.ip().is_unspecified() || listen.port() == 0 => {
                self.wrong(
                    url,
                    "needed, since no node can reach the address that is listened on",
                );
                return None;
            }
            None => format!("http://{listen}"),
        };
        if url.starts_with("http://") && !parse::is_loopback(&url) {
            self.warnings.push(format!(
                "{url} has no TLS: the ISOs hold join tokens, which can be read on the way to the nodes"
            ));
        }
        Some(MediaConfig {
            address: listen,
            url,
            folder: folder.unwrap_or_else(|| std::env::temp_dir().join("omni-infra-provider-media")),
        })
    }
}

/// The setting that names a file for a secret.
fn file_of(secret: &Setting) -> Option<&'static Setting> {
    let flag = format!("{}-file", secret.flag);
    SETTINGS.iter().copied().find(|setting| setting.flag == flag)
}

fn table_has(tables: &Dict, section: &str, key: &str) -> bool {
    matches!(tables.get(section), Some(Value::Dict(_, table)) if table.contains_key(key))
}

/// The tables of a TOML file. A fault never quotes the file: the line could hold a secret.
fn read_tables(path: &Path) -> Result<Dict, String> {
    let text = read_file(path)?;
    Toml::from_str::<Dict>(&text).map_err(|error| {
        let words = error.message().lines().collect::<Vec<_>>().join(", ");
        let line = error.span().map(|span| {
            let before = text.get(..span.start).unwrap_or_default();
            format!(" line {}", before.matches('\n').count() + 1)
        });
        format!(
            "{}{} is not TOML: {words}",
            path.display(),
            line.unwrap_or_default()
        )
    })
}

/// The secret in a file.
///
/// # Errors
///
/// Why there is none; names the file.
pub fn read_secret(path: &Path) -> Result<Secret, String> {
    let text = read_file(path)?;
    match text.trim() {
        "" => Err(format!("{} is empty", path.display())),
        secret => Ok(Secret::new(secret)),
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let cannot = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let file = fs::File::open(path).map_err(cannot)?;
    let mut text = String::new();
    // A pipe or a device does not tell its size.
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(cannot)?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!(
            "{} is too large: more than {MAX_FILE} bytes",
            path.display()
        ));
    }
    Ok(text)
}

/// A sentence if more people may read a secret's file than have to. A group that is not ours by ownership may: that is how
/// Kubernetes and systemd hand secrets to a user.
fn loose_permissions(path: &Path) -> Option<String> {
    let file = fs::metadata(path).ok()?;
    let ours = file.uid() == rustix::process::geteuid().as_raw();
    loose(file.mode(), ours).map(|fault| format!("{} holds a secret, and {fault}", path.display()))
}

/// What is too much in the mode of a secret's file, and what to do about it; `ours` tells whether we own it.
pub(super) fn loose(mode: u32, ours: bool) -> Option<&'static str> {
    if mode & 0o007 != 0 {
        Some(
            "everybody on this machine may open it: chmod o= it, or in Kubernetes set the volume's defaultMode to \
             0440 and the pod's fsGroup",
        )
    } else if mode & 0o020 != 0 || ours && mode & 0o040 != 0 {
        Some("its group may open it: chmod g= it")
    } else {
        None
    }
}
