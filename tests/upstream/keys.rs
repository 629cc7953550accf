//! Service account keys: what upstream's library makes and reads, and what ours read.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use omni_infra_provider::omni::ServiceAccount;
use omni_infra_provider::secret::Secret;
use serde::Deserialize;
use serde_json::{Value, json};

use super::dice::Dice;
use super::vectors::{Vectors, assert_none};

const KEYS: usize = 30;
const INPUTS: usize = 3000;

#[derive(Debug, Deserialize)]
struct Made {
    key: String,
    fingerprint: String,
    error: String,
}

#[derive(Debug, Deserialize)]
struct Account {
    name: String,
    fingerprint: String,
    error: String,
}

/// Makes keys as `omnictl` does, good for so many seconds.
async fn make(vectors: &mut Vectors, dice: &mut Dice, lifetimes: &[u64]) -> Vec<Made> {
    let inputs: Vec<Value> = lifetimes
        .iter()
        .map(|lifetime| {
            json!({
                "account": dice.pick(&["infra-provider:oxide", "oxide", "infra-provider:a-1"]),
                "name": dice.pick(&["oxide", "someone@example.com", ""]),
                "comment": dice.pick(&["", "omni", "a b"]),
                "email": dice.pick(&["oxide@infra-provider.serviceaccount.omni.sidero.dev", "a@b"]),
                "lifetime": lifetime,
            })
        })
        .collect();
    let made: Vec<Made> = vectors.ask("make keys", &inputs).await;
    for made in &made {
        assert_eq!(made.error, "");
    }
    made
}

fn read(key: &str) -> Account {
    match ServiceAccount::parse(&Secret::new(key)) {
        Ok(account) => Account {
            name: account.name().to_owned(),
            fingerprint: account.fingerprint().to_owned(),
            error: String::new(),
        },
        Err(error) => Account {
            name: String::new(),
            fingerprint: String::new(),
            error: error.to_string(),
        },
    }
}

#[tokio::test]
async fn a_key_of_upstreams_making_is_read_with_its_fingerprint_and_its_end() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let lifetimes: Vec<u64> = (0..KEYS as u64).map(|n| n * n * 37_000).collect();
    let made = make(&mut vectors, &mut dice, &lifetimes).await;
    for (made, lifetime) in made.iter().zip(lifetimes) {
        let account = ServiceAccount::parse(&Secret::new(&made.key)).unwrap();
        assert_eq!(account.fingerprint(), made.fingerprint);
        let end = (lifetime > 0).then(|| account.created().after(Duration::from_secs(lifetime)));
        assert_eq!(account.expires(), end, "{lifetime} s");
    }
}

/// A key's text, and what is inside.
struct Text {
    key: String,
    name: String,
    armour: String,
}

impl Text {
    fn new(key: &str) -> Self {
        let json: Value = serde_json::from_slice(&STANDARD.decode(key).unwrap()).unwrap();
        Self {
            key: key.to_owned(),
            name: json["name"].as_str().unwrap().to_owned(),
            armour: json["pgp_key"].as_str().unwrap().to_owned(),
        }
    }

    fn with_armour(&self, armour: &str) -> String {
        STANDARD.encode(json!({ "name": self.name, "pgp_key": armour }).to_string())
    }
}

/// Puts something anywhere in a text, in place of so many characters.
fn put(dice: &mut Dice, text: &str, piece: &str, instead: usize) -> String {
    let place = dice.below(text.len() + 1);
    let rest = text.get(place + instead..).unwrap_or_default();
    format!("{}{piece}{rest}", &text[..place])
}

