//! A value that no log, status, debug print or error may show.
//!
//! A [`Secret`] prints as `<redacted>`. Behind that stands a second line, for what a server echoes or a library quotes: what is
//! [guarded](Secret::guard) is taken out of every text on its way to a person ([`hide`]).

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What stands in the place of a secret.
const REDACTED: &str = "<redacted>";

/// Most forms of secrets that are guarded; the oldest go first. Join tokens rotate.
const GUARDED: usize = 400;

/// Shortest form that is guarded, in bytes: anything shorter stands in ordinary words.
const SHORTEST: usize = 8;

static FORMS: RwLock<VecDeque<String>> = RwLock::new(VecDeque::new());

/// A secret. `Debug` and `Display` print `<redacted>`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that has to send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Takes the value out of all texts that are hidden from now on: as it is, in base64, in hexadecimal digits and as a part of a
    /// URL.
    pub fn guard(&self) {
        if self.0.len() < SHORTEST {
            return;
        }
        let known = FORMS
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&self.0);
        if known {
            return;
        }
        let encoded = STANDARD.encode(&self.0);
        let new = [
            url::form_urlencoded::byte_serialize(self.0.as_bytes()).collect(),
            hex::encode(&self.0),
            encoded.trim_end_matches('=').to_owned(),
            self.0.clone(),
        ];
        let mut forms = FORMS.write().unwrap_or_else(PoisonError::into_inner);
        for form in new {
            if !forms.contains(&form) {
                forms.push_back(form);
            }
        }
        while forms.len() > GUARDED {
            forms.pop_front();
        }
    }
}

/// The text without the secrets that are guarded.
#[must_use]
pub fn hide(text: &str) -> Cow<'_, str> {
    let mut text = Cow::Borrowed(text);
    for form in FORMS.read().unwrap_or_else(PoisonError::into_inner).iter() {
        if text.contains(form.as_str()) {
            text = text.replace(form.as_str(), REDACTED).into();
        }
    }
    text
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_guarded_is_hidden_in_every_form() {
        let secret = Secret::new("guarded secret/1");
        secret.guard();
        for form in [
            "guarded secret/1",
            "Z3VhcmRlZCBzZWNyZXQvMQ==",
            "Z3VhcmRlZCBzZWNyZXQvMQ",
            "guarded+secret%2F1",
        ] {
            let text = format!("refused: {form}, try again");
            let hidden = hide(&text);
            assert!(hidden.starts_with("refused: <redacted>"), "{form}: {hidden}");
            assert!(hidden.ends_with(", try again"), "{form}: {hidden}");
        }
        assert_eq!(hide("nothing of it"), "nothing of it");
    }

    #[test]
    fn an_ordinary_word_is_never_taken_for_a_secret() {
        Secret::new("word").guard();
        assert_eq!(hide("a word"), "a word");
    }
}
