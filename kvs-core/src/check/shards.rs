//! Shards: every slot, every entry, every counter.

use super::Walk;
use super::blocks::Owner;
use crate::arena::block_list::Chunk;
use crate::limits::VALUE_BYTES_MAX_LIMIT;
use crate::segment::layout::Shard;
use crate::sys::memory::Damaged;
use crate::table::bucket::{Buckets, Slot};
use crate::table::entry::Entry;
use crate::table::geometry::Geometry;
use crate::table::hash::{HashSeed, KeyHash};

/// What one shard was found to hold.
struct Found {
    index: u64,
    geometry: Geometry,
    seed: HashSeed,
    next_version: u64,
    entries: u64,
    content_bytes: u64,
    /// Hash and offset of every entry.
    hashes: Vec<(KeyHash, u64)>,
}

impl Walk<'_> {
    /// Walks all shards; returns the bytes reserved for buckets.
    pub(super) fn shards(&mut self) -> Result<u64, Damaged> {
        let mut reserved: u64 = 0;
        for index in 0..self.view.regions().shard_count {
            let shard: &Shard = self.view.view().object(self.view.regions().shard(index))?;
            reserved = reserved.saturating_add(shard.reserved_bytes.load());
            let walked = self.shard(index, shard);
            self.report.sound(walked.map_err(|fault| format!("shard {index}: {fault}")));
        }
        Ok(reserved)
    }

    fn shard(&mut self, index: u64, shard: &Shard) -> Result<(), String> {
        if shard.quarantined.load() != 0 {
            self.report.fault(format!("shard {index}: it was found damaged before and is set aside"));
        }
        let geometry = Geometry::decode(shard.geometry.load()).ok_or("its geometry can't be")?;
        let reserved = shard.reserved_bytes.load();
        if geometry.bytes() > reserved || reserved > self.view.regions().bucket_region_bytes {
            return Err(format!("it has {} bytes of buckets, of {reserved} reserved", geometry.bytes()));
        }
        let seed = HashSeed::of(super::header_of(self.view).map_err(|damaged| damaged.to_string())?);
        let next_version = shard.next_version.load();
        let mut found =
            Found { index, geometry, seed, next_version, entries: 0, content_bytes: 0, hashes: Vec::new() };
        let view = self.view;
        let buckets = Buckets::new(view.view(), view.regions(), index);
        for bucket in 0..geometry.buckets() {
            let walked = self.bucket(&mut found, buckets, bucket);
            self.report.sound(walked.map_err(|fault| format!("shard {index}: bucket {bucket}: {fault}")));
        }
        self.no_key_twice(&mut found);
        self.report.entries += found.entries;
        self.report.content_bytes = self.report.content_bytes.saturating_add(found.content_bytes);
        let said = (shard.entries.load(), shard.content_bytes.load());
        if said != (found.entries, found.content_bytes) {
            return Err(format!(
                "it counts {} entries of {} bytes, {} of {} bytes are there",
                said.0, said.1, found.entries, found.content_bytes
            ));
        }
        Ok(())
    }

    fn bucket(&mut self, found: &mut Found, buckets: Buckets<'_>, index: u64) -> Result<(), String> {
        buckets.header(index).map_err(super::outside("its header"))?;
        let bucket = buckets.get(index).map_err(|damaged| damaged.to_string())?;
        for (number, word) in bucket.slots.iter().enumerate() {
            let Some(slot) = Slot::decode(word.load()) else { continue };
            let walked = self.slot(found, buckets, index, slot);
            let place = |fault| format!("shard {}: bucket {index}: slot {number}: {fault}", found.index);
            self.report.sound(walked.map_err(place));
        }
        Ok(())
    }

    fn slot(
        &mut self,
        found: &mut Found,
        buckets: Buckets<'_>,
        bucket: u64,
        slot: Slot,
    ) -> Result<(), String> {
        found.entries += 1;
        let view = self.view.view();
        let entry = Entry::load(view, slot.offset).map_err(super::outside("its entry"))?;
        let entry = entry.ok_or(format!("the entry at {:#x} is not published", slot.offset))?;
        found.content_bytes = found.content_bytes.saturating_add(entry.key_length() + entry.value_length());
        self.claim_entry(&entry, Some(found.index))?;
        if entry.key_length() == 0 || entry.value_length() > VALUE_BYTES_MAX_LIMIT {
            return Err(format!(
                "a key of {} and a value of {} bytes",
                entry.key_length(),
                entry.value_length()
            ));
        }
        if !(1..found.next_version).contains(&entry.version()) {
            return Err(format!("version {} is not below {}", entry.version(), found.next_version));
        }
        if !entry.checksum_fits().map_err(|damaged| damaged.to_string())? {
            return Err(format!("the checksum of the entry at {:#x} does not fit", slot.offset));
        }
        entry.copy_key(&mut self.key).map_err(super::outside("its key"))?;
        let hash = found.seed.hash(0, &self.key);
        found.hashes.push((hash, slot.offset));
        let home = found.geometry.home(hash.0);
        let reach = buckets.header(home).map_err(super::outside("its home"))?.reach;
        if hash.shard(self.view.regions().shard_count) != found.index || hash.tag() != slot.tag {
            return Err(format!("the key of the entry at {:#x} has another hash", slot.offset));
        }
        if !(home..=home + reach).contains(&bucket) {
            return Err(format!("its home is bucket {home} with a reach of {reach}: no lookup finds it"));
        }
        Ok(())
    }

    /// Claims the block and the chunks of an entry.
    ///
    /// # Errors
    /// What it can't have.
    pub(super) fn claim_entry(&mut self, entry: &Entry<'_>, shard: Option<u64>) -> Result<(), String> {
        for word in entry.chunk_words().map_err(super::outside("its chunks"))? {
            let chunk = Chunk::decode(word.load()).ok_or(format!("{:#x} is no chunk", word.load()))?;
            self.blocks.claim(chunk.offset, chunk.order, Owner::Value)?;
        }
        let bytes = entry.block_bytes().map_err(|damaged| damaged.to_string())?;
        // Of one that is being freed, chunks are missing: what it took in its block can't be told any more.
        let bytes = if shard.is_some() { bytes } else { 0 };
        self.claim_slab_block(entry.offset, shard, bytes)
    }

    fn no_key_twice(&mut self, found: &mut Found) {
        found.hashes.sort_unstable();
        for pair in found.hashes.windows(2) {
            let [(hash, first), (other, second)] = pair else { continue };
            if hash == other && self.same_key(*first, *second) == Some(true) {
                self.report.fault(format!(
                    "shard {}: the entries at {first:#x} and {second:#x} have the same key",
                    found.index
                ));
            }
        }
    }

    fn same_key(&self, first: u64, second: u64) -> Option<bool> {
        let key = |offset| {
            let mut key = Vec::new();
            Entry::load(self.view.view(), offset).ok()??.copy_key(&mut key).ok()?;
            Some(key)
        };
        Some(key(first)? == key(second)?)
    }
}
