//! Holds the requests that are not executed, in the order of their arrival, and forms groups of them.
//!
//! Pure, except that it takes and releases the holds that it shares with the event loop.

use std::collections::VecDeque;
use std::sync::Arc;

use super::store_event::{RequestHold, SubmittedRequest};
use super::ticket::Ticket;
use crate::jobs::store::error::{StoreError, StoreFault};
use crate::jobs::store::group::RequestGroup;
use crate::jobs::store::request::StoreRequest;

/// What belongs to a request of a group.
pub type GroupMember = (Ticket, Option<Arc<RequestHold>>);

/// The requests that are not executed.
#[derive(Default)]
pub struct PendingRequests(VecDeque<SubmittedRequest>);

impl PendingRequests {
    pub fn push(&mut self, submitted: SubmittedRequest) {
        self.0.push_back(submitted);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes the next group, without the requests that were withdrawn. Each request has its member.
    pub fn take_group(&mut self) -> (Vec<StoreRequest>, Vec<GroupMember>) {
        let (mut group, mut members) = (RequestGroup::default(), Vec::new());
        while let Some(SubmittedRequest {
            request,
            ticket,
            hold,
        }) = self.0.pop_front()
        {
            if hold.as_ref().is_some_and(|hold| !hold.take()) {
                continue;
            }
            if let Some(request) = group.push(request) {
                self.put_back((request, (ticket, hold)), true);
                break;
            }
            members.push((ticket, hold));
        }
        (group.take(), members)
    }

    /// Puts the requests of a group back that could not be executed because of `error`. Returns the tickets of those
    /// that fail instead.
    pub fn put_group_back(
        &mut self,
        requests: Vec<StoreRequest>,
        members: Vec<GroupMember>,
        error: &StoreError,
    ) -> Vec<Ticket> {
        let mut failed = Vec::new();
        for (request, member) in requests.into_iter().zip(members).rev() {
            let is_lost = match error.fault {
                StoreFault::Full => matches!(request, StoreRequest::Enqueue(_)),
                StoreFault::Corrupt => true,
                StoreFault::Away | StoreFault::SyncFailed => false,
            };
            match is_lost {
                true => failed.push(member.0),
                false => self.put_back((request, member), !error.is_maybe_stored),
            }
        }
        failed.reverse();
        failed
    }

    /// Puts a request back as the first one. `is_released` is whether it is certainly not stored, so that it may be
    /// withdrawn.
    fn put_back(&mut self, request: (StoreRequest, GroupMember), is_released: bool) {
        let (request, (ticket, hold)) = request;
        if let Some(hold) = hold.as_ref().filter(|_| is_released) {
            hold.release();
        }
        self.0.push_front(SubmittedRequest {
            request,
            ticket,
            hold,
        });
    }

    /// Drops the requests that were withdrawn.
    pub fn drop_withdrawn(&mut self) {
        let is_withdrawn = |hold: &Arc<RequestHold>| hold.is_withdrawn();
        self.0
            .retain(|it| !it.hold.as_ref().is_some_and(is_withdrawn));
    }

    /// Removes all requests.
    pub fn take_all(&mut self) -> impl Iterator<Item = SubmittedRequest> + use<> {
        std::mem::take(&mut self.0).into_iter()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::ticket::CallPlace;
    use super::*;
    use crate::protocol::job_id::JobId;

    fn submitted(number: u64) -> SubmittedRequest {
        let request = match number % 2 {
            0 => StoreRequest::Enqueue(Vec::new()),
            _ => StoreRequest::Cancel(JobId([number as u8; 16])),
        };
        SubmittedRequest {
            request,
            ticket: ticket(number),
            hold: Some(Arc::default()),
        }
    }

    fn ticket(number: u64) -> Ticket {
        Ticket::Enqueue(CallPlace { link: 1, number })
    }

    fn filled(count: u64) -> (PendingRequests, Vec<Arc<RequestHold>>) {
        let mut pending = PendingRequests::default();
        let mut holds = Vec::new();
        for number in 0..count {
            let submitted = submitted(number);
            holds.extend(submitted.hold.clone());
            pending.push(submitted);
        }
        (pending, holds)
    }

    fn tickets(members: &[GroupMember]) -> Vec<Ticket> {
        members.iter().map(|(ticket, _)| ticket.clone()).collect()
    }

    #[test]
    fn a_group_that_is_not_stored_waits_in_its_order_and_may_be_withdrawn() {
        let (mut pending, holds) = filled(4);
        assert!(holds[1].withdraw());
        let (requests, members) = pending.take_group();
        assert_eq!(tickets(&members), [ticket(0), ticket(2), ticket(3)]);
        assert!(!holds[0].withdraw());
        let away = StoreError::new(StoreFault::Away, "locked");
        assert!(pending.put_group_back(requests, members, &away).is_empty());
        assert!(holds[2].withdraw());
        pending.drop_withdrawn();
        let left: Vec<Ticket> = pending.take_all().map(|it| it.ticket).collect();
        assert_eq!(left, [ticket(0), ticket(3)]);
    }

    #[test]
    fn a_group_that_may_be_stored_is_executed_again_and_cannot_be_withdrawn() {
        let (mut pending, holds) = filled(2);
        let (requests, members) = pending.take_group();
        let doubtful = StoreError {
            is_maybe_stored: true,
            ..StoreError::new(StoreFault::Away, "i/o error")
        };
        pending.put_group_back(requests, members, &doubtful);
        assert!(!holds[0].withdraw() && !holds[1].withdraw());
        assert_eq!(pending.take_group().1.len(), 2);
    }

    #[test]
    fn a_full_disk_fails_enqueues_alone_and_damage_fails_all() {
        for (fault, expected) in [
            (StoreFault::Full, vec![ticket(0), ticket(2)]),
            (StoreFault::Corrupt, (0..4).map(ticket).collect()),
        ] {
            let (mut pending, _) = filled(4);
            let (requests, members) = pending.take_group();
            let error = StoreError::new(fault, "");
            let failed = pending.put_group_back(requests, members, &error);
            assert_eq!(failed, expected);
            assert_eq!(pending.take_all().count(), 4 - expected.len());
        }
    }
}
