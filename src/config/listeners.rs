//! The listeners: of the command line, else of the file, else the default one.
//!
//! No two may stand at one address, for one of them could never be bound, and a reload knows them
//! by their addresses; nor one at a port that another has on all interfaces.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::address::{Address, check_unix_path};
use super::check::{Check, command_line};
use super::raw::{Raw, RawListen};
use super::settings::{HttpMethods, ListenConfig};
use crate::error::{Error, Result};
use crate::sys::account::{self, AccountError, NamedId};

const DEFAULT_ADDRESS: Address =
    Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080));
const DEFAULT_BACKLOG: u32 = 4096;

/// The listeners of the command line, else those of the file, else the default one.
pub(super) fn resolve(check: &Check<'_>, raw: &Raw) -> Result<Vec<ListenConfig>> {
    let options = &check.overrides.listen;
    let listeners: Vec<ListenConfig> = match &raw.listen {
        _ if !options.is_empty() => options
            .iter()
            .map(|text| {
                address(text, |path| check.here.absolute(path))
                    .map(plain)
                    .map_err(|problem| command_line("--listen", problem, ""))
            })
            .collect::<Result<_>>()?,
        Some(list) if list.is_empty() => {
            let remedy = "add one with an address, or take the key out for the default";
            return Err(check.places.error("listen", "there is no listener", remedy));
        }
        Some(list) => list
            .iter()
            .enumerate()
            .map(|(index, raw)| listener(check, &format!("listen[{index}]"), raw))
            .collect::<Result<_>>()?,
        None => default(),
    };
    refuse_collisions(check, &listeners)?;
    Ok(listeners)
}

/// Where a server listens that is told nothing.
pub(super) fn default() -> Vec<ListenConfig> {
    vec![plain(DEFAULT_ADDRESS)]
}

/// Two listeners of which one could not be bound.
fn refuse_collisions(check: &Check<'_>, listeners: &[ListenConfig]) -> Result<()> {
    for (index, listen) in listeners.iter().enumerate() {
        let before = &listeners[..index];
        let place = |first: usize| {
            let place = check.places.name(&format!("listen[{first}].address"));
            let place = place.filter(|_| check.overrides.listen.is_empty());
            place.map_or(String::new(), |place| format!(", in {place}"))
        };
        let same = |other: &ListenConfig| other.address == listen.address;
        // Where the service manager passes it, the address is not bound.
        let bound = |listen: &ListenConfig| listen.name.is_none();
        let in_the_way = |other: &ListenConfig| {
            bound(other) && bound(listen) && other.address.is_in_the_way_of(&listen.address)
        };
        let (problem, remedy) = if let Some(first) = before.iter().position(same) {
            (
                format!(
                    "there is another listener at {}{}",
                    listen.address,
                    place(first)
                ),
                "give each an address of its own",
            )
        } else if let Some(first) = before.iter().position(in_the_way) {
            let other = &before[first].address;
            (
                format!(
                    "{} can't be bound beside {other}{}: one of the two is all interfaces",
                    listen.address,
                    place(first)
                ),
                "give each a port of its own, or leave the narrower one out",
            )
        } else {
            continue;
        };
        return Err(error(check, index, problem, remedy));
    }
    Ok(())
}

/// An error about the address of the listener with that index, wherever it was given.
pub(super) fn error(check: &Check<'_>, index: usize, problem: String, remedy: &str) -> Error {
    if check.overrides.listen.is_empty() {
        let key = format!("listen[{index}].address");
        check.places.error(&key, problem, remedy)
    } else {
        command_line("--listen", problem, remedy)
    }
}

fn listener(check: &Check<'_>, key: &str, raw: &RawListen) -> Result<ListenConfig> {
    let backlog = check.integer(
        &format!("{key}.backlog"),
        raw.backlog,
        DEFAULT_BACKLOG,
        1..=i64::from(i32::MAX),
        "",
    )?;
    if let Some(name) = &raw.name {
        check_name(check, &format!("{key}.name"), name)?;
    }
    let at = &format!("{key}.address");
    let Some(text) = &raw.address else {
        let remedy = "add address = \"127.0.0.1:8080\", or where it is to listen";
        return Err(check.places.error(at, "it is missing", remedy));
    };
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        check.path(at, path)?;
    }
    let address = address(text, |path| check.beside(at, path))
        .map_err(|problem| check.places.error(at, problem, ""))?;
    let mode = match &raw.mode {
        None => None,
        Some(text) => Some(mode(check, &format!("{key}.mode"), text, &address)?),
    };
    let owner = |name: &str, text: &Option<String>, lookup: LookUp| {
        let key = format!("{key}.{name}");
        let text = text.as_deref();
        text.map(|text| socket_owner(check, &key, text, &address, lookup))
            .transpose()
    };
    let socket_user = owner("socket-user", &raw.socket_user, account::lookup_user)?;
    let socket_group = owner("socket-group", &raw.socket_group, account::lookup_group)?;
    Ok(ListenConfig {
        address,
        name: raw.name.clone(),
        backlog,
        mode,
        socket_user,
        socket_group,
        http_methods: match &raw.http_methods {
            None => HttpMethods::Any,
            Some(word) => {
                match check.choice(&format!("{key}.http-methods"), word, &["any", "path"])? {
                    "path" => HttpMethods::Path,
                    _ => HttpMethods::Any,
                }
            }
        },
    })
}

type LookUp = fn(&str) -> std::result::Result<NamedId, AccountError>;

fn socket_owner(
    check: &Check<'_>,
    key: &str,
    text: &str,
    address: &Address,
    lookup: LookUp,
) -> Result<NamedId> {
    if !matches!(address, Address::Unix(_)) {
        let problem = format!("{address} is no unix socket, and only those have an owner");
        return Err(check.places.error(key, problem, "take it out"));
    }
    lookup(text).map_err(|error| {
        let remedy = "create it, or name one that exists";
        check.places.error(key, error.to_string(), remedy)
    })
}

/// What a socket unit can say: sd_listen_fds(3) has the same bounds.
fn check_name(check: &Check<'_>, key: &str, name: &str) -> Result<()> {
    let sound = |character: char| character != ':' && !character.is_control();
    if (1..=255).contains(&name.len()) && name.chars().all(sound) {
        return Ok(());
    }
    Err(check.places.error(
        key,
        format!("{name:?} is no name of a passed socket"),
        "take 1 to 255 characters without a colon, as FileDescriptorName= does",
    ))
}

fn mode(check: &Check<'_>, key: &str, text: &str, address: &Address) -> Result<u32> {
    if !matches!(address, Address::Unix(_)) {
        let problem = format!("{address} is no unix socket, and only those have a mode");
        return Err(check.places.error(key, problem, "take it out"));
    }
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits && mode <= 0o777 => Ok(mode),
        _ => Err(check.places.error(
            key,
            format!("{text:?} is no mode"),
            "write permission bits in octal, as in \"0660\"",
        )),
    }
}

fn plain(address: Address) -> ListenConfig {
    ListenConfig {
        address,
        name: None,
        backlog: DEFAULT_BACKLOG,
        mode: None,
        socket_user: None,
        socket_group: None,
        http_methods: HttpMethods::Any,
    }
}

/// An address with its path, if it is one, made absolute.
fn address(
    text: &str,
    absolute: impl FnOnce(&Path) -> PathBuf,
) -> std::result::Result<Address, String> {
    match text.parse()? {
        Address::Unix(path) => {
            let path = absolute(&path);
            check_unix_path(&path)?;
            Ok(Address::Unix(path))
        }
        tcp => Ok(tcp),
    }
}
