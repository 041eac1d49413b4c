//! Tests the status page in Chromium: its figures, keys, texts, times, and what it asks for.
//!
//! It needs Debian's package `chromium`, and playwright-core and axe-core from npm in the directory that PAGE_TOOLS
//! names: `npm install --prefix DIR playwright-core@1.65.1 axe-core@4.14.1`. Without them a test says that it was not
//! run. `browser.js` drives the browser. Screenshots are in `target/page/`.
//! PREFORKD_PAGE_WORKERS sets the number of workers for the time of a tick.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::address;
use crate::support::{
    Builder, Daemon, PATIENCE, alone, from_environment, percentile, source, wait_for,
};

/// A pool program that answers with its name.
const PROGRAM: &str = "import json, socket, struct
calls = socket.socket(fileno=3)
while True:
    head = calls.recv(4)
    if not head:
        break
    call = json.loads(calls.recv(struct.unpack('<I', head)[0]).decode())
    body = json.dumps({'out': call['in'], 'result': 'pool'}).encode()
    calls.sendall(struct.pack('<I', len(body)) + body)
";

const CONFIG: &str = "[workers]\ncount = 2\nthreads = 4\n[observe]\naddress = \"127.0.0.1:0\"\n\
    [slow-log]\nthreshold = \"200ms\"\n[methods.sleep]\nbuiltin = \"sleep\"\n\
    [methods.fails]\ncommand = [\"/bin/false\"]\n\
    [pools.model]\ncommand = [\"python3\", \"model.py\"]\nready = \"alive\"\ndirectory = \".\"\nprocesses = 2\n\
    [methods.score]\npool = \"model\"\n";

fn builder() -> Builder {
    Daemon::builder().config(CONFIG).file("model.py", PROGRAM)
}

/// Chromium with one page, driven by Node.
struct Browser {
    node: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Browser {
    /// Starts it. `None` if this machine does not have what it needs.
    fn start() -> Option<Self> {
        let tools = std::env::var_os("PAGE_TOOLS").map(PathBuf::from);
        let tools = tools.unwrap_or_else(|| source().join("target/page-tools"));
        let chromium = Path::new("/usr/bin/chromium");
        if !chromium.is_file() || !tools.join("node_modules/playwright-core").is_dir() {
            println!("not run: there is no chromium, or no playwright-core in PAGE_TOOLS");
            return None;
        }
        let mut command = Command::new("node");
        command.arg(source().join("tests/observe/browser.js"));
        command.args([&tools, chromium]).env("TZ", "UTC");
        let pipe = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut node = pipe.spawn().unwrap();
        let stdin = node.stdin.take();
        let stdout = BufReader::new(node.stdout.take().unwrap());
        Some(Browser {
            node,
            stdin,
            stdout,
        })
    }

    /// Runs the body of an async function in the driver and returns its result.
    #[track_caller]
    fn run(&mut self, body: &str) -> Value {
        let line = json!(body).to_string() + "\n";
        let mut stdin = self.stdin.as_ref().expect("it runs");
        stdin.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        let mut answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"].is_null(), "{body}: {}", answer["error"]);
        answer["ok"].take()
    }

    /// Opens the page. `options` are those of a browser context.
    #[track_caller]
    fn open(&mut self, address: SocketAddr, options: &Value) {
        self.run(&format!("await it.open('http://{address}/', {options})"));
    }

    /// Returns the texts of a table's cells, without its head.
    #[track_caller]
    fn rows(&mut self, table: &str) -> Vec<Vec<String>> {
        let rows = self.run(&format!("return (await it.table('{table}')).slice(1)"));
        serde_json::from_value(rows).unwrap()
    }

    /// Returns the texts of the first column of a table.
    #[track_caller]
    fn first(&mut self, table: &str) -> Vec<String> {
        let rows = self.rows(table).into_iter();
        rows.map(|mut row| row.swap_remove(0)).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // At the end of its input the driver closes the browser.
        self.stdin = None;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Ok(Some(_)) = self.node.try_wait() {
                return;
            }
            crate::support::pause();
        }
        let _ = self.node.kill();
        let _ = self.node.wait();
    }
}

#[track_caller]
fn call(daemon: &Daemon, method: &str, params: &Value, count: usize) {
    let mut client = daemon.client();
    for _ in 0..count {
        client.call(&json!({"in": method, "params": params}));
    }
}

