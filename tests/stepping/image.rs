//! Images of the segment in this process's memory, and what their locks say.

use kvs_core::segment::Segment;
use kvs_core::sys::memory::Word;
use kvs_core::sys::robust_mutex::{Acquired, RobustMutex};
use kvs_core::table::Table;

use crate::pages::Pages;
use crate::violation::{must, violation};

/// A segment in this process's memory, for images.
pub struct Image {
    /// The segment.
    pub segment: Segment,
    /// Its table.
    pub table: Table,
}

impl Image {
    /// A copy of `pages` of `from`.
    ///
    /// # Errors
    /// Never, with memory.
    pub fn of(from: &Segment, pages: &Pages) -> anyhow::Result<Self> {
        let segment = Segment::on_heap(from.regions().capacity_bytes)?;
        pages.copy(from.memory(), segment.memory())?;
        // The table keeps the seed, so it comes after the header.
        let table = Table::new(&segment)?;
        Ok(Self { segment, table })
    }

    /// Its table as a new process has it.
    ///
    /// # Errors
    /// Never.
    pub fn anew(&self) -> anyhow::Result<Table> {
        Ok(Table::new(&self.segment)?)
    }
}

/// Every lock of `segment`, with its name.
///
/// # Errors
/// Never.
pub fn locks(segment: &Segment) -> anyhow::Result<Vec<(String, &RobustMutex)>> {
    let mut locks = vec![("the arena's lock".to_owned(), &segment.header()?.arena_lock)];
    for index in 0..segment.regions().shard_count {
        locks.push((format!("the lock of shard {index}"), &segment.shard(index)?.lock));
    }
    Ok(locks)
}

/// In the first word of a lock as glibc has it: what the kernel knows it by, of that the thread that holds it, and what the
/// kernel leaves there when that thread dies. That it does so at every instruction is what the real kills are for.
const FUTEX_MASK: u64 = 0xffff_ffff;
const OWNER_MASK: u64 = 0x3fff_ffff;
const OWNER_DIED: u64 = 0x4000_0000;

fn lock_word<'s>(segment: &'s Segment, lock: &RobustMutex) -> anyhow::Result<&'s Word> {
    let start = std::ptr::from_ref(segment.memory().word(0)?).addr();
    Ok(segment.memory().word((std::ptr::from_ref(lock).addr() - start) as u64)?)
}

/// Demands that nobody would wait for a lock of a process that was killed; returns how many were found held.
///
/// # Errors
/// A violation.
pub fn no_lock_blocks(segment: &Segment) -> anyhow::Result<usize> {
    let mut held = 0;
    for (name, lock) in locks(segment)? {
        match must(&name, lock.try_lock())? {
            Some(Acquired::Clean(_)) => {}
            Some(Acquired::OwnerDied(mut guard)) => {
                guard.mark_consistent();
                held += 1;
            }
            None => {
                return Err(violation(format!(
                    "{name} is held by a dead process, and its successor isn't told"
                )));
            }
        }
    }
    Ok(held)
}

/// Does what the kernel does when whoever holds a lock of `segment` dies.
///
/// # Errors
/// Never.
pub fn owners_die(segment: &Segment) -> anyhow::Result<()> {
    for (_, lock) in locks(segment)? {
        let word = lock_word(segment, lock)?;
        if word.load() & OWNER_MASK != 0 {
            segment.memory().store(word, word.load() & !FUTEX_MASK | OWNER_DIED);
        }
    }
    Ok(())
}

/// Whether the lock is held, or was by somebody who died.
///
/// # Errors
/// Never.
pub fn is_held(segment: &Segment, lock: &RobustMutex) -> anyhow::Result<bool> {
    Ok(lock_word(segment, lock)?.load() & (OWNER_MASK | OWNER_DIED) != 0)
}
