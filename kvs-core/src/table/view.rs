//! Reading without a lock: look, copy, then make sure that nothing moved meanwhile.
//!
//! A lookup loads the shard's geometry, the header of the key's home, the slots within reach, the entry. Then it loads
//! header and geometry again; when the home is still the home and its sequence is what it was, no entry of this home
//! was set, replaced, removed or moved in between, so everything read belonged together. Why stale reads are harmless:
//! 1. a slot of an entry that is freed and used again meanwhile: the sequence went up before the memory could be used again;
//! 2. an insert whose slot is there but whose reach isn't yet: not found, and it wasn't acknowledged either;
//! 3. a growth step between the loads: copies are placed before the geometry says so, and old slots are cleared
//!    after it does; whoever missed a cleared slot finds another geometry;
//! 4. lengths and offsets that are garbage: every access is checked against the segment, and the caller's copy runs only
//!    after a first validation.
//!
//! Nothing here writes. Retries are bounded; then [`ReadError::Contended`] sends the caller to the lock or the server.

use std::hint::select_unpredictable;

use super::bucket::{Bucket, BucketHeader, Buckets, Slot};
use super::entry::Entry;
use super::geometry::Geometry;
use super::hash::{HashSeed, KeyHash};
use crate::arena::slab::slab_of;
use crate::segment::layout::{BUCKET_SLOTS, Regions, Shard};
use crate::sys::memory::{Damaged, View, Window};

/// Most buckets behind a home that are asked for ahead: more entries than lie farther away would not be worth it.
const PREFETCH_BUCKETS: u64 = 3;

/// Validated reads are tried so often before a reader gives up.
const TRIES_MAX: usize = 64;

/// Why a lock-free read gave nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Writers were faster every time.
    #[error("the key is being changed faster than it can be read")]
    Contended,
    /// Something in the shard can't be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

/// A value that was found, to be copied before the lookup is validated.
pub struct Value<'v> {
    entry: Entry<'v>,
}

impl Value<'_> {
    /// Its length, in bytes.
    #[inline(always)]
    pub fn length(&self) -> u64 {
        self.entry.value_length()
    }

    /// That it can't be a value: to be returned, so that it is looked at again, and reported when it stays so.
    #[cold]
    pub fn damaged(&self) -> Damaged {
        Damaged { offset: self.entry.offset }
    }

    /// Copies its bytes from position `from` on into `target`.
    ///
    /// # Errors
    /// [`Damaged`] when it has no such bytes; pass it on, and the lookup is repeated if it was a torn one.
    #[inline(always)]
    pub fn copy_to(&self, from: u64, target: &mut [u8]) -> Result<(), Damaged> {
        self.entry.copy_value(from, target)
    }
}

/// Where an entry was found.
#[derive(Clone, Copy)]
pub struct Place<'v> {
    /// Shard.
    pub shard: u64,
    /// Its home bucket.
    pub home: u64,
    /// The bucket its slot is in.
    pub bucket: u64,
    /// Which slot of it.
    pub slot: usize,
    /// The entry.
    pub entry: Entry<'v>,
}

/// The table as a reader sees it.
#[derive(Clone, Copy)]
pub struct TableView<'v> {
    view: &'v View,
    regions: &'v Regions,
    seed: HashSeed,
    /// Where entries may be.
    data: Window<'v>,
}

/// What a read depends on: unchanged at its end, it is valid.
struct Snapshot<'v> {
    shard: &'v Shard,
    buckets: Buckets<'v>,
    geometry_word: u64,
    home: u64,
    bucket: &'v Bucket,
    header: BucketHeader,
}

impl<'v> Snapshot<'v> {
    #[inline(always)]
    fn take(table: &TableView<'v>, index: u64, hash: u64) -> Result<Self, Damaged> {
        let shard = table.shard(index)?;
        let geometry_word = shard.geometry.load();
        let damaged = || Damaged { offset: table.regions.shard(index).bytes() };
        let home = Geometry::decode(geometry_word).ok_or_else(damaged)?.home(hash);
        // Memory is reserved before the geometry leads there.
        let buckets = Buckets::within(table.view, table.regions, index, shard.reserved_bytes.load());
        let bucket = buckets.get(home)?;
        let header = buckets.header_of(bucket, home)?;
        Ok(Self { shard, buckets, geometry_word, home, bucket, header })
    }

    /// Whether nothing of this home has changed since.
    #[inline(always)]
    fn is_current(&self, hash: u64) -> bool {
        let is_unchanged = self.bucket.header.load() == self.header.word();
        let geometry_word = self.shard.geometry.load();
        is_unchanged && (geometry_word == self.geometry_word || is_home_of(self.home, hash, geometry_word))
    }
}

