//! Measures the cost of a command. It compares the CPU time of a call that runs /bin/true with a bare posix_spawn(3)
//! and wait. It also measures how much longer a call takes with the guard than with `guard = false`. With `-- --bar`
//! it fails if the ratio is above 1.3, or if the guard costs more than 20 µs.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use support::figures::median;
use support::server::Server;
use support::{Failure, words};

const ROUNDS: usize = 7;
const CALLS: u32 = 500;
const BAR: f64 = 1.3;
/// Pairs of calls: one with the guard, one without it.
const PAIRS: usize = 3000;
/// The most microseconds that the guard may add to a call.
const GUARD_BAR: f64 = 20.0;

fn main() -> Result<(), Failure> {
    let config = "[methods.true]\ncommand = [\"/bin/true\"]\n\
                  [methods.free]\ncommand = [\"/bin/true\"]\nguard = false\n";
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
    let cost = guard_cost(&server)?;
    println!("the guard costs {cost:.1} us a spawn (bar: {GUARD_BAR} us)");
    let has_bar = words().iter().any(|word| word == "--bar");
    if has_bar && ratio > BAR {
        return Err(format!("{ratio:.2} is above {BAR}").into());
    }
    if has_bar && cost > GUARD_BAR {
        return Err(format!("the guard's {cost:.1} us are above {GUARD_BAR} us").into());
    }
    Ok(())
}

/// Returns the CPU time of this process and of the children that it has waited for.
fn own_cpu() -> Result<Duration, Failure> {
    let mut micros = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        micros += usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    }
    Ok(Duration::from_micros(micros.unsigned_abs()))
}

/// std uses posix_spawn if it can, as here.
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
    let mut stream = connected(server)?;
    let before = server.cpu_time()?;
    for _ in 0..CALLS {
        call(&mut stream, "true")?;
    }
    Ok((server.cpu_time()? - before) / CALLS)
}

/// Returns how many microseconds longer a call takes with the guard than without: the difference of the
/// lower quartiles, because disturbances only make a call longer. CPU time has the resolution of a clock
/// tick, which is too coarse here.
fn guard_cost(server: &Server) -> Result<f64, Failure> {
    let mut stream = connected(server)?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..PAIRS {
        for (method, times) in ["true", "free"].into_iter().zip(&mut times) {
            let begin = Instant::now();
            call(&mut stream, method)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    let [guarded, free] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 4]
    });
    println!("a call with the guard {guarded:.1} us, with guard = false {free:.1} us");
    Ok(guarded - free)
}

fn connected(server: &Server) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(server.address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn call(stream: &mut TcpStream, method: &str) -> Result<(), Failure> {
    let body = format!("{{\"in\":\"{method}\"}}");
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(body.as_bytes());
    stream.write_all(&frame)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut answer)?;
    if answer != format!("{{\"out\":\"{method}\",\"result\":\"\"}}").as_bytes() {
        return Err(String::from_utf8_lossy(&answer).into());
    }
    Ok(())
}
