//! Segments as images: the pages that have memory, copied and compared word by word.
//!
//! All images of one mutation have the same pages: those that are reserved at its end, which are those at its beginning and
//! whatever it took from the kernel.

use std::mem::{offset_of, size_of};

use kvs_core::segment::Segment;
use kvs_core::segment::layout::{
    BACKUP_RING_BYTES, ConnectionSlot, EXTENT_BYTES, Header, PAGE_BYTES, SessionHead, SessionWindow,
    WorkerSlot, round_up,
};
use kvs_core::sys::memory::{Damaged, Memory, View, WORD_BYTES, Word};
use kvs_core::sys::robust_mutex::ROBUST_MUTEX_BYTES;

/// Words of a page.
pub const PAGE_WORDS: usize = (PAGE_BYTES / WORD_BYTES) as usize;

/// A word that differs between two images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Change {
    /// Where it is.
    pub offset: u64,
    /// What it was.
    pub old: u64,
    /// What it is.
    pub new: u64,
}

/// Offsets of pages, in order.
#[derive(Debug, Clone, Default)]
pub struct Pages(Vec<u64>);

impl Pages {
    /// Those of `segment` that have memory, as its header has it.
    ///
    /// # Errors
    /// [`Damaged`] never, on a segment that was opened.
    pub fn reserved(segment: &Segment) -> Result<Self, Damaged> {
        let (header, regions) = (segment.header()?, segment.regions());
        let slots = |count: &Word, bytes: usize| count.load() * bytes as u64;
        let mut ranges = vec![
            (0, regions.workers + slots(&header.worker_slots_reserved, size_of::<WorkerSlot>())),
            (regions.connections, slots(&header.connection_slots_reserved, size_of::<ConnectionSlot>())),
            (regions.rings, slots(&header.backup_rings_reserved, BACKUP_RING_BYTES as usize)),
            (regions.session_heads, slots(&header.sessions_reserved, size_of::<SessionHead>())),
            (regions.session_windows, slots(&header.sessions_reserved, size_of::<SessionWindow>())),
            (regions.data, header.extents_reserved.load() * EXTENT_BYTES),
        ];
        for index in 0..regions.shard_count {
            ranges.push((regions.bucket_region(index), segment.shard(index)?.reserved_bytes.load()));
        }
        let pages =
            |(start, length)| (start..start + round_up(length, PAGE_BYTES)).step_by(PAGE_BYTES as usize);
        let mut pages: Vec<u64> = ranges.into_iter().flat_map(pages).collect();
        pages.sort_unstable();
        pages.dedup();
        Ok(Self(pages))
    }

    /// Adds the page that `offset` lies in; false when it is one of these already.
    pub fn add(&mut self, offset: u64) -> bool {
        let page = offset & !(PAGE_BYTES - 1);
        let place = self.0.binary_search(&page);
        if let Err(place) = place {
            self.0.insert(place, page);
        }
        place.is_err()
    }

    /// Their offsets.
    pub fn offsets(&self) -> &[u64] {
        &self.0
    }

    /// Their memory, in bytes.
    pub fn bytes(&self) -> u64 {
        self.0.len() as u64 * PAGE_BYTES
    }

    /// Those below `limit`.
    pub fn below(&self, limit: u64) -> Self {
        Self(self.0.iter().copied().filter(|&page| page < limit).collect())
    }

    /// Makes these pages of `to` what they are in `from`.
    ///
    /// # Errors
    /// [`Damaged`] when one lies outside.
    pub fn copy(&self, from: &View, to: &Memory) -> Result<(), Damaged> {
        for &page in &self.0 {
            let (from, target) = (page_of(from, page)?, page_of(to, page)?);
            for (word, target) in from.iter().zip(target) {
                let value = word.load();
                if target.load() != value {
                    to.store(target, value);
                }
            }
        }
        Ok(())
    }

    /// Which words of these pages are different in `new`.
    ///
    /// # Errors
    /// [`Damaged`] when a page lies outside.
    pub fn differences(&self, old: &View, new: &View) -> Result<Vec<Change>, Damaged> {
        let mut changes = Vec::new();
        for &page in &self.0 {
            let words = page_of(old, page)?.iter().zip(page_of(new, page)?);
            let changed =
                (page..).step_by(WORD_BYTES as usize).zip(words).filter_map(|(offset, (old, new))| {
                    let (old, new) = (old.load(), new.load());
                    (old != new).then_some(Change { offset, old, new })
                });
            changes.extend(changed);
        }
        Ok(changes)
    }
}

/// The words of one page.
///
/// # Errors
/// [`Damaged`] when it lies outside.
pub fn page_of(view: &View, page: u64) -> Result<&[Word], Damaged> {
    view.words(page, PAGE_WORDS as u64)
}

/// Whether the word at `offset` is part of a lock.
pub fn is_lock(segment: &Segment, offset: u64) -> bool {
    let regions = segment.regions();
    let within = |start: u64| (start..start + ROBUST_MUTEX_BYTES as u64).contains(&offset);
    within(offset_of!(Header, arena_lock) as u64)
        || (0..regions.shard_count).any(|index| within(regions.shard(index).bytes()))
}

/// Looks whether a few pages have changed since it looked last.
pub struct Watch {
    pages: Vec<(u64, Box<[u64; PAGE_WORDS]>)>,
}

impl Watch {
    /// Of `pages`, as they are now.
    ///
    /// # Errors
    /// [`Damaged`] when one lies outside.
    pub fn new(view: &View, pages: &Pages) -> Result<Self, Damaged> {
        let mut watch =
            Self { pages: pages.0.iter().map(|&page| (page, Box::new([0; PAGE_WORDS]))).collect() };
        watch.changed(view, |_| {})?;
        Ok(watch)
    }

    /// Whether anything changed; tells each change.
    ///
    /// # Errors
    /// [`Damaged`] when a page lies outside.
    #[inline]
    pub fn changed(&mut self, view: &View, mut tell: impl FnMut(Change)) -> Result<bool, Damaged> {
        let mut any = false;
        for (page, known) in &mut self.pages {
            let words = page_of(view, *page)?;
            let difference =
                words.iter().zip(known.iter()).fold(0, |sum, (word, known)| sum | (word.load() ^ known));
            if difference == 0 {
                continue;
            }
            any = true;
            for (index, (word, known)) in (0u64..).zip(words.iter().zip(known.iter_mut())) {
                let new = word.load();
                let old = std::mem::replace(known, new);
                if old != new {
                    tell(Change { offset: *page + index * WORD_BYTES, old, new });
                }
            }
        }
        Ok(any)
    }
}
