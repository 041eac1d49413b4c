//! The address of a listener: an IP address with a port, or a unix socket. Parses it and prints it.
//!
//! Names are not resolved, here or anywhere else in the server: a listener is an address of this machine,
//! and the master must not wait for a name server.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The longest path of a unix socket, in bytes: `sun_path` of unix(7) without its NUL.
pub const UNIX_PATH_MAX: usize = 107;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// An IP address and a port. With port 0 the kernel chooses one.
    Tcp(SocketAddr),
    /// The path of a unix socket. In [`Settings`](super::Settings) it is absolute.
    Unix(PathBuf),
}

impl Address {
    /// Returns whether it can be reached from other machines.
    pub fn is_public(&self) -> bool {
        match self {
            Address::Tcp(address) => !address.ip().to_canonical().is_loopback(),
            Address::Unix(_) => false,
        }
    }

    /// Returns whether one of the two prevents the other from being bound although they differ: a listener
    /// on all interfaces has the port of each interface (ip(7)).
    pub fn is_in_the_way_of(&self, other: &Address) -> bool {
        match (self, other) {
            (Address::Tcp(one), Address::Tcp(other)) => {
                one != other
                    && one.port() == other.port()
                    && one.port() != 0
                    // Our IPv6 sockets do not accept IPv4.
                    && one.is_ipv4() == other.is_ipv4()
                    && (one.ip().is_unspecified() || other.ip().is_unspecified())
            }
            _ => false,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    /// The error is a sentence that says what to write.
    fn from_str(text: &str) -> Result<Self, String> {
        Address::parse(text, 8080)
    }
}

impl Address {
    /// Reads an address. The error suggests this port if `text` has none.
    pub fn parse(text: &str, port: u16) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("the path is missing; write it as in \"unix:/run/preforkd/rpc.sock\"".into())
            } else if path.starts_with('@') {
                Err("abstract sockets have no owner and no mode; give a path".into())
            } else {
                Ok(Address::Unix(PathBuf::from(path)))
            };
        }
        if let Ok(address) = text.parse() {
            return Ok(Address::Tcp(address));
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if let Some(scheme) = scheme {
            return Err(format!("{text:?} is not an address; leave out {scheme}://"));
        }
        let port_text = text.rsplit_once(':').map_or(text, |(_, port)| port);
        if port_text
            .parse::<u64>()
            .is_ok_and(|port| port > u64::from(u16::MAX))
        {
            return Err(format!(
                "{text:?} has no valid port; a port is at most {}",
                u16::MAX
            ));
        }
        let suggestion = match text.rsplit_once(':') {
            _ if text.starts_with('/') => format!("unix:{text}"),
            Some(("*", port)) => format!("0.0.0.0:{port}"),
            Some(("" | "localhost", port)) => format!("127.0.0.1:{port}"),
            None if text.parse::<u16>().is_ok() => format!("127.0.0.1:{text}"),
            None if text.parse::<std::net::Ipv4Addr>().is_ok() => format!("{text}:{port}"),
            _ => {
                return Err(format!(
                    "{text:?} is no IP address with a port; write it as in \"127.0.0.1:{port}\", \
                     \"[::1]:{port}\" or \"unix:/run/preforkd/rpc.sock\""
                ));
            }
        };
        Err(format!(
            "{text:?} is no IP address with a port; did you mean {suggestion:?}?"
        ))
    }
}

/// Reads an address and makes its path, if it is one, absolute; `port` as in [`Address::parse`].
pub(super) fn absolute_address(
    (text, port): (&str, u16),
    absolute: impl FnOnce(&Path) -> PathBuf,
) -> Result<Address, String> {
    match Address::parse(text, port)? {
        Address::Unix(path) => {
            let path = absolute(&path);
            check_unix_path(&path)?;
            Ok(Address::Unix(path))
        }
        tcp => Ok(tcp),
    }
}

/// Refuses a path that no unix socket can have.
pub(super) fn check_unix_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length <= UNIX_PATH_MAX {
        return Ok(());
    }
    Err(format!(
        "{} has {length} bytes, and the path of a unix socket at most {UNIX_PATH_MAX}; give a \
         shorter one",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_read_and_write_the_same() {
        for text in [
            "127.0.0.1:8080",
            "[::1]:8080",
            "0.0.0.0:0",
            "unix:/run/x.sock",
            "unix:x",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn all_interfaces_are_in_the_way_of_one_at_the_same_port() {
        for (one, other, expected) in [
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("[::]:80", "[::1]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("0.0.0.0:80", "[::]:80", false),
            ("0.0.0.0:80", "127.0.0.1:81", false),
            ("0.0.0.0:0", "127.0.0.1:0", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "127.0.0.1:80", false),
            ("0.0.0.0:80", "unix:/x", false),
        ] {
            let (one, other): (Address, Address) = (one.parse().unwrap(), other.parse().unwrap());
            assert_eq!(one.is_in_the_way_of(&other), expected, "{one} {other}");
            assert_eq!(other.is_in_the_way_of(&one), expected, "{other} {one}");
        }
    }

    #[test]
    fn what_is_no_address_gets_a_suggestion() {
        for (text, suggestion) in [
            ("localhost:80", "\"127.0.0.1:80\""),
            (":80", "\"127.0.0.1:80\""),
            ("*:80", "\"0.0.0.0:80\""),
            ("8080", "\"127.0.0.1:8080\""),
            ("10.0.0.1", "\"10.0.0.1:8080\""),
            ("/run/x.sock", "\"unix:/run/x.sock\""),
            ("example.org:80", "\"[::1]:8080\""),
            ("127.0.0.1:65536", "a port is at most 65535"),
            ("99999", "a port is at most 65535"),
            ("http://127.0.0.1:8080/", "leave out http://"),
            ("::1:x", "\"[::1]:8080\""),
            ("unix:", "\"unix:/run/preforkd/rpc.sock\""),
            ("unix:@name", "give a path"),
        ] {
            let problem = text.parse::<Address>().unwrap_err();
            assert!(problem.contains(suggestion), "{text}: {problem}");
        }
    }

    #[test]
    fn the_suggested_port_is_the_one_of_the_key() {
        for text in ["127.0.0.1", "example.org:80"] {
            let problem = Address::parse(text, 9180).unwrap_err();
            assert!(problem.contains("127.0.0.1:9180\""), "{problem}");
        }
    }

    #[test]
    fn loopback_is_not_public_in_any_of_its_spellings() {
        for text in ["127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/x"] {
            assert!(!text.parse::<Address>().unwrap().is_public(), "{text}");
        }
        for text in ["0.0.0.0:1", "[::]:1", "192.168.0.1:1"] {
            assert!(text.parse::<Address>().unwrap().is_public(), "{text}");
        }
    }

    #[test]
    fn a_unix_path_of_107_bytes_is_the_longest() {
        assert!(check_unix_path(Path::new(&"x".repeat(107))).is_ok());
        assert!(check_unix_path(Path::new(&"x".repeat(108))).is_err());
    }
}
