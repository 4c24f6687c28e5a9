//! Putting back what a backup file says: each key's latest version counts, whatever the order in which they come.
//!
//! Lock: the shard's. A crash while loading makes the whole segment void; see [`crate::backup::load`].

use super::entry::Content;
use super::{KeyHash, Table, TableError};
use crate::arena::block_list::BlockList;
use crate::sys::memory::Word;
use crate::transaction::Transaction;

impl Table {
    /// Notes that `key` has had `value`, which [fits](Self::fits_inline), since `version`, unless it has a later one; false then.
    /// For loading; no backup ring hears of it.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn restore(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        version: u64,
    ) -> Result<bool, TableError> {
        self.change(transaction, hash, |writer| writer.restore(hash, key, &Content::Inline(value), version))
    }

    /// As [`Table::restore`], with the value in `list`, as [`Table::set_assembled`] has it.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn restore_assembled(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        list: &BlockList,
        owner: &Word,
        version: u64,
    ) -> Result<bool, TableError> {
        self.assembled(transaction, (key, list, owner), |table, transaction, content| {
            table.change(transaction, hash, |writer| writer.restore(hash, key, content, version))
        })
    }

    /// Notes that `key` is gone since `version`, unless it has a later one; false when nothing is changed.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn restore_delete(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        version: u64,
    ) -> Result<bool, TableError> {
        self.change(transaction, hash, |writer| writer.restore_delete(hash, key, version))
    }
}
