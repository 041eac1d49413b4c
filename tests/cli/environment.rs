//! Tests secrets of commands and pools: from a file or from the server's environment, and never shown.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Daemon, Dir, PATIENCE, binary, wait_for};

const CONFIG: &str = r#"
[workers]
count = 1
[methods.variables]
command = ["env"]
environment-file = "secrets.env"
environment = { TOKEN = "${SERVER_TOKEN}", URL = "http://u:${SERVER_TOKEN}@db", PLAIN = "$${HOME}", WINS = "here" }
[pools.secret]
command = ["sh", "-c", "echo the pool has $KEY; exec sleep 600"]
environment-file = "secrets.env"
processes = 1
ready = "alive"
[methods.secret]
pool = "secret"
"#;
const FILE: &str = "# keys\nKEY='key one'\nWINS=other-9\n";

fn variables(daemon: &Daemon) -> Vec<String> {
    let answer = daemon.client().call(&json!({"in": "variables"}));
    let text = answer["result"].as_str().unwrap_or_default().to_owned();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.retain(|line| !line.starts_with("PREFORKD_CALL="));
    lines.sort_unstable();
    lines
}

#[test]
fn programs_get_secrets_from_a_file_and_from_the_servers_environment() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .file("secrets.env", FILE)
        .env("SERVER_TOKEN", "token-1")
        .env("OTHER", "not for programs")
        .expect_log("secrets.env: line 2: this is not KEY=VALUE")
        .start();
    let expected = |key: &str| {
        let key = format!("KEY={key}");
        [
            &*key,
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PLAIN=${HOME}",
            "TOKEN=token-1",
            "URL=http://u:token-1@db",
            "WINS=here",
        ]
        .map(str::to_owned)
    };
    assert_eq!(variables(&daemon), expected("key one"));
    daemon.wait_log("the pool has key one");
    daemon.dir().write("secrets.env", "KEY=two");
    assert_eq!(
        variables(&daemon),
        expected("key one"),
        "read at start and reload"
    );
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    // The old worker may still accept a connection.
    wait_for("the new file in use", PATIENCE, || {
        variables(&daemon) == expected("two")
    });
    daemon.wait_log("the pool has two");
    // An error is reported with its line, and changes nothing.
    daemon.dir().write("secrets.env", "KEY=three\nKEY four\n");
    let refused = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let why = "secrets.env: line 2: this is not KEY=VALUE";
    assert!(said.contains(why) && !said.contains("four"), "{said}");
    assert_eq!(variables(&daemon), expected("two"));
    let status = daemon.command(&["status", "--json"]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        !status.contains("token-1") && !status.contains("two\""),
        "{status}"
    );
}

#[test]
fn check_prints_the_names_of_secrets_and_not_their_values() {
    let dir = Dir::new();
    dir.write("p.toml", CONFIG);
    let run = |command: &str, token: Option<&str>| {
        let mut run = Command::new(binary());
        run.args([command, "--config"]).arg(dir.join("p.toml"));
        run.env_remove("SERVER_TOKEN");
        run.envs(token.map(|token| ("SERVER_TOKEN", token)));
        run.output().unwrap()
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let missing = run("check", None);
    assert_eq!(missing.status.code(), Some(78));
    assert!(text(&missing.stderr).contains(".environment-file: "));
    dir.write("secrets.env", FILE);
    for token in [Some("token-1"), None] {
        let checked = run("check", token);
        let (shown, said) = (text(&checked.stdout), text(&checked.stderr));
        assert!(checked.status.success(), "{said}");
        assert!(shown.contains("TOKEN = \"${SERVER_TOKEN}\"") && shown.contains("secrets.env"));
        for secret in ["token-1", "key one", "other-9"] {
            assert!(
                !shown.contains(secret) && !said.contains(secret),
                "{secret}: {shown}{said}"
            );
        }
        let warns = said.contains("environment.TOKEN needs the variable SERVER_TOKEN");
        assert_eq!(warns, token.is_none(), "{said}");
    }
    // A start needs it.
    let refused = run("run", None);
    let said = text(&refused.stderr);
    let why = "environment.TOKEN: the environment of the server has no SERVER_TOKEN";
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains(why), "{said}");
}

/// A value from outside is not interpreted again.
#[test]
fn a_value_is_passed_on_as_it_is() {
    let daemon = Daemon::builder()
        .config("[methods.v]\ncommand = [\"env\"]\nenvironment = { A = \"${B}\" }\n")
        .env("B", "${C} $D \"e\"")
        .start();
    let answer: Value = daemon.client().call(&json!({"in": "v"}));
    let text = answer["result"].as_str().unwrap_or_default().to_owned();
    assert!(
        text.lines().any(|line| line == "A=${C} $D \"e\""),
        "{answer}"
    );
}
