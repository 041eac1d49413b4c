//! Decides which program of a pool is started or ended next while the programs are replaced one by one.
//!
//! Pure. A program is known by its number, and each has the table that it was started with. There is at most
//! one program more than `processes`. An old program that serves is ended only if the old programs and the new ones
//! that serve are more than `processes`. So a replacement never reduces the programs that serve
//! below `processes`.

use std::collections::BTreeMap;

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RolloutStep {
    /// Start a program with this number.
    Start(usize),
    /// Let the program with this number exit.
    Leave(usize),
    /// Wait until something changes.
    Wait,
}

/// The table of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PlaceTable {
    table: u32,
    is_leaving: bool,
}

/// The programs of a pool and their tables.
#[derive(Debug)]
pub(super) struct Rollout {
    /// The number of the table in effect.
    current: u32,
    /// The number of programs that it wants.
    processes: usize,
    /// A table that may take effect. One program is started with it to find out whether it becomes ready.
    next: Option<u32>,
    last_table: u32,
    places: BTreeMap<usize, PlaceTable>,
}

impl Rollout {
    /// Creates the state of this number of programs, which all have the same table.
    pub fn new(processes: usize) -> Self {
        let place = PlaceTable {
            table: 0,
            is_leaving: false,
        };
        Rollout {
            current: 0,
            processes,
            next: None,
            last_table: 0,
            places: (0..processes).map(|number| (number, place)).collect(),
        }
    }

    /// Adds another table.
    pub fn prepare(&mut self) {
        self.last_table += 1;
        self.next = Some(self.last_table);
    }

    /// Puts the other table into effect.
    pub fn commit(&mut self, processes: usize) {
        if let Some(next) = self.next.take() {
            (self.current, self.processes) = (next, processes);
        }
    }

    /// Drops the other table.
    pub fn revert(&mut self) {
        self.next = None;
    }

    /// Returns the program that was started to find out whether it becomes ready.
    pub fn canary(&self) -> Option<usize> {
        let next = self.next?;
        self.numbers(|place| place.table == next).next()
    }

    /// Records that a program was started.
    pub fn started(&mut self, number: usize) {
        let place = PlaceTable {
            table: self.next.unwrap_or(self.current),
            is_leaving: false,
        };
        self.places.insert(number, place);
    }

    /// Records that a program was ordered to exit.
    pub fn told_to_leave(&mut self, number: usize) {
        if let Some(place) = self.places.get_mut(&number) {
            place.is_leaving = true;
        }
    }

    /// Records that a program is gone.
    pub fn gone(&mut self, number: usize) {
        self.places.remove(&number);
    }

    /// Returns whether all programs have the table in effect, and their number is right.
    pub fn is_done(&self) -> bool {
        let is_right = |place: &PlaceTable| place.table == self.current && !place.is_leaving;
        self.next.is_none()
            && self.places.len() == self.processes
            && self.places.values().all(is_right)
    }

    /// Returns whether the next start makes one program more than `processes`.
    pub fn has_one_more(&self) -> bool {
        self.places.len() >= self.processes
    }

    /// Returns the next step. `serves` says whether a program takes calls.
    pub fn step(&self, serves: impl Fn(usize) -> bool) -> RolloutStep {
        let is_reverted = |place: &PlaceTable| {
            !place.is_leaving && place.table > self.current && Some(place.table) != self.next
        };
        if let Some(number) = self.numbers(is_reverted).next() {
            return RolloutStep::Leave(number);
        }
        let is_old = |place: &PlaceTable| !place.is_leaving && place.table < self.current;
        let is_fresh = |place: &PlaceTable| !place.is_leaving && place.table == self.current;
        let fresh: Vec<usize> = self.numbers(is_fresh).collect();
        let serving = fresh.iter().filter(|number| serves(**number)).count();
        let old: Vec<usize> = self.numbers(is_old).collect();
        let has_room = self.places.len() < self.processes + 1;
        if old.len() + serving > self.processes {
            let useless = old.iter().find(|number| !serves(**number));
            if let Some(number) = useless.or(old.first()) {
                return RolloutStep::Leave(*number);
            }
        }
        if self.next.is_some() {
            let is_leaving = self.places.values().any(|place| place.is_leaving);
            // The programs with the table in effect may never serve, and the next table may be made to correct
            // that. So do not wait for them.
            let useless = self.numbers(|_| true).find(|number| !serves(*number));
            return match (self.canary(), useless) {
                (None, _) if has_room => RolloutStep::Start(self.free_number()),
                (None, Some(number)) if !is_leaving => RolloutStep::Leave(number),
                _ => RolloutStep::Wait,
            };
        }
        match has_room && fresh.len() < self.processes {
            true => RolloutStep::Start(self.free_number()),
            false => RolloutStep::Wait,
        }
    }

