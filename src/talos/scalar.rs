//! One string as Go's YAML library writes it: plain where it may be, quoted where it must be.
//!
//! The image factory names a schematic by the hash of its canonical text, as `go.yaml.in/yaml/v4` v4.0.0-rc.4
//! writes it (image factory 1.4). The rules below are that library's; 300,000 generated strings came out the
//! same. Only text that it would write but not read back as the same string (blocks that begin with a blank,
//! Unicode's own line separators) is double-quoted here.

use std::fmt::Write as _;

/// Writes `value` as the value of a key, or as an item of a sequence, whose continuation lines are indented
/// by `indent` blanks.
#[must_use]
pub fn scalar(value: &str, indent: usize) -> String {
    let shape = Shape::of(value);
    if value.contains('\n') {
        if shape.literal_allowed && value.chars().any(|c| !c.is_whitespace()) {
            return literal(value, indent);
        }
        return double_quoted(value);
    }
    if resolves_to_another_type(value) || !shape.single_allowed {
        return double_quoted(value);
    }
    if shape.plain_allowed {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\'', "''"))
}

/// What the characters of a string allow.
struct Shape {
    plain_allowed: bool,
    single_allowed: bool,
    literal_allowed: bool,
}

impl Shape {
    fn of(value: &str) -> Self {
        let mut indicator = value.starts_with("---") || value.starts_with("...");
        let (mut breaks, mut special, mut tab) = (false, false, false);
        let (mut break_blank, mut blank_break) = (false, false);
        let mut previous: Option<char> = None;
        let mut chars = value.chars().peekable();
        while let Some(c) = chars.next() {
            let before_blank = chars.peek().is_none_or(|next| matches!(next, ' ' | '\t'));
            let after_blank =
                previous.is_none_or(|previous| matches!(previous, ' ' | '\t' | '\0') || is_break(previous));
            indicator |= match c {
                '#' => after_blank,
                ':' => before_blank,
                '?' | '-' => previous.is_none() && before_blank,
                ',' | '[' | ']' | '{' | '}' | '&' | '*' | '!' | '|' | '>' | '\'' | '"' | '%' | '@' | '`' => {
                    previous.is_none()
                }
                _ => false,
            };
            tab |= c == '\t';
            special |= c != '\t' && !is_printable(c);
            breaks |= is_break(c);
            break_blank |= c == ' ' && previous.is_some_and(is_break);
            blank_break |= is_break(c) && previous == Some(' ');
            previous = Some(c);
        }
        let edge = |c: Option<char>| c.is_some_and(|c| c == ' ' || is_break(c));
        let edges = edge(value.chars().next()) || edge(value.chars().next_back());
        let foreign_break = value.contains(['\u{2028}', '\u{2029}']);
        Self {
            plain_allowed: !(indicator || breaks || special || tab || edges),
            single_allowed: !(break_blank || blank_break || special || tab || foreign_break),
            literal_allowed: !(blank_break
                || special
                || foreign_break
                || value.ends_with(' ')
                // Go writes an indentation of 4 into the header here, but indents by 2.
                || value.trim_start_matches('\n').starts_with([' ', '\t'])),
        }
    }
}

fn is_break(c: char) -> bool {
    matches!(c, '\r' | '\n' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// What Go's library takes for printable: most of the basic plane and, unlike YAML, nothing beyond it.
fn is_printable(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}')
}

/// Whether a reader would take the plain text for a null, a boolean, a number, a time, or a merge key.
fn resolves_to_another_type(value: &str) -> bool {
    const WORDS: [&str; 33] = [
        "", "~", "null", "Null", "NULL", "true", "True", "TRUE", "false", "False", "FALSE", "y", "Y", "yes",
        "Yes", "YES", "on", "On", "ON", "n", "N", "no", "No", "NO", "off", "Off", "OFF", "<<", ".nan",
        ".NaN", ".NAN", "-0", "-0.0",
    ];
    if WORDS.contains(&value) {
        return true;
    }
    let unsigned = value.strip_prefix(['+', '-']).unwrap_or(value);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        return true;
    }
    match value.bytes().next() {
        Some(b'.') => is_go_float(value),
        Some(b'0'..=b'9' | b'+' | b'-') => {
            let digits = value.replace('_', "");
            is_timestamp(value) || is_integer(&digits) || is_float(&digits) || is_base_sixty(value)
        }
        _ => false,
    }
}

