//! A writer beside local readers: a client that changes keys through the server as fast as it can.
//!
//! Each value tells whether it is whole, and whose: its first word is chosen anew by each write, and the others follow from that
//! and the key. A reader that got part of one value and part of another, or the value of another key, sees it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use kvs_client::{Answer, Client};

use super::Key;
use crate::bench::target::Interrupted;
use crate::bench::workload::{Workload, key};

/// Requests the writer sends at once.
const PIPELINE: usize = 64;
/// The number of the writer among the threads that make requests.
const WRITER_THREAD: u64 = 1_000;

/// Fills `value` for `key` with a write's own `first` word.
pub fn fill(key: &Key, first: u64, value: &mut [u8]) {
    for (word, position) in value.chunks_mut(8).zip(0..) {
        let bytes = word_at(key, first, position).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// Whether `value` is one that [`fill`] made for `key`.
#[inline]
pub fn is_whole(key: &Key, value: &[u8]) -> bool {
    let (words, rest) = value.as_chunks::<8>();
    let Some((first, others)) = words.split_first() else { return false };
    let first = u64::from_le_bytes(*first);
    let expected = |position: usize| word_at(key, first, position as u32).to_le_bytes();
    others.iter().zip(1..).all(|(word, position)| *word == expected(position))
        && *rest == expected(words.len())[..rest.len()]
}

#[inline(always)]
fn word_at(key: &Key, first: u64, position: u32) -> u64 {
    let own = u64::from_le_bytes(key[8..].try_into().expect("keys have sixteen bytes"));
    if position == 0 { first } else { first.rotate_left(position * 7) ^ own }
}

/// A client that stores such values.
pub struct Writer {
    client: Client,
    workload: Workload,
    value: Vec<u8>,
    /// Values stored so far, which makes each another.
    stored: u64,
}

impl Writer {
    /// Connects to the unix socket at `path`.
    pub fn connect(path: &Path, workload: &Workload) -> Result<Self> {
        let path = path.to_str().context("the directory for temporary files has a name that is not UTF-8")?;
        let client = Client::connect(format!("unix:{path}"))?;
        Ok(Self { client, workload: *workload, value: vec![0; workload.value_bytes], stored: 0 })
    }

    /// Stores all keys.
    pub fn store_all(&mut self, interrupted: &Interrupted) -> Result<()> {
        let mut from = 0;
        while from < self.workload.keys {
            let to = (from + PIPELINE as u64).min(self.workload.keys);
            self.store(from..to)?;
            interrupted.check()?;
            from = to;
        }
        Ok(())
    }

    /// Changes keys, chosen as the workload says, until `end` is set.
    pub fn run(&mut self, end: &AtomicBool) -> Result<()> {
        let mut generator = self.workload.generator(WRITER_THREAD);
        while !end.load(Ordering::Relaxed) {
            self.store((0..PIPELINE).map(|_| generator.index()))?;
        }
        Ok(())
    }

    fn store(&mut self, indices: impl Iterator<Item = u64>) -> Result<()> {
        let mut pipeline = self.client.pipeline();
        for index in indices {
            let key: Key = key(index);
            self.stored += 1;
            fill(&key, self.stored.wrapping_mul(0x9e37_79b9_7f4a_7c15), &mut self.value);
            pipeline.set(key, &self.value);
        }
        for answer in pipeline.run()? {
            match answer {
                Answer::Stored => {}
                Answer::Failed(error) => return Err(error).context("the writer can't store"),
                other => bail!("the writer is answered oddly: {other:?}"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writer_values_are_whole_and_their_keys_own() {
        let (one, other): (Key, Key) = (key(1), key(2));
        for length in [8, 16, 32, 37, 1024] {
            let (mut value, mut later) = (vec![0; length], vec![0; length]);
            fill(&one, 77, &mut value);
            fill(&one, 78, &mut later);
            assert!(is_whole(&one, &value) && is_whole(&one, &later));
            if length > 8 {
                assert!(!is_whole(&other, &value));
                let torn = [&value[..8], &later[8..]].concat();
                assert!(!is_whole(&one, &torn));
            }
        }
        assert!(!is_whole(&one, b"short"));
    }
}
