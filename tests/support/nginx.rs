//! Runs an nginx for one test, as a reference. It answers the load without reading the calls.
//!
//! `tests/run` unpacks Debian's package and sets `NGINX_BINARY`. The nginx gets its listening socket as
//! from an nginx that is upgraded (the variable NGINX), so no port is guessed.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{Dir, PATIENCE, process, wait_for};

/// Passes its stdin as descriptor 3.
const HAND_OVER: &str = r#"exec 3<&0 </dev/null; export NGINX="3;"; exec "$@""#;

pub struct Nginx {
    child: Child,
    address: SocketAddr,
    _dir: Dir,
}

/// Returns the program, if there is one.
pub fn program() -> Option<PathBuf> {
    let named = std::env::var_os("NGINX_BINARY").map(PathBuf::from);
    let unpacked = super::source().join("target/beside/usr/sbin/nginx");
    named.or_else(|| unpacked.is_file().then_some(unpacked))
}

impl Nginx {
    /// Starts it with this many workers, and waits until they run.
    #[track_caller]
    pub fn start(program: PathBuf, workers: usize) -> Self {
        let dir = Dir::new();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        // $http_x_id: the header in which the load sends the number of the call.
        dir.write(
            "nginx.conf",
            format!(
                "user root;\nworker_processes {workers};\npid nginx.pid;\ndaemon off;\n\
                 error_log error.log warn;\nevents {{ worker_connections 4096; }}\n\
                 http {{ access_log off; keepalive_requests 1000000000; server {{\n\
                 listen {address} backlog=4096;\nlocation / {{ default_type application/json;\n\
                 return 200 '{{\"result\": \"for $http_x_id\", \"id\": $http_x_id}}'; }} }} \n\
                 client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; \
                 uwsgi_temp_path t4; scgi_temp_path t5; }}\n"
            ),
        );
        let child = Command::new("/bin/sh")
            .args(["-c", HAND_OVER, "sh"])
            .arg(program)
            .arg("-p")
            .arg(&*dir)
            .arg("-e")
            .arg(dir.join("error.log"))
            .arg("-c")
            .arg(dir.join("nginx.conf"))
            .stdin(OwnedFd::from(listener))
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let nginx = Nginx {
            child,
            address,
            _dir: dir,
        };
        wait_for("nginx's workers", PATIENCE, || {
            nginx.workers().len() == workers
        });
        nginx
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn workers(&self) -> Vec<i32> {
        process::children(self.pid())
    }

    /// Reloads it, and waits until the old workers are gone. It waits at most two seconds, because with
    /// clients that call continuously some workers stay.
    pub fn reload(&self) {
        let before = self.workers();
        kill(Pid::from_raw(self.pid()), Signal::SIGHUP).unwrap();
        let end = Instant::now() + Duration::from_secs(2);
        while self.workers().iter().any(|pid| before.contains(pid)) && Instant::now() < end {
            super::pause();
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
