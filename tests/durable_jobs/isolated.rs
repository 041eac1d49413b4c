//! Jobs over listeners with a process for each connection.

use serde_json::json;

use super::{CONFIG, enqueue, error, later, result};
use crate::support::Daemon;

#[test]
fn a_session_reaches_the_jobs_process() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .listen("isolation = \"connection\"\n")
        .start();
    let client = &mut daemon.client();
    let jobs: Vec<String> = (0..5)
        .map(|number| enqueue(client, &json!(number)))
        .collect();
    let other = &mut daemon.client();
    for job in &jobs {
        assert_eq!(
            result(other, "rpc.job.get", &json!({"job": job}))["job"],
            *job
        );
    }
    let bad = error(other, "rpc.job.enqueue", &json!({"method": "none"}));
    assert_eq!(bad["name"], "method-not-found");
    daemon.reload();
    let client = &mut daemon.client();
    assert_eq!(
        result(client, "rpc.job.cancel", &json!({"job": jobs[0]})),
        true
    );
    let stored = result(client, "rpc.job.enqueue", &later(&json!("after")));
    assert_eq!(stored["new"], true);
}
