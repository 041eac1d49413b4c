//! Provides random numbers that a seed repeats.

/// xorshift64: the same numbers on every machine.
pub struct Dice(u64);

impl Dice {
    /// Creates it from any seed. Seed 0 is replaced, because xorshift would only return 0.
    pub fn new(seed: u64) -> Self {
        Dice(if seed == 0 {
            0x9E37_79B9_7F4A_7C15
        } else {
            seed
        })
    }

    /// Uses the seed in the variable `name`, or a new one each time. The seed is printed, so that a
    /// failed run can be repeated.
    pub fn of_the_day(name: &str) -> Self {
        let now = std::time::SystemTime::now();
        let since = now.duration_since(std::time::UNIX_EPOCH);
        let today = since.map_or(1, |it| u64::from(it.subsec_nanos()) + it.as_secs());
        let seed = super::from_environment(name, today);
        println!("{name}={seed}");
        Dice::new(seed)
    }

    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    /// Returns a random element.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }
}
