//! The load of readers inside this process: threads that look keys up as fast as they can.
//!
//! A thread makes the keys of a group, then looks them up: so they lie in memory when they are needed, as a program's keys do, and
//! making them doesn't stand between two lookups. The time for it counts; the target `baseline` tells how much it is. Numbers of
//! another distribution than the uniform one take as long as a lookup, so they are drawn before the first round. A clock would
//! take as long as a lookup, so of each group only the first call is timed: its latency is that of a call on its own, while the
//! rate has all that the processor does for several at once.

use std::time::Instant;

use anyhow::Result;

use super::{Key, Reads};
use crate::bench::results::{Sample, latencies};
use crate::bench::target::{Measurement, Span, Target};
use crate::bench::workload::{Distribution, Generator, Workload, write_key};

/// Keys of a group.
const GROUP_KEYS: usize = 256;
/// Numbers that are drawn before the first round.
const NUMBERS_BEFORE: usize = 1 << 22;

const _: () = assert!(NUMBERS_BEFORE.is_multiple_of(GROUP_KEYS));

/// One thread's way to the entries, kept from round to round.
pub trait Reader: Send {
    /// What it looks up with.
    type Lookup<'r>: Lookup
    where
        Self: 'r;

    /// Begins a round, on the thread that reads.
    ///
    /// # Errors
    /// What keeps it from reading.
    fn begin(&mut self) -> Result<Self::Lookup<'_>>;
}

/// Looks keys up.
pub trait Lookup {
    /// Reads the values of these keys: with one call, or one key after the other.
    ///
    /// # Errors
    /// What keeps it from reading, a key that isn't there among it.
    fn read(&mut self, keys: &[Key]) -> Result<()>;
}

impl<L: Lookup> Lookup for &mut L {
    #[inline]
    fn read(&mut self, keys: &[Key]) -> Result<()> {
        (**self).read(keys)
    }
}

/// What needs nothing for a round looks up by itself.
impl<L: Lookup + Send> Reader for L {
    type Lookup<'r>
        = &'r mut L
    where
        L: 'r;

    fn begin(&mut self) -> Result<Self::Lookup<'_>> {
        Ok(self)
    }
}

/// A target that is read by threads of this process.
pub struct ReadTarget<R> {
    name: String,
    batch: usize,
    /// One for each thread, with its keys.
    readers: Vec<(R, Group)>,
    /// What the readers read, gone after them.
    _kept: Box<dyn std::any::Any>,
}

impl<R: Reader> ReadTarget<R> {
    /// A target with readers made by `reader` for as many threads as `reads` says, each from its number. `kept` lives as long.
    pub fn new(
        name: &str,
        workload: &Workload,
        reads: Reads,
        kept: impl std::any::Any,
        mut reader: impl FnMut(usize) -> Result<R>,
    ) -> Result<Self> {
        let reader = |thread| Ok((reader(thread)?, Group::new(workload, thread as u64)));
        let readers = (0..reads.threads).map(reader).collect::<Result<_>>()?;
        Ok(Self { name: name.to_owned(), batch: reads.batch, readers, _kept: Box::new(kept) })
    }

    /// Measures one round.
    pub fn load(&mut self, span: &Span) -> Result<Sample> {
        let (begun, batch) = (Instant::now(), self.batch);
        let samples = std::thread::scope(|scope| {
            let readers = self.readers.iter_mut();
            // All are started before the first is waited for.
            let threads: Vec<_> = readers
                .map(|(reader, group)| scope.spawn(move || round(reader, group, batch, begun, span)))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no thread panics"));
            joined.collect::<Result<Vec<_>>>()
        })?;
        Ok(together(samples))
    }
}

impl<R: Reader> Target for ReadTarget<R> {
    fn name(&self) -> &str {
        &self.name
    }

    fn measure(&mut self, span: &Span) -> Result<Measurement> {
        Ok(Measurement::Load(self.load(span)?))
    }
}

/// All threads' samples as one.
pub fn together(samples: Vec<Sample>) -> Sample {
    let mut sum = Sample { operations: 0, seconds: 0.0, latency: latencies() };
    for sample in samples {
        sum.operations += sample.operations;
        sum.seconds = sum.seconds.max(sample.seconds);
        sum.latency += sample.latency;
    }
    sum
}

/// Where the numbers of the keys come from.
enum Numbers {
    /// Drawn when they are needed.
    Drawn(Generator),
    /// Drawn before; when all were used, they are used again.
    Before { numbers: Vec<u32>, next: usize },
}

impl Numbers {
    fn new(workload: &Workload, thread: u64) -> Self {
        let mut generator = workload.generator(thread);
        match workload.distribution {
            Distribution::Uniform => Self::Drawn(generator),
            Distribution::Zipfian(_) => {
                // Keys are fewer than 2 to the power of 32.
                let numbers = (0..NUMBERS_BEFORE).map(|_| generator.index() as u32).collect();
                Self::Before { numbers, next: 0 }
            }
        }
    }

