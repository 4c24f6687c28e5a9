//! Where a thread's requests come from, and when: as fast as answers come (closed loop), or at times that are fixed in advance (open
//! loop).

use crate::bench::workload::{Generator, Operation};

/// Requests.
pub enum Source {
    /// Without end.
    Endless(Generator),
    /// Stores every key from the first to before the second, once.
    Fill(u64, u64),
}

impl Source {
    /// The next one; None when all were given.
    #[inline]
    pub fn next(&mut self) -> Option<Operation> {
        match self {
            Self::Endless(generator) => Some(generator.operation()),
            Self::Fill(next, end) => {
                let index = *next;
                *next = (index + 1).min(*end);
                (index < *end).then_some(Operation { index, is_read: false })
            }
        }
    }
}

/// The times of an open loop: one request every so often, whatever becomes of those before. What can't be sent in its time is sent as
/// soon as it can, and its latency counts from its time, so that a store that hesitates doesn't hide how many it kept waiting.
pub struct Schedule {
    interval_ns: f64,
    /// How many were sent.
    sent: u64,
    begun_ns: u64,
}

impl Schedule {
    /// So many a second, from `begun_ns` on.
    pub fn new(rate: f64, begun_ns: u64) -> Self {
        Self { interval_ns: 1e9 / rate, sent: 0, begun_ns }
    }

    /// When the next one has to be sent.
    pub fn next_ns(&self) -> u64 {
        self.begun_ns + (self.sent as f64 * self.interval_ns) as u64
    }

    /// The time of one that has to be sent by now, and is.
    pub fn take(&mut self, now_ns: u64) -> Option<u64> {
        let next_ns = self.next_ns();
        if next_ns > now_ns {
            return None;
        }
        self.sent += 1;
        Some(next_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_of_filling_gives_each_key_once() {
        let mut source = Source::Fill(3, 6);
        let indexes: Vec<u64> =
            std::iter::from_fn(|| source.next()).map(|operation| operation.index).collect();
        assert_eq!(indexes, [3, 4, 5]);
    }

    #[test]
    fn schedule_after_a_pause_gives_the_times_that_were_missed() {
        let mut schedule = Schedule::new(1e6, 500);
        assert_eq!(schedule.take(499), None);
        assert_eq!(schedule.take(500), Some(500));
        assert_eq!(schedule.take(1_000), None);
        let missed: Vec<u64> = std::iter::from_fn(|| schedule.take(4_600)).collect();
        assert_eq!(missed, [1_500, 2_500, 3_500, 4_500]);
        assert_eq!(schedule.next_ns(), 5_500);
    }
}
