//! The table of settings: one name for each, in the file, the environment and on the command line.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Command};
use figment::value::{Dict, Map, Value};
use figment::{Error, Metadata, Profile, Provider};

use crate::cloud::class::did_you_mean;

/// How a setting is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One value.
    Single,
    /// A switch; on the command line its name alone turns it on.
    Switch,
    /// Several values: a repeated flag, a list in the file, separated by commas or blanks in the environment.
    Several,
    /// A secret: refused on the command line, where everybody on the machine can read it.
    Secret,
}

/// One setting and its names.
#[derive(Debug)]
pub struct Setting {
    /// The table in the file; empty for the top level.
    pub section: &'static str,
    /// The key in that table.
    pub key: &'static str,
    /// The flag, without its dashes.
    pub flag: &'static str,
    /// The environment variables, the strongest first.
    pub variables: &'static [&'static str],
    /// How it is written.
    pub form: Form,
    /// The value where nothing is said, for people; empty where there is none.
    pub default: &'static str,
    /// What it is, for `--help`, the README and messages: "Omni's API endpoint".
    pub what: &'static str,
    /// How a value looks in `--help`.
    pub value: &'static str,
}

macro_rules! settings {
    ($(
        $name:ident = $section:literal $key:literal, $flag:literal, [$($variable:literal),+], $form:ident,
        $default:literal, $value:literal, $what:literal;
    )*) => {
        $(
            #[doc = $what]
            pub(super) const $name: Setting = Setting {
                section: $section,
                key: $key,
                flag: $flag,
                variables: &[$($variable),+],
                form: Form::$form,
                default: $default,
                what: $what,
                value: $value,
            };
        )*
        /// Every setting, in the order of the documents.
        pub const SETTINGS: &[&Setting] = &[$(&$name),*];
    };
}

