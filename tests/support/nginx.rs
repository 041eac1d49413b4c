//! An nginx of one test, as the yardstick: it answers what the load asks for, without reading it.
//!
//! `tests/run` unpacks Debian's package and names the program in `NGINX_BINARY`. It gets its
//! listening socket as it gets it from an nginx that is upgraded (the variable NGINX), so that no
//! port is guessed.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{Dir, PATIENCE, process, wait_for};

/// Hands its stdin over as descriptor 3.
const HAND_OVER: &str = r#"exec 3<&0 </dev/null; export NGINX="3;"; exec "$@""#;

pub struct Nginx {
    child: Child,
    address: SocketAddr,
    _dir: Dir,
}

/// Where there is one.
pub fn program() -> Option<PathBuf> {
    let named = std::env::var_os("NGINX_BINARY").map(PathBuf::from);
    let unpacked = super::source().join("target/beside/usr/sbin/nginx");
    named.or_else(|| unpacked.is_file().then_some(unpacked))
}

impl Nginx {
    /// Starts it with so many workers, and waits until they are there.
    #[track_caller]
    pub fn start(program: PathBuf, workers: usize) -> Self {
        let dir = Dir::new();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        // $http_x_id: the header that the load writes its call's number into
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

    /// Reloads it, and waits until the workers of before are gone: at most two seconds, for with
    /// clients that call all the time some of them stay.
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
