//! What goes in and out of one call of the Oxide API: the question, the answer, the refusal in nexus's words,
//! one page of a list.
//!
//! Status, code and wording of refusals are nexus's (`common/src/api/external/error.rs`); pages are
//! dropshot's: sorted, at most so many items, and a token after *every* page that has an item, which carries
//! the whole question, so that the next call may leave out the project.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use bytes::Bytes;
use oxide::types;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::rack::Rack;

/// Why a call was refused, in nexus's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// `error_code` of the body; dropshot's own refusals have none.
    pub code: Option<&'static str>,
    /// `message` of the body.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}: {}",
            self.status,
            self.code.unwrap_or("-"),
            self.message
        )
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: Some(code),
            message: message.into(),
        }
    }

    /// The request makes no sense to dropshot, before nexus sees it.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            code: None,
            message: message.into(),
        }
    }

    /// Well-formed, but not possible as things are.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, "InvalidRequest", message)
    }

    /// One field has a value that cannot be.
    pub(super) fn value(label: &str, message: impl fmt::Display) -> Self {
        Self::new(
            400,
            "InvalidValue",
            format!("unsupported value for \"{label}\": {message}"),
        )
    }

    /// No such thing, or not yours to see: the wire does not tell the two apart.
    pub(super) fn not_found(kind: &str, wanted: &Pick) -> Self {
        let message = match wanted {
            Pick::Name(name) => format!("not found: {kind} with name \"{name}\""),
            Pick::Id(id) => format!("not found: {kind} with id \"{id}\""),
        };
        Self::new(404, "ObjectNotFound", message)
    }

    /// The name is taken.
    pub(super) fn exists(kind: &str, name: &str) -> Self {
        Self::new(
            400,
            "ObjectAlreadyExists",
            format!("already exists: {kind} \"{name}\""),
        )
    }

    /// Try again, or change it and try again.
    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::new(409, "Conflict", message)
    }

    /// No room, or no quota: one code for both.
    pub(super) fn capacity(message: impl fmt::Display) -> Self {
        Self::new(
            507,
            "InsufficientCapacity",
            format!("Insufficient capacity: {message}"),
        )
    }

    /// No token, or not a valid one.
    pub(super) fn unauthenticated() -> Self {
        Self::new(401, "Unauthorized", "credentials missing or invalid")
    }

    /// The daemon's bug would be ours: something that cannot be.
    pub(super) fn internal() -> Self {
        Self::new(500, "Internal", "Internal Server Error")
    }
}

/// Shorthand of this folder.
pub(super) type Result<T> = std::result::Result<T, Refusal>;

/// One thing, named by the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Pick {
    Id(Uuid),
    Name(String),
}

impl Pick {
    /// Reads a path segment or parameter as nexus does: a UUID is an ID, everything else has to be a name.
    pub(super) fn parse(text: &str) -> Result<Self> {
        match Uuid::parse_str(text) {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => check_name(text)
                .map(|()| Self::Name(text.to_owned()))
                .map_err(|why| Refusal::malformed(format!("bad parameter: {why}"))),
        }
    }
}

impl From<&types::NameOrId> for Pick {
    fn from(pick: &types::NameOrId) -> Self {
        match pick {
            types::NameOrId::Id(id) => Self::Id(*id),
            types::NameOrId::Name(name) => Self::Name(name.to_string()),
        }
    }
}

/// Nexus's rules for names, which are stricter than the SDK's pattern (`common/src/api/external/mod.rs`).
pub(super) fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.len() > 63 {
        return Err("name may contain at most 63 characters".to_owned());
    }
    let Some(first) = name.chars().next() else {
        return Err("name requires at least one character".to_owned());
    };
    if !first.is_ascii_lowercase() {
        return Err("name must begin with an ASCII lowercase character".to_owned());
    }
    if let Some(odd) = name
        .chars()
        .find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-'))
    {
        return Err(format!(
            "name contains invalid character: \"{odd}\" (allowed characters are lowercase \
             ASCII, digits, and \"-\")"
        ));
    }
    if name.ends_with('-') {
        return Err("name cannot end with \"-\"".to_owned());
    }
    if Uuid::parse_str(name).is_ok() {
        return Err("name cannot be a UUID to avoid ambiguity with IDs".to_owned());
    }
    Ok(())
}

/// One call, as an operation sees it.
#[derive(Debug, Default)]
pub(super) struct Ask {
    /// Projects that the token lost.
    pub(super) hidden: BTreeSet<Uuid>,
    /// The user behind the token.
    pub(super) user: String,
    /// The path's variable part.
    pub(super) target: String,
    /// Query parameters.
    pub(super) query: BTreeMap<String, String>,
    /// The body.
    pub(super) body: Bytes,
}

impl Ask {
    pub(super) fn query(&self, key: &str) -> Option<&str> {
        self.query.get(key).map(String::as_str)
    }

    /// The body as the SDK's own type, every `name` in it checked by nexus's rules.
    pub(super) fn body<T: DeserializeOwned>(&self) -> Result<T> {
        let broken = |why: &dyn fmt::Display| Refusal::malformed(format!("unable to parse JSON body: {why}"));
        let value: serde_json::Value = serde_json::from_slice(&self.body).map_err(|e| broken(&e))?;
        check_names(&value).map_err(|e| broken(&e))?;
        serde_json::from_value(value).map_err(|e| broken(&e))
    }
}

