//! LMDB, through `heed`: what programs use today that want to read a store from their own address space.
//!
//! It is treated well: the database is a file in `/dev/shm`, so no disk has a part in it; the entries are loaded in the order of their
//! keys with `MDB_APPEND`, which fills every page; each thread reads in one read transaction for the whole run, so no lookup pays
//! for its beginning (the price, that such a reader never sees a later write, is not charged). A value is copied out once, as
//! from the segment.

use anyhow::{Context as _, Result};
use heed::types::Bytes;
use heed::{CommitOrAbort, Database, Env, PutFlags, RoTxn, WithTls};
use tempfile::TempDir;

use super::lmdb_environment;

/// Memory that is no disk.
const DIRECTORY: &str = "/dev/shm";
/// Entries stored by one write transaction.
const BATCH: usize = 500_000;
/// Readers at the same time, with some to spare.
const READERS_MAX: u32 = 16;
/// What LMDB has for an entry besides key and value, 10 bytes, and for the pages above the leaves, generously.
const OVERHEAD_BYTES: usize = 64;
/// Room for a database of next to nothing.
const ROOM_BYTES: usize = 64 << 20;

/// The database of an environment: bytes to bytes.
type Entries<'e> = Database<'e, Bytes, Bytes>;

/// A database with all entries of a workload. Its file is gone when this is dropped.
pub struct Lmdb {
    environment: Env,
    // Dropped last: the environment is closed before its file goes.
    _directory: TempDir,
}

impl Lmdb {
    /// Loads `count` entries of `entry_bytes` each, which come in the order of their keys.
    pub fn load<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        count: usize,
        entry_bytes: usize,
        mut entries: impl Iterator<Item = (K, V)>,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("kvs-bench-{}-lmdb-", std::process::id()))
            .tempdir_in(DIRECTORY)
            .with_context(|| format!("can't make a directory for LMDB in {DIRECTORY}"))?;
        let map_bytes = (count * (entry_bytes + OVERHEAD_BYTES) + ROOM_BYTES).next_multiple_of(1 << 20);
        let environment = lmdb_environment::open(directory.path(), map_bytes, READERS_MAX)?;
        let loaded = Self { environment, _directory: directory };
        let database = loaded.database()?;
        while loaded.append(database, &mut entries)? > 0 {}
        Ok(loaded)
    }

    fn database(&self) -> heed::Result<Entries<'_>> {
        let transaction = self.environment.write_txn()?;
        let opened = self.environment.create_databases_and_commit(transaction, |opener, transaction| {
            opener.create_database(transaction, None).map(CommitOrAbort::<_, ()>::Commit)
        });
        Ok(opened?.unwrap_commit())
    }

    /// Stores the next entries in one transaction: how many.
    fn append<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        database: Entries<'_>,
        entries: &mut impl Iterator<Item = (K, V)>,
    ) -> Result<usize> {
        let mut transaction = self.environment.write_txn()?;
        let mut stored = 0;
        for (key, value) in entries.by_ref().take(BATCH) {
            let (key, value) = (key.as_ref(), value.as_ref());
            database.put_with_flags(&mut transaction, PutFlags::APPEND, key, value)?;
            stored += 1;
        }
        transaction.commit()?;
        Ok(stored)
    }

    /// A reader for the calling thread, in one read transaction that lasts as long as it.
    pub fn reader(&self) -> Result<LmdbReader<'_>> {
        Ok(LmdbReader { database: self.database()?, transaction: self.environment.read_txn()? })
    }
}

/// One thread's way to the database.
pub struct LmdbReader<'l> {
    transaction: RoTxn<'l, WithTls>,
    database: Entries<'l>,
}

impl LmdbReader<'_> {
    /// Copies the value of `key` into `value`, in place of what is there; false when there is none.
    #[inline]
    pub fn get_into(&self, key: &[u8], value: &mut Vec<u8>) -> Result<bool> {
        let Some(found) = self.database.get(&self.transaction, key)? else { return Ok(false) };
        value.clear();
        value.extend_from_slice(found);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lmdb_with_entries_gives_each_and_leaves_no_file() {
        let key = |number: u32| format!("key:{number:012}");
        let entries = (0..1000).map(|number| (key(number), number.to_le_bytes()));
        let lmdb = Lmdb::load(1000, 20, entries).expect("room in /dev/shm");
        let place = lmdb._directory.path().to_owned();
        assert!(place.join("data.mdb").exists());
        let reader = lmdb.reader().expect("a reader");
        let mut value = Vec::new();
        for number in 0..1000u32 {
            assert!(reader.get_into(key(number).as_bytes(), &mut value).expect("sound"));
            assert_eq!(value, number.to_le_bytes());
        }
        assert!(!reader.get_into(b"another", &mut value).expect("sound"));
        drop(reader);
        drop(lmdb);
        assert!(!place.exists());
    }
}
