//! Which bucket is whose home, also while a shard grows.
//!
//! The homes of a shard are `n` buckets in the order of the hash: home = hash × n / 2^64, the low eight bits of the
//! hash, which choose the shard, left out. Growing to n' keeps that order, so every entry moves up or stays. It starts at the last home and goes down; the *frontier* says how far it
//! got:
//!
//! ```text
//!            0 ........ frontier ........ n ........ n'
//! old homes  [ in use  )[ moved away ... )
//! new homes             .... [ in use ............. )     those of hashes whose old home is at or above the frontier
//! ```
//!
//! Invariants
//! - `n` and the frontier are one word, so a reader sees both or neither change.
//! - frontier = n: not growing. Old homes in use lie below the frontier, new ones at or above frontier × n' / n, which
//!   is no smaller: no bucket is a home of both kinds.

use crate::segment::layout::{BUCKET_BYTES, REACH_MAX};

/// Where a bucket's home range ends: the first hash that belongs to the next one; None behind the last.
pub type NextHash = Option<u64>;

/// Low bits of a hash that choose the shard and have no part in the home.
pub const SHARD_BITS: u32 = 8;

/// Homes of the smallest shard; with its overhang a little less than 16 KiB.
const HOMES_MIN: f64 = 168.0;
const GROWTH: f64 = 1.125;

/// Number of homes and growth frontier of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Homes before the growth under way, or all of them.
    pub homes: u32,
    /// Old homes at or above it have moved; equal to `homes` when not growing.
    pub frontier: u32,
}

impl Geometry {
    /// The first geometry of shard `index` of `shard_count`. Shards begin at different points of the growth cycle, so
    /// that they don't all grow, or all have room to spare, at the same time.
    pub fn initial(index: u64, shard_count: u64) -> Self {
        Self::for_homes(HOMES_MIN, index, shard_count)
    }

    /// One for so many homes, or up to an eighth more, as the shard's place in the growth cycle has it.
    pub fn for_homes(homes: f64, index: u64, shard_count: u64) -> Self {
        let phase = index as f64 / shard_count as f64;
        let homes = (homes.max(HOMES_MIN) * GROWTH.powf(phase)) as u32;
        Self { homes, frontier: homes }
    }

    /// Reads the word; None when it can't be one.
    #[inline(always)]
    pub const fn decode(word: u64) -> Option<Self> {
        let geometry = Self { homes: (word >> 32) as u32, frontier: word as u32 };
        if geometry.homes == 0 || geometry.frontier > geometry.homes { None } else { Some(geometry) }
    }

    /// The word that is kept in the shard.
    pub const fn word(self) -> u64 {
        (self.homes as u64) << 32 | self.frontier as u64
    }

    /// Whether homes are being moved.
    pub const fn is_growing(self) -> bool {
        self.frontier < self.homes
    }

    /// Homes after the growth under way, or after the next.
    pub const fn next_homes(self) -> u32 {
        self.homes.saturating_add(self.homes / 8 + 1)
    }

    /// The home of `hash`.
    #[inline(always)]
    pub fn home(self, hash: u64) -> u64 {
        let (old, new) = (scale(hash, self.homes), scale(hash, self.next_homes()));
        // While a shard grows no branch could be foreseen here.
        std::hint::select_unpredictable(old < u64::from(self.frontier), old, new)
    }

    /// The first hash behind those that share the home of `hash`.
    pub const fn next_hash(self, hash: u64) -> NextHash {
        let old = scale(hash, self.homes);
        if old < self.frontier as u64 {
            first_hash(old + 1, self.homes)
        } else {
            first_hash(scale(hash, self.next_homes()) + 1, self.next_homes())
        }
    }

    /// Whether `hash` has old home `home`, which the next step of the growth moves.
    pub const fn is_old_home(self, hash: u64, home: u32) -> bool {
        scale(hash, self.homes) == home as u64
    }

    /// The home of `hash` once its old home has moved.
    pub const fn new_home(self, hash: u64) -> u64 {
        scale(hash, self.next_homes())
    }

    /// The geometry after one more home has moved.
    pub const fn after_step(self) -> Self {
        if self.frontier <= 1 {
            let homes = self.next_homes();
            Self { homes, frontier: homes }
        } else {
            Self { homes: self.homes, frontier: self.frontier - 1 }
        }
    }

    /// Buckets in use, those behind the last home included.
    pub const fn buckets(self) -> u64 {
        let homes = if self.is_growing() { self.next_homes() } else { self.homes };
        homes as u64 + REACH_MAX + 1
    }

    /// Memory of the buckets in use, in bytes.
    pub const fn bytes(self) -> u64 {
        self.buckets() * BUCKET_BYTES
    }

    /// Memory of the buckets that the growth under way, or the next, needs, in bytes.
    pub const fn next_bytes(self) -> u64 {
        (self.next_homes() as u64 + REACH_MAX + 1) * BUCKET_BYTES
    }
}

#[inline(always)]
const fn scale(hash: u64, homes: u32) -> u64 {
    (((hash >> SHARD_BITS) as u128 * homes as u128) >> (64 - SHARD_BITS)) as u64
}

/// The smallest hash whose home among `homes` is `home`.
const fn first_hash(home: u64, homes: u32) -> NextHash {
    if home >= homes as u64 {
        return None;
    }
    let position = ((home as u128) << (64 - SHARD_BITS)).div_ceil(homes as u128);
    Some((position as u64) << SHARD_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn geometry_grows_through_every_step_without_sharing_a_home() {
        let mut geometry = Geometry { homes: 5, frontier: 5 };
        for _ in 0..400 {
            let lowest_new = scale(
                first_hash(u64::from(geometry.frontier), geometry.homes).unwrap_or(u64::MAX),
                geometry.next_homes(),
            );
            assert!(!geometry.is_growing() || lowest_new >= u64::from(geometry.frontier));
            assert_eq!(Geometry::decode(geometry.word()), Some(geometry));
            geometry = geometry.after_step();
        }
        assert!(geometry.homes > 10);
    }

    #[test]
    fn geometry_of_nonsense_is_none() {
        assert_eq!(Geometry::decode(0), None);
        assert_eq!(Geometry::decode(1 << 32 | 2), None);
    }

    proptest! {
        #[test]
        fn geometry_homes_follow_the_order_of_hashes(homes in 1u32..5000, moved in 0u32..5000, a: u64, b: u64) {
            let geometry = Geometry { homes, frontier: homes - moved % homes };
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(geometry.home(low) <= geometry.home(high));
            prop_assert!(geometry.home(high) < geometry.buckets());
            prop_assert!(geometry.after_step().home(low) >= geometry.home(low));
            match geometry.next_hash(low) {
                None => prop_assert_eq!(geometry.home(u64::MAX), geometry.home(low)),
                Some(next) => {
                    prop_assert!(next > low);
                    prop_assert_eq!(geometry.home(next - 1), geometry.home(low));
                    prop_assert!(geometry.home(next) > geometry.home(low));
                }
            }
        }
    }
}
