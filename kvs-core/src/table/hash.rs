//! The keyed hash of keys: SipHash-1-3 with a seed that the segment's header keeps, so nobody can choose keys that
//! collide. The low 8 bits choose the shard, the next 16 are the slot's tag, and the whole, as a fraction of 2^64, is
//! the place in the shard.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::segment::layout::Header;

/// Hash of a key in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyHash(pub u64);

impl KeyHash {
    /// The shard, out of `shard_count`, a power of two of at most 256.
    #[inline(always)]
    pub const fn shard(self, shard_count: u64) -> u64 {
        self.0 & (shard_count - 1)
    }

    /// What a slot keeps of it.
    #[inline(always)]
    pub const fn tag(self) -> u64 {
        self.0 >> 8 & 0xffff
    }
}

/// The seed of a segment's hash.
#[derive(Debug, Clone, Copy)]
pub struct HashSeed([u64; 2]);

impl HashSeed {
    /// The seed that `header` keeps.
    pub fn of(header: &Header) -> Self {
        Self([header.hash_seed[0].load(), header.hash_seed[1].load()])
    }

    /// The hash of `key` in `group`; group 0 is the store itself.
    #[inline]
    pub fn hash(self, group: u32, key: &[u8]) -> KeyHash {
        let mut hasher = self.hasher(group);
        hasher.write(key);
        hasher.finish()
    }

    /// Hashes a key in `group` piece by piece.
    #[inline]
    pub fn hasher(self, group: u32) -> KeyHasher {
        let mut hasher = SipHasher13::new_with_keys(self.0[0], self.0[1]);
        if group != 0 {
            hasher.write_u32(group);
        }
        KeyHasher(hasher)
    }
}

/// A hash in the making.
pub struct KeyHasher(SipHasher13);

impl KeyHasher {
    /// The next piece of the key.
    #[inline]
    pub fn write(&mut self, piece: &[u8]) {
        self.0.write(piece);
    }

    /// The hash of all pieces.
    #[inline]
    pub fn finish(&self) -> KeyHash {
        KeyHash(self.0.finish())
    }
}
