//! What all connections together hold in the segment, counted from their slots: what leaks shows here.
//!
//! Read without any lock while workers go on: each figure is right for some moment, and together they are nearly so.

use super::slot;
use crate::arena::block_list::{CHUNKS_MAX, Chunk, HEAD_ORDER, ListHead};
use crate::arena::extents::block_bytes;
use crate::limits::CONNECTIONS_MAX_LIMIT;
use crate::segment::Segment;
use crate::segment::layout::ConnectionSlot;
use crate::sys::memory::{Damaged, Offset};

/// Slots and buffers of all connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Slots with memory under them.
    pub slots_reserved: u64,
    /// Slots in use.
    pub slots: u64,
    /// Rings and block lists that slots name, free ones too: those would be lost.
    pub buffers: u64,
    /// The memory these hold, in bytes.
    pub buffer_bytes: u64,
}

impl Usage {
    /// Counts it.
    ///
    /// # Errors
    /// [`Damaged`] when slots lie outside.
    pub fn of(segment: &Segment) -> Result<Self, Damaged> {
        let reserved = segment.header()?.connection_slots_reserved.load();
        let slots_reserved = reserved.min(u64::from(CONNECTIONS_MAX_LIMIT));
        let mut usage = Self { slots_reserved, ..Self::default() };
        for index in 0..slots_reserved {
            let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
            usage.slots += u64::from(slot::is_used(slot));
            for ring in [&slot.input, &slot.output].map(|ring| ring.block.load()) {
                usage.add((ring != 0).then(|| Chunk::decode(ring).map_or(0, Chunk::bytes)));
            }
            for list in [slot.assembly.load(), slot::outgoing_list(slot.outgoing.load())] {
                usage.add((list != 0).then(|| list_bytes(segment, list)));
            }
        }
        Ok(usage)
    }

    fn add(&mut self, buffer: Option<u64>) {
        self.buffers += u64::from(buffer.is_some());
        self.buffer_bytes += buffer.unwrap_or(0);
    }
}

/// Memory of the list at `offset`; its head alone when it is gone meanwhile.
fn list_bytes(segment: &Segment, offset: u64) -> u64 {
    let head: Result<&ListHead, Damaged> = segment.memory().object(Offset::new(offset));
    let chunks = head.map_or(&[][..], |head| {
        let count = head.chunk_count.load().min(CHUNKS_MAX as u64);
        &head.chunks[..count as usize]
    });
    let chunk_bytes = |word: u64| Chunk::decode(word).map_or(0, Chunk::bytes);
    block_bytes(HEAD_ORDER) + chunks.iter().map(|word| chunk_bytes(word.load())).sum::<u64>()
}
