//! Chance that can be had once more: a generator whose whole future is its seed.

/// xorshift64: the same rolls on every machine.
pub struct Dice(u64);

impl Dice {
    /// Any seed; 0, from which xorshift never gets away, is another one.
    pub fn new(seed: u64) -> Self {
        Dice(if seed == 0 {
            0x9E37_79B9_7F4A_7C15
        } else {
            seed
        })
    }

    /// With the seed that the variable `name` holds, or another one each time; printed, so that a
    /// run that failed can be had again.
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

    /// One of some.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }
}
