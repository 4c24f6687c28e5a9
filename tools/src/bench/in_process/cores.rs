//! Readers beside a writer, each on cores of their own: what a writer costs readers shall be seen, not how a scheduler shares cores.
//!
//! The readers get the first core that this process may use, the writer and the store's servers the others. With a single core
//! they all share it.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Reads;
use super::lookups::{Checked, Local};
use super::reads::ReadTarget;
use super::store::LocalStore;
use super::writer::Writer;
use crate::bench::target::{Measurement, Span, Target};
use crate::bench::workload::Workload;

/// Who runs where.
struct Cores {
    all: CpuSet,
    readers: CpuSet,
    others: CpuSet,
}

impl Cores {
    fn split() -> Result<Self> {
        let all = sched_getaffinity(None).context("can't learn which cores may be used")?;
        let (mut readers, mut others) = (CpuSet::new(), all);
        if let Some(first) = (0..CpuSet::MAX_CPU).find(|core| all.is_set(*core)) {
            readers.set(first);
            others.unset(first);
        }
        if others.count() == 0 {
            (readers, others) = (all, all);
        }
        Ok(Self { all, readers, others })
    }

    /// Has the calling thread, and what it starts, run on `cores` meanwhile.
    fn on<R>(&self, cores: &CpuSet, work: impl FnOnce() -> Result<R>) -> Result<R> {
        sched_setaffinity(None, cores).context("can't choose cores")?;
        let result = work();
        sched_setaffinity(None, &self.all).context("can't use all cores again")?;
        result
    }
}

/// Has `work`, and what it starts, run where no reader runs.
///
/// # Errors
/// What `work` says, or that cores can't be chosen.
pub fn on_others<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    let cores = Cores::split()?;
    cores.on(&cores.others, work)
}

/// Local readers, beside a writer or, to be compared with that, without one.
pub struct Beside {
    readers: ReadTarget<Checked>,
    writer: Option<Writer>,
    cores: Cores,
}

impl Beside {
    /// Readers of `store`; its values are a [`Writer`]'s.
    pub fn new(
        name: &str,
        workload: &Workload,
        reads: Reads,
        store: &Rc<LocalStore>,
        has_writer: bool,
    ) -> Result<Self> {
        let path = store.segment_path();
        let open = |_| Local::open(&path).map(Checked);
        let readers = ReadTarget::new(name, workload, reads, Rc::clone(store), open)?;
        let connect = |path: &Path| Writer::connect(path, workload);
        let writer = has_writer.then(|| connect(store.unix_path())).transpose()?;
        Ok(Self { readers, writer, cores: Cores::split()? })
    }
}

impl Target for Beside {
    fn name(&self) -> &str {
        self.readers.name()
    }

    fn measure(&mut self, span: &Span) -> Result<Measurement> {
        let Self { readers, writer, cores } = self;
        let end = AtomicBool::new(false);
        let sample = std::thread::scope(|scope| {
            let writing =
                writer.as_mut().map(|writer| scope.spawn(|| cores.on(&cores.others, || writer.run(&end))));
            let sample = cores.on(&cores.readers, || readers.load(span));
            end.store(true, Ordering::Relaxed);
            writing.map_or(Ok(()), |writing| writing.join().expect("no thread panics"))?;
            sample
        })?;
        Ok(Measurement::Load(sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_out_and_given_back() {
        let cores = Cores::split().expect("they can be asked for");
        let set = || sched_getaffinity(None).context("asked before");
        let (mut sum, mut together) = (0, CpuSet::new());
        for part in [&cores.readers, &cores.others] {
            assert_eq!(cores.on(part, set).expect("allowed"), *part);
            sum += part.count();
            (0..CpuSet::MAX_CPU).filter(|core| part.is_set(*core)).for_each(|core| together.set(core));
        }
        assert_eq!(together, cores.all);
        assert!(sum == cores.all.count() || cores.all.count() == 1);
        assert_eq!(set().expect("asked before"), cores.all);
    }
}
