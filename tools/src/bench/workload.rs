//! What is asked of a store: which keys, how large, how often which, and how many reads among it.
//!
//! Every target of a run gets exactly this, from the same seeds. Keys are numbers in decimal, of fixed width. What value a key has
//! follows from its number, so that any answer can be checked, whoever wrote the value and however often.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};

use super::zipf::Zipf;

/// Shortest key: all numbers below [`KEYS_MAX`] fit.
pub const KEY_BYTES_MIN: usize = 10;
/// Most keys of a workload; the scrambling needs it.
pub const KEYS_MAX: u64 = SCRAMBLE - 1;

/// A prime above all key numbers: multiplied by it modulo their count, ranks go to key numbers one to one, and neighbours far apart.
const SCRAMBLE: u64 = 2_654_435_761;
/// Values begin at this many different places of one text of random bytes.
const VALUE_PLACES: u64 = 4096;
/// 2 to the power of 32, for shares.
const WHOLE: f64 = 4_294_967_296.0;

/// How often which key is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Distribution {
    /// All equally often.
    Uniform,
    /// The key of rank k as often as k to the power of minus this; who has which rank is scrambled.
    Zipfian(f64),
}

impl std::fmt::Display for Distribution {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uniform => formatter.write_str("uniform"),
            Self::Zipfian(exponent) => write!(formatter, "zipfian {exponent}"),
        }
    }
}

/// What is asked of a store.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    /// How many keys there are. All are stored before anything is measured.
    pub keys: u64,
    /// Bytes of each key.
    pub key_bytes: usize,
    /// Bytes of each value.
    pub value_bytes: usize,
    /// Part of the requests that read, 0 to 1; the others store.
    pub read_share: f64,
    /// How often which key is asked for.
    pub distribution: Distribution,
    /// Where randomness begins.
    pub seed: u64,
}

impl Workload {
    /// The requests of one thread; another one's are others.
    pub fn generator(&self, thread: u64) -> Generator {
        let zipf = match self.distribution {
            Distribution::Uniform => None,
            Distribution::Zipfian(exponent) => Some(Zipf::new(self.keys, exponent)),
        };
        Generator {
            random: Xoshiro256PlusPlus::seed_from_u64(self.seed ^ thread.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            keys: self.keys,
            zipf,
            reads_below: (self.read_share * WHOLE) as u64,
        }
    }

    /// The values.
    pub fn values(&self) -> Values {
        let mut text = vec![0; self.value_bytes + VALUE_PLACES as usize];
        Xoshiro256PlusPlus::seed_from_u64(self.seed).fill_bytes(&mut text);
        Values { text, length: self.value_bytes }
    }
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Number of the key.
    pub index: u64,
    /// Whether it reads; else it stores.
    pub is_read: bool,
}

/// Makes requests, a few nanoseconds each; no memory is taken.
#[derive(Debug, Clone)]
pub struct Generator {
    random: Xoshiro256PlusPlus,
    keys: u64,
    zipf: Option<Zipf>,
    /// Of 32 random bits.
    reads_below: u64,
}

impl Generator {
    /// The next request.
    #[inline]
    pub fn operation(&mut self) -> Operation {
        // One random number serves both unless the key needs more of it.
        let bits = self.random.next_u64();
        let is_read = (bits & 0xffff_ffff) < self.reads_below;
        let index = match &self.zipf {
            // Keys are fewer than 2 to the power of 32.
            None => ((bits >> 32) * self.keys) >> 32,
            Some(zipf) => scramble(zipf.rank(&mut self.random), self.keys),
        };
        Operation { index, is_read }
    }

    /// The number of the next key, for targets that read only.
    #[inline]
    pub fn index(&mut self) -> u64 {
        self.operation().index
    }
}

/// The key that has this rank, 0 being the most frequent.
fn scramble(rank: u64, keys: u64) -> u64 {
    // Both are below 2 to the power of 32.
    (rank * SCRAMBLE) % keys
}

/// The key with this number, as wide as the array.
pub fn key<const N: usize>(index: u64) -> [u8; N] {
    let mut key = [b'0'; N];
    write_key(index, &mut key);
    key
}

/// Writes the key with this number as wide as `key`, which has at least [`KEY_BYTES_MIN`] bytes and only zeros (`'0'`) before the last
/// ten of them.
#[inline]
pub fn write_key(index: u64, key: &mut [u8]) {
    let mut rest = index as u32;
    for pair in key.rchunks_exact_mut(2).take(KEY_BYTES_MIN / 2) {
        let digits = DIGITS[(rest % 100) as usize];
        pair.copy_from_slice(&digits);
        rest /= 100;
    }
}

/// The numbers below 100.
const DIGITS: [[u8; 2]; 100] = {
    let mut digits = [[0; 2]; 100];
    let mut number = 0;
    while number < 100 {
        digits[number] = [b'0' + (number / 10) as u8, b'0' + (number % 10) as u8];
        number += 1;
    }
    digits
};

/// The values of all keys.
#[derive(Debug, Clone)]
pub struct Values {
    text: Vec<u8>,
    length: usize,
}

impl Values {
    /// The value of the key with this number.
    #[inline]
    pub fn of(&self, index: u64) -> &[u8] {
        let from = (index.wrapping_mul(SCRAMBLE) % VALUE_PLACES) as usize;
        &self.text[from..from + self.length]
    }
}

#[cfg(test)]
mod tests {
    //! Goal: what is asked is what the workload says. Method: many requests with fixed seeds are counted.

