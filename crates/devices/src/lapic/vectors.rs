//! A set of interrupt vectors, as IRR, ISR and TMR hold them.

use serde::{Deserialize, Serialize};

/// 256 bits, one for each vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorSet([u64; 4]);

impl VectorSet {
    /// Adds or removes a vector.
    pub fn set(&mut self, vector: u8, present: bool) {
        let word = &mut self.0[usize::from(vector >> 6)];
        let bit = 1 << (vector & 63);
        if present {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// Whether the vector is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    /// The highest vector.
    pub fn highest(&self) -> Option<u8> {
        let (word, bits) = self.0.iter().enumerate().rev().find(|(_, bits)| **bits != 0)?;
        Some((64 * word as u32 + 63 - bits.leading_zeros()) as u8)
    }

    /// The set whose registers, in order, are these.
    pub fn of_dwords(dwords: &[u32; 8]) -> Self {
        let words = dwords.as_chunks::<2>().0;
        Self(std::array::from_fn(|n| u64::from(words[n][0]) | u64::from(words[n][1]) << 32))
    }

    /// Vectors `32 * n` to `32 * n + 31` as the register shows them; `n` is 0..8.
    pub fn dword(&self, n: usize) -> u32 {
        (self.0[(n / 2) & 3] >> (32 * (n & 1))) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_vectors() {
        for a in 0..=255u8 {
            for b in 0..=a {
                let mut s = VectorSet::default();
                s.set(b, true);
                s.set(a, true);
                assert_eq!(s.highest(), Some(a));
                assert_eq!(s.dword(usize::from(a) / 32) >> (a % 32) & 1, 1);
                assert_eq!(VectorSet::of_dwords(&std::array::from_fn(|n| s.dword(n))), s);
                s.set(a, false);
                assert_eq!(s.highest(), (a != b).then_some(b));
                assert_eq!(s.contains(b), a != b);
            }
        }
    }
}
