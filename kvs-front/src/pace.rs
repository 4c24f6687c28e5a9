//! How soon the next server may be launched, in the place of one that died.
//!
//! One that served and died is replaced at once: that is the promise. Two things are kept from eating the machine: a
//! server that can't start is tried again after pauses that grow, and one that starts and soon dies, again and
//! again, at most [`LAUNCHES_PER_SECOND`] times a second once a first [`LAUNCHES_AT_ONCE`] are spent.

use std::time::{Duration, Instant};

/// First pause after a server could not start.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Failures in a row that are put down to bad luck, such as being killed while starting.
const FAILURES_FREE: u32 = 2;
/// Launches in a row without a pause.
const LAUNCHES_AT_ONCE: f64 = 100.0;
/// How fast spent launches come back.
const LAUNCHES_PER_SECOND: f64 = 50.0;

/// The pace of launches.
pub struct Pace {
    failures: u32,
    launches: f64,
    counted: Instant,
}

impl Pace {
    /// Of a store that starts now.
    pub fn new(now: Instant) -> Self {
        Self { failures: 0, launches: LAUNCHES_AT_ONCE, counted: now }
    }

    /// A server has become ready.
    pub fn ready(&mut self) {
        self.failures = 0;
    }

    /// A server could not start.
    pub fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }

    /// A launch is due; how long to wait with it.
    pub fn pause(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.counted = now;
        self.launches = (self.launches + passed * LAUNCHES_PER_SECOND).min(LAUNCHES_AT_ONCE) - 1.0;
        let crowded = Duration::from_secs_f64((-self.launches).max(0.0) / LAUNCHES_PER_SECOND);
        crowded.max(self.failure_pause())
    }

    fn failure_pause(&self) -> Duration {
        match self.failures.saturating_sub(FAILURES_FREE) {
            0 => Duration::ZERO,
            count => PAUSE_MIN.saturating_mul(1 << (count - 1).min(20)).min(PAUSE_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_pauses_grow_with_failures_and_end_with_success() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert_eq!(pace.pause(now), Duration::ZERO);
        let pauses: Vec<Duration> = (0..30)
            .map(|_| {
                pace.failed();
                pace.pause(now)
            })
            .collect();
        assert_eq!(pauses[..4], [Duration::ZERO, Duration::ZERO, PAUSE_MIN, PAUSE_MIN * 2]);
        assert!(pauses.is_sorted() && pauses.last() == Some(&PAUSE_MAX));
        pace.ready();
        assert_eq!(pace.pause(now), Duration::ZERO);
    }

    #[test]
    fn pace_many_launches_are_spread() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let pauses: Vec<Duration> = (0..300)
            .map(|_| {
                now += Duration::from_millis(1);
                let pause = pace.pause(now);
                now += pause;
                pause
            })
            .collect();
        assert!(pauses[..100].iter().all(Duration::is_zero));
        assert_eq!(pauses[200..].iter().map(|pause| pause.as_millis() / 5).max(), Some(3), "{pauses:?}");
        now += Duration::from_secs(10);
        assert_eq!(pace.pause(now), Duration::ZERO);
    }
}