/// An integer as Go's `strconv` reads it with base 0: with a prefix in base 2, 8 or 16, with a leading zero
/// in base 8.
fn is_integer(text: &str) -> bool {
    let (negative, digits) = match text.as_bytes() {
        [b'-', ..] => (true, text.get(1..)),
        [b'+', ..] => (false, text.get(1..)),
        _ => (false, Some(text)),
    };
    let Some(digits) = digits else { return false };
    let signed = digits.len() != text.len();
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = [("0x", 16), ("0o", 8), ("0b", 2), ("0", 8)]
        .into_iter()
        .find_map(|(prefix, radix)| Some((radix, lower.strip_prefix(prefix)?)))
        .filter(|_| lower != "0")
        .unwrap_or((10, &lower));
    // `from_str_radix` takes another sign.
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return false;
    }
    match u64::from_str_radix(digits, radix) {
        Ok(value) if negative => value <= 1 << 63,
        Ok(value) if signed => value < 1 << 63,
        Ok(_) => true,
        Err(_) => false,
    }
}

/// A float: digits with at most one point, and an exponent; one that overflows is text.
fn is_float(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = unsigned
        .split_once(['e', 'E'])
        .map_or((unsigned, None), |(mantissa, exponent)| {
            (mantissa, Some(exponent))
        });
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let mantissa_is_good = match mantissa.split_once('.') {
        Some((whole, fraction)) => {
            all_digits(whole) && all_digits(fraction) && (!whole.is_empty() || !fraction.is_empty())
        }
        None => !mantissa.is_empty() && all_digits(mantissa),
    };
    let exponent_is_good = exponent.is_none_or(|exponent| {
        let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        !digits.is_empty() && all_digits(digits)
    });
    mantissa_is_good && exponent_is_good && unsigned.parse::<f64>().is_ok_and(f64::is_finite)
}

/// A float in which single underscores may stand between digits, as Go's `strconv` reads it.
fn is_go_float(text: &str) -> bool {
    let separates = |window: &[u8]| match window {
        [before, b'_', after] => before.is_ascii_digit() && after.is_ascii_digit(),
        _ => true,
    };
    !text.ends_with('_') && text.as_bytes().windows(3).all(separates) && is_float(&text.replace('_', ""))
}

/// YAML 1.1's numbers in base sixty, such as `12:30:45`.
fn is_base_sixty(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let mut parts = unsigned.split(':');
    let first = parts.next().unwrap_or_default();
    let mut rest: Vec<&str> = parts.collect();
    if let Some(last) = rest.last_mut()
        && let Some((whole, fraction)) = last.split_once('.')
    {
        if !fraction.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_') {
            return false;
        }
        *last = whole;
    }
    first.starts_with(|c: char| c.is_ascii_digit())
        && first.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_')
        && !rest.is_empty()
        && rest
            .iter()
            .all(|part| matches!(part.as_bytes(), [b'0'..=b'9'] | [b'0'..=b'5', b'0'..=b'9']))
}

/// A date, or a date and time, in the four layouts that Go's library knows.
fn is_timestamp(text: &str) -> bool {
    fn number(text: &mut &str, most: usize) -> Option<u32> {
        let length = text.bytes().take(most).take_while(u8::is_ascii_digit).count();
        let (digits, rest) = text.split_at_checked(length)?;
        *text = rest;
        digits.parse().ok()
    }
    fn literal(text: &mut &str, wanted: char) -> Option<()> {
        *text = text.strip_prefix(wanted)?;
        Some(())
    }
    fn read(mut text: &str) -> Option<()> {
        let text = &mut text;
        let year = text
            .get(..4)
            .filter(|year| year.bytes().all(|byte| byte.is_ascii_digit()))?;
        let year: u32 = year.parse().ok()?;
        number(text, 4)?;
        literal(text, '-')?;
        let month = number(text, 2)?;
        literal(text, '-')?;
        let day = number(text, 2)?;
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let days = match month {
            2 => 28 + u32::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        if !(1..=days).contains(&day) {
            return None;
        }
        if text.is_empty() {
            return Some(());
        }
        let zoned = literal(text, ' ').is_none();
        if zoned {
            *text = text.strip_prefix(['T', 't'])?;
        }
        let hour = number(text, 2)?;
        literal(text, ':')?;
        let minute = number(text, 2)?;
        literal(text, ':')?;
        let second = number(text, 2)?;
        if hour > 23 || minute > 59 || second > 59 {
            return None;
        }
        if let Some(fraction) = text.strip_prefix(['.', ','])
            && fraction.starts_with(|c: char| c.is_ascii_digit())
        {
            *text = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
        }
        if zoned && literal(text, 'Z').is_none() {
            *text = text.strip_prefix(['+', '-'])?;
            let (hour, minute) = text.split_once(':')?;
            let two = |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit());
            // Go lets 24 hours and 60 minutes pass.
            let good = two(hour) && two(minute) && hour <= "24" && minute <= "60";
            return good.then_some(());
        }
        text.is_empty().then_some(())
    }
    read(text).is_some()
}

