//! Runs code that may panic: a panic of a handler becomes an answer, even if the payload panics when it
//! is dropped. Only an abort ends the worker (a panic during unwinding, a stack overflow).

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::logging;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// Runs the handler of `method` for the call with this id. A panic is logged, at a limited rate, and
/// answered with `internal`.
///
/// # Errors
/// The error of the handler, or `internal`.
pub fn run(
    (method, id): (&str, Option<&str>),
    handler: impl FnOnce() -> Result<(), RpcError>,
) -> Result<(), RpcError> {
    let outcome =
        logging::rate_limit_panics((method, id), || catch_unwind(AssertUnwindSafe(handler)));
    outcome.unwrap_or_else(|payload| {
        discard(payload);
        let text = format!("the handler of {method} panicked; the server's log has the reason");
        Err(RpcError::of(Code::Internal, text, true))
    })
}

/// Drops the payload of a panic. That may panic again; the second payload is leaked.
pub fn discard(payload: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(again);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::panic::panic_any;

    struct Grudge;
    impl Drop for Grudge {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn every_panic_payload_becomes_an_answer() {
        let thrown: [fn() -> Result<(), RpcError>; 4] = [
            || panic!("text"),
            || panic_any(7),
            || panic_any(Grudge),
            || {
                let _grudge = Grudge;
                Ok(())
            },
        ];
        for handler in thrown {
            let error = run(("it", None), handler).unwrap_err();
            assert_eq!((error.code, error.started), (-32603, true));
        }
        assert!(run(("it", Some("7")), || Ok(())).is_ok());
    }
}
