//! A progress bar on standard error, when that is a terminal; nothing else is drawn there meanwhile.

use std::fmt::Write;
use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::figures;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Entries of the store.
    Entries,
    /// Bytes of a file.
    Bytes,
}

/// A bar that is gone when this is dropped, so that what is said then stands alone.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar to `total`, or a mere sign of life when that is not known.
    pub fn new(total: Option<u64>, unit: Unit) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::hidden();
        }
        let template = match (total, unit) {
            (Some(_), Unit::Entries) => {
                "{bar:40} {percent:>3}%  {human_pos} of {human_len} entries, {rate}, {eta} left"
            }
            (Some(_), Unit::Bytes) => {
                "{bar:40} {percent:>3}%  {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left"
            }
            (None, Unit::Entries) => "{spinner} {human_pos} entries, {rate}",
            (None, Unit::Bytes) => "{spinner} {binary_bytes}, {binary_bytes_per_sec}",
        };
        let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(bar.with_style(style.with_key("rate", show_rate)))
    }

    /// A bar of steps that take equally long, with room for what is being done.
    pub fn steps(total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::hidden();
        }
        let style = ProgressStyle::with_template("{bar:40} {percent:>3}%  {msg}");
        Self(ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// What is being done.
    pub fn say(&self, what: String) {
        self.0.set_message(what);
    }

    /// One step more is done.
    pub fn step(&self) {
        self.0.inc(1);
    }

    /// No bar at all.
    pub fn hidden() -> Self {
        Self(ProgressBar::hidden())
    }

    /// So much is done.
    pub fn set(&self, position: u64) {
        self.0.set_position(position);
    }
}

/// Entries a second; nobody wants fractions of one.
fn show_rate(state: &ProgressState, to: &mut dyn Write) {
    // A bar without its rate is still one.
    let _ = write!(to, "{}/s", figures::grouped(state.per_sec() as u64));
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