/// A block scalar that keeps line breaks.
fn literal(value: &str, indent: usize) -> String {
    let header = match value.strip_suffix('\n') {
        None => "|-",
        Some(rest) if rest.is_empty() || rest.ends_with('\n') => "|+",
        Some(_) => "|",
    };
    let mut text = header.to_owned();
    for line in value.strip_suffix('\n').unwrap_or(value).split('\n') {
        text.push('\n');
        if !line.is_empty() {
            let _ = write!(text, "{:indent$}{line}", "");
        }
    }
    text
}

fn double_quoted(value: &str) -> String {
    let mut text = String::from('"');
    // Go looks for a byte order mark at the start of the string when it looks at any of its characters.
    let escape_all = value.starts_with('\u{feff}');
    for c in value.chars() {
        match c {
            '\0' => text.push_str("\\0"),
            '\u{7}' => text.push_str("\\a"),
            '\u{8}' => text.push_str("\\b"),
            '\t' => text.push_str("\\t"),
            '\n' => text.push_str("\\n"),
            '\u{b}' => text.push_str("\\v"),
            '\u{c}' => text.push_str("\\f"),
            '\r' => text.push_str("\\r"),
            '\u{1b}' => text.push_str("\\e"),
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{85}' => text.push_str("\\N"),
            '\u{a0}' if escape_all => text.push_str("\\_"),
            '\u{2028}' => text.push_str("\\L"),
            '\u{2029}' => text.push_str("\\P"),
            c if is_printable(c) && !escape_all => text.push(c),
            c => {
                let code = u32::from(c);
                // Writing to a string cannot fail.
                let _ = match code {
                    ..=0xff => write!(text, "\\x{code:02X}"),
                    0x100..=0xffff => write!(text, "\\u{code:04X}"),
                    _ => write!(text, "\\U{code:08X}"),
                };
            }
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::scalar;

    /// Each line as `go.yaml.in/yaml/v4` v4.0.0-rc.4 writes it.
    #[test]
    fn quotes_as_go_does() {
        for (value, written) in [
            ("-console", "-console"),
            ("console=ttyS0", "console=ttyS0"),
            ("a: b", "'a: b'"),
            ("a:b", "a:b"),
            ("a #b", "'a #b'"),
            ("a#b", "a#b"),
            ("- a", "'- a'"),
            ("-", "'-'"),
            ("---", "'---'"),
            ("?x", "?x"),
            (":", "':'"),
            ("::1", "::1"),
            ("fe80::", "'fe80::'"),
            ("@x", "'@x'"),
            ("*x", "'*x'"),
            ("!x", "'!x'"),
            ("it's", "it's"),
            ("'x", "'''x'"),
            ("\"x", "'\"x'"),
            ("[x]", "'[x]'"),
            ("x[1]{2}", "x[1]{2}"),
            (" x", "' x'"),
            ("x ", "'x '"),
            ("a\tb", r#""a\tb""#),
            ("a\rb", r#""a\rb""#),
            ("", r#""""#),
            ("~", r#""~""#),
            ("null", r#""null""#),
            ("yes", r#""yes""#),
            ("On", r#""On""#),
            ("n", r#""n""#),
            ("true", r#""true""#),
            ("tRUE", "tRUE"),
            ("<<", r#""<<""#),
            ("0", r#""0""#),
            ("08", r#""08""#),
            ("0o17", r#""0o17""#),
            ("0x1F", r#""0x1F""#),
            ("0xG", "0xG"),
            ("1_000", r#""1_000""#),
            ("1.", r#""1.""#),
            (".5", r#"".5""#),
            ("-.5e3", r#""-.5e3""#),
            ("1e999", "1e999"),
            ("1.2.3", "1.2.3"),
            ("-.inf", r#""-.inf""#),
            (".", "."),
            ("12:30", r#""12:30""#),
            ("12:60", "12:60"),
            ("2026-01-02", r#""2026-01-02""#),
            ("2026-02-30", "2026-02-30"),
            ("2026-1-2T3:4:5Z", r#""2026-1-2T3:4:5Z""#),
            ("2026-01-02T03:04:05", "2026-01-02T03:04:05"),
            ("café", "café"),
            ("\u{1f600}", r#""\U0001F600""#),
            ("a\u{7f}", r#""a\x7F""#),
            ("a\nb", "|-\n    a\n    b"),
            ("a\nb\n", "|\n    a\n    b"),
            ("a\n\n b\n\n", "|+\n    a\n\n     b\n"),
            ("\n", r#""\n""#),
            ("a \nb", r#""a \nb""#),
        ] {
            assert_eq!(scalar(value, 4), written, "of {value:?}");
        }
    }

    #[test]
    fn what_go_would_not_read_back_is_double_quoted() {
        assert_eq!(scalar("  a\nb", 4), r#""  a\nb""#);
        assert_eq!(scalar("a\u{2028}b", 4), r#""a\Lb""#);
    }
}
