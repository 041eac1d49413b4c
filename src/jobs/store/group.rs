//! Collects requests for one transaction, up to a limit that keeps the wait for its commit short.
//!
//! Requests that arrive while a commit runs become the next group. A group is closed at 512 jobs or 1 MiB. A
//! request is never split: an array that is larger than a group is a group of its own.

use super::request::StoreRequest;

/// The largest number of jobs of a group.
pub const MOST_JOBS: usize = 512;

/// The largest number of bytes of params and results of a group.
pub const MOST_BYTES: usize = 1 << 20;

/// The requests of the next transaction, in the order of their arrival.
#[derive(Debug, Default)]
pub struct RequestGroup {
    requests: Vec<StoreRequest>,
    jobs: usize,
    bytes: usize,
}

impl RequestGroup {
    /// Adds a request. Returns it if there is no room for it: it belongs to the next group.
    pub fn push(&mut self, request: StoreRequest) -> Option<StoreRequest> {
        let (jobs, bytes) = weight(&request);
        let has_room = self.jobs + jobs <= MOST_JOBS && self.bytes + bytes <= MOST_BYTES;
        if !has_room && !self.requests.is_empty() {
            return Some(request);
        }
        self.jobs += jobs;
        self.bytes += bytes;
        self.requests.push(request);
        None
    }

    /// Returns the requests, and begins the next group.
    pub fn take(&mut self) -> Vec<StoreRequest> {
        std::mem::take(self).requests
    }
}

/// Returns the number of jobs that a request changes at most, and the bytes that it writes.
fn weight(request: &StoreRequest) -> (usize, usize) {
    match request {
        StoreRequest::Enqueue(jobs) => {
            let bytes = jobs.iter().map(|job| job.params.len()).sum();
            (jobs.len(), bytes)
        }
        StoreRequest::Import(jobs) => {
            let bytes = jobs.iter().map(|job| job.size()).sum();
            (jobs.len(), bytes)
        }
        StoreRequest::Claim(claim) => (claim.most, 0),
        StoreRequest::Settle(settlement) => {
            let json = settlement.end.json.as_ref();
            (1, json.map_or(0, |json| json.len()))
        }
        _ => (1, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance_tests::{id, job};
    use super::*;

    fn array(jobs: usize, bytes: usize) -> StoreRequest {
        let one = || {
            let mut one = job(1, "a");
            one.params = "1".repeat(bytes / jobs).into();
            one
        };
        StoreRequest::Enqueue((0..jobs).map(|_| one()).collect())
    }

    #[test]
    fn a_group_is_closed_by_jobs_and_by_bytes() {
        let mut group = RequestGroup::default();
        for _ in 0..MOST_JOBS {
            assert_eq!(group.push(StoreRequest::Cancel(id(1))), None);
        }
        let next = group.push(StoreRequest::Cancel(id(2)));
        assert_eq!(next, Some(StoreRequest::Cancel(id(2))));
        assert_eq!(group.take().len(), MOST_JOBS);
        assert!(group.take().is_empty());
        assert_eq!(group.push(array(1, MOST_BYTES / 2)), None);
        assert_eq!(group.push(array(1, MOST_BYTES / 2)), None);
        assert!(group.push(array(1, 1)).is_some());
        assert_eq!(
            group.push(StoreRequest::Cancel(id(1))),
            None,
            "it has no bytes"
        );
    }

    #[test]
    fn an_array_is_never_split() {
        let mut group = RequestGroup::default();
        assert_eq!(group.push(StoreRequest::Cancel(id(1))), None);
        let large = array(MOST_JOBS + 1, MOST_BYTES * 2);
        let large = group
            .push(large)
            .expect("there is no room beside another request");
        assert_eq!(group.take().len(), 1);
        assert_eq!(group.push(large), None, "alone it is a group");
        assert!(group.push(StoreRequest::Cancel(id(1))).is_some());
        assert_eq!(group.take().len(), 1);
    }
}
