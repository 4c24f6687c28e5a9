//! A client in a closed loop that notes its longest gap between two answers, window by window.
//!
//! Invariant: a gap belongs to the window in which it ends. The window of a kill is opened before the signal is sent, so the gap that
//! the kill is in belongs to it.

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::speak::{Answer, Speak, Wire};

/// How long anything may take before the measurement is given up.
const PATIENCE: Duration = Duration::from_secs(300);
/// A gap that begins within this time from a kill on is that of the take-over itself, not of what is done behind the scenes later.
const TAKE_OVER: Duration = Duration::from_millis(1);

/// The longest gaps of a window.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gaps {
    /// Of all.
    pub longest: Duration,
    /// When that began, from the opening of the window on.
    pub began: Duration,
    /// Of those that began by its first millisecond.
    pub first: Duration,
}

/// What a client and whoever kills share.
#[derive(Default)]
pub struct Watch {
    over: AtomicBool,
    window: AtomicU64,
    /// When that was opened.
    opened: Mutex<Option<Instant>>,
    answers: AtomicU64,
    /// Connections that were lost.
    lost: AtomicU64,
    /// Answers that the key is gone.
    missing: AtomicU64,
    /// The longest gaps of each window.
    gaps: Mutex<Vec<Gaps>>,
    fault: Mutex<Option<String>>,
}

/// One answer, for pictures.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// When it came.
    pub at: Instant,
    /// How long after the request.
    pub took: Duration,
}

impl Watch {
    /// Asks until it is over, and reconnects as fast as it can when the connection is lost. What it finds wrong is kept as a fault. With
    /// `points`, every answer is noted there.
    pub fn run(&self, speak: Speak, address: SocketAddr, points: Option<&mut Vec<Point>>) {
        if let Err(error) = self.run_until_over(speak, address, points) {
            *self.fault.lock().expect("nobody panics with it") = Some(error.to_string());
        }
    }

    fn run_until_over(
        &self,
        speak: Speak,
        address: SocketAddr,
        mut points: Option<&mut Vec<Point>>,
    ) -> io::Result<()> {
        let mut wire = Wire::connect(speak, address)?;
        let (mut window, mut gaps, mut number) = (0, Gaps::default(), None);
        let mut opened = Instant::now();
        let mut last = Instant::now();
        while !self.over.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let lost = self.ask_until_answered(speak, address, &mut wire, &mut number)?;
            let now = Instant::now();
            if let Some(points) = &mut points {
                points.push(Point { at: now, took: now - asked });
            }
            self.lost.fetch_add(lost, Ordering::Relaxed);
            let current = self.window.load(Ordering::Acquire);
            if current != window {
                self.note(window, gaps);
                (window, gaps) = (current, Gaps::default());
                opened = self.opened().unwrap_or(now);
            }
            if now - last > gaps.longest {
                (gaps.longest, gaps.began) = (now - last, last.saturating_duration_since(opened));
            }
            if last < opened + TAKE_OVER {
                gaps.first = gaps.first.max(now - last);
            }
            last = now;
            self.answers.fetch_add(1, Ordering::Release);
        }
        self.note(window, gaps);
        Ok(())
    }

    /// Asks once, again and again over new connections if need be; returns how many connections were lost.
    fn ask_until_answered(
        &self,
        speak: Speak,
        address: SocketAddr,
        wire: &mut Wire,
        number: &mut Option<i64>,
    ) -> io::Result<u64> {
        let (mut lost, end) = (0, Instant::now() + PATIENCE);
        let mut connected = true;
        loop {
            match wire.increment() {
                Ok(Answer::Number(found)) => {
                    // Without a lost connection each increment was done once. With one, it is not known.
                    if number.is_some_and(|before| found <= before || (lost == 0 && found != before + 1)) {
                        return Err(io::Error::other(format!("{found} came after {number:?}")));
                    }
                    *number = Some(found);
                    return Ok(lost);
                }
                Ok(Answer::Missing) => {
                    self.missing.fetch_add(1, Ordering::Relaxed);
                    wire.set_counter()?;
                    *number = None;
                    return Ok(lost);
                }
                Ok(Answer::Later) => {}
                Err(_) => {
                    lost += u64::from(connected);
                    connected = false;
                    if let Ok(new) = Wire::connect(speak, address) {
                        (*wire, connected) = (new, true);
                    }
                }
            }
            if Instant::now() > end {
                return Err(io::Error::other(format!("no answer within {PATIENCE:?}")));
            }
        }
    }

    fn note(&self, window: u64, gaps: Gaps) {
        let mut all = self.gaps.lock().expect("nobody panics with it");
        let length = all.len().max(window as usize + 1);
        all.resize(length, Gaps::default());
        all[window as usize] = gaps;
    }

    fn opened(&self) -> Option<Instant> {
        *self.opened.lock().expect("nobody panics with it")
    }

    /// Opens the next window and returns its number.
    pub fn open_window(&self) -> u64 {
        *self.opened.lock().expect("nobody panics with it") = Some(Instant::now());
        self.window.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Waits until `least` has passed since `start` and the client has had some answers since.
    pub fn await_answers(&self, start: Instant, least: Duration) {
        std::thread::sleep(least.saturating_sub(start.elapsed()));
        let before = self.answers.load(Ordering::Acquire);
        while self.answers.load(Ordering::Acquire) < before + 3 && !self.has_failed() {
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn has_failed(&self) -> bool {
        self.fault.lock().expect("nobody panics with it").is_some()
    }

    /// Gives the measurement up when the client has.
    ///
    /// # Errors
    /// What it found wrong.
    pub fn check(&self) -> anyhow::Result<()> {
        match &*self.fault.lock().expect("nobody panics with it") {
            Some(fault) => anyhow::bail!("the client: {fault}"),
            None => Ok(()),
        }
    }

    /// Connections lost so far.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The flag that ends it.
    pub fn over(&self) -> &AtomicBool {
        &self.over
    }

    /// What the client has found: the longest gaps of each window.
    ///
    /// # Errors
    /// What it found wrong.
    pub fn into_gaps(self) -> anyhow::Result<Vec<Gaps>> {
        self.check()?;
        Ok(self.gaps.into_inner().expect("nobody panics with it"))
    }
}
