//! Keeps entries in the order of their amounts, so that the one with the most is known at once.
//!
//! The order is a binary heap of indices. Each entry knows its place in the heap. A change costs one lookup and at
//! most O(log n) moves. An entry without an amount is removed. Pure.

use std::collections::BinaryHeap;
use std::hash::Hash;

use rustc_hash::FxHashMap;

/// Entries with an amount and a value for each key.
#[derive(Debug)]
pub struct Ranking<K, V = ()> {
    entries: Vec<Ranked<K, V>>,
    /// The indices of the entries. No entry has a larger amount than its parent in the heap, so the first one has the
    /// most.
    heap: Vec<usize>,
    indices: FxHashMap<K, usize>,
}

#[derive(Debug)]
pub struct Ranked<K, V> {
    pub key: K,
    pub amount: usize,
    pub value: V,
    place: usize,
}

impl<K, V> Default for Ranking<K, V> {
    fn default() -> Self {
        Ranking {
            entries: Vec::new(),
            heap: Vec::new(),
            indices: FxHashMap::default(),
        }
    }
}

impl<K: Copy + Eq + Hash, V: Default> Ranking<K, V> {
    /// Adds `amount` (above 0) to a key. Returns its value.
    pub fn add(&mut self, key: K, amount: usize) -> &mut V {
        let (entries, heap) = (&mut self.entries, &mut self.heap);
        let index = *self.indices.entry(key).or_insert_with(|| {
            heap.push(entries.len());
            entries.push(Ranked {
                key,
                amount: 0,
                value: V::default(),
                place: heap.len() - 1,
            });
            entries.len() - 1
        });
        self.entries[index].amount += amount;
        self.rise(self.entries[index].place);
        &mut self.entries[index].value
    }

    /// Subtracts `amount` from a key, or all that it has if that is less. Returns what was subtracted.
    pub fn remove(&mut self, key: K, amount: usize) -> usize {
        let Some(&index) = self.indices.get(&key) else {
            return 0;
        };
        let entry = &mut self.entries[index];
        let amount = amount.min(entry.amount);
        entry.amount -= amount;
        let (is_empty, mut place) = (entry.amount == 0, entry.place);
        while let Some(larger) = self.larger_child(place)
            && self.has_more(larger, place)
        {
            self.swap(place, larger);
            place = larger;
        }
        if is_empty {
            self.drop_entry(index, place);
        }
        amount
    }

    /// Removes an entry that has no children in the heap. The last entry of the heap takes its place.
    fn drop_entry(&mut self, index: usize, place: usize) {
        self.swap(place, self.heap.len() - 1);
        self.heap.pop();
        if place < self.heap.len() {
            self.rise(place);
        }
        let removed = self.entries.swap_remove(index);
        self.indices.remove(&removed.key);
        if let Some(moved) = self.entries.get(index) {
            self.heap[moved.place] = index;
            self.indices.insert(moved.key, index);
        }
    }

    pub fn get(&self, key: K) -> Option<&Ranked<K, V>> {
        self.entries.get(*self.indices.get(&key)?)
    }

    pub fn value_mut(&mut self, key: K) -> Option<&mut V> {
        let entry = self.entries.get_mut(*self.indices.get(&key)?)?;
        Some(&mut entry.value)
    }

    /// Returns the amount of a key; 0 if there is no entry.
    pub fn amount(&self, key: K) -> usize {
        self.get(key).map_or(0, |entry| entry.amount)
    }

    /// Returns the entry with the most.
    pub fn first(&self) -> Option<&Ranked<K, V>> {
        self.at(0)
    }

    /// Returns all entries, those with the most first. Each costs O(log n) when it is taken.
    pub fn descending(&self) -> impl Iterator<Item = &Ranked<K, V>> {
        let mut next = BinaryHeap::new();
        next.extend(self.first().map(|first| (first.amount, 0)));
        std::iter::from_fn(move || {
            let (_, place) = next.pop()?;
            let children = children(place).into_iter();
            next.extend(children.filter_map(|child| Some((self.at(child)?.amount, child))));
            self.at(place)
        })
    }

    /// Returns the entry at a place of the heap.
    fn at(&self, place: usize) -> Option<&Ranked<K, V>> {
        self.entries.get(*self.heap.get(place)?)
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty() && self.entries.is_empty() && self.indices.is_empty()
    }

    /// Moves an entry past those above it that have no more: of equal ones the newest comes first.
    fn rise(&mut self, mut place: usize) {
        while place > 0 && !self.has_more(parent(place), place) {
            self.swap(place, parent(place));
            place = parent(place);
        }
    }

    fn amount_at(&self, place: usize) -> usize {
        self.entries[self.heap[place]].amount
    }

    fn has_more(&self, one: usize, other: usize) -> bool {
        self.amount_at(one) > self.amount_at(other)
    }

    fn larger_child(&self, place: usize) -> Option<usize> {
        let children = children(place).into_iter();
        let existing = children.filter(|child| *child < self.heap.len());
        existing.max_by_key(|child| self.amount_at(*child))
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        for place in [one, other] {
            self.entries[self.heap[place]].place = place;
        }
    }
}

fn parent(place: usize) -> usize {
    (place - 1) / 2
}

fn children(place: usize) -> [usize; 2] {
    [2 * place + 1, 2 * place + 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn the_order_is_that_of_a_sorted_list(
            steps in prop::collection::vec((0..12_u8, 0..9_usize, any::<bool>()), 0..200),
        ) {
            let mut ranking = Ranking::<u8>::default();
            let mut model = BTreeMap::<u8, usize>::new();
            for (key, amount, is_more) in steps {
                let has = model.entry(key).or_default();
                if is_more {
                    ranking.add(key, amount + 1);
                    *has += amount + 1;
                } else {
                    prop_assert_eq!(ranking.remove(key, amount), amount.min(*has));
                    *has -= amount.min(*has);
                }
                model.retain(|_, amount| *amount > 0);
                let mut sorted: Vec<usize> = model.values().copied().collect();
                sorted.sort_unstable_by(|one, other| other.cmp(one));
                let ranked: Vec<usize> = ranking.descending().map(|it| it.amount).collect();
                prop_assert_eq!(ranked, sorted);
                for key in 0..12 {
                    prop_assert_eq!(ranking.amount(key), model.get(&key).copied().unwrap_or(0));
                }
            }
        }
    }
}
