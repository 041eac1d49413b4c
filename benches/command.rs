//! What a command costs: CPU time of a call that runs /bin/true, beside a bare posix_spawn(3) and
//! wait of it, in turns. `-- --bar` fails above 1.3.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use support::figures::median;
use support::server::Server;
use support::{Failure, words};

const ROUNDS: usize = 7;
const CALLS: u32 = 500;
const BAR: f64 = 1.3;

fn main() -> Result<(), Failure> {
    let config = "[methods.true]\ncommand = [\"/bin/true\"]\n";
    let server = Server::preforkd(1, config)?;
    let mut ratios = Vec::new();
    called(&server)?;
    for _ in 0..ROUNDS {
        let bare = spawned()?;
        let call = called(&server)?;
        println!("bare {bare:>9.1?} a process, preforkd {call:>9.1?} a call");
        ratios.push(call.as_secs_f64() / bare.as_secs_f64());
    }
    let ratio = median(&ratios);
    println!("a command call costs {ratio:.2} times a bare posix_spawn and wait (bar: {BAR})");
    if words().iter().any(|word| word == "--bar") && ratio > BAR {
        return Err(format!("{ratio:.2} is above {BAR}").into());
    }
    Ok(())
}

/// CPU time of this process and the children that it has waited for.
fn own_cpu() -> Result<Duration, Failure> {
    let mut micros = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        micros += usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    }
    Ok(Duration::from_micros(micros.unsigned_abs()))
}

/// std uses posix_spawn where it can, as it can here.
fn spawned() -> Result<Duration, Failure> {
    let before = own_cpu()?;
    for _ in 0..CALLS {
        let mut command = Command::new("/bin/true");
        command.stdin(Stdio::inherit()).env_clear();
        command.spawn()?.wait()?;
    }
    Ok((own_cpu()? - before) / CALLS)
}

fn called(server: &Server) -> Result<Duration, Failure> {
    let mut stream = TcpStream::connect(server.address)?;
    stream.set_nodelay(true)?;
    let body = br#"{"in":"true"}"#;
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(body);
    let before = server.cpu_time()?;
    for _ in 0..CALLS {
        stream.write_all(&frame)?;
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut answer)?;
        if answer != br#"{"out":"true","result":""}"# {
            return Err(String::from_utf8_lossy(&answer).into());
        }
    }
    Ok((server.cpu_time()? - before) / CALLS)
}