/// Reads a number as the page writes it.
#[track_caller]
fn number(text: &str) -> f64 {
    let digits: String = text.chars().filter(|letter| *letter != ',').collect();
    digits.parse().unwrap_or_else(|_| panic!("{text:?}"))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[test]
#[ignore = "needs Chromium"]
fn figures_equal_the_status() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let daemon = builder()
        .expect_log("SIGKILL")
        .expect_log("reload refused")
        .start();
    daemon.refused_reload("nonsense = 1\n");
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("another worker", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 2 && !ready.contains(&worker)
    });
    browser.open(address(&daemon), &json!({}));
    call(&daemon, "sleep", &json!(0.3), 1);
    call(&daemon, "ping", &json!(1), 500);
    call(&daemon, "score", &json!(1), 20);
    call(&daemon, "fails", &json!(1), 5);
    let _open = daemon.client();
    browser.run("await it.ticks(2)");
    let shown = browser.run("return await it.pause()");
    let expected: Value =
        serde_json::from_slice(&daemon.command(&["status", "--json"]).stdout).unwrap();

    let of = |value: &Value, names: &[&str]| -> Vec<String> {
        names.iter().map(|name| text(&value[*name])).collect()
    };
    let workers = browser.rows("workers");
    assert_eq!(workers.len(), 2);
    for (row, (shown, known)) in workers.iter().zip(
        array(&shown["workers"])
            .iter()
            .zip(array(&expected["workers"])),
    ) {
        let names = ["slot", "pid", "generation", "state"];
        assert_eq!(of(shown, &names), of(known, &names));
        assert_eq!(row[..3], of(shown, &names[..3]));
        assert_eq!(row[3], "● ready");
        let counts = ["connections", "running", "queued"];
        assert_eq!(row[4..7], of(shown, &counts));
        assert_eq!(number(&row[11]), 0.0, "lost threads");
    }
    let methods = browser.rows("methods");
    let known = array(&expected["methods"]);
    assert_eq!(methods.len(), known.len());
    for row in &methods {
        let known = known.iter().find(|it| it["name"] == row[0]).unwrap();
        let kind = known["kind"].as_str().unwrap_or("–");
        assert_eq!(row[1], kind, "{row:?}");
        let rates = array(&shown["rates"]["methods"]).iter();
        let rates = rates.filter(|it| it["name"] == row[0]).collect::<Vec<_>>();
        let per_s = rates
            .first()
            .map_or(0.0, |it| it["calls_per_s"].as_f64().unwrap());
        assert!((number(&row[2]) - per_s).abs() <= 0.5, "{row:?}: {per_s}");
        assert_eq!(number(&row[9]), known["running"].as_f64().unwrap());
        assert_eq!(number(&row[10]), known["queued"].as_f64().unwrap());
    }
    let total = shown["rates"]["total"]["calls_per_s"].as_f64().unwrap();
    let header = browser.run("return await it.headers()");
    assert_eq!(header["Workers ready"], "2 of 2");
    assert!((number(header["Calls/s"].as_str().unwrap()) - total).abs() <= 0.5);
    assert_eq!(header["Busy threads"], "0 of 8");
    assert_eq!(header["Quarantine"], "0");
    let backlog = number(&text(&expected["listeners"][0]["backlog"]));
    let queue = header["Accept queue"].as_str().unwrap();
    assert_eq!(number(queue.split_once(" of ").unwrap().1), backlog);
    let reload = header["Last reload"].as_str().unwrap();
    assert!(reload.starts_with("refused, "), "{reload}");

    let pools = browser.rows("pools");
    let pool = &expected["pools"][0];
    assert_eq!(pools[0][..2], of(pool, &["name", "pid"]));
    assert_eq!(pools[0][3], "2 idle");
    assert_eq!(pools[0][6], text(&pool["starts"]));

    let events = browser.rows("events");
    let deaths: Vec<&Value> = array(&expected["deaths"]).iter().collect();
    assert_eq!(deaths.len(), 1);
    assert_eq!(events.len(), 2, "{events:?}");
    let death = events.iter().find(|row| row[1] == "death").unwrap();
    let reason = text(&deaths[0]["reason"]);
    for part in [&format!("pid {worker}: SIGKILL"), &reason] {
        assert!(death[2].contains(part), "{part}: {death:?}");
    }
    let refused = events.iter().find(|row| row[1] == "reload refused");
    assert!(refused.unwrap()[2].contains("nonsense"), "{refused:?}");

    let slow = browser.rows("slow");
    assert_eq!(slow.len(), 1);
    let known = &expected["slow"][0];
    assert_eq!(slow[0][1..3], of(known, &["call", "method"]));
    assert_eq!(slow[0][4..], of(known, &["outcome", "evidence"]));
    let off = browser.run("return await it.page.isVisible('#slow-off')");
    assert_eq!(off, json!(false));

    // What the heat map shows is in a table too.
    browser.run("await it.page.click('summary')");
    // The browser reports that it was opened only after the click, and the page draws the table then.
    browser.run("await it.until(\"document.querySelector('#seconds td')\")");
    let seconds = browser.rows("seconds");
    let known = browser.run("return await it.page.evaluate('seconds')");
    let calls = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>();
    let listed = calls(&mut seconds.iter().map(|row| number(&row[1])));
    let known = calls(&mut array(&known).iter().map(|it| it["calls"].as_f64().unwrap()));
    assert_eq!(listed, known);
    assert!(known >= 526.0, "{known}");

    let alerts = browser.run("return await it.page.textContent('#alerts')");
    let alerts = alerts.as_str().unwrap();
    assert!(
        alerts.contains("was refused: ") && alerts.contains("1 death in the last 10 minutes"),
        "{alerts}"
    );
}