settings! {
    OMNI_ENDPOINT = "omni" "endpoint", "omni-endpoint", ["OMNI_ENDPOINT"], Single, "", "URL",
        "Omni's API endpoint";
    OMNI_KEY = "omni" "service_account_key", "omni-service-account-key",
        ["SIDERO_SERVICE_ACCOUNT_KEY", "OMNI_SERVICE_ACCOUNT_KEY"], Secret, "", "KEY",
        "the service account key that `omnictl infraprovider create` printed";
    OMNI_KEY_FILE = "omni" "service_account_key_file", "omni-service-account-key-file",
        ["OMNI_SERVICE_ACCOUNT_KEY_FILE"], Single, "", "PATH", "a file with the service account key";
    OMNI_CA_BUNDLE = "omni" "ca_bundle", "omni-ca-bundle", ["OMNI_CA_BUNDLE"], Single, "", "PATH",
        "a PEM file of certificate authorities to trust for Omni, besides the system's";
    OMNI_INSECURE = "omni" "insecure_skip_tls_verify", "omni-insecure-skip-tls-verify",
        ["OMNI_INSECURE_SKIP_TLS_VERIFY"], Switch, "false", "BOOL",
        "whether to trust any certificate of Omni";
    OXIDE_HOST = "oxide" "host", "oxide-host", ["OXIDE_HOST"], Single, "", "URL", "the Oxide silo's API";
    OXIDE_TOKEN = "oxide" "token", "oxide-token", ["OXIDE_TOKEN"], Secret, "", "TOKEN", "the Oxide API token";
    OXIDE_TOKEN_FILE = "oxide" "token_file", "oxide-token-file", ["OXIDE_TOKEN_FILE"], Single, "", "PATH",
        "a file with the Oxide API token";
    OXIDE_CA_BUNDLE = "oxide" "ca_bundle", "oxide-ca-bundle", ["OXIDE_CA_BUNDLE"], Single, "", "PATH",
        "a PEM file of certificate authorities to trust for Oxide, besides the system's";
    GANETI_ENDPOINT = "ganeti" "endpoint", "ganeti-endpoint", ["GANETI_ENDPOINT"], Single, "", "URL",
        "the URL of the Ganeti cluster's RAPI, with its port";
    GANETI_USER = "ganeti" "user", "ganeti-user", ["GANETI_USER"], Single, "", "NAME",
        "the RAPI user, who has to have `write`";
    GANETI_PASSWORD = "ganeti" "password", "ganeti-password", ["GANETI_PASSWORD"], Secret, "", "PASSWORD",
        "the RAPI user's password";
    GANETI_PASSWORD_FILE = "ganeti" "password_file", "ganeti-password-file", ["GANETI_PASSWORD_FILE"], Single, "",
        "PATH", "a file with the RAPI user's password";
    GANETI_CA_BUNDLE = "ganeti" "ca_bundle", "ganeti-ca-bundle", ["GANETI_CA_BUNDLE"], Single, "", "PATH",
        "a PEM file of certificate authorities to trust for Ganeti, besides the system's";
    GANETI_SHA256 = "ganeti" "certificate_sha256", "ganeti-certificate-sha256", ["GANETI_CERTIFICATE_SHA256"], Single,
        "", "SHA256", "the SHA-256 of the cluster's own certificate, which alone is trusted then";
    GANETI_INSECURE = "ganeti" "insecure_skip_tls_verify", "ganeti-insecure-skip-tls-verify",
        ["GANETI_INSECURE_SKIP_TLS_VERIFY"], Switch, "false", "BOOL",
        "whether to trust any certificate of Ganeti";
    GANETI_MEDIA_ADDRESS = "ganeti.media" "address", "ganeti-media-address", ["GANETI_MEDIA_ADDRESS"], Single, "",
        "ADDRESS", "where the provider listens to serve ISOs and seeds to Ganeti's nodes and machines, for example 0.0.0.0:8080; \
         unset: nowhere";
    GANETI_MEDIA_URL = "ganeti.media" "url", "ganeti-media-url", ["GANETI_MEDIA_URL"], Single,
        "http:// and that address", "URL", "how nodes and machines reach it";
    GANETI_MEDIA_FOLDER = "ganeti.media" "folder", "ganeti-media-folder", ["GANETI_MEDIA_FOLDER"], Single,
        "one among the system's temporary files", "PATH", "where these are kept; it may be emptied when no machine boots";
    PROVIDER_ID = "provider" "id", "provider-id", ["PROVIDER_ID"], Single, "the cloud's name", "ID",
        "the provider ID that Omni knows this daemon by";
    PROVIDER_NAME = "provider" "name", "provider-name", ["PROVIDER_NAME"], Single, "the cloud's name", "NAME",
        "the provider's name in Omni's screens";
    PROVIDER_DESCRIPTION = "provider" "description", "provider-description", ["PROVIDER_DESCRIPTION"], Single,
        "one sentence", "TEXT", "the provider's description in Omni's screens";
    CONCURRENCY = "provisioner" "concurrency", "provisioner-concurrency", ["PROVISIONER_CONCURRENCY"], Single,
        "16", "N", "how many machines are worked on at once";
    NAMESERVER = "" "nameserver", "nameserver", ["NAMESERVER"], Several, "", "IP",
        "a nameserver for the machines, from their first boot on; may be repeated";
    JOIN_DEADLINE = "" "join_deadline", "join-deadline", ["JOIN_DEADLINE"], Single, "15m", "TIME",
        "how long after its start a machine may take to join before it counts as failed";
    ORPHANS = "" "orphans", "orphans", ["ORPHANS"], Single, "report", "POLICY",
        "what happens to instances that no machine request wants: report or delete";
    HIGH_AVAILABILITY = "" "high_availability", "high-availability", ["HIGH_AVAILABILITY"], Switch, "false", "BOOL",
        "whether several daemons of this provider ID take turns: one is active, the others stand by";
    FACTORY_CA_BUNDLE = "factory" "ca_bundle", "factory-ca-bundle", ["FACTORY_CA_BUNDLE"], Single, "", "PATH",
        "a PEM file of certificate authorities to trust for the image factory, besides the system's";
    LOG = "" "log", "log", ["LOG"], Single, "info", "FILTER",
        "which log lines are written: a level, or filters such as info,omni_infra_provider::engine=debug";
    LOG_FORMAT = "" "log_format", "log-format", ["LOG_FORMAT"], Single,
        "human on a terminal, else json", "FORMAT", "how log lines are written: human or json";
    CONFIG = "" "", "config", ["CONFIG"], Single, "", "PATH", "a TOML file with settings";
}

