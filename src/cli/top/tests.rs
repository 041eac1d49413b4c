//! Compares frames of `top` at several sizes with recorded text (`tests/snapshots/top`).
//!
//! `PREFORKD_RECORD=1` writes the files again.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use std::{env, fs};

use crossterm::event::KeyCode;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::{Color, Modifier};

use super::draw::{draw, page, text_of, wrap};
use super::view::View;
use crate::link::metrics_board::MethodTotals;
use crate::logging::escape_unprintable;
use crate::observe::content::Figures;
use crate::observe::master_facts::Facts;
use crate::observe::model::{Model, Reading};
use crate::observe::process_rates::{PoolProgramCounts, ProcessCount, ProcessCounts};
use crate::observe::totals::{BoardMembers, MethodFigures, ServerTotals};
use crate::protocol::Code;
use crate::protocol::control::{
    DeathStatus, JobsStatus, LastReload, ListenerStatus, OldestCall, PoolStatus, ProgramPhase,
    ProgramStatus, QueueStatus, ReloadStatus, Status, WorkerPhase, WorkerStatus,
};

const NOW: u64 = 10_000;
/// A name that would clear the screen and turn the text around.
const EVIL: &str = "\x1b[2J\u{202e}\"<b>\\";

fn status() -> Status {
    let mut status = Status::default();
    let master = &mut status.master;
    (
        master.pid,
        master.generation,
        master.uptime_s,
        master.target,
    ) = (4711, 3, 7_265, 3);
    (master.name, master.version) = ("preforkd".into(), "0.1.0".into());
    master.last_reload = Some(LastReload {
        ok: false,
        at: 9_900,
        error: Some("no".into()),
    });
    let worker = |slot, pid, state, queued| WorkerStatus {
        slot,
        pid,
        state,
        queued,
        generation: 3,
        threads: 4,
        connections: 12,
        rss_bytes: 5 << 20,
        ..WorkerStatus::default()
    };
    let mut busy = worker(0, Some(4712), WorkerPhase::Ready, 5);
    (busy.running, busy.lost_threads) = (3, 1);
    busy.oldest_call = Some(OldestCall {
        method: EVIL.into(),
        age_ms: 61_000,
    });
    status.workers = vec![
        busy,
        worker(1, Some(4713), WorkerPhase::Draining, 0),
        worker(2, None, WorkerPhase::Throttled, 0),
    ];
    let program = |state| ProgramStatus {
        state,
        ..ProgramStatus::default()
    };
    status.pools = vec![PoolStatus {
        name: "model".into(),
        pid: Some(4714),
        state: WorkerPhase::Ready,
        programs: 3,
        down: 1,
        starts: 9,
        list: [ProgramPhase::Busy, ProgramPhase::Busy, ProgramPhase::Down]
            .map(program)
            .into(),
        ..PoolStatus::default()
    }];
    status.deaths = vec![DeathStatus {
        slot: Some(2),
        pid: 4700,
        signal: Some("SIGSEGV".into()),
        uptime_s: 61,
        method: Some(EVIL.into()),
        reason: "crashed".into(),
        at: 9_940,
        ..DeathStatus::default()
    }];
    let refused = Some("line 3: unknown key".to_owned());
    status.reloads = vec![
        ReloadStatus {
            generation: 3,
            ok: true,
            at: 9_000,
            took_ms: 812,
            error: None,
        },
        ReloadStatus {
            generation: 3,
            ok: false,
            at: 9_900,
            took_ms: 3,
            error: refused,
        },
    ];
    let address = "127.0.0.1:9000".to_owned();
    status.listeners = vec![ListenerStatus {
        address,
        queue: Some(7),
        backlog: 511,
        refused_per_source: 0,
    }];
    let queue = |method: &str, oldest_due_ms| QueueStatus {
        method: method.into(),
        waiting: 1_200,
        due: 3,
        running: 2,
        oldest_due_ms,
        served: true,
        ..QueueStatus::default()
    };
    let mut old = queue("old", Some(90_000));
    (old.served, old.dead) = (false, 7);
    let mut paused = queue(EVIL, None);
    paused.paused = true;
    status.jobs = Some(JobsStatus {
        state: "full".into(),
        due: 9,
        methods: vec![queue("mail", Some(4_200)), old, paused],
        ..JobsStatus::default()
    });
    status
}

fn reading(second: u64) -> Reading {
    let totals = |name: &str, calls: u64, overloaded: u64| {
        let mut totals = MethodTotals {
            name: name.into(),
            calls,
            ..MethodTotals::default()
        };
        totals.errors = vec![[0; 2]; 32];
        totals.errors[Code::Overloaded as usize] = [overloaded, 0];
        totals.duration.counts[40] = calls;
        totals
    };
    let count = |pid, calls| ProcessCount {
        pid,
        calls,
        errors: second,
    };
    Reading {
        methods: vec![
            totals("score", 1_000 * second * second, 5 * second),
            totals(EVIL, 3 * second, 0),
        ],
        accept_queue: Some(7),
        cpu_ns: vec![900_000_000 * second, 0, 0],
        pools: vec![PoolProgramCounts {
            name: "model".into(),
            starts: 9,
            exits: [("signal", 2), ("timeout", 4)].into(),
        }],
        processes: Some(ProcessCounts {
            at_ms: second * 1_000,
            counts: vec![count(4712, 900 * second), count(4714, 50 * second)],
        }),
    }
}

