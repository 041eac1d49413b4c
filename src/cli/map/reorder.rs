//! Puts back in order what ends in any.
//!
//! Pure. What was announced and did not come yet holds back what is behind it.

use std::collections::VecDeque;

/// Things that come in any order and go in that of their announcement.
#[derive(Debug)]
pub(super) struct ReorderBuffer<T> {
    /// The place of the first one that did not go yet.
    first: u64,
    held: VecDeque<Option<T>>,
}

impl<T> Default for ReorderBuffer<T> {
    fn default() -> Self {
        ReorderBuffer {
            first: 0,
            held: VecDeque::new(),
        }
    }
}

impl<T> ReorderBuffer<T> {
    /// Announces one; its place.
    pub(super) fn expect(&mut self) -> u64 {
        self.held.push_back(None);
        self.first + self.held.len() as u64 - 1
    }

    /// Here it is. A place that was not announced, or went already, is a bug of the caller; the thing
    /// is dropped.
    pub(super) fn put(&mut self, place: u64, thing: T) {
        let slot = place
            .checked_sub(self.first)
            .and_then(|index| self.held.get_mut(usize::try_from(index).ok()?));
        debug_assert!(slot.is_some(), "{place} was not announced");
        if let Some(slot) = slot {
            *slot = Some(thing);
        }
    }

    /// The next one in order, if it is there.
    pub(super) fn next(&mut self) -> Option<T> {
        let thing = self.held.front_mut()?.take()?;
        self.held.pop_front();
        self.first += 1;
        Some(thing)
    }

    /// How many were announced and did not go.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_in_any_order_goes_in_its_own() {
        let mut order = ReorderBuffer::default();
        let places: Vec<u64> = (0..4).map(|_| order.expect()).collect();
        order.put(places[2], "c");
        order.put(places[1], "b");
        assert_eq!(order.next(), None);
        order.put(places[0], "a");
        assert_eq!(
            [order.next(), order.next(), order.next()],
            [Some("a"), Some("b"), Some("c")]
        );
        assert_eq!((order.next(), order.len()), (None, 1));
        order.put(places[3], "d");
        assert_eq!(order.next(), Some("d"));
        assert!(order.is_empty());
    }
}