    /// Gives each of `keys` its next number.
    fn write(&mut self, keys: &mut [Key; GROUP_KEYS]) {
        match self {
            Self::Drawn(generator) => keys.iter_mut().for_each(|key| write_key(generator.index(), key)),
            Self::Before { numbers, next } => {
                let group = &numbers[*next..*next + GROUP_KEYS];
                group.iter().zip(keys).for_each(|(number, key)| write_key(u64::from(*number), key));
                *next = (*next + GROUP_KEYS) % NUMBERS_BEFORE;
            }
        }
    }
}

/// Keys that are looked up one after the other.
struct Group {
    numbers: Numbers,
    keys: Box<[Key; GROUP_KEYS]>,
}

impl Group {
    fn new(workload: &Workload, thread: u64) -> Self {
        Self {
            numbers: Numbers::new(workload, thread),
            keys: Box::new([[b'0'; size_of::<Key>()]; GROUP_KEYS]),
        }
    }

    /// Looks all of them up, and returns how long the first call took, in nanoseconds.
    #[inline]
    fn read(&mut self, lookup: &mut impl Lookup, batch: usize) -> Result<u64> {
        self.numbers.write(&mut self.keys);
        let (first, others) = self.keys.split_at(batch);
        let begun = Instant::now();
        lookup.read(first)?;
        let latency_ns = begun.elapsed().as_nanos() as u64;
        if batch == 1 {
            lookup.read(others)?;
        } else {
            others.chunks(batch).try_for_each(|keys| lookup.read(keys))?;
        }
        Ok(latency_ns)
    }
}

/// One thread's round, which began at `begun`.
fn round<R: Reader>(
    reader: &mut R,
    group: &mut Group,
    batch: usize,
    begun: Instant,
    span: &Span,
) -> Result<Sample> {
    let mut lookup = reader.begin()?;
    while begun.elapsed() < span.warm_up {
        group.read(&mut lookup, batch)?;
        span.interrupted.check()?;
    }
    let (counted, mut operations, mut latency) = (Instant::now(), 0, latencies());
    loop {
        latency.saturating_record(group.read(&mut lookup, batch)?);
        operations += GROUP_KEYS as u64;
        let elapsed = counted.elapsed();
        if elapsed >= span.duration {
            return Ok(Sample { operations, seconds: elapsed.as_secs_f64(), latency });
        }
        span.interrupted.check()?;
    }
}

#[cfg(test)]
mod tests {
    //! Goal: every key that is made is looked up, in calls of the size that is asked for, and counted. Method: a lookup that counts.

    use std::time::Duration;

    use super::*;
    use crate::bench::target::Interrupted;
    use crate::bench::workload::key;

    #[derive(Default)]
    struct Counting {
        keys: u64,
        longest: usize,
    }

    impl Lookup for Counting {
        fn read(&mut self, keys: &[Key]) -> Result<()> {
            assert!(keys.iter().flatten().all(u8::is_ascii_digit));
            self.keys += keys.len() as u64;
            self.longest = self.longest.max(keys.len());
            Ok(())
        }
    }

    fn workload(distribution: Distribution) -> Workload {
        let key_bytes = size_of::<Key>();
        Workload { keys: 1000, key_bytes, value_bytes: 8, read_share: 1.0, distribution, seed: 1 }
    }

    fn target(threads: usize, batch: usize) -> ReadTarget<Counting> {
        let workload = workload(Distribution::Uniform);
        let reads = Reads { threads, batch, with_writer: false };
        ReadTarget::new("counting", &workload, reads, (), |_| Ok(Counting::default())).expect("made")
    }

    fn span(warm_up_ms: u64) -> Span {
        let (warm_up, duration) = (Duration::from_millis(warm_up_ms), Duration::from_millis(5));
        Span { warm_up, duration, interrupted: Interrupted::default() }
    }

    #[test]
    fn reads_of_all_threads_are_counted_once_warm() {
        let mut target = target(2, 1);
        let sample = target.load(&span(0)).expect("nothing fails");
        let looked_up: u64 = target.readers.iter().map(|(reader, _)| reader.keys).sum();
        assert_eq!(sample.operations, looked_up);
        assert_eq!(sample.latency.len() * GROUP_KEYS as u64, looked_up);
        assert!(sample.seconds >= 0.005);
        assert!(target.load(&span(5)).expect("nothing fails").operations > 0);
        let after: u64 = target.readers.iter().map(|(reader, _)| reader.keys).sum();
        assert!(after > looked_up);
    }

    #[test]
    fn reads_in_batches_come_in_calls_of_that_size() {
        for batch in [16, 64] {
            let mut target = target(1, batch);
            target.load(&span(0)).expect("nothing fails");
            assert_eq!(target.readers[0].0.longest, batch);
        }
    }

    #[test]
    fn reads_of_numbers_drawn_before_are_those_of_the_workload() {
        let workload = workload(Distribution::Zipfian(0.99));
        let (mut generator, mut group) = (workload.generator(7), Group::new(&workload, 7));
        for _ in 0..2 {
            group.numbers.write(&mut group.keys);
            assert!(group.keys.iter().all(|found| *found == key::<16>(generator.index())));
        }
    }

    #[test]
    fn reads_end_when_the_user_wants_it() {
        let span = span(0);
        span.interrupted.flag().store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(target(1, 1).load(&Span { duration: Duration::from_secs(60), ..span }).is_err());
    }
}