/// The layers that settings come from, the weakest first. Their names are the figment providers' names.
pub(super) const LAYERS: [&str; 3] = ["the file", "the environment", "the command line"];

impl Setting {
    /// The path of the value in the merged layers; empty for the one setting that cannot stand in the file.
    pub(super) fn path(&self) -> String {
        match (self.section, self.key) {
            (_, "") => self.flag.to_owned(),
            ("", key) => key.to_owned(),
            (section, key) => format!("{section}.{key}"),
        }
    }

    /// Everything that a person can set it by: "--oxide-host, OXIDE_HOST, or `host` in \[oxide\] of the
    /// file".
    #[must_use]
    pub fn names(&self) -> String {
        let mut names = Vec::new();
        if self.form != Form::Secret {
            names.push(format!("--{}", self.flag));
        }
        names.extend(self.variables.iter().map(ToString::to_string));
        match (self.section, self.key) {
            (_, "") => {}
            ("", key) => names.push(format!("`{key}` in the file")),
            (section, key) => names.push(format!("`{key}` in [{section}] of the file")),
        }
        match names.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => names.concat(),
        }
    }
}

/// The flags of the command line.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// Values by flag. No secret is ever in here.
    values: BTreeMap<&'static str, Vec<String>>,
    /// Secrets that somebody tried to give.
    refused: Vec<&'static Setting>,
}

impl Flags {
    /// The one value of a flag.
    pub(super) fn value(&self, setting: &Setting) -> Option<&str> {
        self.values.get(setting.flag)?.last().map(String::as_str)
    }

    /// Secrets that somebody tried to give as flags. Their values were thrown away.
    pub(super) fn refused(&self) -> &[&'static Setting] {
        &self.refused
    }
}

