//! Reads straight from the store's shared memory: no server, no system call, no lock.
//!
//! A lookup hashes the key, loads its bucket, loads its entry, copies the value, and then makes sure that nothing moved
//! meanwhile; `report/local-reads.md` argues why whatever it met on the way was harmless. What is written is seen from before
//! its writer has the answer. A lookup that writers disturb is repeated, for a bounded time.
//!
//! Invariants
//! - The mapping is read-only, and of a segment that is this user's alone.
//! - A value is given out only after it was found to be one that the key had at one moment of the call.
//! - Nothing is allocated but room for values.
//!
//! It needs no server: while the data server is dead, is replaced or hangs, reads go on. When the segment itself is replaced the
//! reader maps the new one; see `segment`.

mod of_client;
mod segment;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvs_core::instance::InstanceName;
use kvs_core::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_LIMIT};
use kvs_core::table::hash::KeyHash;
use kvs_core::table::view::ReadError;

use crate::Error;
pub(crate) use of_client::LocalReads;
use segment::{Mapped, Replaced};

/// For so long a lookup is repeated that writers disturb every time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Keys whose buckets and entries are brought near together: more would drive each other out of the nearest cache.
const GROUP_KEYS: usize = 32;

/// Reads a store's data from its shared memory, on the same machine and as the same user.
///
/// It costs no system call, but for a look at the segment's name about ten times a second while it is used. A reader belongs to one
/// thread at a time; each thread that reads opens its own.
pub struct LocalReader {
    path: PathBuf,
    /// None while there is no segment.
    mapped: Option<Mapped>,
    replaced: Replaced,
    patience: Duration,
    /// Room for one value.
    value: Vec<u8>,
}

impl LocalReader {
    /// Opens the segment of the instance `name`, server or not.
    ///
    /// # Errors
    /// [`Error::InstanceName`], [`Error::NoStore`], [`Error::Loading`], [`Error::Segment`].
    pub fn open(name: &str) -> Result<Self, Error> {
        let name: InstanceName =
            name.parse().map_err(|error| Error::InstanceName { reason: format!("{error}") })?;
        Self::open_path(name.segment_path())
    }

    /// Opens the segment at `path`.
    ///
    /// # Errors
    /// As [`LocalReader::open`].
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref().to_path_buf();
        let mapped = Some(Mapped::open(&path)?);
        Ok(Self { path, mapped, replaced: Replaced::Follow, patience: PATIENCE, value: Vec::new() })
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`Error::KeyLength`], [`Error::NoStore`] after the store was purged, [`Error::Quarantined`], [`Error::Contended`], and what
    /// [`LocalReader::open`] says when the segment was replaced.
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
        let mut value = Vec::new();
        Ok(self.get_into(key, &mut value)?.then_some(value))
    }

    /// Reads a value into `value`, in place of what is there; whether there is one. Where not, `value` is empty afterwards, and so
    /// it is after an error. Nothing is allocated when it has room already.
    ///
    /// # Errors
    /// As [`LocalReader::get`].
    #[inline]
    pub fn get_into(&mut self, key: impl AsRef<[u8]>, value: &mut Vec<u8>) -> Result<bool, Error> {
        let key = key.as_ref();
        let found = check(key).and_then(|()| {
            let mapped = segment::current(&mut self.mapped, &self.path, self.replaced)?;
            let hash = mapped.table().hash_of(key);
            read(mapped, hash, key, value, self.patience)
        });
        if !matches!(found, Ok(true)) {
            value.clear();
        }
        found
    }

    /// Reads the values of all `keys`, and calls `found` for each, in order, with its index. Much faster than one by one: the
    /// memory's answers for many keys are waited for together.
    ///
    /// Each value is one that its key had during the call; they are not all of the same moment.
    ///
    /// # Errors
    /// As [`LocalReader::get`], at the first key that can't be read.
    pub fn get_many<K: AsRef<[u8]>>(
        &mut self,
        keys: &[K],
        mut found: impl FnMut(usize, Option<&[u8]>),
    ) -> Result<(), Error> {
        let mapped = segment::current(&mut self.mapped, &self.path, self.replaced)?;
        let mut hashes = [KeyHash(0); GROUP_KEYS];
        let mut index = 0;
        for group in keys.chunks(GROUP_KEYS) {
            for (key, hash) in group.iter().zip(&mut hashes) {
                check(key.as_ref())?;
                *hash = mapped.table().hash_of(key.as_ref());
            }
            for hash in &hashes[..group.len()] {
                mapped.table().prefetch_bucket(*hash);
            }
            let mut beyond = 0u64;
            for (at, hash) in hashes[..group.len()].iter().enumerate() {
                beyond |= u64::from(!mapped.table().prefetch_entry(*hash, false)) << at;
            }
            while beyond != 0 {
                mapped.table().prefetch_entry_beyond(hashes[beyond.trailing_zeros() as usize], false);
                beyond &= beyond - 1;
            }
            for (key, hash) in group.iter().zip(&hashes) {
                let there = read(mapped, *hash, key.as_ref(), &mut self.value, self.patience)?;
                found(index, there.then_some(&self.value[..]));
                index += 1;
            }
        }
        Ok(())
    }
}

fn check(key: &[u8]) -> Result<(), Error> {
    if (1..=KEY_BYTES_MAX).contains(&key.len()) { Ok(()) } else { Err(Error::KeyLength { found: key.len() }) }
}

/// Reads the value of `key` into `value`; whether there is one.
#[inline(always)]
fn read(
    mapped: &mut Mapped,
    hash: KeyHash,
    key: &[u8],
    value: &mut Vec<u8>,
    patience: Duration,
) -> Result<bool, Error> {
    if let Some(shard) = mapped.table().quarantined(hash) {
        return Err(Error::Quarantined { shard });
    }
    match try_read(mapped, hash, key, value) {
        Ok(found) => Ok(found),
        Err(error) => read_again(mapped, hash, key, value, (error, patience)),
    }
}

#[inline(always)]
fn try_read(mapped: &Mapped, hash: KeyHash, key: &[u8], value: &mut Vec<u8>) -> Result<bool, ReadError> {
    let found = mapped.table().read(hash, key, |stored| {
        if stored.length() > VALUE_BYTES_MAX_LIMIT {
            return Err(stored.damaged());
        }
        // Room of the same length is not cleared: all of it is written now.
        value.resize(stored.length() as usize, 0);
        stored.copy_to(0, value)
    });
    Ok(found?.is_some())
}

/// Goes on where a lookup gave up.
#[cold]
fn read_again(
    mapped: &mut Mapped,
    hash: KeyHash,
    key: &[u8],
    value: &mut Vec<u8>,
    (mut error, patience): (ReadError, Duration),
) -> Result<bool, Error> {
    let since = Instant::now();
    loop {
        match error {
            ReadError::Contended if since.elapsed() >= patience => return Err(Error::Contended),
            // Who disturbs it may need this processor to come to an end.
            ReadError::Contended => std::thread::yield_now(),
            // What lies behind the data that was known is there by now, or it is damage.
            _ if mapped.look_further() => {}
            error => return Err(Error::Segment { reason: error.to_string() }),
        }
        match try_read(mapped, hash, key, value) {
            Ok(found) => return Ok(found),
            Err(again) => error = again,
        }
    }
}
