//! Lets a real Prometheus scrape a server each second: through faults, and for each alert.
//!
//! `tests/run` unpacks Debian's package `prometheus`. The environment sets how many faults: PREFORKD_KILLS,
//! PREFORKD_RELOADS and PREFORKD_UPGRADES.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::tools::{expressions, tool};
use crate::support::installed::{Installed, upgrade};
use crate::support::{
    Callers, Client, Daemon, Dir, PATIENCE, from_environment, pass, process, source, wait_for,
};

const OBSERVE: &str = "[observe]\naddress = \"127.0.0.1:0\"\n";
/// Without an engine the server refuses the table.
const JOBS: &str = match cfg!(feature = "jobs-sqlite") {
    true => "[jobs]\nstore = \"sqlite:jobs.db\"\n",
    false => "",
};

const TIMES: &str = "scrape_interval: 1s\n  scrape_timeout: 1s\n  evaluation_interval: 1s";

/// A running Prometheus, which scrapes one server.
struct Prometheus {
    process: Child,
    address: SocketAddr,
    dir: Dir,
    begin: Instant,
}

impl Prometheus {
    /// Starts it with the rules that are shipped. `shorten` changes their text.
    fn start(program: &Path, target: &str, shorten: impl Fn(String) -> String) -> Self {
        // It cannot choose a port by itself, and another process may take the free one first.
        let mut started = (0..10).filter_map(|_| Self::try_start(program, target, &shorten));
        started.next().expect("one of ten ports is free")
    }

    fn try_start(program: &Path, target: &str, shorten: impl Fn(String) -> String) -> Option<Self> {
        let dir = Dir::new();
        let rules = fs::read_to_string(source().join("config/prometheus/alerts.yml")).unwrap();
        dir.write("alerts.yml", shorten(rules));
        let config = format!(
            "global:\n  {TIMES}\nrule_files: [alerts.yml]\nscrape_configs:\n- job_name: preforkd\n  \
             static_configs:\n  - targets: [\"{target}\"]\n"
        );
        let config = dir.write("prometheus.yml", config);
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let process = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        let mut started = Prometheus {
            process,
            address,
            dir,
            begin,
        };
        let mut has_ended = false;
        wait_for("a Prometheus that is ready", PATIENCE, || {
            has_ended = started.process.try_wait().unwrap().is_some();
            has_ended || started.get("/-/ready").is_some()
        });
        let log = started.dir.read("log");
        assert!(
            !has_ended || log.contains("address already in use"),
            "{log}"
        );
        (!has_ended).then_some(started)
    }

    /// Returns the body of a page, if it is there.
    fn get(&self, path: &str) -> Option<String> {
        let mut connection = TcpStream::connect(self.address).ok()?;
        // Of HTTP/1.0, because its answers are not chunked.
        write!(connection, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.to_owned())
    }

