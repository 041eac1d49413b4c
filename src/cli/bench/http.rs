//! Writes HTTP/1.1 requests and finds the end of responses. Pure.
//!
//! A response has a Content-Length, or its status has no body (RFC 9112, section 6.3). Responses in chunks
//! or without a length are refused: preforkd does not send them.

use httparse::{EMPTY_HEADER, Status};

/// The largest number of header lines of a response.
const HEADERS_MAX: usize = 64;

/// The result of reading the bytes of a connection.
pub(super) enum HttpResponse<'a> {
    Whole {
        status: u16,
        body: &'a [u8],
        used: usize,
    },
    /// An incomplete response.
    Partial,
    /// Bytes that are no response, or a response without a known end.
    Alien,
}

/// Makes a request for `method` with these params.
pub(super) fn request(address: &str, method: &str, params: &str) -> Vec<u8> {
    let host = match address.strip_prefix("unix:") {
        Some(_) => "localhost",
        None => address,
    };
    format!(
        "POST /{} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n{params}",
        encoded(method),
        params.len()
    )
    .into_bytes()
}

/// Encodes a name for a path (RFC 3986, section 2.1).
fn encoded(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte));
            }
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

/// Reads the first response in `bytes`. Its body has at most `limit` bytes.
#[inline]
pub(super) fn read(bytes: &[u8], limit: usize) -> HttpResponse<'_> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) => return HttpResponse::Partial,
        Err(_) => return HttpResponse::Alien,
    };
    let status = response.code.unwrap_or_default();
    let mut length = matches!(status, 204 | 304).then_some(0);
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = std::str::from_utf8(header.value).ok();
            length = digits.and_then(|digits| digits.parse().ok());
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return HttpResponse::Alien;
        }
    }
    match length {
        Some(length) if length <= limit => match bytes[head..].get(..length) {
            Some(body) => HttpResponse::Whole {
                status,
                body,
                used: head + length,
            },
            None => HttpResponse::Partial,
        },
        _ => HttpResponse::Alien,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(bytes: &[u8]) -> Option<(u16, &[u8], usize)> {
        match read(bytes, 100) {
            HttpResponse::Whole { status, body, used } => Some((status, body, used)),
            HttpResponse::Partial => None,
            HttpResponse::Alien => Some((0, b"", 0)),
        }
    }

    #[test]
    fn a_response_ends_where_its_head_says() {
        let bytes = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 3\r\nX: 1\r\n\r\n[1]HTTP/1.1 2";
        let end = bytes.len() - 10;
        assert_eq!(told(bytes), Some((200, &b"[1]"[..], end)));
        for cut in 0..end {
            assert_eq!(told(&bytes[..cut]), None, "{cut}");
        }
        let empty = b"HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(told(empty), Some((204, &b""[..], empty.len())));
        for alien in [
            &b"HTTP/1.1 200 OK\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"\x05\0\0\0[1,2]",
        ] {
            assert_eq!(
                told(alien),
                Some((0, &b""[..], 0)),
                "{}",
                alien.escape_ascii()
            );
        }
    }

    #[test]
    fn a_name_goes_into_a_path_whatever_it_is() {
        let request = request("127.0.0.1:1", "a.b/ü %", "null");
        let text = String::from_utf8_lossy(&request).into_owned();
        assert!(text.starts_with("POST /a.b%2F%C3%BC%20%25 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n"));
        assert!(text.ends_with("Content-Length: 4\r\n\r\nnull"), "{text}");
    }
}
