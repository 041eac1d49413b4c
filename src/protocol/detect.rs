//! Detects the dialect of a connection from its first four bytes.
//!
//! As a little-endian u32 they are the length of a frame if the fourth byte is below 0x09. Text has no
//! such byte. So no frame within the limit is taken for text, and no text for a frame. The
//! caller handles fewer than four bytes.

/// How calls are encoded on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    Frame,
    /// One JSON value per line.
    Line,
    /// HTTP/1.1.
    Http,
    /// Any other protocol, such as TLS and SSH. It is answered with `too-large` in a frame, and closed.
    Unknown,
}

/// The largest `limits.frame` in bytes. With it, the fourth byte of a length is at most 0x08.
pub const FRAME_LIMIT_MAX: usize = 128 << 20;

/// The first four bytes of the HTTP methods (RFC 9110, PATCH), which are case-sensitive. The preface of HTTP/2 is
/// included, because its clients understand an HTTP refusal better than a frame.
const HTTP_METHODS: [[u8; 4]; 10] = [
    *b"GET ", *b"HEAD", *b"POST", *b"PUT ", *b"DELE", *b"CONN", *b"OPTI", *b"TRAC", *b"PATC",
    *b"PRI ",
];

pub fn detect(first_four: [u8; 4]) -> Dialect {
    match first_four {
        [.., 0..=8] => Dialect::Frame,
        // Editors and shells of Windows put a byte order mark before text. It is skipped.
        [0xEF, 0xBB, 0xBF, first] if is_line(first) => Dialect::Line,
        [first, ..] if is_line(first) => Dialect::Line,
        method if HTTP_METHODS.contains(&method) => Dialect::Http,
        _ => Dialect::Unknown,
    }
}

/// Returns whether the bytes so far begin the PROXY protocol, version 1 or 2. Version 2 begins like empty
/// lines, but a line contains no NUL.
pub fn is_proxy_protocol(bytes: &[u8]) -> bool {
    begins(bytes, b"PROXY ", 4) || begins(bytes, b"\r\n\r\n\0\r\nQUIT\n", 5)
}

/// Returns whether the bytes continue version 2 of the PROXY protocol, whose first four bytes arrived alone and were
/// taken for empty lines.
pub fn is_proxy_protocol_behind_lines(bytes: &[u8]) -> bool {
    begins(bytes, b"\0\r\nQUIT\n", 1)
}

/// Returns whether the bytes begin like TLS: a record with a hello of the client (RFC 8446, 5.1). Its length makes it
/// look like a frame of more than 16 MiB.
pub fn is_tls_hello(bytes: &[u8]) -> bool {
    matches!(bytes, [0x16, 0x03, 0..=4, ..])
}

/// Returns whether the bytes begin with `signature`, or are a beginning of it of at least `least` bytes.
fn begins(bytes: &[u8], signature: &[u8], least: usize) -> bool {
    bytes.len() >= least && signature.starts_with(&bytes[..bytes.len().min(signature.len())])
}

/// Returns whether lines can begin with this byte: white space, or the first byte of an object or an
/// array.
pub fn is_line(first: u8) -> bool {
    matches!(first, b' ' | b'\t' | b'\n' | b'\r' | b'{' | b'[')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_within_the_limit_is_a_frame() {
        for length in [0, 1, 30, 0x0A0A_0A0A & 0x00FF_FFFF, FRAME_LIMIT_MAX as u32] {
            assert_eq!(detect(length.to_le_bytes()), Dialect::Frame, "{length}");
        }
    }

    #[test]
    fn text_is_detected_by_its_first_bytes() {
        for (first, dialect) in [
            (*b"{\"in", Dialect::Line),
            (*b"[{\"j", Dialect::Line),
            (*b"\n\n\n{", Dialect::Line),
            (*b"{}\r\n", Dialect::Line),
            (*b"  {}", Dialect::Line),
            (*b"{}\t\t", Dialect::Line),
            (*b"\xEF\xBB\xBF{", Dialect::Line),
            (*b"POST", Dialect::Http),
            (*b"GET ", Dialect::Http),
            (*b"PUT ", Dialect::Http),
            (*b"OPTI", Dialect::Http),
            (*b"HEAD", Dialect::Http),
            (*b"PRI ", Dialect::Http),
        ] {
            assert_eq!(
                detect(first),
                dialect,
                "{:?}",
                first.escape_ascii().to_string()
            );
        }
    }

    #[test]
    fn the_proxy_protocol_is_distinguished_from_empty_lines() {
        for bytes in [
            &b"PROXY TCP4 127.0.0.1"[..],
            b"PROX",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11",
            b"\r\n\r\n\0",
        ] {
            assert!(is_proxy_protocol(bytes), "{bytes:?}");
        }
        for bytes in [&b"\r\n\r\n"[..], b"\r\n\r\n{}", b"PRO", b"PROXIES", b""] {
            assert!(!is_proxy_protocol(bytes), "{bytes:?}");
        }
        assert!(is_proxy_protocol_behind_lines(b"\0\r\nQUIT\n\x21"));
        assert!(is_proxy_protocol_behind_lines(b"\0"));
        assert!(!is_proxy_protocol_behind_lines(b""));
        assert!(!is_proxy_protocol_behind_lines(b"\0x"));
    }

    #[test]
    fn other_bytes_are_unknown() {
        for first in [
            *b"\x16\x03\x01\x20", // TLS
            *b"SSH-",
            *b"*1\r\n", // redis
            *b"\xEF\xBB\xBFx",
            *b"PROX",
            *b"get ",
            *b"GETS",
            *b"\xFF\xFF\xFF\xFF",
            *b"null",
        ] {
            assert_eq!(
                detect(first),
                Dialect::Unknown,
                "{:?}",
                first.escape_ascii().to_string()
            );
        }
    }

    /// A hello of less than 0x900 bytes. Over the default limit it is refused as too large. Under a
    /// higher limit it is an unfinished frame, which `read-timeout` ends.
    #[test]
    fn a_short_tls_hello_is_taken_for_the_length_of_a_large_frame() {
        assert_eq!(detect(*b"\x16\x03\x01\x02"), Dialect::Frame);
        assert!(u32::from_le_bytes(*b"\x16\x03\x01\x02") as usize > 16 << 20);
    }
}
