//! Decides how a Talos document travels as a kernel argument: `talos.config.inline`, base64 of a zstd frame (Talos 1.10).
//!
//! The bytes are part of a schematic, so they have to be the same for ever: the frame holds its content as it is, which every
//! version of every compressor would write in this one way.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Most bytes of a document: the kernel takes 2048 of all arguments on some machines, and 4096 at most.
const MAX_DOCUMENT: usize = 1024;

/// The kernel argument that brings a document to a machine.
///
/// # Errors
///
/// In a sentence, that the document is too long for it.
pub fn kernel_arg(document: &str) -> Result<String, String> {
    if document.len() > MAX_DOCUMENT {
        return Err(format!(
            "{} bytes of Talos configuration do not fit into the kernel's arguments, which take {MAX_DOCUMENT}",
            document.len()
        ));
    }
    Ok(format!(
        "talos.config.inline={}",
        STANDARD.encode(stored_frame(document.as_bytes()))
    ))
}

/// A zstd frame of one raw block (RFC 8878, 3.1.1). The content is shorter than 64 KiB and so is one block.
fn stored_frame(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
    // One segment; the content's size in four bytes; no checksum, no dictionary.
    frame.push(0b1010_0000);
    frame.extend(length.to_le_bytes());
    // The last block, raw.
    let header = length << 3 | 1;
    frame.extend(header.to_le_bytes().into_iter().take(3));
    frame.extend(content);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_zstd_reads_the_document_back() {
        for document in ["", "kind: ResolverConfig\n", &"x".repeat(MAX_DOCUMENT)] {
            let arg = kernel_arg(document).unwrap();
            let frame = STANDARD
                .decode(arg.strip_prefix("talos.config.inline=").unwrap())
                .unwrap();
            assert_eq!(zstd::decode_all(frame.as_slice()).unwrap(), document.as_bytes());
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        assert!(kernel_arg(&"x".repeat(MAX_DOCUMENT + 1)).is_err());
    }
}