/// Whether `home` is the home of `hash` in another geometry than it was looked up with.
#[cold]
fn is_home_of(home: u64, hash: u64, geometry_word: u64) -> bool {
    Geometry::decode(geometry_word).is_some_and(|now| now.home(hash) == home)
}

fn geometry_of(shard: &Shard, table: &TableView<'_>, index: u64) -> Result<Geometry, Damaged> {
    let damaged = Damaged { offset: table.regions.shard(index).bytes() };
    Geometry::decode(shard.geometry.load()).ok_or(damaged)
}

impl<'v> TableView<'v> {
    /// The table in `view`.
    #[inline(always)]
    pub fn new(view: &'v View, regions: &'v Regions, seed: HashSeed) -> Self {
        Self { view, regions, seed, data: view.whole() }
    }

    /// The table in `view`, for a reader that touches no memory but what is reserved: of the data only what lies before `data_end`.
    /// What lies behind is damage to it.
    #[inline(always)]
    pub fn within(view: &'v View, regions: &'v Regions, seed: HashSeed, data_end: u64) -> Self {
        Self { view, regions, seed, data: view.window(regions.data, data_end) }
    }

    /// The hash of `key`.
    #[inline(always)]
    pub fn hash_of(&self, key: &[u8]) -> KeyHash {
        self.seed.hash(0, key)
    }

