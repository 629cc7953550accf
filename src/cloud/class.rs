//! Reads a class from the provider data of a machine request: YAML, strict, with every fault named so that a
//! person can mend it.
//!
//! *Not here*: what a schema cannot say about a class; that is [`Cloud::validate`](super::Cloud::validate).

use std::fmt::Write as _;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Path, Segment, Track};
use serde_saphyr::Error;

/// Most bytes of provider data that are looked at: many times a real class, and little enough that a hostile
/// one costs nothing.
const MAX_BYTES: usize = 256 * 1024;
/// Most faults that are named at once. One look per fault, and a person reads no more.
const MAX_FAULTS: usize = 20;
/// Most distance, as in [`strsim::damerau_levenshtein`], between a wrong name and the one that was meant.
const MAX_DISTANCE: usize = 3;

/// Reads provider data. Empty text is an empty class, as for Omni.
///
/// # Errors
///
/// One sentence for each fault: its field and, where it is known, its line. Text that is no YAML has one
/// fault.
pub fn parse_class<C: DeserializeOwned>(yaml: &str) -> Result<C, Vec<String>> {
    if yaml.len() > MAX_BYTES {
        return Err(vec![format!(
            "the provider data has {} bytes: at most {MAX_BYTES} are read",
            yaml.len()
        )]);
    }
    let text = if yaml.trim().is_empty() { "{}" } else { yaml };
    let first = match read::<C>(text) {
        Ok(class) => return Ok(class),
        Err(fault) => fault,
    };
    let mut faults = vec![first.sentence(true)];
    // The reader stops at the first fault. Take what it complained of away and read the rest, as long as that
    // helps.
    if let Ok(mut rest) = serde_saphyr::from_str_with_options::<Value>(text, options()) {
        let mut last = first;
        while faults.len() < MAX_FAULTS && last.remove_from(&mut rest) {
            match read::<C>(&rest.to_string()) {
                // What is missing now may be what we took away.
                Err(fault) if fault.is_absence() => break,
                Err(fault) => {
                    faults.push(fault.sentence(false));
                    last = fault;
                }
                Ok(_) => break,
            }
        }
    }
    Err(faults)
}

/// The name that was probably meant.
#[must_use]
pub fn did_you_mean<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wrong, name), name))
        // More than half of a word changed is another word.
        .filter(|(distance, name)| *distance <= MAX_DISTANCE && distance * 2 <= name.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// What the reader complained of, and where.
struct Fault {
    path: Path,
    error: Error,
}

fn read<C: DeserializeOwned>(text: &str) -> Result<C, Box<Fault>> {
    let mut track = Track::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options(), |yaml| {
        C::deserialize(serde_path_to_error::Deserializer::new(yaml, &mut track))
    })
    .map_err(|error| {
        Box::new(Fault {
            path: track.path(),
            error,
        })
    })
}

impl Fault {
    /// The fault in a sentence; its line only where the text is the user's own.
    fn sentence(&self, with_line: bool) -> String {
        let mut sentence = String::new();
        let path = self.path.to_string();
        // What is missing from the whole has no line.
        let has_line = with_line && !(self.is_absence() && path == ".");
        if has_line && let Some(location) = self.error.location().filter(|location| location.line() > 0) {
            let _ = write!(sentence, "line {}: ", location.line());
        }
        let _ = match &self.error {
            Error::SerdeUnknownField { field, expected, .. } => {
                write!(
                    sentence,
                    "unknown field `{path}`: {}",
                    suggestion(field, expected)
                )
            }
            Error::SerdeUnknownVariant {
                variant, expected, ..
            } => {
                write!(
                    sentence,
                    "`{path}` cannot be `{variant}`: {}",
                    suggestion(variant, expected)
                )
            }
            // The path leads to what misses the field.
            Error::SerdeMissingField { field, .. } if path == "." => write!(sentence, "`{field}` is missing"),
            Error::SerdeMissingField { field, .. } => write!(sentence, "`{path}.{field}` is missing"),
            Error::DuplicateMappingKey { key: Some(key), .. } => write!(sentence, "`{key}` is there twice"),
            Error::NullIntoString { .. } => write!(sentence, "`{path}` has no value"),
            Error::MultipleDocuments { .. } => write!(sentence, "more than one YAML document"),
            error => {
                let text = match error {
                    Error::InvalidScalar { ty, .. } => match ty.as_bytes() {
                        [b'u', ..] => "must be a whole number, not below zero".to_owned(),
                        [b'i', ..] => "must be a whole number".to_owned(),
                        [b'f', ..] => "must be a number".to_owned(),
                        _ => format!("must be a {ty}"),
                    },
                    Error::Unexpected { expected, .. } => match *expected {
                        "string scalar" => "must be a single value".to_owned(),
                        "mapping start" => "must be a mapping of names to values".to_owned(),
                        "sequence start" => "must be a list".to_owned(),
                        expected => format!("expected {expected}"),
                    },
                    error => error.render_with_formatter(&serde_saphyr::UserMessageFormatter),
                };
                // Its own "at line 3, column 9" would say the line twice, or a line that is not the user's.
                let text = text.split(" at line ").next().unwrap_or_default();
                match path.as_str() {
                    "." => write!(sentence, "{text}"),
                    path => write!(sentence, "`{path}` {text}"),
                }
            }
        };
        sentence
    }

    fn is_absence(&self) -> bool {
        matches!(self.error, Error::SerdeMissingField { .. })
    }

