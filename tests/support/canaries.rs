//! Secrets that must be seen nowhere: the forms they could be seen in, and a watch over all that is logged.

use std::fmt::{Debug, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use omni_infra_provider::secret::Secret;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

/// Secrets, in all forms in which something could show them.
#[derive(Default, Clone)]
pub(crate) struct Canaries(Vec<(&'static str, String)>);

impl Canaries {
    /// A secret that stands in some texts as it is.
    pub(crate) fn add(&mut self, what: &'static str, secret: &str) {
        assert!(
            secret.len() >= 8,
            "{what} is too short to be told from ordinary words"
        );
        let mut forms = vec![
            secret.to_owned(),
            hex::encode(secret),
            url::form_urlencoded::byte_serialize(secret.as_bytes()).collect(),
            format!("{:?}", secret.as_bytes())
                .trim_matches(['[', ']'])
                .to_owned(),
        ];
        // In the middle of something that is base64 as a whole: whatever stands before it.
        for before in ["", "x", "xx"] {
            let encoded = STANDARD.encode(format!("{before}{secret}"));
            forms.push(encoded[4.min(before.len() * 4)..encoded.len() - 4].to_owned());
        }
        self.0.extend(forms.into_iter().map(|form| (what, form)));
    }

    /// A service account key: the text, the armour, and the secret number inside.
    pub(crate) fn add_key(&mut self, key: &Secret) {
        let key = key.expose().trim();
        self.0.push(("the key", key[..60].to_owned()));
        self.0.push(("the key", key[key.len() - 60..].to_owned()));
        let json: Value = serde_json::from_slice(&STANDARD.decode(key).unwrap()).unwrap();
        let armour = json["pgp_key"].as_str().unwrap();
        let body: String = armour
            .lines()
            .filter(|line| !line.contains(['-', ':']) && !line.starts_with('='))
            .collect();
        for line in armour.lines().filter(|line| line.len() > 60) {
            self.0.push(("the key's armour", line.to_owned()));
        }
        // Of a version 4 key in the old format: header, version, time, algorithm, curve and the public half take 53 bytes; then how
        // it is locked, its length, and 32 bytes.
        let secret = &STANDARD.decode(body).unwrap()[58..86];
        self.0.push(("the key's number", hex::encode(secret)));
        self.0.push(("the key's number", hex::encode_upper(secret)));
        self.0.push((
            "the key's number",
            format!("{secret:?}").trim_matches(['[', ']']).to_owned(),
        ));
    }

    /// What stands in a text.
    pub(crate) fn seen_in(&self, text: &str) -> Option<&'static str> {
        let seen = self.0.iter().find(|(_, form)| text.contains(form.as_str()));
        seen.map(|(what, _)| *what)
    }

    /// Nothing stands in a text.
    #[track_caller]
    pub(crate) fn assert_unseen(&self, place: &str, text: &str) {
        if let Some(what) = self.seen_in(text) {
            let line = text.lines().find(|line| self.seen_in(line).is_some());
            panic!(
                "{what} was seen in {place}: {}",
                line.unwrap_or("(over several lines)")
            );
        }
    }
}

/// The secrets of the worlds that there are in this process, each with its number; and where one was seen.
static WATCHED: Mutex<Watched> = Mutex::new(Watched {
    worlds: Vec::new(),
    seen: Vec::new(),
});

struct Watched {
    worlds: Vec<(u64, Canaries)>,
    seen: Vec<String>,
}

fn watched() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A watch over the secrets of one world: every line that our code logs, at all levels and in all tests of this process, is looked
/// at until it is dropped.
pub(crate) struct Watch(u64);

impl Watch {
    pub(crate) fn over(canaries: Canaries) -> Self {
        static INSTALLED: Once = Once::new();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        INSTALLED.call_once(|| {
            let ours = filter_fn(|line| line.target().starts_with("omni_infra_provider"));
            let _ = tracing_subscriber::registry()
                .with(Lines.with_filter(ours))
                .try_init();
        });
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        watched().worlds.push((number, canaries));
        Self(number)
    }

    /// Nothing that is watched stands in these texts, nor was it logged anywhere so far.
    pub(crate) fn assert_unseen(&self, texts: impl IntoIterator<Item = String>) {
        texts.into_iter().for_each(|text| look_at(&text));
        let seen = watched().seen.join("\n");
        assert!(seen.is_empty(), "secrets were shown:\n{seen}");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        watched().worlds.retain(|(number, _)| *number != self.0);
    }
}

fn look_at(text: &str) {
    let mut watched = watched();
    let seen = watched
        .worlds
        .iter()
        .find_map(|(_, canaries)| canaries.seen_in(text));
    if let Some(what) = seen {
        watched.seen.push(format!("{what}: {text}"));
    }
}

/// Looks at the fields of every line and span.
struct Lines;

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.0, "{field}={value} ");
    }
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        look_at(&text.0);
    }

    fn on_new_span(&self, span: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let mut text = Text::default();
        span.record(&mut text);
        look_at(&text.0);
    }

    fn on_record(&self, _: &Id, record: &Record<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        record.record(&mut text);
        look_at(&text.0);
    }
}

#[test]
fn a_canary_is_seen_in_every_form() {
    let mut canaries = Canaries::default();
    canaries.add("the token", "s3cret/token+1");
    for text in [
        "refused: s3cret/token+1".to_owned(),
        STANDARD.encode("user:s3cret/token+1"),
        STANDARD.encode("Bearer s3cret/token+1 and more"),
        STANDARD.encode("{s3cret/token+1"),
        format!("Bytes({:?})", b"a s3cret/token+1".to_vec()),
        hex::encode("x s3cret/token+1"),
        "https://host/?token=s3cret%2Ftoken%2B1&a=b".to_owned(),
    ] {
        assert_eq!(canaries.seen_in(&text), Some("the token"), "{text}");
    }
    assert_eq!(canaries.seen_in("<redacted>"), None);
}
