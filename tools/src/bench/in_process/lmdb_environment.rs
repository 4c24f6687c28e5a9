//! Opens an LMDB environment: the one call of `heed` that the compiler can't vouch for.
#![allow(unsafe_code)]

use std::path::Path;

use heed::{Env, EnvOpenOptions};

/// An environment of at most `map_bytes` in `directory`, which nobody else has opened or will change while it is open.
///
/// # Errors
/// What LMDB says.
pub fn open(directory: &Path, map_bytes: usize, readers_max: u32) -> heed::Result<Env> {
    let mut options = EnvOpenOptions::new();
    options.map_size(map_bytes).max_readers(readers_max);
    // SAFETY: the file is new, in a directory of a random name that this process has just made for itself with mode 0700, so no
    // other process truncates or writes it under the mapping, and no other environment of this process has it open.
    unsafe { options.open(directory) }
}
