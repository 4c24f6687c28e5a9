//! What clients and whoever kills know of each other: whether it goes on, how many kills there were, how many answers.
//!
//! Invariant: the first fault ends the storm, so that the last kills told with it are those around it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest a client waits for the next kill.
const KILL_PATIENCE: Duration = Duration::from_millis(200);

/// Shared by all threads of a storm.
pub struct Weather {
    begun: Instant,
    over: AtomicBool,
    kills: AtomicU64,
    answers: AtomicU64,
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    kills: Vec<String>,
    whole_after_max: Duration,
    faults: Vec<String>,
}

impl Weather {
    /// Before the first kill.
    pub fn new() -> Self {
        Self {
            begun: Instant::now(),
            over: AtomicBool::new(false),
            kills: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            notes: Mutex::default(),
        }
    }

    /// Whether clients are to finish what they began and leave.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Lets everybody finish.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// What [`end`](Self::end) sets, for whoever only knows a flag.
    pub fn over(&self) -> &AtomicBool {
        &self.over
    }

    /// Counts answers that were right.
    pub fn answered(&self, count: u64) {
        self.answers.fetch_add(count, Ordering::Relaxed);
    }

    /// Where answers are counted.
    pub fn answers(&self) -> &AtomicU64 {
        &self.answers
    }

    /// How many processes were killed.
    pub fn kills(&self) -> u64 {
        self.kills.load(Ordering::Relaxed)
    }

    /// Notes a kill; before the signal is sent, so that a fault is never older than its cause.
    pub fn killing(&self, whom: String) {
        self.note(|notes| &mut notes.kills, whom);
        self.kills.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes how long it took until the store was whole again.
    pub fn whole_again(&self, after: Duration) {
        let mut notes = self.notes.lock().expect("nobody panics with the notes");
        notes.whole_after_max = notes.whole_after_max.max(after);
    }

    /// What there was, in one line.
    pub fn summary(&self) -> String {
        let notes = self.notes.lock().expect("nobody panics with the notes");
        format!(
            "{} kills in {:.1} s, {} right answers, the store was whole again after {:?} at most",
            self.kills(),
            self.begun.elapsed().as_secs_f64(),
            self.answers.load(Ordering::Relaxed),
            notes.whole_after_max
        )
    }

    /// Notes what a client has suffered, and ends the storm.
    pub fn fault(&self, fault: String) {
        self.note(|notes| &mut notes.faults, fault);
        self.end();
    }

    fn note(&self, which: impl FnOnce(&mut Notes) -> &mut Vec<String>, what: String) {
        let at = self.begun.elapsed();
        let mut notes = self.notes.lock().expect("nobody panics with the notes");
        which(&mut notes).push(format!("{:12.6} s  {what}", at.as_secs_f64()));
    }

    /// Lets a kill pass, so that what a client has half done is half done when it happens.
    pub fn await_kill(&self) {
        let (before, end) = (self.kills(), Instant::now() + KILL_PATIENCE);
        while self.kills() == before && !self.is_over() && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    /// Nothing went wrong.
    ///
    /// # Panics
    /// When something did, with the kills before it.
    pub fn assert_fair(&self) {
        let notes = self.notes.lock().expect("nobody panics with the notes");
        let last = &notes.kills[notes.kills.len().saturating_sub(25)..];
        assert!(
            notes.faults.is_empty(),
            "{} faults after {} kills\nfaults:\n{}\nthe last kills:\n{}",
            notes.faults.len(),
            notes.kills.len(),
            notes.faults.join("\n"),
            last.join("\n")
        );
    }
}
