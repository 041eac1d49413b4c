//! Which dialect a connection speaks, told by its first four bytes.
//!
//! Read as a little-endian u32 they are a frame's length if the fourth byte is below 0x09, which
//! text can't have: so no frame within the limit is mistaken for text, and no text for a frame.
//! What is done with fewer than four bytes is the connection's business.

/// How calls are written on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// A length and a body.
    Frame,
    /// One JSON value a line.
    Line,
    /// HTTP/1.1.
    Http,
    /// Not one of ours, TLS and SSH among them: answered `too-large` as a frame, and closed.
    Unknown,
}

/// The largest `limits.frame` in bytes: with it the fourth byte of a length is at most 0x08.
pub const FRAME_LIMIT_MAX: usize = 128 << 20;

/// The first four bytes of the methods of HTTP (RFC 9110, PATCH, and the preface of HTTP/2, whose
/// client understands an HTTP refusal better than a frame). They are case-sensitive.
const HTTP_METHODS: [[u8; 4]; 10] = [
    *b"GET ", *b"HEAD", *b"POST", *b"PUT ", *b"DELE", *b"CONN", *b"OPTI", *b"TRAC", *b"PATC",
    *b"PRI ",
];

/// Tells the dialect from a connection's first four bytes.
pub fn detect(first_four: [u8; 4]) -> Dialect {
    match first_four {
        [.., 0..=8] => Dialect::Frame,
        // Editors and shells of Windows put a byte order mark before text. It is passed over.
        [0xEF, 0xBB, 0xBF, first] if is_line(first) => Dialect::Line,
        [first, ..] if is_line(first) => Dialect::Line,
        method if HTTP_METHODS.contains(&method) => Dialect::Http,
        _ => Dialect::Unknown,
    }
}

/// Whether a connection begins with the PROXY protocol, version 1 or 2, as far as the bytes are there. Version
/// 2 begins like empty lines, but a line holds no NUL.
pub fn is_proxy_protocol(bytes: &[u8]) -> bool {
    let begins = |signature: &[u8], least: usize| {
        bytes.len() >= least && signature.starts_with(&bytes[..bytes.len().min(signature.len())])
    };
    begins(b"PROXY ", 4) || begins(b"\r\n\r\n\0\r\nQUIT\n", 5)
}

/// Whether lines begin with this byte: white space, or what an object or an array begins with.
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
    fn text_is_told_by_how_it_begins() {
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
    fn the_proxy_protocol_is_told_from_empty_lines() {
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
    }

    #[test]
    fn the_rest_is_not_ours() {
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

    /// A hello of under 0x900 bytes: over the default limit it is refused as too large, under a
    /// higher one it is an unfinished frame, which read-timeout ends.
    #[test]
    fn a_short_tls_hello_reads_as_the_length_of_a_large_frame() {
        assert_eq!(detect(*b"\x16\x03\x01\x02"), Dialect::Frame);
        assert!(u32::from_le_bytes(*b"\x16\x03\x01\x02") as usize > 16 << 20);
    }
}
