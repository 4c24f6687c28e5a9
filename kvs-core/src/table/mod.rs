//! The hash table: lock-free validated reads, guarded writes, growth without a pause.

pub mod geometry;
