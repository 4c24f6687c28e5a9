//! What is measured against what: the store's own reader, LMDB, the pointer chase, and nothing at all.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use kvs_client::LocalReader;
use kvs_core::segment::SegmentView;

use super::Key;
use super::chase::Chase;
use super::lmdb::{Lmdb, LmdbReader};
use super::reads::{Lookup, Reader};
use super::writer;

/// Reads through `LocalReader`, and copies each value into the same memory of its own.
pub struct Local {
    reader: LocalReader,
    value: Vec<u8>,
}

impl Local {
    /// Opens the segment at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { reader: LocalReader::open_path(path)?, value: Vec::new() })
    }

    /// Reads every key once and compares its value, which also maps all pages there are.
    pub fn verify(mut self, entries: impl Iterator<Item = (Key, impl AsRef<[u8]>)>) -> Result<Self> {
        for (key, value) in entries {
            let found = self.reader.get_into(key, &mut self.value)?;
            ensure!(
                found && self.value == value.as_ref(),
                "a local reader finds another value than was stored"
            );
        }
        Ok(self)
    }

    /// Reads the values of these keys, one after the other, and shows each.
    #[inline]
    fn each(&mut self, keys: &[Key], show: impl Fn(&Key, &[u8]) -> Result<()>) -> Result<()> {
        for key in keys {
            if !self.reader.get_into(key, &mut self.value)? {
                return missing(key);
            }
            show(key, &self.value)?;
        }
        Ok(())
    }
}

/// One key at a time.
pub struct OneByOne(pub Local);

impl Lookup for OneByOne {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        self.0.each(keys, |_, value| {
            black_box(value);
            Ok(())
        })
    }
}

/// Several keys with one call of `get_many`.
pub struct Many(pub Local);

impl Lookup for Many {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        let Local { reader, value } = &mut self.0;
        let mut found = 0;
        reader.get_many(keys, |_, there| {
            if let Some(there) = there {
                value.clear();
                value.extend_from_slice(there);
                black_box(&value[..]);
                found += 1;
            }
        })?;
        ensure!(found == keys.len(), "{} of {} keys are missing", keys.len() - found, keys.len());
        Ok(())
    }
}

/// One key at a time; each value must be one that the writer made for that key, and whole.
pub struct Checked(pub Local);

impl Lookup for Checked {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        self.0.each(keys, |key, value| {
            if !writer::is_whole(key, value) {
                bail!("a torn value of key {}: {value:02x?}", String::from_utf8_lossy(key));
            }
            Ok(())
        })
    }
}

/// LMDB, one key at a time: it has no call for several.
pub struct LmdbOneByOne(pub Arc<Lmdb>);

impl Reader for LmdbOneByOne {
    type Lookup<'r> = LmdbLookup<'r>;

    fn begin(&mut self) -> Result<Self::Lookup<'_>> {
        Ok(LmdbLookup { reader: self.0.reader()?, value: Vec::new() })
    }
}

/// A round of it.
pub struct LmdbLookup<'l> {
    reader: LmdbReader<'l>,
    value: Vec<u8>,
}

impl LmdbLookup<'_> {
    /// Reads every key once and compares its value, which also maps all pages there are.
    pub fn verify(mut self, entries: impl Iterator<Item = (Key, impl AsRef<[u8]>)>) -> Result<()> {
        for (key, value) in entries {
            let found = self.reader.get_into(&key, &mut self.value)?;
            ensure!(found && self.value == value.as_ref(), "LMDB finds another value than was stored");
        }
        Ok(())
    }
}

impl Lookup for LmdbLookup<'_> {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        for key in keys {
            if !self.reader.get_into(key, &mut self.value)? {
                return missing(key);
            }
            black_box(&self.value[..]);
        }
        Ok(())
    }
}

/// The pointer chase; see [`Chase`]. The keys only say how often.
pub struct Chasing {
    chase: Chase,
    is_overlapped: bool,
}

impl Chasing {
    /// Through what is in use in `segment` now.
    pub fn new(segment: &Arc<SegmentView>, seed: u64, is_overlapped: bool) -> Result<Self> {
        let chase = Chase::new(segment, seed)?;
        chase.touch()?;
        Ok(Self { chase, is_overlapped })
    }
}

impl Lookup for Chasing {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        if self.is_overlapped {
            keys.iter().try_for_each(|_| self.chase.overlapped())?;
        } else {
            keys.iter().try_for_each(|_| self.chase.step())?;
        }
        Ok(())
    }
}

/// Nothing: what making the keys takes.
pub struct Baseline;

impl Lookup for Baseline {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        keys.iter().for_each(|key| {
            black_box(key);
        });
        Ok(())
    }
}

#[cold]
fn missing(key: &Key) -> Result<()> {
    bail!("key {} is missing", String::from_utf8_lossy(key))
}
