//! Reads the machine resource of the Go provider, whose machines this one takes over.
//!
//! It is a protobuf message, and the only one that a backend meets: a reader of the wire format's four shapes
//! does.

use super::Project;
use crate::cloud::Legacy;

/// Reads the Go provider's machine resource: project (1), instance (2), disks (3), each an ID (1) and a name
/// (2). It may be empty, and what it does not say is looked for by name.
pub(super) fn legacy(spec: &[u8]) -> Option<Legacy<Project>> {
    let mut project = (None, None);
    let mut instance = (None, None);
    let mut rest = spec;
    while !rest.is_empty() {
        let (number, field) = next_field(&mut rest)?;
        match (number, field) {
            (1, Some(bytes)) => project = id_and_name(bytes)?,
            (2, Some(bytes)) => instance = id_and_name(bytes)?,
            _ => {}
        }
    }
    // The name is what the class says, so that scopes compare equal; the class may have named it by its ID as
    // well.
    let scope = project.1.or(project.0)?;
    Some(Legacy {
        scope: Project(scope),
        id: instance.0,
    })
}

type IdAndName = (Option<String>, Option<String>);

fn id_and_name(mut bytes: &[u8]) -> Option<IdAndName> {
    let (mut id, mut name) = (None, None);
    while !bytes.is_empty() {
        let (number, field) = next_field(&mut bytes)?;
        let text = field
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .filter(|text| !text.is_empty())
            .map(str::to_owned);
        match number {
            1 => id = text,
            2 => name = text,
            _ => {}
        }
    }
    Some((id, name))
}

/// The next field of a protobuf message: its number and, where it is length-delimited, its bytes.
fn next_field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Option<&'a [u8]>)> {
    let key = varint(rest)?;
    let number = key >> 3;
    let field = match key & 7 {
        0 => {
            varint(rest)?;
            None
        }
        1 => {
            take(rest, 8)?;
            None
        }
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            Some(take(rest, length)?)
        }
        5 => {
            take(rest, 4)?;
            None
        }
        _ => return None,
    };
    Some((number, field))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
    }

    #[test]
    fn the_go_providers_record_is_read_as_far_as_it_goes() {
        let pair = |id: &str, name: &str| [field(1, id.as_bytes()), field(2, name.as_bytes())].concat();
        let project = field(1, &pair("p-id", "prod"));
        let instance = field(2, &pair("i-id", "web-x7k"));
        let disk = field(3, &pair("d-id", "web-x7k"));
        let read = |parts: &[&[u8]]| legacy(&parts.concat()).map(|legacy| (legacy.scope.0, legacy.id));
        let whole = Some(("prod".to_owned(), Some("i-id".to_owned())));
        assert_eq!(read(&[&project, &instance, &disk, &disk]), whole);
        assert_eq!(read(&[&disk, &instance, &project]), whole);
        // Fields that a newer version may add.
        assert_eq!(
            read(&[
                &[0x40, 0x96, 0x01],
                &project,
                &[0x4d, 1, 2, 3, 4],
                &instance,
                &[0x51, 1, 2, 3, 4, 5, 6, 7, 8]
            ]),
            whole
        );
        assert_eq!(read(&[&project]), Some(("prod".to_owned(), None)));
        let by_id = field(1, &field(1, b"p-id"));
        assert_eq!(read(&[&by_id]), Some(("p-id".to_owned(), None)));
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[&instance]), None);
        for cut in 1..project.len() {
            assert_eq!(read(&[&project[..cut]]), None, "{cut}");
        }
        assert_eq!(read(&[&[0xff; 20]]), None);
    }
}