#[test]
#[ignore = "needs Chromium"]
fn rows_are_sorted_filtered_and_reached_by_keyboard() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let daemon = builder().start();
    browser.open(address(&daemon), &json!({}));
    let sorts = |browser: &mut Browser| {
        let heads = "#methods th[aria-sort]";
        browser.run(&format!(
            "return it.page.$$eval('{heads}', (all) => all.map((one) => [one.textContent, one.ariaSort]))"
        ))
    };
    browser.run("await it.page.click('#methods th button[data-key=name]')");
    let up = browser.first("methods");
    assert_eq!(up, ["_OTHER", "fails", "ping", "score", "sleep"]);
    assert_eq!(sorts(&mut browser), json!([["Method ▲", "ascending"]]));
    browser.run("await it.page.click('#methods th button[data-key=name]')");
    let down = ["sleep", "score", "ping", "fails", "_OTHER"];
    assert_eq!(browser.first("methods"), down);
    assert_eq!(sorts(&mut browser), json!([["Method ▼", "descending"]]));
    // Order and filter stay when new figures come.
    browser.run("await it.ticks(2)");
    assert_eq!(browser.first("methods"), down);
    browser.run("await it.page.fill('#filter', 's'); await it.page.type('#filter', 'L')");
    assert_eq!(browser.first("methods"), ["sleep"]);
    assert_eq!(browser.first("workers"), ["none"]);
    browser.run("await it.ticks(1)");
    assert_eq!(browser.first("methods"), ["sleep"]);
    browser.run("await it.page.fill('#filter', '')");
    assert_eq!(browser.first("methods"), down);

    // By keyboard alone, from the top of the page.
    browser.open(address(&daemon), &json!({}));
    let focused = "return it.page.evaluate(() => { const it = document.activeElement; \
                   return it.id || it.dataset.key || it.textContent || it.getAttribute('aria-labelledby') })";
    let tab_to = |browser: &mut Browser, wanted: &str| {
        for _ in 0..80 {
            browser.run("await it.page.keyboard.press('Tab')");
            if browser.run(focused) == wanted {
                return;
            }
        }
        panic!("Tab does not lead to {wanted}");
    };
    tab_to(&mut browser, "filter");
    browser.run("await it.page.keyboard.type('ping')");
    assert_eq!(browser.first("methods"), ["ping"]);
    browser.run("for (const _ of 'ping') await it.page.keyboard.press('Backspace')");
    tab_to(&mut browser, "pause");
    browser.run("await it.page.keyboard.press('Space')");
    let paused = browser.run("return it.page.textContent('#state')");
    assert_eq!(paused, "paused");
    browser.run("await it.page.keyboard.press('Space')");
    tab_to(&mut browser, "slot");
    browser.run("await it.page.keyboard.press('Enter')");
    assert_eq!(browser.first("workers"), ["1", "0"]);
    browser.run("await it.ticks(2)");
    assert_eq!(browser.run(focused), "slot", "the focus stays");
    tab_to(&mut browser, "The same figures as a table");
    browser.run("await it.page.keyboard.press('Enter')");
    let open = browser.run("return it.page.isVisible('#seconds tr')");
    assert_eq!(open, json!(true));
}

