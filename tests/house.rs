//! The order of the house: who may name whom, and documents that name only what exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use omni_infra_provider::config::setting::{Form, SETTINGS, Setting};
use serde_json::Value;

/// Which modules of the crate a module may name, besides itself. A module that is not listed may name any: it
/// wires.
const ARROWS: &[(&str, &[&str])] = &[
    // The mind. Of Omni it knows plain structs alone.
    ("talos", &["cloud", "omni::kinds", "secret"]),
    (
        "machine",
        &["cloud", "omni::kinds", "omni::resource", "talos", "words"],
    ),
    // The contract, and those who keep it.
    ("cloud", &["secret", "words"]),
    (
        "backends",
        &["cloud", "config", "media", "net", "secret", "words"],
    ),
    ("media", &["cloud", "secret"]),
    // The hands. The wire's own types stay in `omni`.
    (
        "engine",
        &[
            "cloud",
            "machine",
            "net",
            "omni",
            "secret",
            "talos",
            "telemetry",
            "words",
        ],
    ),
    ("omni", &["cloud", "secret", "words"]),
    ("secret", &[]),
    ("net", &["cloud"]),
    ("words", &[]),
    ("telemetry", &["config", "secret"]),
    ("process", &[]),
    ("rotation", &["config", "secret"]),
    // Of Omni: what a key and a provider ID have to be.
    (
        "config",
        &[
            "cloud::class",
            "omni::auth",
            "omni::channel",
            "secret",
            "telemetry",
            "words",
        ],
    ),
];

/// Words that may stand in code of some modules only.
const WORDS: &[(&[&str], &[&str], &str)] = &[
    // (words, where they may stand, why)
    (
        &["tonic", "prost", "prost_types"],
        &["omni", "sandbox"],
        "only omni/ and sandbox/ speak gRPC (invariant 2)",
    ),
    (
        &["oxide"],
        &["backends", "sandbox", "config", "cli", "daemon", "lib"],
        "the engine names no backend (invariant 3)",
    ),
    (
        &["ganeti"],
        &["backends", "config", "cli", "daemon"],
        "the engine names no backend (invariant 3)",
    ),
];

/// What neither decides nor is data (invariant 1).
const NOT_IN_THE_MIND: &[&str] = &[
    "async",
    "await",
    "now",
    "tokio",
    "reqwest",
    "Instant",
    "SystemTime",
    "spawn",
    "sleep",
];

struct Source {
    /// For example `src/engine/act.rs`.
    path: PathBuf,
    /// For example `["engine", "act"]`.
    module: Vec<String>,
    /// Without comments, strings and tests.
    code: String,
}

impl Source {
    fn top(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }
}

fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    files("src", "rs")
        .into_iter()
        .filter(|path| !path.ends_with("tests.rs"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let mut module: Vec<String> = path
                .with_extension("")
                .iter()
                .skip(1)
                .map(|part| part.to_str().unwrap().to_owned())
                .collect();
            if module
                .last()
                .is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main"))
            {
                module.pop();
            }
            Source {
                code: code_of(&text),
                path,
                module,
            }
        })
        .collect()
}

/// The code of a file: without comments, without what stands in strings, and without the tests at its end.
fn code_of(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod ").next().unwrap();
    let mut code = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => while chars.next_if(|next| *next != '\n').is_some() {},
            '"' => {
                code.push_str("\"\"");
                while let Some(inner) = chars.next() {
                    match inner {
                        '\\' => drop(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            // A quote as a character.
            '\'' if chars.peek() == Some(&'"') => drop(chars.next()),
            c => code.push(c),
        }
    }
    code
}

fn words(code: &str) -> BTreeSet<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect()
}

/// Every path into this crate that the code names, as segments behind `crate`.
fn named_paths(source: &Source) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let code = &source.code;
    for (index, root) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..index].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let mut rest = &code[index + root.len()..];
        let mut prefix = Vec::new();
        if root == "super::" {
            let mut up = 1;
            while let Some(further) = rest.strip_prefix("super::") {
                (rest, up) = (further, up + 1);
            }
            // A module within a file makes one `super` stay in it: such a path ends up too low, never too
            // high.
            prefix = source.module[..source.module.len().saturating_sub(up)].to_vec();
        }
        expand(rest, &prefix, &mut paths);
    }
    paths
}