    use super::*;

    const REQUESTS: u64 = 400_000;

    fn workload(keys: u64, distribution: Distribution) -> Workload {
        Workload { keys, key_bytes: 16, value_bytes: 32, read_share: 0.9, distribution, seed: 7 }
    }

    fn counts(workload: &Workload) -> Vec<u64> {
        let mut counts = vec![0; workload.keys as usize];
        let mut generator = workload.generator(0);
        (0..REQUESTS).for_each(|_| counts[generator.index() as usize] += 1);
        counts
    }

    #[test]
    fn workload_uniform_keys_come_equally_often() {
        let counts = counts(&workload(100, Distribution::Uniform));
        let expected = (REQUESTS / 100) as f64;
        // Five standard deviations.
        assert!(
            counts.iter().all(|count| (*count as f64 - expected).abs() < 5.0 * expected.sqrt()),
            "{counts:?}"
        );
    }

    #[test]
    fn workload_zipfian_keys_come_as_often_as_their_rank_says() {
        let keys = 1000;
        for exponent in [0.5, 0.99, 1.0, 1.4] {
            let counts = counts(&workload(keys, Distribution::Zipfian(exponent)));
            let weight = |rank: u64| (rank as f64 + 1.0).powf(-exponent);
            let sum: f64 = (0..keys).map(weight).sum();
            for rank in 0..keys {
                let expected = REQUESTS as f64 * weight(rank) / sum;
                let found = counts[scramble(rank, keys) as usize] as f64;
                assert!(
                    (found - expected).abs() < 5.0 * expected.sqrt() + 1.0,
                    "{exponent}, {rank}: {found}, {expected}"
                );
            }
        }
    }

    #[test]
    fn workload_reads_are_their_share_and_seeds_repeat() {
        let workload = workload(1000, Distribution::Uniform);
        let mut generator = workload.generator(3);
        let first: Vec<_> = (0..REQUESTS).map(|_| generator.operation()).collect();
        let reads = first.iter().filter(|operation| operation.is_read).count() as f64;
        assert!((reads / REQUESTS as f64 - 0.9).abs() < 0.005, "{reads}");
        let mut again = workload.generator(3);
        assert!(first.iter().all(|operation| *operation == again.operation()));
        let mut other = workload.generator(4);
        assert!(first.iter().any(|operation| *operation != other.operation()));
    }

    #[test]
    fn workload_shares_of_nothing_and_all_are_exact() {
        for (share, all) in [(0.0, false), (1.0, true)] {
            let mut generator =
                Workload { read_share: share, ..workload(10, Distribution::Uniform) }.generator(0);
            assert!((0..10_000).all(|_| generator.operation().is_read == all));
        }
    }

    #[test]
    fn workload_scrambling_gives_each_key_one_rank() {
        for keys in [1, 2, 10, 1000, 65_536] {
            let mut seen = vec![false; keys as usize];
            (0..keys).for_each(|rank| seen[scramble(rank, keys) as usize] = true);
            assert!(seen.iter().all(|seen| *seen), "{keys}");
        }
    }

    #[test]
    fn workload_keys_have_their_width_and_values_their_length() {
        assert_eq!(&key::<16>(42), b"0000000000000042");
        assert_eq!(&key::<10>(KEYS_MAX), b"2654435760");
        assert_eq!(&key::<11>(1_234_567_890), b"01234567890");
        let workload = workload(10, Distribution::Uniform);
        let values = workload.values();
        assert_eq!(values.of(3).len(), 32);
        assert_ne!(values.of(3), values.of(4));
        assert_eq!(values.of(3), workload.values().of(3));
    }
}