/// Makes each text of a status one of HTML and control characters, but for those that the page compares.
const HOSTILE: &str = r#"(status) => {
  const evil = "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>\u0000\u001b[31m\u202e\u2028&amp;'\"";
  const kept = ["state", "kind", "signal", "call"];
  const change = (value, key) => {
    if (typeof value === "string") return kept.includes(key) ? value : evil + value;
    if (Array.isArray(value)) return value.map((one) => change(one, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, change(one, name)]));
  };
  status.quarantine = [{ method: "m", key: "k", at: 1, refused: 1 }];
  status.isolated = [{ address: "a", limit: 1, running: 1 }];
  for (const pool of status.pools) pool.state = "throttled";
  for (const worker of status.workers) worker.oldest_call = { method: "m", age_ms: 5 };
  for (const rates of status.rates.methods) [rates.shed_per_s, rates.errors] = [1, { "<b>code</b>": 1 }];
  return change(status);
}"#;

#[test]
#[ignore = "needs Chromium"]
fn names_and_errors_of_html_and_control_characters_stay_text() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let daemon = builder()
        .expect_log("reload refused")
        .expect_log("SIGKILL")
        .start();
    daemon.refused_reload("\"<b>bold</b>\" = \"<i>\\u001b[31m\"\n");
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("its death record", PATIENCE, || {
        !array(&daemon.status()["deaths"]).is_empty()
    });
    let address = address(&daemon);
    let elements = "return it.page.evaluate(() => ({ hacked: window.hacked === undefined, \
                    made: document.querySelectorAll('main img, main script, main b, main i').length, \
                    heard: document.querySelectorAll('[onerror]').length }))";
    let none = json!({"hacked": true, "made": 0, "heard": 0});
    browser.open(address, &json!({}));
    call(&daemon, "sleep", &json!(0.3), 1);
    let shown = browser.run("return it.page.textContent('#events')");
    assert!(shown.as_str().unwrap().contains("<b>bold</b>"), "{shown}");
    assert_eq!(browser.run(elements), none);

    browser.run(&format!(
        "await it.open('http://{address}/', {{}}, {HOSTILE})"
    ));
    browser.run("await it.ticks(2)");
    let body = browser.run("return it.page.textContent('body')");
    let body = body.as_str().unwrap();
    for (what, least) in [
        ("<img src=x onerror=", 15),
        ("\u{1b}[31m", 15),
        ("<b>code</b>", 1),
    ] {
        let count = body.matches(what).count();
        assert!(count >= least, "{what:?}: {count} in {body}");
    }
    for place in ["#name", "#alerts", "#methods", "#pools", "#events", "#slow"] {
        let shown = browser.run(&format!("return it.page.textContent('{place}')"));
        assert!(
            shown.as_str().unwrap().contains("<script>"),
            "{place}: {shown}"
        );
    }
    assert_eq!(browser.run(elements), none);
    let seen = browser.run(
        "return { ...it.seen, requests: 0, violations: await it.page.evaluate('window.violations') }",
    );
    assert_eq!(
        seen,
        json!({"console": [], "errors": [], "requests": 0, "violations": []})
    );
}

#[cfg(feature = "jobs-sqlite")]
#[test]
#[ignore = "needs Chromium"]
fn the_queues_of_durable_jobs_are_shown() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let config = format!("{CONFIG}[jobs]\nstore = \"sqlite:jobs.db\"\n");
    let daemon = builder().config(&config).start();
    assert!(daemon.command(&["job", "pause", "ping"]).status.success());
    let later = json!({"method": "ping", "delay_ms": 3_600_000});
    call(&daemon, "rpc.job.enqueue", &later, 3);
    browser.open(address(&daemon), &json!({}));
    let expected = ["ping", "▲ paused", "3", "0", "–", "0", "0"];
    wait_for("the queue", PATIENCE, || browser.rows("jobs") == [expected]);
    let store = browser.run("return it.page.textContent('#jobs-store')");
    assert!(store.as_str().unwrap().contains("jobs.db: up"), "{store}");
}