/// Follows `a::{b, c::d}` into each of its paths.
fn expand(text: &str, prefix: &[String], paths: &mut Vec<Vec<String>>) {
    let mut prefix = prefix.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = 0;
            for (index, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth > 0 => depth -= 1,
                    ',' | '}' if depth == 0 => {
                        let item = group[start..index].trim();
                        if !item.is_empty() {
                            expand(item, &prefix, paths);
                        }
                        start = index + 1;
                        if c == '}' {
                            return;
                        }
                    }
                    _ => {}
                }
            }
            return;
        }
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        if end > 0 {
            prefix.push(rest[..end].to_owned());
        }
        match rest[end..].strip_prefix("::") {
            Some(further) if end > 0 => rest = further,
            _ => break,
        }
    }
    paths.push(prefix);
}

#[test]
fn paths_are_found_however_they_are_written() {
    let source = Source {
        path: PathBuf::new(),
        module: vec!["engine".into(), "act".into()],
        code: code_of(
            "use crate::{a::b, c::{d, e as f}};\n// crate::no\nuse super::queue::Q;\n\
             let x = super::super::g::h(\"crate::no\");\n\
             #[cfg(test)]\nmod tests { use crate::no; }",
        ),
    };
    let paths: Vec<String> = named_paths(&source).iter().map(|path| path.join("::")).collect();
    assert_eq!(paths, ["a::b", "c::d", "c::e", "engine::queue::Q", "g::h"]);
}