fn check_names(value: &serde_json::Value) -> std::result::Result<(), String> {
    match value {
        serde_json::Value::Object(members) => members.iter().try_for_each(|(key, member)| match member {
            serde_json::Value::String(name) if is_name_key(key) => {
                check_name(name).map_err(|why| format!("{key}: {why}"))
            }
            _ => check_names(member),
        }),
        serde_json::Value::Array(items) => items.iter().try_for_each(check_names),
        _ => Ok(()),
    }
}

fn is_name_key(key: &str) -> bool {
    matches!(key, "name" | "vpc_name" | "subnet_name" | "snapshot_name")
}

/// An answer, ready to be sent.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Option<Vec<u8>>,
}

impl Reply {
    pub(super) fn empty() -> Self {
        Self {
            status: 204,
            body: None,
        }
    }

    pub(super) fn json(status: u16, body: &impl Serialize) -> Result<Self> {
        Ok(Self {
            status,
            body: Some(serde_json::to_vec(body).map_err(|_| Refusal::internal())?),
        })
    }
}

type Condition = Box<dyn Fn(&Rack) -> Option<Result<Reply>> + Send>;

/// What an operation left behind: its effect is in, the answer may have to wait.
pub(super) enum Outcome {
    Ready(Reply),
    /// The rest of the saga takes this long; nothing visible changes in it.
    After(Duration, Reply),
    /// The saga goes on by itself; the answer comes when this says so.
    When(Condition),
}

impl Outcome {
    pub(super) fn ok(body: &impl Serialize) -> Result<Self> {
        Reply::json(200, body).map(Self::Ready)
    }

    pub(super) fn accepted(body: &impl Serialize) -> Result<Self> {
        Reply::json(202, body).map(Self::Ready)
    }

    pub(super) fn when(condition: impl Fn(&Rack) -> Option<Result<Reply>> + Send + 'static) -> Self {
        Self::When(Box::new(condition))
    }
}

/// Where a list begins and how it is sorted: the first call's question, or what its page token says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Scan {
    pub(super) project: Option<String>,
    pub(super) instance: Option<String>,
    pub(super) vpc: Option<String>,
    #[serde(default)]
    sort: Sort,
    last: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    #[default]
    NameAscending,
    NameDescending,
    IdAscending,
}

/// Dropshot's envelope of a page token.
#[derive(Serialize, Deserialize)]
struct Token {
    v: String,
    page_start: Scan,
}

impl Scan {
    pub(super) fn of(ask: &Ask) -> Result<Self> {
        if let Some(token) = ask.query("page_token") {
            let corrupted = |_| {
                Refusal::malformed(
                    "unable to parse query string: failed to parse pagination token: corrupted token",
                )
            };
            let bytes = URL_SAFE.decode(token).map_err(|e| corrupted(e.to_string()))?;
            let token: Token = serde_json::from_slice(&bytes).map_err(|e| corrupted(e.to_string()))?;
            return Ok(token.page_start);
        }
        let sort = match ask.query("sort_by") {
            None | Some("name_ascending") => Sort::NameAscending,
            Some("name_descending") => Sort::NameDescending,
            Some("id_ascending") => Sort::IdAscending,
            Some(other) => {
                return Err(Refusal::malformed(format!(
                    "unable to parse query string: unknown variant `{other}`"
                )));
            }
        };
        let text = |key| ask.query(key).map(str::to_owned);
        Ok(Self {
            project: text("project"),
            instance: text("instance"),
            vpc: text("vpc"),
            sort,
            last: None,
        })
    }

    /// Cuts one page out of everything that the list has.
    pub(super) fn page<'a, T: Clone + 'a>(
        self,
        ask: &Ask,
        largest: usize,
        items: impl Iterator<Item = &'a T>,
        key: impl Fn(&T) -> (String, Uuid),
    ) -> Result<(Vec<T>, Option<String>)> {
        let limit = match ask.query("limit").map(str::parse::<usize>) {
            None => largest,
            Some(Ok(limit)) if limit > 0 => limit.min(largest),
            Some(_) => {
                return Err(Refusal::malformed(
                    "unable to parse query string: expected a non-zero value",
                ));
            }
        };
        let sorted_by = |item: &T| match self.sort {
            Sort::IdAscending => key(item).1.to_string(),
            _ => key(item).0,
        };
        let ahead = |item: &&T| match (&self.last, self.sort) {
            (None, _) => true,
            (Some(last), Sort::NameDescending) => sorted_by(item) < *last,
            (Some(last), _) => sorted_by(item) > *last,
        };
        // References until the page is cut: a list may be long, and a page is not.
        let mut items: Vec<_> = items.filter(ahead).collect();
        items.sort_by_cached_key(|item| sorted_by(item));
        if self.sort == Sort::NameDescending {
            items.reverse();
        }
        items.truncate(limit);
        let next = match items.last() {
            None => None,
            Some(item) => {
                let page_start = Self {
                    last: Some(sorted_by(item)),
                    ..self.clone()
                };
                let token = Token {
                    v: "v1".to_owned(),
                    page_start,
                };
                Some(URL_SAFE.encode(serde_json::to_vec(&token).map_err(|_| Refusal::internal())?))
            }
        };
        Ok((items.into_iter().cloned().collect(), next))
    }
}