    /// Returns the series of an expression, with their last values.
    #[track_caller]
    fn query(&self, expression: &str) -> Vec<Value> {
        let encoded = expression.bytes().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "%{byte:02x}");
            text
        });
        let answer = self.get(&format!("/api/v1/query?query={encoded}"));
        let answer = answer.unwrap_or_else(|| panic!("no answer to {expression}"));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// Returns the value of the only series of an expression.
    #[track_caller]
    fn number(&self, expression: &str) -> f64 {
        let found = self.query(expression);
        assert_eq!(found.len(), 1, "{expression}: {found:?}");
        found[0]["value"][1].as_str().unwrap().parse().unwrap()
    }

    /// Returns the names of all counters, and of the parts of histograms.
    fn counters(&self) -> Vec<String> {
        let names = self.get("/api/v1/label/__name__/values").unwrap();
        let names: Value = serde_json::from_str(&names).unwrap();
        let ends = ["_total", "_bucket", "_count", "_sum"];
        let names = names["data"].as_array().unwrap().iter();
        names
            .map(|name| name.as_str().unwrap().to_owned())
            .filter(|name| name.starts_with("preforkd_"))
            .filter(|name| ends.iter().any(|end| name.ends_with(end)))
            .collect()
    }

    /// Returns the names of the alerts that fire, each once.
    fn alerts(&self) -> Vec<String> {
        let firing = self.query("count by (alertname) (ALERTS{alertstate=\"firing\"})");
        let name = |it: &Value| it["metric"]["alertname"].as_str().unwrap().to_owned();
        firing.iter().map(name).collect()
    }

    #[track_caller]
    fn wait_alert(&self, name: &str, deadline: Duration) {
        wait_for(name, deadline, || {
            pass(Duration::from_millis(200));
            self.alerts().iter().any(|alert| alert == name)
        });
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn prometheus() -> Option<PathBuf> {
    tool("PROMETHEUS_BINARY", "target/beside/usr/bin/prometheus")
}

fn target(daemon: &Daemon) -> String {
    let status = daemon.status();
    let address = status["master"]["observer"]["address"].as_str();
    address.unwrap().to_owned()
}

#[test]
#[ignore = "needs Prometheus, and takes a minute"]
fn no_scrape_fails_and_no_counter_falls_through_kills_reloads_and_upgrades() {
    let Some(program) = prometheus() else { return };
    let config = format!(
        "[workers]\ncount = 2\nrespawn-burst = 1000\nrespawn-max-delay = \"100ms\"\n{OBSERVE}"
    );
    let installed = Installed::new();
    let daemon = installed
        .daemon(&config)
        .expect_log("ended by SIGKILL")
        .start();
    let prometheus = Prometheus::start(&program, &target(&daemon), |rules| rules);
    let callers = Callers::connecting(daemon.address(), 2);
    let second = || pass(Duration::from_secs(1));
    for _ in 0..from_environment("PREFORKD_KILLS", 10) {
        let workers = daemon.ready_workers();
        kill(Pid::from_raw(workers[0]), Signal::SIGKILL).unwrap();
        wait_for("another worker", PATIENCE, || {
            let ready = daemon.ready_workers();
            ready.len() == 2 && !ready.contains(&workers[0])
        });
        second();
    }
    for _ in 0..from_environment("PREFORKD_RELOADS", 8) {
        daemon.reload();
        second();
    }
    for _ in 0..from_environment("PREFORKD_UPGRADES", 4) {
        installed.renew();
        upgrade(&daemon);
        second();
    }
    callers.stop();
    let seconds = prometheus.begin.elapsed().as_secs_f64();
    let samples = prometheus.number("count_over_time(up[1h])");
    let failed = samples - prometheus.number("sum_over_time(up[1h])");
    let counters = prometheus.counters();
    assert!(counters.len() > 20, "{counters:?}");
    let resets = |name: &String| prometheus.number(&format!("sum(resets({name}[1h]))"));
    let resets: f64 = counters.iter().map(resets).sum();
    println!("{samples} scrapes in {seconds:.0} s: {failed} failed, {resets} resets of counters");
    assert!(samples >= seconds / 2.0);
    assert_eq!((failed, resets), (0.0, 0.0));
    assert!(prometheus.number("preforkd_upgrades_total{result=\"ok\"}") > 0.0);
}

#[test]
#[ignore = "needs Prometheus, and takes some seconds"]
fn each_expression_of_the_dashboard_returns_a_series() {
    let Some(program) = prometheus() else { return };
    let config = format!(
        "[workers]\ncount = 2\nthreads = 2\n{OBSERVE}[methods.sleep]\nbuiltin = \"sleep\"\n\
         [methods.fails]\ncommand = [\"/bin/false\"]\n\
         [pools.cat]\nprocesses = 1\ncommand = [\"/bin/sleep\", \"1000\"]\nready = \"alive\"\n[methods.cat]\npool = \"cat\"\n\
         {JOBS}[[listen]]\naddress = \"127.0.0.1:0\"\n\
         [[listen]]\naddress = \"127.0.0.2:0\"\nisolation = \"connection\"\n"
    );
    let daemon = Daemon::builder().config(&config).start();
    let prometheus = Prometheus::start(&program, &target(&daemon), |rules| rules);
    let address = daemon.status()["listeners"][0]["address"].clone();
    let mut client = Client::connect(address.as_str().unwrap().parse().unwrap());
    let mut left = expressions();
    let all = left.len();
    assert!(all > 30, "{all}");
    // A rate needs two scrapes, and a quantile calls between them.
    let end = Instant::now() + PATIENCE;
    while !left.is_empty() && Instant::now() < end {
        for method in ["ping", "sleep", "fails", "nothing"] {
            client.call(&json!({"in": method, "params": 0}));
        }
        if cfg!(feature = "jobs-sqlite") {
            let job = json!({"method": "sleep", "params": 0});
            client.call(&json!({"in": "rpc.job.enqueue", "params": job}));
        }
        daemon.reload();
        left.retain(|expression| prometheus.query(expression).is_empty());
        pass(Duration::from_millis(500));
    }
    println!("{all} expressions");
    assert_eq!(left, Vec::<String>::new(), "without a series");
}

/// The rules with shorter times, so that their alerts come within seconds: the expressions stay.
fn shortened(rules: String) -> String {
    let times = [
        ("for: 1m", "for: 2s"),
        ("for: 2m", "for: 4s"),
        ("for: 5m", "for: 4s"),
        ("for: 10m", "for: 4s"),
        ("[5m]", "[10s]"),
    ];
    let shorten = |rules: String, (long, short): &(&str, &str)| rules.replace(long, short);
    times.iter().fold(rules, shorten)
}

#[test]
#[ignore = "needs Prometheus, and takes a minute"]
fn alerts_come_from_real_faults_and_not_from_healthy_load() {
    let Some(program) = prometheus() else { return };
    let healthy = from_environment("PREFORKD_HEALTHY_SECONDS", 20);
    let config = format!(
        "[limits]\nqueue = 1\n[workers]\ncount = 1\nthreads = 1\nrespawn-burst = 1000\n{OBSERVE}\
         [methods.sleep]\nbuiltin = \"sleep\"\n"
    );
    let daemon = Daemon::builder()
        .config(&config)
        .listen("backlog = 8\n")
        .expect_log("ended by SIGKILL")
        .expect_log("reload refused")
        .start();
    let prometheus = Prometheus::start(&program, &target(&daemon), shortened);
    let callers = Callers::connecting(daemon.address(), 2);
    pass(Duration::from_secs(healthy));
    callers.stop_without_loss("healthy load");
    let seen = prometheus.query("count by (alertname) (count_over_time(ALERTS[1h]))");
    assert_eq!(seen, Vec::<Value>::new(), "under healthy load");

    daemon.refused_reload("[workers]\ncount = \"none\"\n");
    prometheus.wait_alert("ReloadRefused", PATIENCE);

    let mut clients: Vec<_> = (0..6).map(|_| daemon.client()).collect();
    let end = Instant::now() + PATIENCE;
    let mut fires = false;
    while !fires && Instant::now() < end {
        for client in &mut clients {
            client.send(&json!({"in": "sleep", "params": 0.2}).to_string());
        }
        for client in &mut clients {
            client.recv_json();
        }
        fires = prometheus.alerts().contains(&"Shedding".to_owned());
    }
    assert!(fires, "no alert Shedding");

    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGSTOP).unwrap();
    wait_for("a stopped worker", PATIENCE, || {
        process::state(worker) == Some('T')
    });
    let waiting: Vec<_> = (0..6)
        .map(|_| TcpStream::connect(daemon.address()).unwrap())
        .collect();
    prometheus.wait_alert("AcceptQueue", PATIENCE);
    kill(Pid::from_raw(worker), Signal::SIGCONT).unwrap();
    drop(waiting);

    for _ in 0..8 {
        let worker = daemon.ready_workers()[0];
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
        wait_for("another worker", PATIENCE, || {
            let ready = daemon.ready_workers();
            !ready.is_empty() && !ready.contains(&worker)
        });
        // Between two scrapes an increase is not seen as such.
        pass(Duration::from_secs(1));
    }
    prometheus.wait_alert("CrashLoop", PATIENCE);
}
