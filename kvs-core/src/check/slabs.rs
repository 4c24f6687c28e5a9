//! Ownership of the blocks of slabs.
//!
//! A slab is found on a partial list, or through an entry in it when it is full.

use std::collections::HashMap;

use super::Walk;
use super::blocks::Owner;
use crate::arena::size_class::{SIZES, blocks};
use crate::arena::slab::{Meta, SLAB_ORDER, Slab, block_index, slab_of};
use crate::segment::layout::{SIZE_CLASSES, Shard};
use crate::sys::memory::{Damaged, Offset};

/// All slabs found; None for what was taken for one and isn't.
#[derive(Default)]
pub struct Slabs {
    found: HashMap<u64, Option<State>>,
}

struct State {
    meta: Meta,
    free: [u64; 8],
    owned: [u64; 8],
    on_partial_list: bool,
}

fn count(bits: &[u64; 8]) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

impl Walk<'_> {
    /// The slab at `offset`, claimed when it is first seen.
    fn slab(&mut self, offset: u64) -> Option<&mut State> {
        if !self.slabs.found.contains_key(&offset) {
            let state = self.load_slab(offset);
            let state = self.report.sound(state);
            self.slabs.found.insert(offset, state);
        }
        self.slabs.found.get_mut(&offset)?.as_mut()
    }

    fn load_slab(&mut self, offset: u64) -> Result<State, String> {
        self.blocks.claim(offset, SLAB_ORDER, Owner::Slab)?;
        let slab: &Slab =
            self.view.view().object(Offset::new(offset)).map_err(|damaged| damaged.to_string())?;
        let meta =
            Meta::decode(slab.meta.load()).ok_or(format!("the slab at {offset:#x} has no mark of one"))?;
        if meta.shard >= self.view.regions().shard_count {
            return Err(format!("the slab at {offset:#x} is of shard {}, which isn't", meta.shard));
        }
        let free = std::array::from_fn(|word| slab.bitmap[word].load());
        Ok(State { meta, free, owned: [0; 8], on_partial_list: false })
    }

    /// Walks every shard's lists of slabs with free blocks.
    pub(super) fn partial_lists(&mut self) -> Result<(), Damaged> {
        for index in 0..self.view.regions().shard_count {
            let shard: &Shard = self.view.view().object(self.view.regions().shard(index))?;
            for class in 0..SIZE_CLASSES {
                let walked = self.partial_list(index, class, shard.partial[class].load());
                self.report.sound(walked);
            }
        }
        Ok(())
    }

    fn partial_list(&mut self, shard: u64, class: usize, first: u64) -> Result<(), String> {
        let list = format!("shard {shard}: partial list of {}-byte blocks", SIZES[class]);
        let (mut previous, mut offset) = (0, first);
        while offset != 0 {
            let Some(state) = self.slab(offset) else { return Err(format!("{list} is cut at {offset:#x}")) };
            if std::mem::replace(&mut state.on_partial_list, true) {
                return Err(format!("{list} comes to the slab at {offset:#x} twice"));
            }
            if (state.meta.shard, state.meta.class) != (shard, class) {
                return Err(format!("{list} leads to the slab at {offset:#x}, which is another's"));
            }
            let slab: &Slab =
                self.view.view().object(Offset::new(offset)).map_err(|damaged| damaged.to_string())?;
            if slab.previous.load() != previous {
                return Err(format!("{list}: the slab at {offset:#x} does not link back"));
            }
            (previous, offset) = (offset, slab.next.load());
        }
        Ok(())
    }

    /// Gives the block at `offset` to an entry of `shard` that takes up to `bytes` of it.
    ///
    /// # Errors
    /// Why it can't have it.
    pub(super) fn claim_slab_block(
        &mut self,
        offset: u64,
        shard: Option<u64>,
        bytes: u64,
    ) -> Result<(), String> {
        let Some(state) = self.slab(slab_of(offset)) else {
            return Err(format!("its block at {offset:#x} is in no slab"));
        };
        let Meta { class, shard: owner, .. } = state.meta;
        let block = block_index(offset, class).ok_or(format!("{offset:#x} is no block of its slab"))?;
        if shard.is_some_and(|shard| shard != owner) {
            return Err(format!("its block at {offset:#x} is of shard {owner}"));
        }
        if bytes > SIZES[class] {
            return Err(format!("it takes {bytes} bytes of its block of {}", SIZES[class]));
        }
        let (word, bit) = ((block / 64) as usize, 1 << (block % 64));
        if state.owned[word] & bit != 0 {
            return Err(format!("its block at {offset:#x} is another's too"));
        }
        state.owned[word] |= bit;
        if state.free[word] & bit != 0 {
            return Err(format!("its block at {offset:#x} is free"));
        }
        Ok(())
    }

    /// Holds every slab's bits and counts, and every shard's count of slabs, against what was found.
    pub(super) fn finish_slabs(&mut self) -> Result<(), Damaged> {
        let mut counts: HashMap<(u64, usize), u64> = HashMap::new();
        let slabs = std::mem::take(&mut self.slabs.found);
        for (offset, state) in slabs.iter().filter_map(|(offset, state)| Some((offset, state.as_ref()?))) {
            *counts.entry((state.meta.shard, state.meta.class)).or_default() += 1;
            self.finish_slab(*offset, state);
        }
        for index in 0..self.view.regions().shard_count {
            let shard: &Shard = self.view.view().object(self.view.regions().shard(index))?;
            for (class, counter) in shard.slabs.iter().enumerate() {
                let found = counts.get(&(index, class)).copied().unwrap_or(0);
                if counter.load() != found {
                    let said = format!("shard {index}: counts {} slabs", counter.load());
                    self.report.fault(format!("{said} of {}-byte blocks, {found} are there", SIZES[class]));
                }
            }
        }
        Ok(())
    }

    fn finish_slab(&mut self, offset: u64, state: &State) {
        let State { meta, free, owned, on_partial_list } = state;
        let (total, used, free_count) = (blocks(meta.class), count(owned), count(free));
        let slab = format!("the slab at {offset:#x} of shard {}", meta.shard);
        if meta.used != used {
            self.report.fault(format!("{slab} counts {} blocks in use, {used} are", meta.used));
        }
        if used + free_count != total {
            self.report.fault(format!(
                "{slab} has {total} blocks, of which {used} are in use and {free_count} free"
            ));
        }
        if *on_partial_list != (free_count > 0) {
            let is = if *on_partial_list { "is" } else { "is not" };
            self.report.fault(format!("{slab} has {free_count} free blocks and {is} on the partial list"));
        }
    }
}
