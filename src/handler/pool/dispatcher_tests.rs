use std::os::fd::{AsRawFd, OwnedFd};

use crossbeam_channel::{Receiver, unbounded};
use nix::sys::socket::{MsgFlags, recv, send};

use super::*;
use crate::handler::builtin::Echo;
use crate::handler::call_state::CallKey;
use crate::handler::pool::entry::{ProgramCalls, ServingProgram};
use crate::handler::pool::wire::{PIECE, Wire};
use crate::handler::registry::{Method, Registry};
use crate::sys::process::Pid;
use crate::sys::socket::stream_pair;
use crate::throttle::limiter::Limiter;

const PROGRAM: ServingProgram = ServingProgram {
    pid: Pid(0),
    stack_signal: None,
};

/// A dispatcher with the orders to its supervisors, and the programs' ends of the sockets.
struct World {
    dispatcher: Dispatcher,
    orders: Vec<Receiver<SupervisorOrder>>,
    programs: Vec<Option<OwnedFd>>,
    piece: Vec<u8>,
    concurrency: usize,
}

impl World {
    fn new(count: usize) -> Self {
        let mut orders = Vec::new();
        let supervisors = (0..count).map(|_| {
            let (sender, receiver) = unbounded();
            orders.push(receiver);
            let waker = Arc::new(Waker::new().unwrap());
            SupervisorHandle {
                orders: sender,
                waker,
            }
        });
        let line = Line {
            waiting: Default::default(),
            done: Vec::new(),
            registry: Arc::new(Registry::new(vec![
                method("?", true),
                method("finish", false),
            ])),
            name: "p".to_owned(),
            warning_limiter: Limiter::rare(),
            limit: 1 << 20,
            depth: 10,
            pool: None,
        };
        World {
            dispatcher: Dispatcher::new(line, supervisors.collect()),
            orders,
            programs: (0..count).map(|_| None).collect(),
            piece: vec![0; PIECE],
            concurrency: 1,
        }
    }

    /// All its programs are ready.
    fn serving(count: usize) -> Self {
        let mut world = World::new(count);
        (0..count).for_each(|number| world.ready(number));
        world
    }

    /// All its programs are ready, and each may have `concurrency` calls at once.
    fn parallel(count: usize, concurrency: usize) -> Self {
        let mut world = World::new(count);
        world.concurrency = concurrency;
        (0..count).for_each(|number| world.ready(number));
        world
    }

    fn capacity(&self, concurrency: usize) -> usize {
        self.dispatcher.capacity(concurrency)
    }

    fn end_given_up(&mut self) {
        self.dispatcher.cancel_given_up();
    }

