//! Answers with the status page: one HTML file in the binary, with its script and its style.
//!
//! The content security policy names the hashes of both, computed from the file. So a browser runs nothing
//! that was not in the binary, whatever names and error texts the server has.

use std::borrow::Cow;
use std::sync::OnceLock;

use base64::prelude::{BASE64_STANDARD, Engine};
use hmac_sha256::Hash;

use super::answer::PageAnswer;

const PAGE: &str = include_str!("page.html");

/// Returns the page.
pub fn answer() -> PageAnswer {
    static HEADERS: OnceLock<String> = OnceLock::new();
    let headers = HEADERS.get_or_init(|| {
        let (script, style) = (source_of("script"), source_of("style"));
        format!(
            "Content-Security-Policy: default-src 'none'; script-src {script}; style-src {style}; \
             img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'\r\nReferrer-Policy: no-referrer\r\n"
        )
    });
    PageAnswer {
        headers: Cow::Borrowed(headers),
        ..PageAnswer::of("text/html; charset=utf-8", PAGE)
    }
}

/// Returns the source expression of an element: the hash of its text.
fn source_of(element: &str) -> String {
    let (start, end) = (format!("<{element}>"), format!("</{element}>"));
    let text = PAGE
        .split_once(&start)
        .and_then(|(_, rest)| rest.split_once(&end));
    let text = text.map_or("", |(text, _)| text);
    format!(
        "'sha256-{}'",
        BASE64_STANDARD.encode(Hash::hash(text.as_bytes()))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_else_and_sets_text_only_as_text() {
        assert!(PAGE.len() <= 40_000, "{} bytes", PAGE.len());
        assert_eq!(PAGE.matches("<script>").count(), 1);
        assert_eq!(PAGE.matches("<style>").count(), 1);
        // The policy blocks style attributes and handlers in the text; innerHTML could make elements of names.
        for part in [
            "style=",
            "onclick=",
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "src=",
        ] {
            assert!(!PAGE.contains(part), "{part}");
        }
        assert!(PAGE.contains("<link rel=\"icon\" href=\"data:,\">"));
        let headers = answer().headers;
        assert!(
            headers.contains("script-src 'sha256-") && !headers.contains("'sha256-47DEQpj8HBSa")
        );
    }
}