#[test]
#[ignore = "needs Chromium"]
fn without_an_answer_the_page_says_since_when() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let daemon = builder().start();
    let observe = |address: &str| {
        let mut command = daemon.asking(&["observe", "--address", address]);
        let mut observe = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(observe.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let address = line.trim().trim_start_matches("http://");
        (observe, address.trim_end_matches('/').to_owned())
    };
    let (mut first, address) = observe("127.0.0.1:0");
    browser.open(address.parse().unwrap(), &json!({}));
    let state = "return it.page.textContent('#state')";
    assert_eq!(browser.run(state), "");
    first.kill().unwrap();
    first.wait().unwrap();
    browser.run("await it.until(\"byId('state').textContent.startsWith('no answer since ')\")");
    let alerts = browser.run("return it.page.textContent('#alerts')");
    let alerts = alerts.as_str().unwrap();
    assert!(alerts.starts_with("No answer since "), "{alerts}");
    assert_eq!(browser.first("workers").len(), 2, "the last figures stay");
    let (mut second, same) = observe(&address);
    assert_eq!(same, address);
    browser.run("await it.until(\"byId('state').textContent === ''\")");
    let alerts = browser.run("return it.page.textContent('#alerts')");
    assert_eq!(alerts, "Nothing is wrong.");

    // The master is silent, and the observer answers.
    kill(Pid::from_raw(daemon.pid()), Signal::SIGSTOP).unwrap();
    let told = "byId('alerts').textContent.includes('The master has not answered for ')";
    browser.run(&format!("await it.until(\"{told}\")"));
    kill(Pid::from_raw(daemon.pid()), Signal::SIGCONT).unwrap();
    browser.run(&format!("await it.until(\"!{told}\")"));
    kill(Pid::from_raw(second.id().cast_signed()), Signal::SIGTERM).unwrap();
    second.wait().unwrap();
}

#[test]
#[ignore = "needs Chromium"]
fn a_killed_worker_shows_within_two_seconds() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let _alone = alone();
    let daemon = builder().expect_log("SIGKILL").start();
    browser.open(address(&daemon), &json!({}));
    let worker = daemon.ready_workers()[0];
    let begin = Instant::now();
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let pid = format!("pid {worker}: SIGKILL");
    browser.run(&format!(
        "await it.until(\"byId('events').textContent.includes('{pid}')\")"
    ));
    let took = begin.elapsed();
    println!("a killed worker shows after {took:?} (bar 2 s)");
    assert!(took <= Duration::from_secs(2), "{took:?}");
    let alerts = browser.run("return it.page.textContent('#alerts')");
    assert!(alerts.as_str().unwrap().contains("1 death in"), "{alerts}");
}

#[test]
#[ignore = "needs Chromium"]
fn the_page_is_small_and_fast_and_asks_no_other_server() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let _alone = alone();
    let daemon = builder().start();
    let address = address(&daemon);
    let mut times = [Vec::new(), Vec::new()];
    // The first load finds a cold browser.
    for round in 0..8 {
        browser.open(address, &json!({}));
        let measured = browser.run(
            "return it.page.evaluate(() => { \
             const load = performance.getEntriesByType('navigation')[0]; \
             return [load.domContentLoadedEventEnd, window.firstFigures, load.transferSize] })",
        );
        if round > 0 {
            times[0].push(measured[0].as_f64().unwrap());
            times[1].push(measured[1].as_f64().unwrap());
        }
        let size = measured[2].as_f64().unwrap();
        assert!(size > 10_000.0 && size <= 40_000.0, "{size} bytes");
        println!("{size} bytes with the head (bar 40,000)");
    }
    for ((what, bar), times) in [("DOM ready", 100.0), ("first figures", 200.0)]
        .into_iter()
        .zip(&mut times)
    {
        times.sort_by(f64::total_cmp);
        let median = percentile(times, 50);
        println!(
            "{what}: {median:.0} ms, median of {} (bar {bar})",
            times.len()
        );
        assert!(median <= bar, "{what}: {times:?}");
    }
    call(&daemon, "ping", &json!(1), 100);
    browser.run("await it.ticks(3)");
    browser.run(
        "await it.page.click('summary'); await it.page.fill('#filter', 'a'); await it.ticks(1)",
    );
    let seen = browser.run("return it.seen");
    assert_eq!(
        (&seen["console"], &seen["errors"]),
        (&json!([]), &json!([]))
    );
    let own = format!("http://{address}/");
    let requests: Vec<String> = array(&seen["requests"]).iter().map(text).collect();
    let is_other = |url: &&String| !url.starts_with(&own) && !url.starts_with("data:");
    assert_eq!(requests.iter().find(is_other), None, "{requests:?}");
    let pages = requests.iter().filter(|url| **url == own).count();
    assert_eq!(pages, 1, "{requests:?}");
    let polls = ["status.json", "history.json"].map(|name| format!("{own}{name}"));
    let is_poll = |url: &&String| polls.contains(url);
    assert_eq!(
        requests.iter().filter(is_poll).count() + 1,
        requests.iter().filter(|url| url.starts_with(&own)).count()
    );
    let violations = browser.run("return it.page.evaluate('window.violations')");
    assert_eq!(violations, json!([]));
}