    /// Lets the program answer the call with this id.
    fn answers(&mut self, number: usize, id: u64) {
        let body = format!(r#"{{"out": "?", "result": 12, "id": {id}}}"#);
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(body.as_bytes());
        self.sends(number, &frame);
    }

    /// Returns the bodies that the program gets.
    fn bodies(&self, number: usize) -> Vec<String> {
        let fd = self.programs[number].as_ref().unwrap().as_raw_fd();
        let mut piece = [0; 4096];
        let count = recv(fd, &mut piece, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
        let (mut rest, mut bodies) = (&piece[..count], Vec::new());
        while let Some((length, tail)) = rest.split_first_chunk() {
            let (body, tail) = tail.split_at(u32::from_le_bytes(*length) as usize);
            bodies.push(String::from_utf8_lossy(body).into_owned());
            rest = tail;
        }
        bodies
    }

    fn ready(&mut self, number: usize) {
        let (ours, theirs) = stream_pair().unwrap();
        self.programs[number] = Some(theirs);
        let wire = (Wire::new(ours), false);
        let connection = ProgramConnection::new(
            wire,
            self.concurrency,
            Arc::new(ProgramCalls::of(PROGRAM)),
            0,
        );
        self.receive(number, SupervisorEvent::Ready(Box::new(connection)));
        self.dispatcher.settle(|_, _| Ok(()));
    }

    fn receive(&mut self, number: usize, event: SupervisorEvent) {
        self.dispatcher.receive(number, event, &mut self.piece);
    }

    fn put(&mut self, serial: u64) -> Arc<crate::handler::CallState> {
        self.put_call(call(serial))
    }

    fn put_call(&mut self, call: HandlerCall) -> Arc<crate::handler::CallState> {
        let state = Arc::clone(&call.state);
        self.dispatcher.put(call);
        state
    }

    /// Lets the program send these bytes.
    fn sends(&mut self, number: usize, bytes: &[u8]) {
        let fd = self.programs[number].as_ref().unwrap().as_raw_fd();
        send(fd, bytes, MsgFlags::empty()).unwrap();
        self.dispatcher.attend(number, &mut self.piece);
    }

    /// Returns whether the program gets a call.
    fn reads(&self, number: usize) -> bool {
        let fd = self.programs[number].as_ref().unwrap().as_raw_fd();
        let mut piece = [0; 4096];
        recv(fd, &mut piece, MsgFlags::MSG_DONTWAIT).is_ok_and(|count| count > 4)
    }

    fn done(&mut self) -> Vec<(u64, bool)> {
        let mut done = Vec::new();
        done.append(&mut self.dispatcher.line.done);
        done.into_iter()
            .map(|done| (done.key.serial, matches!(done.outcome, Some(Ok(_)))))
            .collect()
    }

    fn orders(&mut self, number: usize) -> Vec<SupervisorOrder> {
        self.dispatcher.settle(|_, _| Ok(()));
        self.orders[number].try_iter().collect()
    }
}

fn method(name: &str, kills_abandoned: bool) -> Method {
    Method {
        name: name.to_owned(),
        handler: Arc::new(Echo),
        timeout: Duration::from_millis(50),
        concurrency: 0,
        rate: 0,
        kills_abandoned,
    }
}

/// Makes a call of the method whose program may finish abandoned calls.
fn job_to_finish(serial: u64) -> HandlerCall {
    HandlerCall {
        method: 1,
        ..call(serial)
    }
}

fn call(serial: u64) -> HandlerCall {
    HandlerCall {
        key: CallKey { index: 0, serial },
        method: 0,
        params: "null".into(),
        id: None,
        peer: None,
        expected: None,
        deadline: Duration::MAX,
        state: Arc::default(),
    }
}

const ANSWER: &[u8] = b"\x1a\0\0\0{\"out\": \"?\", \"result\": 12}";

#[test]
fn a_call_goes_to_an_idle_program_and_its_answer_makes_room_for_the_next() {
    let mut world = World::serving(2);
    for serial in 1..=3 {
        world.put(serial);
    }
    assert!(world.reads(0) && world.reads(1), "each got one");
    assert!(!world.reads(0) && !world.reads(1), "and no more");
    world.sends(1, ANSWER);
    assert_eq!(world.done(), [(2, true)]);
    assert!(world.reads(1), "the third");
    world.sends(1, &ANSWER[..9]);
    world.put(4);
    world.sends(1, &ANSWER[9..12]);
    assert!(world.reads(1), "written while the answer arrives");
    world.sends(1, &ANSWER[12..]);
    assert_eq!(world.done(), [(3, true)]);
}

#[test]
fn a_call_that_finds_nobody_awake_starts_one_program_a_call() {
    let mut world = World::serving(2);
    for number in 0..2 {
        world.receive(number, SupervisorEvent::Recall(Recall::Sleep));
        assert!(matches!(
            world.orders(number)[..],
            [SupervisorOrder::Back(_)]
        ));
    }
    world.put(1);
    assert!(matches!(world.orders(0)[..], [SupervisorOrder::Start]));
    assert!(world.orders(1).is_empty());
    world.put(2);
    world.put(3);
    assert!(matches!(world.orders(1)[..], [SupervisorOrder::Start]));
    assert!(world.orders(0).is_empty(), "it is up already");
    world.ready(1);
    assert!(world.reads(1));
}

/// If a supervisor got `Start` before its program came back, the program would sleep for ever.
#[test]
fn a_program_that_is_wanted_before_its_supervisor_has_it_back_stays() {
    let mut world = World::serving(1);
    world.receive(0, SupervisorEvent::Recall(Recall::Sleep));
    world.put(1);
    assert!(world.reads(0));
    assert!(matches!(world.orders(0)[..], [SupervisorOrder::Kept]));
    world.sends(0, ANSWER);
    assert_eq!(world.done(), [(1, true)]);
}

#[test]
fn a_program_that_works_does_not_sleep_and_goes_to_its_successor_when_it_is_done() {
    let mut world = World::serving(1);
    world.put(1);
    world.receive(0, SupervisorEvent::Recall(Recall::Sleep));
    assert!(matches!(world.orders(0)[..], [SupervisorOrder::Kept]));
    world.receive(0, SupervisorEvent::Recall(Recall::Successor));
    world.put(2);
    assert!(world.orders(0).is_empty());
    assert!(world.reads(0));
    world.sends(0, ANSWER);
    assert_eq!(world.done(), [(1, true)]);
    assert!(matches!(world.orders(0)[..], [SupervisorOrder::Back(_)]));
    assert!(!world.reads(0), "the second is for the successor");
    world.ready(0);
    assert!(world.reads(0));
}

#[test]
fn what_is_given_up_ends_its_program_also_when_it_was_written_ahead() {
    let mut world = World::serving(1);
    world.put(1);
    let second = world.put(2);
    assert!(world.reads(0));
    world.sends(0, &ANSWER[..9]);
    assert!(world.reads(0), "written ahead");
    assert!(second.give_up(), "it has begun");
    world.dispatcher.cancel_given_up();
    assert!(world.orders(0).is_empty(), "the first still runs");
    world.sends(0, &ANSWER[9..]);
    assert_eq!(world.done(), [(1, true)]);
    assert!(matches!(
        world.orders(0)[..],
        [SupervisorOrder::End(_, EndCause::GivenUp)]
    ));
}

#[test]
fn an_abandoned_call_may_be_finished_within_the_timeout_of_its_method() {
    let mut world = World::serving(1);
    let state = world.put_call(job_to_finish(1));
    assert!(state.give_up());
    world.end_given_up();
    world.put(2);
    assert!(world.orders(0).is_empty() && world.reads(0) && !world.reads(0));
    world.sends(0, ANSWER);
    assert_eq!(world.done().len(), 1);
    assert!(world.reads(0), "the second");
    assert!(world.orders(0).is_empty() && world.dispatcher.next_overdue.is_none());
    world.sends(0, ANSWER);
    world.put_call(job_to_finish(3)).give_up();
    std::thread::sleep(Duration::from_millis(60));
    assert!(matches!(
        world.orders(0)[..],
        [SupervisorOrder::End(_, EndCause::GivenUp)]
    ));
}

#[test]
fn what_can_be_no_answer_ends_its_program_with_the_reason() {
    for bytes in [ANSWER, &b"\x02\0\0\0{}"[..], b"\xff\xff\xff\xff"] {
        let mut world = World::serving(1);
        world.put(1);
        // Sent before the call was read.
        world.sends(0, bytes);
        assert_eq!(world.done(), []);
        let orders = world.orders(0);
        assert!(
            matches!(&orders[..], [SupervisorOrder::End(connection, EndCause::Broken(_))] if connection.running.is_some()),
            "{orders:?}"
        );
    }
}

#[test]
fn a_program_that_has_ended_gets_nothing_more_whoever_holds_its_wire() {
    let mut world = World::serving(1);
    world.put(1);
    assert!(world.reads(0));
    let fd = world.programs[0].as_ref().unwrap().as_raw_fd();
    send(fd, ANSWER, MsgFlags::empty()).unwrap();
    world.put(2);
    world.receive(0, SupervisorEvent::Recall(Recall::Ended));
    assert_eq!(world.done(), [(1, true)], "what it has said counts");
    assert!(matches!(
        world.orders(0)[..],
        [SupervisorOrder::End(_, EndCause::Died)]
    ));
    assert!(!world.reads(0));
    world.receive(0, SupervisorEvent::Again(call(3)));
    world.ready(0);
    assert!(world.reads(0));
    world.sends(0, ANSWER);
    assert_eq!(world.done(), [(3, true)], "what came back goes first");
}

#[test]
fn calls_are_refused_only_while_every_program_is_down() {
    let mut world = World::serving(2);
    let down = |text: &str, at| SupervisorEvent::Down(text.to_owned(), at);
    for number in 0..2 {
        world.programs[number] = None;
        world.dispatcher.attend(number, &mut [0; 10]);
        assert!(matches!(
            world.orders(number)[..],
            [SupervisorOrder::End(_, EndCause::Died)]
        ));
    }
    world.receive(0, down("so it was", 5));
    world.put(1);
    assert_eq!(world.done(), [], "the other one may come back");
    world.receive(1, down("so it was as well", 3));
    assert_eq!(world.done(), [(1, false)]);
    world.put(2);
    assert_eq!(world.done(), [(2, false)]);
    world.receive(1, SupervisorEvent::Starts);
    world.put(3);
    assert_eq!(world.done(), []);
}

#[test]
fn a_wire_that_is_full_is_watched_for_writing_until_it_is_not() {
    let mut world = World::serving(1);
    let mut large = call(1);
    large.params = format!("\"{}\"", "x".repeat(500_000)).into();
    world.dispatcher.put(large);
    let mut seen = Vec::new();
    world.dispatcher.settle(|_, wire| {
        seen.push(wire.map(|(_, writing)| writing));
        Ok(())
    });
    assert_eq!(seen, [Some(true)]);
    let fd = world.programs[0].as_ref().unwrap().as_raw_fd();
    let (mut read, mut piece) = (0, vec![0; 1 << 20]);
    while read < 500_000 {
        read += recv(fd, &mut piece, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
        world.dispatcher.attend(0, &mut [0; 10]);
    }
    world.dispatcher.settle(|_, wire| {
        seen.push(wire.map(|(_, writing)| writing));
        Ok(())
    });
    assert_eq!(seen, [Some(true), Some(false)]);
}

#[test]
fn programs_with_several_calls_get_them_evenly_and_answer_in_any_order() {
    let mut world = World::parallel(2, 3);
    for serial in 1..=7 {
        world.put(serial);
    }
    assert_eq!(world.capacity(3), 6);
    let calls = |ids: [u64; 3]| ids.map(|id| format!(r#"{{"in":"?","params":null,"id":{id}}}"#));
    assert_eq!(world.bodies(0), calls([1, 2, 3]));
    assert_eq!(world.bodies(1), calls([1, 2, 3]));
    world.answers(1, 3);
    assert_eq!(world.done(), [(6, true)]);
    assert_eq!(world.bodies(1).len(), 1, "the seventh");
    world.answers(1, 1);
    world.answers(0, 2);
    assert_eq!(world.done(), [(2, true), (3, true)]);
}

#[test]
fn a_cancelled_call_is_told_and_its_answer_is_dropped() {
    let mut world = World::parallel(1, 2);
    let first = world.put(1);
    world.put(2);
    world.put(3);
    assert_eq!(world.bodies(0).len(), 2);
    assert!(first.give_up(), "it has begun");
    world.end_given_up();
    assert_eq!(world.done(), [(1, false)]);
    let told = r#"{"in":"rpc.cancel","params":{"id":1}}"#;
    assert_eq!(
        world.bodies(0),
        [told],
        "and the third waits: the program still has two"
    );
    assert_eq!(world.capacity(2), 1);
    world.answers(0, 1);
    assert!(world.done().is_empty());
    assert_eq!(world.bodies(0).len(), 1, "the third");
    assert!(world.orders(0).is_empty());
}

#[test]
fn a_program_that_keeps_a_cancelled_call_is_ended_without_the_others() {
    let mut world = World::parallel(1, 2);
    let state = world.put_call(job_to_finish(1));
    world.put(2);
    assert!(state.give_up());
    world.end_given_up();
    assert!(world.orders(0).is_empty());
    std::thread::sleep(Duration::from_millis(1100));
    world.put(3);
    assert_eq!(world.capacity(2), 1, "no further call");
    assert!(world.orders(0).is_empty(), "the second runs");
    world.answers(0, 2);
    assert!(matches!(
        world.orders(0)[..],
        [SupervisorOrder::End(_, EndCause::GivenUp)]
    ));
}

#[test]
fn a_wrong_id_ends_a_program_and_a_bad_answer_costs_its_call_only() {
    let mut world = World::parallel(1, 2);
    world.put(1);
    world.put(2);
    let bad = br#"{"out": 1, "result": 1, "id": 1}"#;
    world.sends(0, &[&(bad.len() as u32).to_le_bytes()[..], bad].concat());
    assert_eq!(world.done(), [(1, false)]);
    assert!(world.orders(0).is_empty());
    world.answers(0, 1);
    let orders = world.orders(0);
    let [SupervisorOrder::End(connection, EndCause::Broken(problem))] = &orders[..] else {
        panic!("{orders:?}");
    };
    assert!(
        problem.contains("id 1, which no open call has"),
        "{problem}"
    );
    assert_eq!(connection.count(), 1, "the second");
}
