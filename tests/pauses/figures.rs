//! Rows of figures: a table for people, CSV with every sample for programs.

use std::fmt::Write as _;
use std::time::Duration;

use super::watch::Gaps;

/// What was measured of one store in one situation.
pub struct Row {
    /// Which store, and how it was started.
    pub store: String,
    /// Who was killed.
    pub victim: &'static str,
    /// How many entries it had.
    pub entries: u64,
    /// How many connections there were.
    pub connections: usize,
    /// The longest gaps around each kill.
    pub gaps: Vec<Gaps>,
    /// Those in as long a time without a kill.
    pub calm: Vec<Gaps>,
    /// Connections that were lost, over all kills.
    pub connections_lost: u64,
    /// Keys that were lost, at the worst kill.
    pub keys_lost: u64,
}

/// The head of the table.
pub fn heading() -> String {
    "| store | killed | entries | connections | kills | median | p99 | longest | of the take-over itself: median | without a kill: median | p99 | connections lost | keys lost |\n\
     |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        .into()
}

impl Row {
    /// The row of the table.
    pub fn line(&self) -> String {
        let of = |samples: Vec<Duration>, part: f64| {
            percentile(samples, part).map_or_else(|| "–".into(), readable)
        };
        let longest = |gaps: &[Gaps], part: f64| of(gaps.iter().map(|gaps| gaps.longest).collect(), part);
        let first = self.gaps.iter().map(|gaps| gaps.first).collect();
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.store,
            self.victim,
            grouped(self.entries),
            grouped(self.connections as u64),
            self.gaps.len(),
            longest(&self.gaps, 0.5),
            longest(&self.gaps, 0.99),
            longest(&self.gaps, 1.0),
            of(first, 0.5),
            longest(&self.calm, 0.5),
            longest(&self.calm, 0.99),
            grouped(self.connections_lost),
            grouped(self.keys_lost),
        )
    }

    /// A line of CSV for each sample.
    pub fn csv(&self) -> String {
        let mut text = String::new();
        for (kind, samples) in [("kill", &self.gaps), ("calm", &self.calm)] {
            for gap in samples {
                let Row { store, victim, entries, connections, .. } = self;
                let [longest, began, first] =
                    [gap.longest, gap.began, gap.first].map(|gap| gap.as_secs_f64() * 1e6);
                _ = writeln!(
                    text,
                    "\"{store}\",{victim},{entries},{connections},{kind},{longest:.1},{began:.1},{first:.1}"
                );
            }
        }
        text
    }
}

/// The columns of [`Row::csv`].
pub const CSV_HEADING: &str =
    "store,killed,entries,connections,window,longest_gap_us,began_us,first_gap_us\n";

/// The sample below which that part of all is, the nearest one from above.
fn percentile(mut sorted: Vec<Duration>, part: f64) -> Option<Duration> {
    sorted.sort_unstable();
    let rank = (sorted.len() as f64 * part).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied()
}

/// A time with three digits.
pub fn readable(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    let (figure, unit) = match us {
        us if us < 1e3 => (us, "µs"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    let decimals = if figure < 10.0 { 2 } else { usize::from(figure < 100.0) };
    format!("{figure:.decimals$} {unit}")
}

/// A number with commas between thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
