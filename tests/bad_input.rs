//! Bad input without a fuzzer: every file of `fuzz/corpus`, and what a seeded chance makes of it, at the doors that the fuzz
//! targets knock at.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

#[path = "../fuzz/src/lib.rs"]
#[expect(
    clippy::expect_used,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "tests, and a crate of its own"
)]
mod doors;

/// Makes another run, or repeats one: a number. Without it every run is the same.
const SEED: &str = "BAD_INPUT_SEED";

/// How often each file of a corpus is changed.
const CHANGES: usize = 30;

/// Longest input that changes make.
const LONGEST: usize = 64 * 1024;

/// Files of a target's corpus, in order.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

/// Changes an input a little, as a fuzzer would.
fn change(dice: &mut StdRng, input: &mut Vec<u8>, other: &[u8]) {
    const ODD: &[&[u8]] = &[
        b"\0",
        b"\xff",
        b"\x80",
        b"\xff\xff\xff\x7f",
        b"\n",
        b"\"",
        b"[",
        b"{",
        b"&a",
        b"*a",
        b"1e999",
        b"\xe2\x80\xa8",
        b"\x1b",
    ];
    let place = dice.gen_range(0..=input.len());
    let end = dice.gen_range(place..=input.len());
    match dice.gen_range(0..7) {
        0 => input.truncate(place),
        1 => drop(input.drain(place..end)),
        2 => drop(input.splice(place..place, ODD.choose(dice).unwrap().iter().copied())),
        3 => {
            let piece = other.get(dice.gen_range(0..=other.len())..).unwrap().to_vec();
            input.splice(place..end, piece);
        }
        4 => {
            let piece = input[place..end].repeat(dice.gen_range(2..50));
            input.splice(place..end, piece);
        }
        _ => {
            if let Some(byte) = input.get_mut(place) {
                *byte ^= 1 << dice.gen_range(0..8);
            }
        }
    }
    input.truncate(LONGEST);
}

/// Gives a door its corpus, and changes of it.
fn knock(target: &str) {
    let (_, door) = doors::TARGETS.iter().find(|(name, _)| *name == target).unwrap();
    let seed = std::env::var(SEED).map_or(1, |seed| seed.parse().unwrap());
    let mut dice = StdRng::seed_from_u64(seed);
    let files = corpus(target);
    let give = |name: &str, input: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| door(input))).is_err() {
            let shown: String = input
                .iter()
                .take(2000)
                .flat_map(|byte| byte.escape_ascii())
                .map(char::from)
                .collect();
            panic!("{target}: {name} ({SEED}={seed}), {} bytes: {shown}", input.len());
        }
    };
    for (name, input) in &files {
        give(name, input);
    }
    for (name, input) in &files {
        for _ in 0..CHANGES {
            let mut input = input.clone();
            let (_, other) = files.choose(&mut dice).unwrap();
            for _ in 0..dice.gen_range(1..4) {
                change(&mut dice, &mut input, other);
            }
            give(&format!("a change of {name}"), &input);
        }
    }
}

macro_rules! doors {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                knock(stringify!($target));
            }
        )*
        const KNOCKED: &[&str] = &[$(stringify!($target)),*];
    };
}

doors! {
    provider_data machine_request settings_file service_account_key cosi_message join_config oxide_answers factory_stream
    schematic_answer
}

#[test]
fn every_door_has_a_target_a_corpus_and_a_test() {
    let manifest = fs::read_to_string("fuzz/Cargo.toml").unwrap();
    let names: Vec<&str> = doors::TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, KNOCKED);
    assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    for name in names {
        assert!(
            manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")),
            "{name}"
        );
        let target = fs::read_to_string(format!("fuzz/fuzz_targets/{name}.rs")).unwrap();
        assert!(target.contains(&format!("::{name}(input)")), "{name}");
        assert!(corpus(name).len() > 3, "{name}");
    }
}
