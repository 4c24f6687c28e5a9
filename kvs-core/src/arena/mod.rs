//! Memory inside the segment.
//!
//! | module | what it is |
//! |---|---|
//! | [`size_class`] | which block size serves which request |
//! | [`extents`] | power-of-two blocks of 4 KiB to 2 MiB, shared by all shards |
//! | [`slab`] | small blocks of one size, sixteen KiB of them at a time, each slab in one shard |
//! | [`block_list`] | many blocks strung together, for what is larger than one |
//!
//! Nothing large ever needs one contiguous piece: a big value is a list of blocks, so memory that is free is
//! memory that it can use, however it is scattered. Small values need 16 KiB in one piece, for a slab, now and then.
//!
//! Invariants
//! - A block is either free, which its bit says, or owned by exactly one thing: a slab, an entry, a connection's
//!   buffer, a block list. `check` proves it for the whole segment.
//! - Bits change only through a [`Transaction`](crate::transaction::Transaction). A crash therefore leaves a block
//!   free or owned, never lost.

pub mod block_list;
pub mod extents;
pub mod size_class;
pub mod slab;
