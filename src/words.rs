//! Makes foreign text fit to be shown to a person: on one line, and no longer than one reads.

/// The text with blanks for line breaks, control characters and what turns the direction of writing; at most so many characters.
#[must_use]
pub fn one_line(text: &str, most: usize) -> String {
    let mut chars = text.chars();
    let mut line: String = chars.by_ref().take(most).map(shown).collect();
    if chars.next().is_some() {
        line.push('…');
    }
    line
}

fn shown(char: char) -> char {
    match char {
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => ' ',
        char if char.is_control() => ' ',
        char => char,
    }
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn what_is_shown_is_one_line_of_bounded_length() {
        for (text, shown) in [
            ("short", "short"),
            ("exactly 9", "exactly 9"),
            ("a\nb\u{1b}[31m", "a b [31m"),
            ("a\u{2028}b\u{202e}c", "a b c"),
            ("much longer", "much long…"),
            ("äöüäöüäöüß", "äöüäöüäöü…"),
        ] {
            assert_eq!(one_line(text, 9), shown, "{text:?}");
        }
    }
}