/// What happens to a key on its way from Omni to us, through files, terminals and editors.
fn carry(dice: &mut Dice, text: &Text) -> String {
    let Text { key, name, armour } = text;
    let without = |start: char| {
        let lines: Vec<&str> = armour.lines().filter(|line| !line.starts_with(start)).collect();
        lines.join("\n")
    };
    match dice.below(12) {
        0 => format!(
            "{}{key}{}",
            dice.pick(&["", " ", "\n"]),
            dice.pick(&["", "\n", "\r\n", " "])
        ),
        1 => {
            let piece = dice.pick(&["\n", "\r\n", " ", "\n  "]);
            put(dice, key, piece, 0)
        }
        2 => key.trim_end_matches('=').to_owned(),
        3 => STANDARD.encode(format!(" {}\n", json!({ "pgp_key": armour, "name": name }))),
        4 => STANDARD
            .encode(json!({ "name": name, "pgp_key": armour, "more": [1, { "a": null }] }).to_string()),
        5 => text.with_armour(armour.trim()),
        6 => text.with_armour(&armour.replace('\n', "\r\n")),
        7 => text.with_armour(&armour.replace('\n', dice.pick(&[" \n", "\n ", "\n\t"]))),
        8 => text.with_armour(&without('=')),
        9 => {
            let between = dice.pick(&["\n \n", "\nVersion: 1\n\n", "\nVersion: 1\nComment: a b\n\n"]);
            text.with_armour(&armour.replacen("\n\n", between, 1))
        }
        10 => {
            let before = dice.pick(&["", "\n", "before\n"]);
            text.with_armour(&format!(
                "{before}{armour}{}",
                dice.pick(&["\n", "\n\n", "\nafter\n"])
            ))
        }
        _ => key.clone(),
    }
}

/// What should happen to no key.
fn spoil(dice: &mut Dice, text: &Text) -> String {
    let Text { key, name, armour } = text;
    let encode = |json: Value| STANDARD.encode(json.to_string());
    match dice.below(12) {
        0 => {
            let piece = dice.pick(&["A", "=", "-", "_", "é", "\0", ""]);
            put(dice, key, piece, 1)
        }
        1 => put(dice, key, "", key.len()),
        2 => encode(json!({ "name": name })),
        3 => encode(json!({ "pgp_key": armour })),
        4 => {
            let names = [
                json!(""),
                json!("a b"),
                json!("é"),
                json!("a\n"),
                json!(null),
                json!(1),
                json!("!#"),
            ];
            encode(json!({ "name": names[dice.below(names.len())], "pgp_key": armour }))
        }
        5 => encode(json!({ "Name": name, "PGP_Key": armour })),
        6 => STANDARD.encode(format!(
            r#"{{"name":"other",{}"#,
            &json!({ "name": name, "pgp_key": armour }).to_string()[1..]
        )),
        7 => {
            let json = json!({ "name": name, "pgp_key": armour });
            STANDARD.encode(format!("{json}{}", dice.pick(&["x", "{}", "\0"])))
        }
        8 => encode(json!([name, armour])),
        9 => text.with_armour(&armour.replace("PRIVATE", dice.pick(&["PUBLIC", "private", "SECRET"]))),
        10 => text.with_armour(&format!("{armour}{armour}")),
        _ => {
            let piece = dice.pick(&["A", "\n", " ", "=", "é", "-", ""]);
            let instead = dice.below(3);
            text.with_armour(&put(dice, armour, piece, instead))
        }
    }
}

/// Changes keys, and has upstream's library and ours read them.
async fn compare(change: fn(&mut Dice, &Text) -> String, may_refuse: bool) {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let made = make(&mut vectors, &mut dice, &[0, 3600, 31_536_000]).await;
    let keys: Vec<Text> = made.iter().map(|made| Text::new(&made.key)).collect();
    let inputs: Vec<(usize, String)> = (0..INPUTS)
        .map(|_| {
            let which = dice.below(keys.len());
            (which, change(&mut dice, &keys[which]))
        })
        .collect();
    let texts: Vec<&str> = inputs.iter().map(|(_, text)| text.as_str()).collect();
    let upstream: Vec<Account> = vectors.ask("read keys", &texts).await;
    let mut differences = Vec::new();
    for ((which, text), upstream) in inputs.iter().zip(&upstream) {
        let ours = read(text);
        // Where upstream reads nothing, ours may read the key that it was, and no other.
        let (name, fingerprint) = match upstream.error.as_str() {
            "" => (&upstream.name, &upstream.fingerprint),
            _ => (&keys[*which].name, &made[*which].fingerprint),
        };
        let good = match ours.error.as_str() {
            "" => ours.name == name.trim_start_matches("infra-provider:") && ours.fingerprint == *fingerprint,
            _ => may_refuse || !upstream.error.is_empty(),
        };
        if !good {
            differences.push(format!(
                "{text:?}\n    upstream {upstream:?}\n    ours     {ours:?}"
            ));
        }
    }
    assert_none(&differences, &dice);
}

#[tokio::test]
async fn a_key_that_went_a_long_way_is_read_as_upstream_reads_it() {
    compare(carry, false).await;
}

#[tokio::test]
async fn a_spoilt_key_is_never_read_as_another() {
    compare(spoil, true).await;
}