    fn numbers(&self, which: impl Fn(&PlaceTable) -> bool) -> impl Iterator<Item = usize> {
        let places = self.places.iter().filter(move |(_, place)| which(place));
        places.map(|(number, _)| *number)
    }

    fn free_number(&self) -> usize {
        let taken = (0..).zip(self.places.keys());
        let in_a_row = taken.take_while(|(number, taken)| number == *taken);
        in_a_row.count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Programs that are ready and gone as soon as a test says so.
    struct Programs {
        rollout: Rollout,
        serving: BTreeSet<usize>,
        most: usize,
    }

    impl Programs {
        fn new(count: usize) -> Self {
            Programs {
                rollout: Rollout::new(count),
                serving: (0..count).collect(),
                most: count,
            }
        }

        /// Takes all steps. Each program that is ordered to exit is gone at once.
        fn settle(&mut self) {
            loop {
                match self.rollout.step(|number| self.serving.contains(&number)) {
                    RolloutStep::Start(number) => {
                        self.rollout.started(number);
                        if self.rollout.canary() != Some(number) {
                            self.serving.insert(number);
                        }
                    }
                    RolloutStep::Leave(number) => {
                        self.rollout.told_to_leave(number);
                        self.serving.remove(&number);
                        self.most = self.most.max(self.rollout.places.len());
                        self.rollout.gone(number);
                    }
                    RolloutStep::Wait => break,
                }
                self.most = self.most.max(self.rollout.places.len());
            }
        }

        /// A reload that succeeds.
        fn reload(&mut self, processes: usize) {
            self.rollout.prepare();
            self.settle();
            let canary = self.rollout.canary();
            self.rollout.commit(processes);
            self.serving.extend(canary);
            self.settle();
        }
    }

    #[test]
    fn programs_are_replaced_with_one_more_than_there_are_to_be() {
        for (before, after) in [(1, 1), (4, 4), (8, 2), (2, 5)] {
            let mut programs = Programs::new(before);
            programs.reload(after);
            assert!(programs.rollout.is_done(), "{:?}", programs.rollout);
            assert_eq!(programs.serving.len(), after);
            assert_eq!(programs.most, before.max(after) + 1);
        }
    }

    #[test]
    fn a_reload_that_fails_costs_its_one_program() {
        let mut programs = Programs::new(2);
        programs.rollout.prepare();
        programs.settle();
        assert_eq!(programs.rollout.canary(), Some(2));
        // Also if a program has died meanwhile.
        programs.serving.remove(&0);
        programs.rollout.revert();
        programs.settle();
        assert!(programs.rollout.is_done());
        assert!(programs.rollout.places.keys().eq(&[0, 1]));
    }

    #[test]
    fn a_reload_in_the_middle_of_another_replaces_all_programs_before_it() {
        let mut programs = Programs::new(3);
        programs.rollout.prepare();
        programs.settle();
        programs.rollout.commit(3);
        // The first canary does not serve, so no program has left, and it makes room for the second one.
        programs.settle();
        programs.rollout.prepare();
        programs.settle();
        assert_eq!(programs.rollout.canary(), Some(3));
        assert_eq!(programs.rollout.places.len(), 4);
        programs.rollout.revert();
        programs.settle();
        assert!(programs.rollout.is_done());
        programs.reload(3);
        assert!(programs.rollout.is_done());
        assert_eq!(programs.most, 4);
    }
}
