//! Reads what part of a medium a request asks for (RFC 9110, section 14). Pure.

/// What of a body is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it: nothing was asked for, nothing that we understand, or several parts at once, which may be answered so.
    Whole,
    /// From the first byte to the last one, inclusive.
    Bytes(u64, u64),
    /// None of it is there.
    Beyond,
}

/// The part of a body of `length` bytes that a `Range` header asks for.
pub(super) fn part(header: Option<&str>, length: u64) -> Part {
    read(header, length).unwrap_or(Part::Whole)
}

fn read(header: Option<&str>, length: u64) -> Option<Part> {
    let (first, last) = header?.trim().strip_prefix("bytes=")?.split_once('-')?;
    // A sign would pass as a number.
    let number = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u64>().ok()).flatten()
    };
    let end = length.checked_sub(1);
    Some(match (first.trim(), last.trim()) {
        ("", count) => match (number(count)?, end) {
            (0, _) | (_, None) => Part::Beyond,
            (count, Some(end)) => Part::Bytes(length.saturating_sub(count), end),
        },
        (first, "") => match (number(first)?, end) {
            (first, Some(end)) if first <= end => Part::Bytes(first, end),
            _ => Part::Beyond,
        },
        (first, last) => match (number(first)?, number(last)?, end) {
            (first, last, _) if last < first => return None,
            (first, last, Some(end)) if first <= end => Part::Bytes(first, last.min(end)),
            _ => Part::Beyond,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_to_what_is_there() {
        for (header, expected) in [
            ("bytes=0-0", Part::Bytes(0, 0)),
            ("bytes=2-5", Part::Bytes(2, 5)),
            ("bytes=2-", Part::Bytes(2, 9)),
            ("bytes=9-99", Part::Bytes(9, 9)),
            ("bytes=-3", Part::Bytes(7, 9)),
            ("bytes=-99", Part::Bytes(0, 9)),
            ("bytes=-0", Part::Beyond),
            ("bytes=10-", Part::Beyond),
            ("bytes=10-12", Part::Beyond),
            // What is no range is as if it were not there.
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,4-5", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=-", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(part(Some(header), 10), expected, "{header}");
        }
        assert_eq!(part(None, 10), Part::Whole);
        assert_eq!(part(Some("bytes=0-"), 0), Part::Beyond);
        assert_eq!(part(Some("bytes=-1"), 0), Part::Beyond);
    }
}