fn figures() -> Figures {
    let mut model = Model::new(1_000);
    for second in 0..9 {
        model.add(reading(second), second * 1_000, second);
    }
    let method = |name: &str, kind| MethodFigures {
        name: name.into(),
        kind,
        calls: 1,
        errors: [].into(),
        running: 2,
        queued: 0,
        slow: 0,
        p50_us: None,
        p99_us: None,
        max_us: None,
    };
    let methods = vec![
        method("score", Some("pool")),
        method(EVIL, Some("function")),
        method("_OTHER", None),
    ];
    let totals = ServerTotals::default();
    let facts = Facts {
        status: status(),
        json: "{}".into(),
        at_ms: 8_000,
    };
    Figures {
        facts: Rc::new(facts),
        members: Some(BoardMembers {
            totals,
            methods,
            slow_log: false,
            slow: Vec::new(),
        }),
        rates: model.rates(),
        master_age_ms: 12,
    }
}

fn view(keys: &str) -> View {
    let mut view = View::new(Duration::from_secs(1), false);
    for key in keys.chars() {
        let key = if key == '\n' {
            KeyCode::Enter
        } else {
            KeyCode::Char(key)
        };
        view.key(key, 3, 10);
    }
    view
}

fn frame(keys: &str, (width, height): (u16, u16)) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let (view, figures) = (view(keys), figures());
    terminal
        .draw(|frame| {
            draw(frame.buffer_mut(), &view, Some(&figures), NOW);
        })
        .unwrap();
    terminal
}

#[track_caller]
fn assert_recorded(name: &str, text: &str) {
    assert_eq!(escape_unprintable(text, &['\n']), text);
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/top");
    let path = place.join(name);
    if env::var_os("PREFORKD_RECORD").is_some() {
        fs::create_dir_all(place).unwrap();
        fs::write(&path, text).unwrap();
    }
    assert_eq!(fs::read_to_string(path).unwrap_or_default(), text, "{name}");
}

#[test]
fn each_pane_is_drawn_as_recorded() {
    for (name, keys, size) in [
        ("workers-80x24.txt", "1", (80, 24)),
        ("workers-120x40.txt", "1", (120, 40)),
        ("workers-40x10.txt", "1", (40, 10)),
        ("methods-120x40.txt", "2", (120, 40)),
        ("methods-59x12.txt", "2", (59, 12)),
        ("pools-100x16.txt", "3", (100, 16)),
        ("events-80x16.txt", "4", (80, 16)),
        ("slow-60x12.txt", "5", (60, 12)),
        ("jobs-80x16.txt", "6", (80, 16)),
        ("details-80x24.txt", "1\n", (80, 24)),
        ("help-80x24.txt", "?", (80, 24)),
        ("filter-80x16.txt", "2/sc", (80, 16)),
    ] {
        assert_recorded(name, &text_of(frame(keys, size).backend().buffer()));
    }
    assert_recorded("once-100.txt", &page(&view(""), &figures(), NOW, 100));
}

#[test]
fn a_frame_of_any_size_can_be_drawn() {
    for keys in ["1", "2", "3", "4", "5", "6", "?", "1\n", "/x"] {
        for width in [1, 2, 19, 20, 21, 59, 200] {
            for height in [1, 4, 5, 6, 9, 60] {
                frame(keys, (width, height));
            }
        }
    }
    let line = text_of(frame("1", (19, 24)).backend().buffer());
    assert_eq!(line, "1/3 15,003/s\n");
    let narrow = text_of(frame("1", (59, 24)).backend().buffer());
    let wide = text_of(frame("1", (160, 24)).backend().buffer());
    assert!(
        wide.contains("Oldest call") && !narrow.contains("Oldest call"),
        "{narrow}{wide}"
    );
}

#[test]
fn colors_are_used_only_if_they_are_wanted() {
    let colors = |wants: bool| {
        let mut terminal = Terminal::new(TestBackend::new(100, 20)).unwrap();
        let mut view = view("1");
        view.colors = wants;
        let figures = figures();
        terminal
            .draw(|frame| {
                draw(frame.buffer_mut(), &view, Some(&figures), NOW);
            })
            .unwrap();
        let cells = terminal.backend().buffer().content.clone();
        assert!(
            cells
                .iter()
                .any(|cell| cell.modifier.contains(Modifier::REVERSED))
        );
        cells.iter().filter(|cell| cell.fg != Color::Reset).count()
    };
    assert_eq!(colors(false), 0);
    assert!(colors(true) > 20);
}

#[test]
fn wide_characters_count_twice_when_a_line_is_wrapped() {
    assert_eq!(wrap("abcdef", 4), ["abcd", "ef"]);
    assert_eq!(wrap("ab\u{6f22}\u{5b57}c", 4), ["ab\u{6f22}", "\u{5b57}c"]);
    assert_eq!(wrap("\u{6f22}\u{5b57}", 1), ["\u{6f22}", "\u{5b57}"]);
    assert!(wrap("", 4).is_empty());
}
