//! Throws the inputs that upstream's functions and ours are compared on.

use std::env;
use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Makes another run, or repeats one: a number. Without it every run is the same, so that CI judges the change and not the dice.
const SEED: &str = "UPSTREAM_SEED";

/// What YAML, JSON, URLs and Go treat in some way of their own, and what they do not.
const PIECES: &[&str] = &[
    "a",
    "Z",
    "0",
    "1",
    "7",
    "9",
    "-",
    "+",
    ":",
    " ",
    "  ",
    "#",
    "'",
    "\"",
    "\\",
    "\t",
    "\n",
    "\r",
    "\0",
    "{",
    "}",
    "[",
    "]",
    "&",
    "*",
    "!",
    "|",
    ">",
    "<",
    "%",
    "@",
    "`",
    "?",
    ",",
    "=",
    "~",
    "_",
    ".",
    "/",
    ";",
    "$",
    "(",
    "^",
    "é",
    "\u{7f}",
    "\u{80}",
    "\u{85}",
    "\u{a0}",
    "\u{2028}",
    "\u{2029}",
    "\u{fb00}",
    "\u{feff}",
    "\u{fffd}",
    "\u{1f600}",
    "true",
    "No",
    "null",
    "0x",
    "0o",
    "0b",
    "e3",
    ".inf",
    ".nan",
    "2026-01-02",
    "T03:04:05",
    "12:30",
    "<<",
    "---",
    "...",
    "talos",
    "console=ttyS0",
];

/// A source of chance that tells its seed when a test fails.
pub(super) struct Dice {
    seed: u64,
    rng: StdRng,
}

impl Dice {
    pub(super) fn new() -> Self {
        let seed = match env::var(SEED) {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => 1,
        };
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// A number below another.
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.rng.gen_range(0..end)
    }

    pub(super) fn port(&mut self) -> i32 {
        self.rng.gen_range(1..=65535)
    }

    /// True once in so many times.
    pub(super) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(super) fn pick<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }

    /// Text of at most so many pieces.
    pub(super) fn text(&mut self, most: usize) -> String {
        let length = self.below(most + 1);
        (0..length).map(|_| self.pick(PIECES)).collect()
    }

    /// Ordinary words, sometimes more than fit on a line.
    pub(super) fn words(&mut self) -> String {
        let length = self.below(40);
        let words: Vec<&str> = (0..length)
            .map(|_| self.pick(&["talos", "a=b", "net.ifnames=0", "x", "console=ttyS0,115200"]))
            .collect();
        words.join(" ")
    }

    /// At most so many of something.
    pub(super) fn some<T>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let length = self.below(most + 1);
        (0..length).map(|_| one(self)).collect()
    }
}

/// How to repeat it.
impl fmt::Display for Dice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SEED}={}", self.seed)
    }
}
