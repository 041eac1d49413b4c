//! Measures `preforkd top` at 64 workers with 50 methods: the time to its first frame, its CPU time, and what
//! viewers cost the master. `cargo bench --bench top [-- --bar] [--short]`.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use support::figures::{MissedBars, median, quantile};
use support::load::frame;
use support::server::{Server, cpu_time_of};
use support::{Failure, words};

#[derive(Parser)]
struct Words {
    /// Starts of `top` [default: 20, or 5 with --short]
    #[arg(long)]
    starts: Option<usize>,
    /// Seconds over which CPU time is measured [default: 20, or 5 with --short]
    #[arg(long)]
    seconds: Option<u64>,
    #[arg(long, default_value_t = 64)]
    workers: usize,
    #[arg(long, default_value_t = 50)]
    methods: usize,
    /// Fail beyond the bars
    #[arg(long)]
    bar: bool,
    /// Measure for half a minute
    #[arg(long)]
    short: bool,
}

/// Viewers at one time.
const VIEWERS: usize = 10;
/// The longest time until a frame.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["top".to_owned()].into_iter().chain(words()));
    let starts = words.starts.unwrap_or(if words.short { 5 } else { 20 });
    let seconds = words.seconds.unwrap_or(if words.short { 5 } else { 20 });
    let methods: String = (0..words.methods)
        .map(|number| format!("[methods.method_{number}]\nbuiltin = \"sleep\"\n"))
        .collect();
    let config = format!(
        "[workers]\ncount = {}\nthreads = 2\n{methods}",
        words.workers
    );
    let server = Server::preforkd_with(&config)?;
    let _calls = Calls::start(&server, words.methods);
    let mut missed = MissedBars::default();

    let mut times = Vec::new();
    for _ in 0..starts {
        let (top, took) = Viewer::start(&server)?;
        times.push(took.as_secs_f64() * 1e3);
        drop(top);
    }
    println!(
        "{starts} starts: first frame after {:.0} to {:.0} ms",
        quantile(&times, 0.0),
        quantile(&times, 1.0)
    );
    missed.check("first frame in ms, median", median(&times), 150.0);

    let time = Duration::from_secs(seconds);
    let master = |time: Duration| -> Result<f64, Failure> {
        let before = cpu_time_of(server.pid())?;
        thread::sleep(time);
        let used = cpu_time_of(server.pid())?.saturating_sub(before);
        Ok(used.as_secs_f64() * 1e3 / time.as_secs_f64())
    };
    let idle = master(time)?;
    let (top, _) = Viewer::start(&server)?;
    let before = cpu_time_of(top.process.id())?;
    thread::sleep(time);
    let used = cpu_time_of(top.process.id())?.saturating_sub(before);
    let share = used.as_secs_f64() * 100.0 / time.as_secs_f64();
    missed.check("CPU of one viewer at 1 Hz in % of a core", share, 2.0);
    drop(top);
    let mut viewers = Vec::new();
    for _ in 0..VIEWERS {
        viewers.push(Viewer::start(&server)?.0);
    }
    let viewed = master(time)?;
    println!("master: {idle:.2} ms of CPU per second without viewers, {viewed:.2} with {VIEWERS}");
    let cost = (viewed - idle).max(0.0);
    missed.check(
        "CPU of the master for 10 viewers in ms per second",
        cost,
        10.0,
    );
    drop(viewers);
    missed.end(words.bar)
}

/// Calls each method once per second, so that all have figures.
struct Calls {
    is_over: Arc<AtomicBool>,
}

impl Calls {
    fn start(server: &Server, methods: usize) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (address, over) = (server.address, Arc::clone(&is_over));
        thread::spawn(move || -> io::Result<()> {
            let mut stream = std::net::TcpStream::connect(address)?;
            let mut answers = vec![0; 64 << 10];
            while !over.load(Relaxed) {
                for number in 0..methods {
                    stream
                        .write_all(&frame(&format!(r#"{{"in":"method_{number}","params":0}}"#)))?;
                    let _ = stream.read(&mut answers)?;
                }
                thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        });
        Calls { is_over }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
    }
}

/// `top` in a terminal of its own, whose output is read and thrown away.
struct Viewer {
    process: Child,
}

impl Viewer {
    /// Starts it. Returns the time until its first frame with all figures.
    fn start(server: &Server) -> Result<(Self, Duration), Failure> {
        let (own, terminal) = terminal(120, 40)?;
        let mut command: Command = server.command(&["top"]);
        command.env("TERM", "xterm");
        command.stdin(Stdio::from(terminal.try_clone()?));
        command.stdout(Stdio::from(terminal.try_clone()?));
        command.stderr(Stdio::from(terminal));
        // SAFETY: setsid(2) and ioctl(2) are async-signal-safe, and the closure does nothing else.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let begin = Instant::now();
        let mut viewer = Viewer {
            process: command.spawn()?,
        };
        // Its copies would keep the terminal open after the end of the viewer.
        drop(command);
        let mut output = File::from(own);
        let (mut seen, mut piece) = (Vec::new(), vec![0; 64 << 10]);
        // A state stands in each row of the workers, which come with the first answer of the master.
        while !String::from_utf8_lossy(&seen).contains("ready") || !has_row(&seen) {
            let count = output.read(&mut piece).unwrap_or(0);
            if count == 0 || begin.elapsed() > PATIENCE {
                let text = String::from_utf8_lossy(&seen).into_owned();
                let _ = viewer.process.kill();
                return Err(format!("no frame: {text}").into());
            }
            seen.extend_from_slice(&piece[..count]);
        }
        let took = begin.elapsed();
        thread::spawn(move || while output.read(&mut piece).is_ok_and(|count| count > 0) {});
        Ok((viewer, took))
    }
}

/// Whether a row of the workers is drawn.
fn has_row(seen: &[u8]) -> bool {
    String::from_utf8_lossy(seen).contains('●')
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.process.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.process.wait();
    }
}

/// Opens a pseudo-terminal. Returns its own end, and that of a program.
fn terminal(columns: u16, rows: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut own, mut terminal) = (-1, -1);
    // SAFETY: both numbers and the size live during the call; a null pointer stands for the defaults.
    let opened = unsafe {
        libc::openpty(
            &raw mut own,
            &raw mut terminal,
            ptr::null_mut(),
            ptr::null(),
            &raw const size,
        )
    };
    if opened != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned these descriptors, so they have no other owner.
    let ends = unsafe { (OwnedFd::from_raw_fd(own), OwnedFd::from_raw_fd(terminal)) };
    // Other viewers must not keep this terminal open.
    for fd in [&ends.0, &ends.1] {
        // SAFETY: fcntl(2) with F_SETFD takes no pointer.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(ends)
}
