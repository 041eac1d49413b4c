//! Decides what a request for a page gets: which content, or which refusal. Pure.
//!
//! The `Host` is checked first. Otherwise a web page could read a local port by DNS rebinding: the page's host name
//! then resolves to this address, and the browser treats the answers as coming from the page's own server.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::protocol::http::get::PageRequest;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// The status page.
    Page,
    Metrics,
    Status,
    /// The last 300 s of a method; `None`: of all methods together.
    History(Option<String>),
    Health,
}

/// Who may ask for what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteRules {
    /// The names that a `Host` may have, in lower case; `None`: it is not checked.
    pub hosts: Option<Vec<String>>,
    /// Whether there is a status page.
    pub has_page: bool,
}

impl RouteRules {
    /// Returns what a request asks for.
    ///
    /// # Errors
    /// The status and the text of the refusal.
    pub fn route(&self, request: &PageRequest) -> Result<Route, (u16, String)> {
        if let Some(hosts) = &self.hosts
            && !is_allowed(&request.host, hosts)
        {
            let text = "the Host of this request is neither an IP address nor localhost; if people use this \
                        name, add it to observe.hosts";
            return Err((403, text.to_owned()));
        }
        match request.path.as_str() {
            "/" if self.has_page => Ok(Route::Page),
            "/metrics" => Ok(Route::Metrics),
            "/status.json" => Ok(Route::Status),
            "/history.json" => Ok(Route::History(parameter(&request.query, "method"))),
            "/healthz" => Ok(Route::Health),
            "/" => Err((404, "the status page is off (observe.page = false)".into())),
            _ => {
                let text =
                    "there are /, /metrics, /status.json, /history.json?method=NAME and /healthz";
                Err((404, text.to_owned()))
            }
        }
    }
}

/// Returns whether a `Host` is an IP address, `localhost` or one of `hosts`, without its port.
fn is_allowed(host: &str, hosts: &[String]) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<Ipv6Addr>().is_ok() && is_port(port);
    }
    let (name, port) = match host.find(':') {
        Some(at) => host.split_at(at),
        None => (host, ""),
    };
    let name = name.to_ascii_lowercase();
    is_port(port)
        && (name == "localhost" || name.parse::<Ipv4Addr>().is_ok() || hosts.contains(&name))
}

/// Returns whether it is a port with its colon, or nothing.
fn is_port(text: &str) -> bool {
    let digits = text.strip_prefix(':').unwrap_or(text);
    (text.is_empty() || text.starts_with(':')) && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns the value of a query parameter, with its escapes decoded.
fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(key, _)| *key == name)?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let mut digit = || (rest.next()? as char).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                bytes.push(u8::try_from(high * 16 + low).ok()?);
            }
            other => bytes.push(other),
        }
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, path: &str, query: &str) -> PageRequest {
        PageRequest {
            used: 0,
            bodiless: false,
            path: path.into(),
            query: query.into(),
            host: host.into(),
            close: false,
        }
    }

    #[test]
    fn a_host_is_an_address_localhost_or_listed() {
        let hosts = ["node1.example.com".to_owned()];
        for (host, expected) in [
            ("127.0.0.1", true),
            ("127.0.0.1:9180", true),
            ("[::1]:9180", true),
            ("[::1]", true),
            ("LocalHost:9180", true),
            ("Node1.Example.COM:1", true),
            ("node1.example.com.evil", false),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("localhost:9180:1", false),
            ("localhost:x", false),
            ("127.0.0.1.evil.example", false),
            ("127.1", false),
            ("[::1", false),
            ("[::1]x", false),
            ("::1", false),
            ("", false),
            (" localhost", false),
            ("user@localhost", false),
        ] {
            assert_eq!(is_allowed(host, &hosts), expected, "{host:?}");
        }
    }

    #[test]
    fn each_path_has_its_content() {
        let rules = RouteRules {
            hosts: Some(Vec::new()),
            has_page: true,
        };
        let of = |path: &str, query: &str| rules.route(&request("localhost", path, query));
        assert_eq!(of("/", ""), Ok(Route::Page));
        assert_eq!(of("/metrics", "x=1"), Ok(Route::Metrics));
        let history = Route::History(Some("a b/ü".into()));
        assert_eq!(of("/history.json", "x=y&method=a+b%2F%C3%BC"), Ok(history));
        assert_eq!(of("/history.json", ""), Ok(Route::History(None)));
        for path in ["/metrics/", "/../metrics", "/Metrics", "/index.html"] {
            assert_eq!(
                of(path, "").map_err(|(status, _)| status),
                Err(404),
                "{path}"
            );
        }
    }

    #[test]
    fn a_foreign_host_is_refused_except_on_a_unix_socket() {
        let foreign = request("evil.example", "/metrics", "");
        let mut rules = RouteRules {
            hosts: Some(Vec::new()),
            has_page: true,
        };
        let (status, text) = rules.route(&foreign).err().unwrap_or_default();
        assert!(status == 403 && text.contains("observe.hosts"), "{text}");
        rules.hosts = None;
        assert_eq!(rules.route(&foreign), Ok(Route::Metrics));
    }
}
