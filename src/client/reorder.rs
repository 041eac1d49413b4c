//! Puts items that arrive in any order back in order. Pure.
//!
//! An item that has not arrived holds back those behind it.

use std::collections::BTreeMap;

/// Items that arrive in any order and leave in the order of their indices, from 0 on.
#[derive(Debug)]
pub(crate) struct ReorderBuffer<T> {
    /// The index of the next item to leave.
    first: usize,
    early: BTreeMap<usize, T>,
}

impl<T> Default for ReorderBuffer<T> {
    fn default() -> Self {
        ReorderBuffer {
            first: 0,
            early: BTreeMap::new(),
        }
    }
}

impl<T> ReorderBuffer<T> {
    /// Adds the item with this index.
    pub(crate) fn put(&mut self, place: usize, thing: T) {
        self.early.insert(place, thing);
    }

    /// Returns the next item in order, if it has arrived.
    pub(crate) fn next(&mut self) -> Option<T> {
        let thing = self.early.remove(&self.first)?;
        self.first += 1;
        Some(thing)
    }

    /// Returns the number of items that have left.
    pub(crate) fn passed(&self) -> usize {
        self.first
    }

    /// Returns the number of items that have arrived and not left.
    pub(crate) fn held(&self) -> usize {
        self.early.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_in_any_order_goes_in_its_own() {
        let mut order = ReorderBuffer::default();
        order.put(2, "c");
        order.put(1, "b");
        assert_eq!((order.next(), order.held()), (None, 2));
        order.put(0, "a");
        assert_eq!(
            [order.next(), order.next(), order.next()],
            [Some("a"), Some("b"), Some("c")]
        );
        assert_eq!((order.next(), order.held(), order.passed()), (None, 0, 3));
    }
}
