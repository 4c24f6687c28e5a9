//! How the segment's memory lies in pages: huge ones where that can be had, and mapped before they are needed.
//!
//! A huge page holds an extent, or as much of a shard's buckets. With them a random access misses one level of page tables less, a
//! process maps the segment in a fraction of the time, and a dead one is gone as much sooner.
//!
//! Invariants
//! - Only memory that is reserved as a whole is touched here, so nothing here takes memory from `/dev/shm`.
//! - Contents never change; a crash anywhere in it leaves pages of one size or the other.
//!
//! No lock: what is reserved stays reserved.

use std::io;
use std::ops::Range;

use super::Segment;
use super::layout::{EXTENT_BYTES, PAGE_BYTES, round_up};
use crate::sys::memory::{Damaged, HUGE_PAGE_BYTES};

const _: () = assert!(EXTENT_BYTES == HUGE_PAGE_BYTES);

impl Segment {
    /// Everything that is reserved now, as ranges of bytes, in order.
    ///
    /// # Errors
    /// [`Damaged`] when the segment is.
    pub fn reserved(&self) -> Result<Vec<Range<u64>>, Damaged> {
        let (header, regions) = (self.header()?, self.regions());
        let mut all = vec![
            0..regions.worker(header.worker_slots_reserved.load()).bytes(),
            regions.connections..regions.connection(header.connection_slots_reserved.load()).bytes(),
            regions.rings..regions.ring(header.backup_rings_reserved.load()),
        ];
        for shard in 0..regions.shard_count {
            let start = regions.bucket_region(shard);
            let bytes = self.shard(shard)?.reserved_bytes.load().min(regions.bucket_region_bytes);
            all.push(start..start + bytes);
        }
        let extents = header.extents_reserved.load().min(regions.extent_count);
        all.push(regions.data..regions.data + extents * EXTENT_BYTES);
        Ok(all)
    }

    /// Offsets of everything that can be one huge page: extents, and buckets that are reserved so far.
    ///
    /// # Errors
    /// [`Damaged`] when the segment is.
    pub fn huge_pages(&self) -> Result<impl Iterator<Item = u64> + use<>, Damaged> {
        let buckets = self.regions().buckets;
        let reserved = self.reserved()?.into_iter().filter(move |range| range.start >= buckets);
        Ok(reserved.flat_map(|range| {
            let start = range.start.next_multiple_of(HUGE_PAGE_BYTES);
            (start..range.end & !(HUGE_PAGE_BYTES - 1)).step_by(HUGE_PAGE_BYTES as usize)
        }))
    }

    /// Makes a huge page of the small ones at `offset`, which all have to be reserved. Who uses them meanwhile waits.
    ///
    /// # Errors
    /// What the kernel says; then nothing has changed.
    pub fn collapse(&self, offset: u64) -> io::Result<()> {
        if self.file.is_some() { self.memory.collapse(offset) } else { Ok(()) }
    }

    /// Maps all reserved memory into this process, in pieces of `piece` bytes: the first access to each of them costs no fault of
    /// its own then. `go_on` is asked before each piece. Returns how many bytes were mapped.
    ///
    /// # Errors
    /// What the kernel says, or that the segment is damaged. What was mapped before stays mapped.
    pub fn populate(&self, piece: u64, mut go_on: impl FnMut() -> bool) -> io::Result<u64> {
        let piece = piece.clamp(PAGE_BYTES, 1 << 30).next_power_of_two();
        let mut mapped = 0;
        for range in self.reserved().map_err(io::Error::other)? {
            let end = round_up(range.end, PAGE_BYTES).min(self.regions().length);
            let mut at = range.start & !(PAGE_BYTES - 1);
            while at < end && go_on() {
                // Pieces end where huge pages do.
                let next = (at & !(piece - 1)).saturating_add(piece).min(end);
                self.memory.populate(at, next - at)?;
                mapped += next - at;
                at = next;
            }
        }
        Ok(mapped)
    }
}

#[cfg(all(test, not(feature = "shuttle"), not(miri)))]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::arena::extents;
    use crate::limits::CAPACITY_BYTES_MIN;
    use crate::transaction::Transaction;

    #[test]
    fn pages_made_huge_or_mapped_keep_their_contents_and_take_no_memory() {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = directory.path().join("segment");
        let segment = Segment::open_or_create(&path, CAPACITY_BYTES_MIN).expect("made").segment;
        segment.claim_worker(0).expect("room");
        segment.claim_connection(0).expect("room");
        let slot = segment.memory().object(segment.regions().worker(0)).expect("claimed");
        let mut transaction = Transaction::begin(&segment, slot);
        let offset = extents::allocate(&mut transaction, 9).expect("room");
        transaction.commit().expect("small");
        let contents: Vec<u8> = (0..EXTENT_BYTES).map(|byte| (byte % 251) as u8).collect();
        segment.memory().write_bytes(offset, &contents).expect("in bounds");
        let blocks = || std::fs::metadata(&path).expect("named").blocks();
        let before = blocks();

        let pages: Vec<u64> = segment.huge_pages().expect("sound").collect();
        assert_eq!(pages, [offset]);
        match segment.collapse(offset) {
            Ok(()) => {}
            // A kernel without it, or without memory in one piece.
            Err(error) => assert!(error.raw_os_error().is_some(), "{error}"),
        }
        let mapped = segment.populate(1 << 20, || true).expect("Linux 5.14");
        assert_eq!(mapped, before * 512, "all that is reserved, and nothing else");
        assert_eq!(segment.populate(PAGE_BYTES, || false).expect("Linux 5.14"), 0);

        assert_eq!(blocks(), before);
        let mut found = vec![0; contents.len()];
        segment.memory().read_bytes(offset, &mut found).expect("in bounds");
        assert!(found == contents);
    }

    #[test]
    fn pages_outside_or_astride_are_refused() {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = directory.path().join("segment");
        let segment = Segment::open_or_create(&path, CAPACITY_BYTES_MIN).expect("made").segment;
        for offset in [PAGE_BYTES, segment.regions().length, u64::MAX - HUGE_PAGE_BYTES + 1] {
            let refused = segment.collapse(offset).expect_err("no huge page of the segment");
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
