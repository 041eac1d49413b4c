//! Reads the frames of other processes, and passes each to the part that handles it.

use super::attempts;
use super::calls;
use super::core::JobsCore;
use super::links::CallAdmission;
use super::ticket::CallPlace;
use crate::link::call_frame::Frame;
use crate::link::call_link::MAX_READS;
use crate::throttle::limiter::SharedLimiter;

static INVALID_FRAMES: SharedLimiter = SharedLimiter::new();

/// Reads from a link, through the buffer `piece`. Returns false if the link has ended: then remove it and call `end`.
#[must_use]
pub fn receive(core: &mut JobsCore, link: u64, piece: &mut [u8]) -> bool {
    for _ in 0..MAX_READS {
        let Some(peer) = core.links.get_mut(link) else {
            return true;
        };
        let has_more = peer.link.receive(piece);
        let is_closed = peer.link.is_closed();
        if !read(core, link) || is_closed {
            return false;
        }
        if !has_more {
            break;
        }
    }
    true
}

/// Handles the end of a link, which was removed.
pub fn end(core: &mut JobsCore, link: u64) {
    calls::end_link(core, link);
    attempts::link_ended(core, link);
}

/// Handles the frames that were read from a link. Returns false if the other process sent an invalid one.
fn read(core: &mut JobsCore, link: u64) -> bool {
    let Some(peer) = core.links.get_mut(link) else {
        return false;
    };
    let (received, limit) = (peer.link.take_received(), core.limits.frame);
    let (used, is_understood) =
        Frame::decode_each(&received, limit, |frame| handle(core, link, frame));
    if !is_understood {
        let text = "a process sent an invalid frame over an internal link: the link is closed";
        INVALID_FRAMES.log(log::Level::Warn, text.to_owned());
    }
    if let Some(peer) = core.links.get_mut(link) {
        peer.link.put_back(received, used);
    }
    is_understood
}

/// Handles a frame of another process. Returns false if that process may not send such a frame.
fn handle(core: &mut JobsCore, link: u64, frame: Frame<'_>) -> bool {
    match frame {
        Frame::Call(call) => {
            let number = call.id.number;
            let place = CallPlace { link, number };
            let state = call.trace.as_deref().and_then(|it| it.state.as_deref());
            let bytes = call.params.len() + state.map_or(0, str::len);
            match core.links.begin_call(place, bytes, core.limits.pipeline) {
                CallAdmission::Accepted => calls::begin(core, place, &call),
                CallAdmission::TooManyBytes => calls::refuse_bytes(core, place),
                CallAdmission::Invalid => return false,
            }
        }
        Frame::Cancel { id } => calls::give_up(core, CallPlace { link, number: id }),
        Frame::AnswerWaits => {
            let jobs = core.waits.finish_link(link);
            calls::read(core, jobs);
        }
        Frame::Attempt(frame) => return attempts::receive(core, link, frame),
        Frame::Leave => {
            attempts::leaves(core, link);
            if let Some(peer) = core.links.get_mut(link) {
                peer.link.queue(&Frame::LeaveNoted);
            }
        }
        Frame::Offer { .. } => attempts::offers(core, link),
        Frame::LeaveNoted => {}
        // This process sends no calls, so no answer can follow.
        Frame::Answer(_) | Frame::Returned { .. } => return false,
    }
    true
}
