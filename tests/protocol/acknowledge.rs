//! Calls in pieces are acknowledged at once, because a client with Nagle's algorithm waits for that before it sends
//! the rest. For a call that arrives whole, no further system call is made.

use crate::support::strace::Strace;
use crate::support::wire::{Dialect, Wire, post};
use crate::support::{Daemon, frame};

const BODY: &str = r#"{"in":"ping"}"#;

#[test]
fn only_calls_in_pieces_are_acknowledged_at_once() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    let worker = daemon.ready_workers()[0];
    let Some(strace) = Strace::attach(&daemon, worker, "setsockopt,epoll_wait") else {
        return;
    };
    let forms = [
        (Dialect::Frame, frame(BODY.as_bytes())),
        (Dialect::Line, format!("{BODY}\n").into_bytes()),
        (Dialect::Http, post("/", BODY).into_bytes()),
    ];
    let mut wires: Vec<Wire> = forms.iter().map(|_| Wire::to(&daemon)).collect();
    for (wire, (dialect, call)) in wires.iter_mut().zip(&forms) {
        for _ in 0..50 {
            wire.send(call);
            assert!(wire.answer(*dialect).is_some());
        }
    }
    let whole = strace.end();
    assert!(whole.iter().any(|line| line.contains("epoll_wait(")));
    let more: Vec<_> = whole
        .iter()
        .filter(|line| line.contains("QUICKACK"))
        .collect();
    assert!(more.is_empty(), "{more:#?}");
    let strace = Strace::attach(&daemon, worker, "setsockopt").unwrap();
    for (wire, (dialect, call)) in wires.iter_mut().zip(&forms) {
        for _ in 0..5 {
            wire.send(&call[..call.len() - 4]);
            // Another connection's call is answered once this is read.
            Wire::to(&daemon)
                .ask(Dialect::Line, BODY)
                .answer(Dialect::Line)
                .unwrap();
            wire.send(&call[call.len() - 4..]);
            assert!(wire.answer(*dialect).is_some());
        }
    }
    let pieces = strace.end();
    let count = pieces
        .iter()
        .filter(|line| line.contains("QUICKACK"))
        .count();
    assert_eq!(count, 15, "{pieces:#?}");
}