    /// Shard `index`.
    ///
    /// # Errors
    /// [`Damaged`] never, for an index below the number of shards.
    #[inline(always)]
    pub fn shard(&self, index: u64) -> Result<&'v Shard, Damaged> {
        self.view.object(self.regions.shard(index))
    }

    /// The shard of `hash` when it was found to be damaged.
    #[inline(always)]
    pub fn quarantined(&self, hash: KeyHash) -> Option<u64> {
        let index = hash.shard(self.regions.shard_count);
        let sound = self.shard(index).is_ok_and(|shard| shard.quarantined.load() == 0);
        if sound { None } else { Some(index) }
    }

    /// The buckets of shard `index`.
    #[inline(always)]
    pub fn buckets(&self, index: u64) -> Buckets<'v> {
        Buckets::new(self.view, self.regions, index)
    }

    /// The entry at `offset`; None while it isn't published.
    ///
    /// # Errors
    /// [`Damaged`] when there can't be one.
    pub fn entry(&self, offset: u64) -> Result<Option<Entry<'v>>, Damaged> {
        Entry::load_within(self.data, offset)
    }

    /// Asks for the home bucket of `hash` to be brought near.
    #[inline]
    pub fn prefetch_bucket(&self, hash: KeyHash) {
        let index = hash.shard(self.regions.shard_count);
        let geometry = self.shard(index).ok().and_then(|shard| Geometry::decode(shard.geometry.load()));
        if let Some(geometry) = geometry {
            self.buckets(index).prefetch(geometry.home(hash.0));
        }
    }

    /// Asks for the entry to be brought near that the home bucket of `hash`, near already, names for it. When it names none, asks
    /// for the next bucket instead and returns false: [`TableView::prefetch_entry_beyond`] goes on when that is near.
    #[inline(always)]
    pub fn prefetch_entry(&self, hash: KeyHash, is_change: bool) -> bool {
        let index = hash.shard(self.regions.shard_count);
        let home = Snapshot::take(self, index, hash.0);
        home.is_ok_and(|home| self.prefetch_named(&home, home.home, (hash, is_change)))
    }

    /// Asks for the entry to be brought near that a bucket behind the home of `hash` names for it.
    pub fn prefetch_entry_beyond(&self, hash: KeyHash, is_change: bool) {
        let index = hash.shard(self.regions.shard_count);
        let Ok(home) = Snapshot::take(self, index, hash.0) else { return };
        let mut beyond = home.home + 1..=home.home + home.header.reach.min(PREFETCH_BUCKETS);
        let _ = beyond.any(|bucket| self.prefetch_named(&home, bucket, (hash, is_change)));
    }

    /// Asks for the first entry that bucket `index` names for `hash`, or for the bucket behind when it names none; whether it does.
    #[inline(always)]
    fn prefetch_named(&self, home: &Snapshot<'v>, index: u64, (hash, is_change): (KeyHash, bool)) -> bool {
        let Ok(bucket) = home.buckets.get(index) else { return true };
        let candidates = bucket.slots_with_tag(hash.tag());
        let first = (candidates | 1 << (BUCKET_SLOTS - 1)).trailing_zeros() as usize;
        let entry = Slot::decode(bucket.slots[first].load()).map_or(0, |slot| slot.offset);
        // No branch here either: it would be guessed wrong for each key that isn't in its home.
        let wanted = select_unpredictable(candidates != 0, entry, home.buckets.offset(index + 1));
        Entry::prefetch(self.view, wanted);
        if is_change {
            // The head of the slab that a replaced block goes back to.
            self.view.prefetch(slab_of(wanted));
        }
        candidates != 0
    }

    /// Looks `key` up and lets `copy` take what it needs of the value. `copy` may run several times; its last result
    /// counts. None when there is no such key.
    ///
    /// # Errors
    /// [`ReadError`].
    #[inline]
    pub fn read<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        mut copy: impl FnMut(&Value<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<R>, ReadError> {
        self.find(hash, key, |place| copy(&Value { entry: place.entry }))
    }

    /// Looks `key` up and lets `look` see where it is, as [`TableView::read`] does.
    ///
    /// # Errors
    /// [`ReadError`].
    #[inline]
    pub fn find<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        mut look: impl FnMut(&Place<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<R>, ReadError> {
        match self.try_find(hash, key, &mut look)? {
            Some(found) => Ok(found),
            None => self.find_again(hash, key, &mut look),
        }
    }

    /// What most lookups never need.
    #[cold]
    #[inline(never)]
    fn find_again<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        look: &mut impl FnMut(&Place<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<R>, ReadError> {
        for _ in 1..TRIES_MAX {
            std::hint::spin_loop();
            if let Some(found) = self.try_find(hash, key, look)? {
                return Ok(found);
            }
        }
        Err(ReadError::Contended)
    }

    /// Looks once; None when something changed meanwhile.
    #[inline(always)]
    fn try_find<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        look: &mut impl FnMut(&Place<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<Option<R>>, Damaged> {
        let index = hash.shard(self.regions.shard_count);
        let snapshot = Snapshot::take(self, index, hash.0)?;
        let found = match self.search(index, &snapshot, hash, key) {
            Ok(Some(place)) if snapshot.is_current(hash.0) => look(&place).map(Some),
            Ok(Some(_)) => return Ok(None),
            Ok(None) => Ok(None),
            Err(damaged) => Err(damaged),
        };
        if snapshot.is_current(hash.0) { found.map(Some) } else { Ok(None) }
    }

    #[inline(always)]
    fn search(
        &self,
        shard: u64,
        snapshot: &Snapshot<'v>,
        hash: KeyHash,
        key: &[u8],
    ) -> Result<Option<Place<'v>>, Damaged> {
        let home = snapshot.home;
        match self.search_bucket(snapshot.bucket, hash, key)? {
            Some((slot, entry)) => Ok(Some(Place { shard, home, bucket: home, slot, entry })),
            None if snapshot.header.reach == 0 => Ok(None),
            None => self.search_behind(shard, (home, snapshot.header.reach), snapshot.buckets, hash, key),
        }
    }

    /// Searches the buckets behind the home, for the few entries that found no room in it.
    #[inline(never)]
    fn search_behind(
        &self,
        shard: u64,
        (home, reach): (u64, u64),
        buckets: Buckets<'v>,
        hash: KeyHash,
        key: &[u8],
    ) -> Result<Option<Place<'v>>, Damaged> {
        for bucket in home + 1..=home + reach {
            if let Some((slot, entry)) = self.search_bucket(buckets.get(bucket)?, hash, key)? {
                return Ok(Some(Place { shard, home, bucket, slot, entry }));
            }
        }
        Ok(None)
    }

    #[inline(always)]
    fn search_bucket(
        &self,
        bucket: &Bucket,
        hash: KeyHash,
        key: &[u8],
    ) -> Result<Option<(usize, Entry<'v>)>, Damaged> {
        let mut candidates = bucket.slots_with_tag(hash.tag());
        while candidates != 0 {
            let index = candidates.trailing_zeros() as usize;
            candidates &= candidates - 1;
            let Some(slot) = bucket.slots.get(index).and_then(|word| Slot::decode(word.load())) else {
                continue;
            };
            if let Some(entry) = Entry::load_within(self.data, slot.offset)?
                && entry.has_key(key)?
            {
                return Ok(Some((index, entry)));
            }
        }
        Ok(None)
    }

    /// Visits the keys of up to `homes_max` homes, in the order of their hash, from `cursor` on (0: from the start).
    /// Returns the cursor of what follows; None at the end. Every key that is there from the first call to the last
    /// is visited exactly once, also while the table grows.
    ///
    /// # Errors
    /// [`ReadError`]; nothing of the home where it happened was visited.
    pub fn scan(
        &self,
        cursor: u64,
        homes_max: usize,
        visit: &mut dyn FnMut(&[u8]),
    ) -> Result<Option<u64>, ReadError> {
        let mut at = Some(Position::of(cursor));
        let mut keys = KeyList::default();
        for _ in 0..homes_max {
            let Some(position) = at.filter(|position| position.shard < self.regions.shard_count) else {
                return Ok(None);
            };
            let next = self.collect_home(position, &mut keys)?;
            keys.iter().for_each(&mut *visit);
            at = Some(position.next(next));
        }
        Ok(at.filter(|position| position.shard < self.regions.shard_count).map(Position::cursor))
    }

    /// The shard that a cursor is in.
    pub const fn shard_of_cursor(cursor: u64) -> u64 {
        cursor >> CURSOR_SHARD_SHIFT
    }

    /// Lets `found` collect the entries of the home that holds `position`, from there on; returns the first hash behind that home.
    pub(super) fn collect_home(
        &self,
        position: Position,
        found: &mut impl Collector,
    ) -> Result<Option<u64>, ReadError> {
        for _ in 0..TRIES_MAX {
            let snapshot = Snapshot::take(self, position.shard, position.hash)?;
            let geometry = geometry_of(snapshot.shard, self, position.shard)?;
            let next = geometry.next_hash(position.hash);
            found.clear();
            let collected = self.collect(&snapshot, position, next, found);
            if snapshot.is_current(position.hash)
                && Geometry::decode(snapshot.shard.geometry.load()) == Some(geometry)
            {
                collected?;
                return Ok(next);
            }
            std::hint::spin_loop();
        }
        Err(ReadError::Contended)
    }

    fn collect(
        &self,
        snapshot: &Snapshot<'v>,
        position: Position,
        next: Option<u64>,
        found: &mut impl Collector,
    ) -> Result<(), Damaged> {
        let within = snapshot.home..=snapshot.home + snapshot.header.reach;
        for bucket in within.clone() {
            let slots = &snapshot.buckets.get(bucket)?.slots;
            slots
                .iter()
                .filter_map(|word| Slot::decode(word.load()))
                .for_each(|slot| self.data.prefetch(slot.offset));
        }
        for bucket in within {
            for word in &snapshot.buckets.get(bucket)?.slots {
                let Some(slot) = Slot::decode(word.load()) else { continue };
                let Some(entry) = Entry::load_within(self.data, slot.offset)? else { continue };
                let hash = entry.hash(self.seed)?;
                let ours = hash.tag() == slot.tag && hash.shard(self.regions.shard_count) == position.shard;
                if ours && hash.0 >= position.hash && next.is_none_or(|next| hash.0 < next) {
                    found.push(&entry)?;
                }
            }
        }
        Ok(())
    }
}

/// What becomes of the entries of a home. They are worth nothing until the home is found unchanged after them.
pub(super) trait Collector {
    /// Forgets all that was collected.
    fn clear(&mut self);

    /// Takes what is needed of an entry.
    fn push(&mut self, entry: &Entry<'_>) -> Result<(), Damaged>;
}

/// A place in the order of the scan: a shard, and a hash in it whose lowest eight bits are 0.
#[derive(Clone, Copy)]
pub(super) struct Position {
    pub(super) shard: u64,
    pub(super) hash: u64,
}

const CURSOR_SHARD_SHIFT: u32 = 56;

impl Position {
    pub(super) fn of(cursor: u64) -> Self {
        Self { shard: cursor >> CURSOR_SHARD_SHIFT, hash: cursor << (64 - CURSOR_SHARD_SHIFT) }
    }

    /// Where the scan goes on behind a home; `hash` is the first behind it in its shard, if there is one.
    pub(super) fn next(self, hash: Option<u64>) -> Self {
        match hash {
            Some(hash) => Self { hash, ..self },
            None => Self { shard: self.shard + 1, hash: 0 },
        }
    }

    pub(super) fn cursor(self) -> u64 {
        self.shard << CURSOR_SHARD_SHIFT | self.hash >> (64 - CURSOR_SHARD_SHIFT)
    }
}

/// Keys one behind the other in one piece of memory.
#[derive(Default)]
struct KeyList {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Collector for KeyList {
    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn push(&mut self, entry: &Entry<'_>) -> Result<(), Damaged> {
        entry.append_key(&mut self.bytes)?;
        self.ends.push(self.bytes.len());
        Ok(())
    }
}

impl KeyList {
    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.bytes[start..end])
    }
}