impl clap::FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in SETTINGS {
            if matches.value_source(setting.flag).is_none() {
                continue;
            }
            if setting.form == Form::Secret {
                self.refused.push(setting);
            } else if let Some(values) = matches.get_many::<String>(setting.flag) {
                self.values.insert(setting.flag, values.cloned().collect());
            }
        }
        Ok(())
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        command
            .next_help_heading("Settings")
            .args(SETTINGS.iter().map(|setting| {
                let mut help = setting.what.to_owned();
                if let Some(first) = help.get(..1).map(str::to_uppercase) {
                    help.replace_range(..1, &first);
                }
                help += &format!(" [env: {}]", setting.variables.join(", "));
                if !setting.default.is_empty() {
                    help += &format!(" [default: {}]", setting.default);
                }
                let arg = Arg::new(setting.flag)
                    .long(setting.flag)
                    .value_name(setting.value)
                    .help(help)
                    .action(ArgAction::Append);
                match setting.form {
                    Form::Single | Form::Several => arg,
                    Form::Switch => arg
                        .num_args(0..=1)
                        .require_equals(true)
                        .default_missing_value("true"),
                    // Taken, so that clap does not quote it back, and refused by name.
                    Form::Secret => arg.hide(true).num_args(0..),
                }
            }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// One layer of settings as figment merges them.
pub(super) struct Layer {
    name: &'static str,
    values: Vec<(&'static Setting, Value)>,
}

impl Layer {
    pub(super) fn command_line(flags: &Flags) -> Self {
        let values = SETTINGS.iter().filter_map(|setting| {
            let values = flags.values.get(setting.flag)?;
            let value = match setting.form {
                Form::Several => Value::from(values.clone()),
                _ => Value::from(values.last()?.clone()),
            };
            Some((*setting, value))
        });
        Self {
            name: LAYERS[2],
            values: values.collect(),
        }
    }

    /// A variable that is empty is one that is not set: `docker run --env` and Compose leave such.
    pub(super) fn environment(environment: &BTreeMap<String, String>) -> Self {
        let values = SETTINGS.iter().filter_map(|setting| {
            let mut values = setting
                .variables
                .iter()
                .filter_map(|variable| environment.get(*variable));
            let value = values.find(|value| !value.trim().is_empty())?;
            Some((*setting, Value::from(value.clone())))
        });
        Self {
            name: LAYERS[1],
            values: values.collect(),
        }
    }

    /// The settings of a file, and a sentence for each of its keys that is none.
    pub(super) fn file(mut tables: Dict) -> (Self, Vec<String>) {
        let mut values = Vec::new();
        for setting in SETTINGS.iter().filter(|setting| !setting.key.is_empty()) {
            let table =
                sections(setting.section).try_fold(&mut tables, |table, name| match table.get_mut(name) {
                    Some(Value::Dict(_, table)) => Some(table),
                    _ => None,
                });
            if let Some(value) = table.and_then(|table| table.remove(setting.key)) {
                values.push((*setting, value));
            }
        }
        let mut unknown = Vec::new();
        note_unknown("", &tables, &mut unknown);
        (
            Self {
                name: LAYERS[0],
                values,
            },
            unknown,
        )
    }
}

/// The tables on the way to a section: `a.b` is `b` in `a`.
fn sections(section: &str) -> impl Iterator<Item = &str> {
    section.split('.').filter(|name| !name.is_empty())
}

/// Takes down what is left of the file once every setting was taken out of it.
fn note_unknown(section: &str, tables: &Dict, unknown: &mut Vec<String>) {
    for (name, value) in tables {
        let Value::Dict(_, table) = value else {
            unknown.push(unknown_key(section, name));
            continue;
        };
        let path = if section.is_empty() {
            name.clone()
        } else {
            format!("{section}.{name}")
        };
        if SETTINGS.iter().any(|setting| setting.section == path) {
            note_unknown(&path, table, unknown);
            continue;
        }
        let known = SETTINGS.iter().map(|setting| setting.section);
        let hint = did_you_mean(&path, known.filter(|section| !section.is_empty()))
            .map(|hint| format!(": did you mean [{hint}]?"))
            .unwrap_or_default();
        unknown.push(format!("the file has an unknown table [{path}]{hint}"));
    }
}

fn unknown_key(section: &str, key: &str) -> String {
    let known = SETTINGS
        .iter()
        .filter(|setting| setting.section == section)
        .map(|setting| setting.key);
    let hint = did_you_mean(key, known)
        .map(|hint| format!(": did you mean `{hint}`?"))
        .unwrap_or_default();
    match section {
        "" => format!("the file has an unknown key `{key}`{hint}"),
        section => format!("the file has an unknown key `{key}` in [{section}]{hint}"),
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        let mut tables = Dict::new();
        for (setting, value) in &self.values {
            if setting.section.is_empty() {
                tables.insert(setting.path(), value.clone());
                continue;
            }
            let table = sections(setting.section).try_fold(&mut tables, |tables, name| {
                let table = tables
                    .entry(name.to_owned())
                    .or_insert_with(|| Value::from(Dict::new()));
                match table {
                    Value::Dict(_, table) => Some(table),
                    _ => None,
                }
            });
            if let Some(table) = table {
                table.insert(setting.key.to_owned(), value.clone());
            }
        }
        Ok(Profile::Default.collect(tables))
    }
}
