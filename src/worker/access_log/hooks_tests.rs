use super::*;

#[test]
fn an_outcome_follows_from_the_code_and_whether_the_call_began() {
    for (it, started, is_gone, expected) in [
        (Code::Timeout, true, false, "timeout"),
        (Code::Timeout, false, false, "shed"),
        (Code::Overloaded, false, false, "shed"),
        (Code::Stopping, false, false, "shed"),
        (Code::Cancelled, true, false, "cancelled"),
        (Code::Cancelled, false, true, "disconnected"),
        (Code::Crashed, true, false, "crashed"),
        (Code::Crashed, false, false, "crashed"),
        (Code::MethodNotFound, false, false, "error"),
        (Code::CommandFailed, true, false, "error"),
    ] {
        let error = RpcError::of(it, "x", started);
        assert_eq!(outcome(&error, is_gone), expected, "{it:?} {started}");
        assert_eq!(code(&error), it.name());
    }
    let own = RpcError::new(7, "x");
    assert_eq!((outcome(&own, false), code(&own)), ("error", "handler"));
}
