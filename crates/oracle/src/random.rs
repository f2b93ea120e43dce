//! Random numbers: splitmix64, so that runs repeat exactly.

/// The generator. A fuzzer's input, if it has one, comes first, a choice for a byte or eight.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    input: Vec<u8>,
    at: usize,
}

const EDGES: [u64; 12] =
    [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 0x7fff_ffff_ffff_ffff, 0x8000_0000_0000_0000];

impl Random {
    /// Numbers that follow from the seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, input: Vec::new(), at: 0 }
    }
    /// Numbers that follow from a fuzzer's input.
    pub fn of(input: &[u8]) -> Self {
        Self { input: input.to_vec(), ..Self::new(0) }
    }
    fn input(&mut self, bytes: usize) -> Option<u64> {
        let taken = self.input.get(self.at..self.at + bytes)?;
        self.at += bytes;
        Some(taken.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
    /// The next 64 bits.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        if let Some(value) = self.input(8) {
            return value;
        }
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        let bytes = if n <= 1 << 8 { 1 } else { 4 };
        match self.input(bytes) {
            Some(value) => value % n,
            None => ((u128::from(self.next()) * u128::from(n)) >> 64) as u64,
        }
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// Edge values as often as random ones.
    pub fn operand(&mut self) -> u64 {
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.pick(&EDGES).wrapping_neg(),
            2 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
    /// 16 bytes as two doubles, four floats, or anything: edge values of floating point included.
    pub fn lane(&mut self) -> [u64; 2] {
        const SINGLES: [u32; 8] = [0, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7fa0_0000, 1];
        const DOUBLES: [u64; 8] = [0, 1 << 63, 0x3ff << 52, 0x7ff << 52, 0xfff << 52, 0x7ff8 << 48, 0x7ff4 << 48, 1];
        let single = |r: &mut Self| match r.below(3) {
            0 => u64::from(r.pick(&SINGLES)),
            1 => (r.below(200) as f32 - 99.5).to_bits().into(),
            _ => r.next() & 0xffff_ffff,
        };
        match self.below(3) {
            0 => std::array::from_fn(|_| single(self) | single(self) << 32),
            1 => std::array::from_fn(|_| match self.below(3) {
                0 => self.pick(&DOUBLES),
                1 => (self.below(2000) as f64 / 8.0 - 99.5).to_bits(),
                _ => self.next(),
            }),
            _ => [self.operand(), self.operand()],
        }
    }
}
