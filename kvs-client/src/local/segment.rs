//! The segment that a reader has mapped, and whether it is still the one.
//!
//! Who removes a segment says so in it first, and every lookup looks there. For what nobody announced, a segment that a user
//! removed by hand, the name is looked at when a clock that costs no system call says that it is time again.

use std::path::Path;

use kvs_core::segment::{SegmentError, SegmentView, identity};
use kvs_core::table::hash::HashSeed;
use kvs_core::table::view::TableView;
use rustix::time::{ClockId, clock_gettime};

use crate::Error;

/// The segment's name is looked at so often, in nanoseconds.
pub const LOOK_EVERY_NS: i64 = 100_000_000;

/// A segment that is mapped.
pub struct Mapped {
    view: SegmentView,
    seed: HashSeed,
    /// Where the data ended that had memory when that was looked at last; it never ends earlier.
    data_end: u64,
    /// When its name was looked at last.
    looked_ns: i64,
}

impl Mapped {
    /// Maps the segment at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let view = SegmentView::open(path).map_err(|error| refused(path, &error))?;
        let header = view.header().map_err(|error| refused(path, &error.into()))?;
        if header.loading.load() != 0 {
            return Err(Error::Loading { path: path.to_path_buf() });
        }
        let seed = HashSeed::of(header);
        let mut mapped = Self { view, seed, data_end: 0, looked_ns: coarse_ns() };
        mapped.look_further();
        Ok(mapped)
    }

    /// What tells the segment from all others.
    pub fn identity(&self) -> Option<String> {
        self.view.header().ok().map(identity)
    }

    /// Whether the segment's server serves connection `number` of this process.
    pub fn has_connection(&self, number: u64) -> bool {
        self.view.has_connection(number, std::process::id())
    }

    /// Looks how far the data reaches now; whether that is farther than before.
    pub fn look_further(&mut self) -> bool {
        let before = self.data_end;
        self.data_end = self.view.data_end();
        self.data_end > before
    }

    /// Whether it can be read without a closer look.
    #[inline(always)]
    fn is_current(&self) -> bool {
        !self.view.is_retired() && coarse_ns().wrapping_sub(self.looked_ns) < LOOK_EVERY_NS
    }

    /// Makes the next read look at the segment's name.
    #[cfg(test)]
    pub fn look_again(&mut self) {
        self.looked_ns -= LOOK_EVERY_NS;
    }

    /// The table in it.
    #[inline(always)]
    pub fn table(&self) -> TableView<'_> {
        TableView::within(self.view.view(), self.view.regions(), self.seed, self.data_end)
    }
}

/// What to do when the segment was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// Read the new one.
    Follow,
    /// Read no more: nobody has said that it is the right one.
    Refuse,
}

/// The segment that is to be read now.
#[inline(always)]
pub fn current<'m>(
    mapped: &'m mut Option<Mapped>,
    path: &Path,
    replaced: Replaced,
) -> Result<&'m mut Mapped, Error> {
    if !mapped.as_ref().is_some_and(Mapped::is_current) {
        renew(mapped, path, replaced)?;
    }
    mapped.as_mut().ok_or_else(|| no_store(path))
}

/// Looks for another segment when there is none, when the one that is mapped is void, or from time to time.
#[cold]
#[inline(never)]
fn renew(mapped: &mut Option<Mapped>, path: &Path, replaced: Replaced) -> Result<(), Error> {
    if let Some(old) = mapped.as_mut().filter(|old| !old.view.is_retired()) {
        old.looked_ns = coarse_ns();
        // One that has lost its name and was not replaced still has the last data, and may still be served. So has one of which
        // nothing can be learnt.
        if !old.view.is_replaced(path).unwrap_or(false) {
            return Ok(());
        }
    }
    let new = match replaced {
        Replaced::Follow => Mapped::open(path),
        Replaced::Refuse => Err(Error::Segment { reason: "the segment was replaced by another one".into() }),
    };
    let is_void = mapped.as_ref().is_none_or(|old| old.view.is_retired());
    match new {
        Ok(new) => *mapped = Some(new),
        // The new one has no data yet.
        Err(Error::NoStore { .. } | Error::Loading { .. }) if !is_void => {}
        Err(error) => {
            *mapped = None;
            return Err(error);
        }
    }
    Ok(())
}

fn no_store(path: &Path) -> Error {
    Error::NoStore { path: path.to_path_buf() }
}

#[cold]
fn refused(path: &Path, error: &SegmentError) -> Error {
    match error {
        SegmentError::Missing { .. } | SegmentError::Unfinished { .. } => no_store(path),
        error => Error::Segment { reason: error.to_string() },
    }
}

/// Nanoseconds of a clock that moves every few milliseconds and is read without a system call.
#[inline(always)]
pub fn coarse_ns() -> i64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
