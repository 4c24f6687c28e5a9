//! Single entries: where one is, and all of them.

use crate::limits::VALUE_BYTES_MAX_LIMIT;
use crate::segment::SegmentView;
use crate::sys::memory::Damaged;
use crate::table::hash::HashSeed;
use crate::table::view::{ReadError, TableView};

/// Homes looked at between two visits.
const HOMES_AT_ONCE: usize = 16;

/// An entry, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryFigures {
    /// Shard.
    pub shard: u64,
    /// Its home bucket.
    pub home: u64,
    /// The bucket its slot is in.
    pub bucket: u64,
    /// Which slot of it.
    pub slot: usize,
    /// Where it is in the segment.
    pub offset: u64,
    /// Its version in the shard.
    pub version: u64,
    /// Bytes it takes in its block.
    pub block_bytes: u64,
    /// Chunks beside it.
    pub chunks: u64,
    /// Bytes of those.
    pub chunk_bytes: u64,
    /// Whether its checksum fits.
    pub checksum_fits: bool,
    /// The value.
    pub value: Vec<u8>,
}

/// The entry of `key`; None when there is none.
///
/// # Errors
/// [`ReadError`] when it is being changed all the time, or can't be.
pub fn entry(view: &SegmentView, key: &[u8]) -> Result<Option<EntryFigures>, ReadError> {
    let table = table(view)?;
    table.find(table.hash_of(key), key, |place| {
        let entry = &place.entry;
        let mut value = vec![0; checked_length(entry.value_length(), entry.offset)?];
        entry.copy_value(0, &mut value)?;
        Ok(EntryFigures {
            shard: place.shard,
            home: place.home,
            bucket: place.bucket,
            slot: place.slot,
            offset: entry.offset,
            version: entry.version(),
            block_bytes: entry.block_bytes()?,
            chunks: entry.chunk_count(),
            chunk_bytes: entry.chunk_bytes()?,
            checksum_fits: entry.checksum_fits()?,
            value,
        })
    })
}

/// Visits key and value of every entry, in the order of their hashes, until `visit` fails. What is removed meanwhile is
/// left out.
///
/// # Errors
/// What `visit` says, or [`ReadError`].
pub fn for_each<E: From<ReadError>>(
    view: &SegmentView,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let table = table(view).map_err(ReadError::from)?;
    let mut cursor = Some(0);
    let (mut keys, mut value) = (Vec::new(), Vec::new());
    while let Some(at) = cursor {
        keys.clear();
        cursor = table.scan(at, HOMES_AT_ONCE, &mut |key| keys.push(key.to_vec()))?;
        for key in &keys {
            let found = table.read(table.hash_of(key), key, |stored| {
                value.resize(checked_length(stored.length(), 0)?, 0);
                stored.copy_to(0, &mut value)
            })?;
            if found.is_some() {
                visit(key, &value)?;
            }
        }
    }
    Ok(())
}

/// A length that damage has not made larger than any value.
fn checked_length(length: u64, offset: u64) -> Result<usize, Damaged> {
    if length > VALUE_BYTES_MAX_LIMIT { Err(Damaged { offset }) } else { Ok(length as usize) }
}

fn table(view: &SegmentView) -> Result<TableView<'_>, Damaged> {
    Ok(TableView::within(view.view(), view.regions(), HashSeed::of(view.header()?), view.data_end()))
}
