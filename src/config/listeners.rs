//! Resolves the listeners: those of the command line, else those of the file, else the default one.
//!
//! Two listeners cannot have the same address, or the same port if one of them listens on all interfaces. One of the
//! two could not be bound, and a reload identifies listeners by their addresses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::address::{Address, absolute_address};
use super::check::{Check, KeyValue, command_line};
use super::isolation;
use super::raw::{DEFAULT_BACKLOG, Raw, RawLimits, RawListen};
use super::settings::{HttpMethods, ListenConfig};
use crate::error::{Error, Result};
use crate::sys::account::{self, AccountError, NamedId};

const DEFAULT_PORT: u16 = 8080;
const DEFAULT_ADDRESS: Address = Address::Tcp(SocketAddr::new(
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    DEFAULT_PORT,
));
/// The largest number of listeners with a process for each connection.
const MAX_ISOLATED: usize = 64;

/// Returns the listeners of the command line, else those of the file, else the default one.
pub(super) fn resolve(check: &Check<'_>, raw: &Raw) -> Result<Vec<ListenConfig>> {
    let options = &check.overrides.listen;
    let listeners: Vec<ListenConfig> = match &raw.listen {
        _ if !options.is_empty() => options
            .iter()
            .map(|text| {
                absolute_address((text, DEFAULT_PORT), |path| check.here.absolute(path))
                    .map(ListenConfig::at)
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
            .map(|(index, one)| listener(check, &format!("listen[{index}]"), one, &raw.limits))
            .collect::<Result<_>>()?,
        None => default(),
    };
    refuse_collisions(check, &listeners)?;
    refuse_too_many_isolated(check, &listeners)?;
    Ok(listeners)
}

/// Returns the default listener.
pub(super) fn default() -> Vec<ListenConfig> {
    vec![ListenConfig::at(DEFAULT_ADDRESS)]
}

/// Refuses too many isolated listeners, because each has an acceptor with a table of sessions.
fn refuse_too_many_isolated(check: &Check<'_>, listeners: &[ListenConfig]) -> Result<()> {
    let isolated = listeners.iter().enumerate();
    let mut isolated = isolated.filter(|(_, listen)| listen.isolation.is_some());
    match isolated.nth(MAX_ISOLATED) {
        None => Ok(()),
        Some((index, _)) => Err(check.places.error(
            &format!("listen[{index}].isolation"),
            format!("more than {MAX_ISOLATED} listeners have isolation = \"connection\""),
            "remove it from some of them",
        )),
    }
}

/// Refuses two listeners of which one could not be bound.
fn refuse_collisions(check: &Check<'_>, listeners: &[ListenConfig]) -> Result<()> {
    for (index, listen) in listeners.iter().enumerate() {
        let before = &listeners[..index];
        let place = |first: usize| {
            let place = check.places.name(&format!("listen[{first}].address"));
            let place = place.filter(|_| check.overrides.listen.is_empty());
            place.map_or(String::new(), |place| format!(", in {place}"))
        };
        let same = |other: &ListenConfig| other.address == listen.address;
        // If the service manager passes the socket, the address is not bound.
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
                    "{} can't be bound beside {other}{}: one of the two addresses stands for all interfaces",
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

/// Makes an error about the address of the listener with that index, wherever it was set.
pub(super) fn error(check: &Check<'_>, index: usize, problem: String, remedy: &str) -> Error {
    if check.overrides.listen.is_empty() {
        let key = format!("listen[{index}].address");
        check.places.error(&key, problem, remedy)
    } else {
        command_line("--listen", problem, remedy)
    }
}

fn listener(
    check: &Check<'_>,
    key: &str,
    raw: &RawListen,
    limits: &RawLimits,
) -> Result<ListenConfig> {
    let key_of = |name: &str| format!("{key}.{name}");
    let backlog = raw.backlog.value(check, &key_of("backlog"))?;
    if let Some(name) = &raw.name {
        check_name(check, &key_of("name"), name)?;
    }
    let at = &key_of("address");
    let Some(text) = &raw.address else {
        let remedy = "add address = \"127.0.0.1:8080\", or where it is to listen";
        return Err(check.places.error(at, "it is missing", remedy));
    };
    let address = check.address(at, (text, DEFAULT_PORT))?;
    let mode = match &raw.mode {
        None => None,
        Some(text) => Some(check.mode(&key_of("mode"), text, &address)?),
    };
    let per_source = raw.per_source.value(check, &key_of("per-source"))?;
    let owner = |name: &str, text: &Option<String>, lookup: LookUp| {
        let key = key_of(name);
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
        http_methods: check.word(
            &key_of("http-methods"),
            raw.http_methods.as_ref(),
            HttpMethods::Any,
        )?,
        per_source,
        isolation: isolation::resolve(check, key, raw, limits)?,
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
        let problem = format!("{address} is not a unix socket, and only those have an owner");
        return Err(check.places.error(key, problem, "remove it"));
    }
    lookup(text).map_err(|error| {
        let remedy = "create it, or name one that exists";
        check.places.error(key, error.to_string(), remedy)
    })
}

/// Refuses a name that a socket unit cannot have (sd_listen_fds(3)).
fn check_name(check: &Check<'_>, key: &str, name: &str) -> Result<()> {
    let sound = |character: char| character != ':' && !character.is_control();
    if (1..=255).contains(&name.len()) && name.chars().all(sound) {
        return Ok(());
    }
    Err(check.places.error(
        key,
        format!("{name:?} is not the name of a passed socket"),
        "take 1 to 255 characters without a colon, as FileDescriptorName= does",
    ))
}

impl ListenConfig {
    /// A listener at `address` with the defaults of all other keys.
    pub fn at(address: Address) -> Self {
        ListenConfig {
            address,
            name: None,
            backlog: DEFAULT_BACKLOG as u32,
            mode: None,
            socket_user: None,
            socket_group: None,
            http_methods: HttpMethods::Any,
            per_source: 0,
            isolation: None,
        }
    }
}