#[test]
#[ignore = "needs Chromium"]
fn a_tick_takes_little_script_with_many_workers_and_methods() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let _alone = alone();
    let workers = from_environment("PREFORKD_PAGE_WORKERS", 64);
    let methods: String = (0..50)
        .map(|number| format!("[methods.method_{number}]\nbuiltin = \"sleep\"\n"))
        .collect();
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = {workers}\nthreads = 1\n[observe]\naddress = \"127.0.0.1:0\"\n{methods}"
        ))
        .start();
    browser.open(address(&daemon), &json!({}));
    // As after 300 s, with as many buckets in each second.
    browser.run(
        "await it.page.route('**/history.json', async (route) => { \
         const answer = await route.fetch(), body = await answer.json(), last = body.seconds.at(-1); \
         const second = (_, number) => ({ ...last, at: last.at - 299 + number }); \
         if (last) body.seconds = Array.from({ length: 300 }, second); \
         await route.fulfill({ response: answer, json: body }) })",
    );
    let mut client = daemon.client();
    let mut ticks = Vec::new();
    browser.run("it.session = await it.context.newCDPSession(it.page); await it.session.send('Performance.enable')");
    for _ in 0..9 {
        for number in 0..50 {
            client.send(&json!({"in": format!("method_{number}"), "params": 0}).to_string());
        }
        (0..50).for_each(|_| drop(client.recv_json()));
        let script = browser.run(
            "const script = async () => (await it.session.send('Performance.getMetrics')).metrics \
             .find((one) => one.name === 'ScriptDuration').value; \
             const before = await script(); await it.ticks(1); return (await script() - before) * 1000",
        );
        ticks.push(script.as_f64().unwrap());
    }
    let rows = (
        browser.first("workers").len(),
        browser.first("methods").len(),
    );
    assert_eq!(rows, (workers as usize, 52));
    ticks.sort_by(f64::total_cmp);
    let median = percentile(&ticks, 50);
    println!(
        "script per tick with {workers} workers and 50 methods: {median:.1} ms, median of 9 (bar 5)"
    );
    assert!(median <= 5.0, "{ticks:?}");
}

/// Makes a server on which something is wrong, so that each part of the page has content.
fn troubled() -> Daemon {
    let daemon = builder()
        .expect_log("SIGKILL")
        .expect_log("reload refused")
        .start();
    daemon.reload();
    daemon.refused_reload("nonsense = 1\n");
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("another worker", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 2 && !ready.contains(&worker)
    });
    daemon
}

#[test]
#[ignore = "needs Chromium"]
fn it_is_readable_at_each_width_in_light_and_dark() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let daemon = troubled();
    let directory = source().join("target/page");
    fs::create_dir_all(&directory).unwrap();
    for (width, height) in [(1280, 900), (390, 844)] {
        for light in ["light", "dark"] {
            let options =
                json!({"viewport": {"width": width, "height": height}, "colorScheme": light});
            browser.open(address(&daemon), &options);
            call(&daemon, "sleep", &json!(0.25), 1);
            call(&daemon, "ping", &json!(1), 300);
            call(&daemon, "score", &json!(1), 20);
            call(&daemon, "fails", &json!(1), 3);
            browser.run("await it.ticks(3)");
            let file = directory.join(format!("{width}-{light}.png"));
            browser.run(&format!(
                "await it.page.screenshot({{ path: {}, fullPage: true }})",
                json!(file)
            ));
            let wide =
                browser.run("return it.page.evaluate(() => document.documentElement.scrollWidth)");
            assert_eq!(wide, json!(width), "it scrolls to the side");
            let found = browser.run(
                "await it.page.click('summary'); await it.page.evaluate(it.axe()); \
                 const found = await it.page.evaluate(() => axe.run()); \
                 return found.violations.map((one) => [one.impact, one.id, one.nodes.length, one.nodes[0].html])",
            );
            println!("{width} {light}: {found}");
            let is_serious = |it: &&Value| it[0] == "serious" || it[0] == "critical";
            let serious: Vec<&Value> = array(&found).iter().filter(is_serious).collect();
            assert_eq!(serious, Vec::<&Value>::new());
        }
    }
}
