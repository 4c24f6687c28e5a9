//! What a thread of the load generator has counted.

use hdrhistogram::Histogram;

use crate::bench::results::{Sample, latencies};

/// Answers and their latencies since counting began.
pub struct Tally {
    operations: u64,
    latency: Histogram<u64>,
    /// Answers of one batch take equally long: they are noted together.
    run: (u64, u64),
}

impl Tally {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { operations: 0, latency: latencies(), run: (0, 0) }
    }

    /// An answer came after this time.
    #[inline]
    pub fn answered(&mut self, latency_ns: u64) {
        let (last, count) = self.run;
        if last == latency_ns {
            self.run.1 = count + 1;
        } else {
            self.end_run();
            self.run = (latency_ns, 1);
        }
        self.operations += 1;
    }

    /// An answer hasn't come within this time: no operation, but a latency.
    pub fn unanswered(&mut self, waited_ns: u64) {
        self.latency.saturating_record(waited_ns);
    }

    #[inline]
    fn end_run(&mut self) {
        let (latency_ns, count) = self.run;
        if count > 0 {
            self.latency.saturating_record_n(latency_ns, count);
        }
    }

    /// Answers counted.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Forgets all.
    pub fn reset(&mut self) {
        self.latency.reset();
        (self.operations, self.run) = (0, (0, 0));
    }

    /// What was counted, in this time.
    pub fn into_sample(mut self, seconds: f64) -> Sample {
        self.end_run();
        Sample { operations: self.operations, seconds, latency: self.latency }
    }
}

/// The samples of threads that worked at the same time, as one.
pub fn together(samples: Vec<Sample>) -> Sample {
    let rate: f64 = samples.iter().map(Sample::rate).sum();
    let operations: u64 = samples.iter().map(|sample| sample.operations).sum();
    let mut latency = latencies();
    samples.iter().for_each(|sample| latency += &sample.latency);
    // Their times differ by next to nothing; together they are such that the rate is the sum of the rates.
    let seconds = if operations == 0 { 1.0 } else { operations as f64 / rate };
    Sample { operations, seconds, latency }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tally_counts_all_and_forgets_what_was_before() {
        let mut tally = Tally::new();
        tally.answered(999_999);
        tally.reset();
        [1_000, 1_000, 2_000, 1_000].into_iter().for_each(|latency_ns| tally.answered(latency_ns));
        tally.unanswered(5_000);
        let sample = tally.into_sample(2.0);
        assert_eq!((sample.operations, sample.latency.len(), sample.rate()), (4, 5, 2.0));
        assert_eq!(sample.latency.count_at(1_000), 3);
    }

    #[test]
    fn tally_rates_of_threads_are_added() {
        let sample = |operations| Sample { operations, seconds: 2.0, latency: latencies() };
        let both = together(vec![sample(10), sample(30)]);
        assert_eq!((both.operations, both.rate()), (40, 20.0));
        assert_eq!(together(vec![sample(0)]).rate(), 0.0);
    }
}