#[test]
fn arrows_point_where_they_may() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((_, allowed)) = ARROWS.iter().find(|(module, _)| *module == source.top()) else {
            continue;
        };
        for path in named_paths(&source) {
            let named = path.join("::");
            let is_within = |module: &str| named == module || named.starts_with(&format!("{module}::"));
            let is_constant = path.len() == 1 && path[0] == "VERSION";
            if !is_constant && !is_within(source.top()) && !allowed.iter().any(|module| is_within(module)) {
                wrong.push(format!("{}: {named}", source.path.display()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "these may not be named there (ARROWS in tests/house.rs):\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_engine_sees_plain_structs_and_no_messages() {
    for source in sources()
        .iter()
        .filter(|source| matches!(source.top(), "engine" | "daemon" | "machine"))
    {
        for path in named_paths(source) {
            let named = path.join("::");
            assert!(
                !named.starts_with("omni::wire"),
                "{}: {named}",
                source.path.display()
            );
        }
    }
}

#[test]
fn a_backend_names_no_other_backend() {
    let backends: Vec<String> = fs::read_dir("src/backends")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    for source in sources()
        .iter()
        .filter(|source| source.top() == "backends" && source.module.len() > 1)
    {
        for path in named_paths(source) {
            if let [top, backend, ..] = path.as_slice()
                && top == "backends"
                && backends.contains(backend)
            {
                assert_eq!(backend, &source.module[1], "{}", source.path.display());
            }
        }
    }
}

#[test]
fn words_stand_where_they_may() {
    let mut wrong = Vec::new();
    for source in sources() {
        let words = words(&source.code);
        for (forbidden, places, why) in WORDS {
            for word in forbidden.iter().filter(|word| words.contains(**word)) {
                if !places.contains(&source.top()) {
                    wrong.push(format!("{}: `{word}`: {why}", source.path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_mind_waits_for_nothing_and_knows_no_time() {
    let mut wrong = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| matches!(source.top(), "machine" | "talos"))
    {
        let words = words(&source.code);
        for word in NOT_IN_THE_MIND.iter().filter(|word| words.contains(**word)) {
            // The planner is told what time it is.
            if *word == "now" && !source.code.contains("now()") {
                continue;
            }
            wrong.push(format!("{}: `{word}`", source.path.display()));
        }
    }
    assert!(
        wrong.is_empty(),
        "neither machine/ nor talos/ may (invariant 1):\n{}",
        wrong.join("\n")
    );
}

/// The documents, with their text.
fn documents() -> Vec<(PathBuf, String)> {
    files(".", "adoc")
        .into_iter()
        .filter(|path| path.components().count() == 2)
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect()
}

/// What stands between backticks, and the lines of shell listings.
fn quoted(text: &str) -> Vec<String> {
    let mut quoted: Vec<String> = text
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    for listing in text.split("[source,shell]\n----\n").skip(1) {
        let listing = listing.split("\n----").next().unwrap().replace("\\\n", " ");
        quoted.extend(
            listing
                .lines()
                .map(|line| line.split(" # ").next().unwrap().trim().to_owned()),
        );
    }
    quoted
}

#[test]
fn documents_name_only_files_that_exist() {
    let roots = ["src/", "tests/", "fuzz/", "proto/", "machine-classes/", ".ci/"];
    let mut wrong = Vec::new();
    for (document, text) in documents() {
        let links = text
            .split("link:")
            .skip(1)
            .filter_map(|link| link.split('[').next())
            .map(str::to_owned);
        let files = quoted(&text).into_iter().filter(|quoted| {
            !quoted.contains(' ')
                && !quoted.contains('<')
                && (roots.iter().any(|root| quoted.starts_with(root))
                    || [".toml", ".adoc", ".rs"].iter().any(|end| quoted.ends_with(end))
                        && !quoted.contains('*')
                    || matches!(quoted.as_str(), "Makefile" | "Containerfile" | "VERSION"))
        });
        for file in links.chain(files) {
            if !file.starts_with("http") && !Path::new(&file).exists() {
                wrong.push(format!("{}: {file}", document.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "there is no such file:\n{}", wrong.join("\n"));
}

#[test]
fn documents_name_only_targets_of_the_makefile() {
    let makefile = fs::read_to_string("Makefile").unwrap();
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.strip_prefix(".PHONY: "))
        .collect();
    let mut wrong = Vec::new();
    for (document, text) in documents() {
        for quoted in quoted(&text) {
            let Some(target) = quoted
                .strip_prefix("make ")
                .and_then(|rest| rest.split_whitespace().next())
            else {
                continue;
            };
            if !targets.contains(target) {
                wrong.push(format!("{}: make {target}", document.display()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "the Makefile has no such target:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_target_of_the_makefile_has_a_line_of_help() {
    let makefile = fs::read_to_string("Makefile").unwrap();
    for target in makefile
        .lines()
        .filter_map(|line| line.strip_prefix(".PHONY: "))
        .filter(|name| *name != "clean-tree")
    {
        assert!(
            makefile
                .lines()
                .any(|line| line.starts_with(&format!("{target}:")) && line.contains(" ## ")),
            "{target}"
        );
    }
}

#[test]
fn documents_name_only_flags_and_commands_that_exist() {
    let help = crate::command_line::help("");
    let commands = help
        .split("\nCommands:\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let commands = commands
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let mut helps = vec![help.clone()];
    helps.extend(
        commands
            .filter(|name| !name.is_empty() && *name != "help")
            .map(crate::command_line::help),
    );
    let known: BTreeSet<&str> = helps
        .iter()
        .flat_map(|help| help.split(|c: char| c.is_whitespace() || matches!(c, '[' | ']' | '=' | ',' | '.')))
        .filter(|word| word.starts_with("--"))
        .collect();
    let others = ["cargo ", "docker ", "omnictl ", "make "];
    let mut wrong = Vec::new();
    for (document, text) in documents() {
        for quoted in quoted(&text) {
            // Variables before a command are the shell's.
            let is_variable = |word: &str| {
                word.split_once('=')
                    .is_some_and(|(name, _)| !name.starts_with('-'))
            };
            let quoted = quoted
                .split(' ')
                .skip_while(|word| is_variable(word))
                .collect::<Vec<_>>()
                .join(" ");
            let ours = match quoted.strip_prefix("docker run ") {
                // What stands behind the image is for us.
                Some(run) => run.split_once(":$TAG").map_or("", |(_, ours)| ours),
                None if others.iter().any(|program| quoted.starts_with(program)) => continue,
                None => &quoted,
            };
            for word in ours.split_whitespace().filter(|word| word.starts_with("--")) {
                let flag = word.split('=').next().unwrap();
                if !known.contains(flag) {
                    wrong.push(format!("{}: {flag}", document.display()));
                }
            }
            let command = ours
                .trim()
                .strip_prefix("omni-infra-provider ")
                .and_then(|rest| rest.split(' ').next());
            if let Some(command) = command
                && !command.starts_with('-')
                && !helps[0].contains(&format!("\n  {command} "))
            {
                wrong.push(format!("{}: command {command}", document.display()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "there is no such flag or command:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_readme_has_every_setting() {
    let row = |setting: &&Setting| {
        let code = |text: &str| format!("`{text}`");
        let flag = match setting.form {
            Form::Secret => "refused".to_owned(),
            _ => code(&format!("--{}", setting.flag)),
        };
        let variables: Vec<String> = setting.variables.iter().map(|variable| code(variable)).collect();
        let file = match (setting.section, setting.key) {
            (_, "") => String::new(),
            ("", key) => code(key),
            (section, key) => code(&format!("[{section}] {key}")),
        };
        let cells = [&flag, &variables.join(", "), &file, setting.default, setting.what];
        let cells = cells.map(|cell| {
            if cell.is_empty() {
                "|".to_owned()
            } else {
                format!("| {cell}")
            }
        });
        cells.join(" ")
    };
    let expected: Vec<String> = SETTINGS.iter().map(row).collect();
    let readme = fs::read_to_string("README.adoc").unwrap();
    let table = readme
        .split("| Flag | Variable")
        .nth(1)
        .unwrap()
        .split("|===")
        .next()
        .unwrap();
    let rows: Vec<&str> = table
        .lines()
        .skip(1)
        .filter(|line| line.starts_with('|'))
        .collect();
    assert_eq!(
        rows,
        expected,
        "the rows of README.adoc's table should be:\n{}",
        expected.join("\n")
    );
}

/// The cloud and the provider data of every machine class in some text of YAML documents. An example's provider ID is its cloud's.
fn provider_data(yaml: &str) -> Vec<(String, String)> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    documents
        .iter()
        .map(|class| {
            assert_eq!(class["metadata"]["type"], "MachineClasses.omni.sidero.dev");
            assert_eq!(class["metadata"]["namespace"], "default");
            let text = |field: &str| class["spec"]["autoprovision"][field].as_str().unwrap().to_owned();
            (text("providerid"), text("providerdata"))
        })
        .collect()
}

#[test]
fn every_example_class_is_good() {
    let mut examples: Vec<(String, String)> = files("machine-classes", "yaml")
        .into_iter()
        .map(|path| (path.display().to_string(), fs::read_to_string(path).unwrap()))
        .collect();
    for (document, text) in documents() {
        for listing in text.split("[source,yaml]\n----\n").skip(1) {
            examples.push((
                document.display().to_string(),
                listing.split("\n----").next().unwrap().to_owned(),
            ));
        }
    }
    assert!(examples.len() >= 5);
    for (name, yaml) in examples {
        for (cloud, data) in provider_data(&yaml) {
            let schema = fs::read_to_string(format!("machine-classes/{cloud}.schema.json")).unwrap();
            let schema = jsonschema::validator_for(&serde_json::from_str(&schema).unwrap()).unwrap();
            let data: Value = serde_saphyr::from_str(&data).unwrap();
            let faults: Vec<String> = schema.iter_errors(&data).map(|error| error.to_string()).collect();
            assert!(faults.is_empty(), "{name}: {faults:?}");
            let arguments = ["validate", "--cloud", &cloud, "-"];
            let (code, output, faults) = crate::command_line::run(&arguments, &[], &yaml);
            assert_eq!(
                (code, output.as_str()),
                (Some(0), "-: good\n"),
                "{name}: {faults}"
            );
        }
    }
}

#[test]
fn the_settings_file_of_the_readme_is_good() {
    let readme = fs::read_to_string("README.adoc").unwrap();
    let toml = readme
        .split("[source,toml]\n----\n")
        .nth(1)
        .unwrap()
        .split("\n----")
        .next()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(
        &secret,
        include_str!("../src/omni/testdata/keys/omnictl-create.txt"),
    )
    .unwrap();
    let toml = toml
        .replace("/run/secrets/omni-key", secret.to_str().unwrap())
        .replace("/run/secrets/oxide-token", secret.to_str().unwrap());
    let file = folder.path().join("settings.toml");
    fs::write(&file, toml).unwrap();
    let environment = [("CONFIG".to_owned(), file.to_str().unwrap().to_owned())].into();
    let loaded = omni_infra_provider::config::load(
        &omni_infra_provider::config::setting::Flags::default(),
        &environment,
    )
    .unwrap();
    assert_eq!(loaded.config.nameservers.len(), 2);
}

#[test]
fn the_container_is_what_the_makefile_stages() {
    let containerfile = fs::read_to_string("Containerfile").unwrap();
    let makefile = fs::read_to_string("Makefile").unwrap();
    for file in containerfile
        .lines()
        .filter_map(|line| line.strip_prefix("COPY ")?.split(' ').next())
    {
        let staged = format!("dist/image/{}", file.replace("omni-infra-provider", "$(BINARY)"));
        assert!(makefile.contains(&staged), "{file}");
    }
    assert!(containerfile.contains("\nFROM scratch\n") && containerfile.contains("\nUSER 65532"));
}

/// The names of all tests in a folder, as `cargo test` would print them but for what macros make of them: the last part of a path.
fn test_names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let text = fs::read_to_string(&path).unwrap();
        // An attribute or, in a suite for several servers, a macro stands before it.
        for (_, rest) in text
            .match_indices("fn ")
            .map(|(at, found)| (at, &text[at + found.len()..]))
        {
            let name: String = rest
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let module = path.with_extension("");
            let parts: Vec<&str> = module.iter().skip(1).map(|part| part.to_str().unwrap()).collect();
            for part in &parts {
                names.insert(format!("{part}::{name}"));
            }
            names.insert(name);
        }
    }
    names
}

#[test]
fn every_fault_of_the_field_has_a_test_or_a_reason() {
    let faults = fs::read_to_string("FAULTS.adoc").unwrap();
    let names = test_names();
    let mut numbers = BTreeSet::new();
    for row in faults.split("\n| ").skip(1) {
        let Some(number) = row
            .split(' ')
            .next()
            .and_then(|number| number.parse::<u32>().ok())
        else {
            continue;
        };
        numbers.insert(number);
    }
    assert_eq!(numbers, (1..=65).collect(), "every fault has its row");
    let paths = faults
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.contains("::"));
    for path in paths {
        let parts: Vec<&str> = path.split("::").collect();
        let (name, module) = (parts[parts.len() - 1], parts[0]);
        let known =
            names.contains(&format!("{module}::{name}")) || names.contains(&format!("{}::{name}", parts[1]));
        let is_constant =
            name.chars().next().is_some_and(char::is_uppercase) || parts.len() == 2 && module == "Pace";
        assert!(
            known || is_constant,
            "FAULTS.adoc names {path}, and there is no such test"
        );
    }
    let reasons = faults.matches("cannot happen").count();
    let empty = faults.matches("\n| -").count();
    assert_eq!(reasons, empty, "a fault without a test has a reason");
}