    /// Removes what the fault is about; false if there is no such thing.
    fn remove_from(&self, value: &mut Value) -> bool {
        if self.is_absence() {
            return false;
        }
        let mut segments: Vec<&Segment> = self.path.iter().collect();
        let Some(last) = segments.pop() else { return false };
        let mut parent = value;
        for segment in segments {
            let child = match segment {
                Segment::Seq { index } => parent.get_mut(*index),
                Segment::Map { key } => parent.get_mut(key),
                Segment::Enum { .. } | Segment::Unknown => None,
            };
            let Some(child) = child else { return false };
            parent = child;
        }
        match (last, parent) {
            (Segment::Map { key }, Value::Object(map)) => map.shift_remove(key).is_some(),
            (Segment::Seq { index }, Value::Array(items)) => {
                let there = *index < items.len();
                items.truncate(*index);
                there
            }
            _ => false,
        }
    }
}

fn suggestion(wrong: &str, known: &[&'static str]) -> String {
    match did_you_mean(wrong, known.iter().copied()) {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("known are `{}`", known.join("`, `")),
    }
}

/// The library's own limits bound anchors, aliases and nesting; provider data never needs as much as they
/// allow.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_events: 20_000,
            max_aliases: 100,
            max_anchors: 100,
            max_depth: 32,
            max_nodes: 10_000,
            // One too many, so that the complaint is about that.
            max_documents: 2,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::{did_you_mean, parse_class};

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(deny_unknown_fields)]
    struct Class {
        project: String,
        #[serde(default)]
        memory: u64,
        #[serde(default)]
        platform: Platform,
        #[serde(default)]
        disks: Vec<Disk>,
    }

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(rename_all = "snake_case")]
    enum Platform {
        #[default]
        AmdMilan,
        AmdTurin,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        size: u64,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Optional {
        size: Option<u64>,
    }

    fn faults(yaml: &str) -> Vec<String> {
        parse_class::<Class>(yaml).unwrap_err()
    }

    #[test]
    fn a_good_class_is_read() {
        let class: Class =
            parse_class("project: p\nmemory: 8\nplatform: amd_turin\ndisks:\n  - size: 1\n").unwrap();
        assert_eq!(
            class,
            Class {
                project: "p".into(),
                memory: 8,
                platform: Platform::AmdTurin,
                disks: vec![Disk { size: 1 }],
            }
        );
    }

    #[test]
    fn nothing_is_an_empty_class() {
        for empty in ["", " \n", "{}", "# nothing\n"] {
            assert_eq!(parse_class(empty), Ok(Optional { size: None }), "{empty:?}");
        }
    }

    #[test]
    fn every_fault_is_named() {
        expect_test::expect![[r#"
            [
                "line 2: unknown field `memmory`: did you mean `memory`?",
                "`platform` cannot be `amd_milano`: did you mean `amd_milan`?",
                "unknown field `disks[1].sise`: did you mean `size`?",
            ]
        "#]]
        .assert_debug_eq(&faults(
            "project: p\nmemmory: 8\nplatform: amd_milano\ndisks:\n  - size: 1\n  - {sise: 2, size: 3}\n",
        ));
    }

    #[test]
    fn one_fault_of_each_kind() {
        let mut seen = String::new();
        for yaml in [
            "project: p\nmemory: lots\n",
            "project: p\nmemory: -1\n",
            "project: p\nmemory: .nan\n",
            "project: p\nmemory: [1]\n",
            "project: p\nquux: 1\n",
            "memory: 8\n",
            "project: p\ndisks:\n  - {}\n",
            "project:\n",
            "project: p\nproject: q\n",
            "project: p\n---\nproject: q\n",
            "- project\n",
            "just text",
            "project: [",
            "project: *nowhere",
        ] {
            seen += &format!("{yaml:?}\n");
            for fault in faults(yaml) {
                seen += &format!("    {fault}\n");
            }
        }
        expect_test::expect![[r#"
            "project: p\nmemory: lots\n"
                line 2: `memory` must be a whole number, not below zero
            "project: p\nmemory: -1\n"
                line 2: `memory` must be a whole number, not below zero
            "project: p\nmemory: .nan\n"
                line 2: `memory` must be a whole number, not below zero
            "project: p\nmemory: [1]\n"
                line 2: `memory` must be a single value
            "project: p\nquux: 1\n"
                line 2: unknown field `quux`: known are `project`, `memory`, `platform`, `disks`
            "memory: 8\n"
                `project` is missing
            "project: p\ndisks:\n  - {}\n"
                line 3: `disks[0].size` is missing
            "project:\n"
                line 1: `project` has no value
            "project: p\nproject: q\n"
                line 2: `project` is there twice
            "project: p\n---\nproject: q\n"
                line 3: more than one YAML document
            "- project\n"
                line 1: must be a mapping of names to values
            "just text"
                line 1: must be a mapping of names to values
            "project: ["
                line 1: `project` must be a single value
            "project: *nowhere"
                line 1: reference to unknown value
        "#]]
        .assert_eq(&seen);
    }

    #[test]
    fn bombs_are_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let below = format!("*a{}, ", level - 1).repeat(10);
            bomb += &format!("a{level}: &a{level} [{}]\n", below.trim_end_matches(", "));
        }
        assert_eq!(faults(&bomb).len(), 1);
        assert_eq!(faults(&"[".repeat(100_000)).len(), 1);
        assert_eq!(
            faults(&" ".repeat(300 * 1024)),
            ["the provider data has 307200 bytes: at most 262144 are read"]
        );
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        let known = ["memory", "cpus", "project"];
        assert_eq!(did_you_mean("memmory", known), Some("memory"));
        assert_eq!(did_you_mean("cpu", known), Some("cpus"));
        assert_eq!(did_you_mean("porject", known), Some("project"));
        assert_eq!(did_you_mean("disk", known), None);
    }
}
