//! What a scenario promises of kvs, and whether a run kept it.

use super::results::Series;

/// What is promised of one target.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The target.
    pub subject: String,
    /// Which of its figures.
    pub figure: Figure,
    /// The promise.
    pub bound: Bound,
    /// The bound is this many times the other target's figure, or just this.
    pub factor: f64,
    /// The other target.
    pub other: Option<String>,
}

/// A figure of a target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figure {
    /// Its median of all rounds.
    Median,
    /// A percentile of its latencies.
    Latency(f64),
}

/// Which side of the bound is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The bound or more.
    AtLeast,
    /// The bound or less.
    AtMost,
}

/// How a promise came out.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The promise in words.
    pub claim: String,
    /// What was found, as a factor of the other target's figure, or as it is. None when something wasn't measured.
    pub found: Option<f64>,
    /// Whether that is a factor.
    pub is_factor: bool,
    /// Whether it was kept; false when that isn't known.
    pub is_met: bool,
}

impl Claim {
    /// `subject` is at least `factor` times as fast as `other`.
    pub fn faster(subject: &str, factor: f64, other: &str) -> Self {
        let (subject, other) = (subject.to_owned(), Some(other.to_owned()));
        Self { subject, figure: Figure::Median, bound: Bound::AtLeast, factor, other }
    }

    /// `subject`'s median is at most `factor` times that of `other`.
    pub fn smaller(subject: &str, factor: f64, other: &str) -> Self {
        Self { bound: Bound::AtMost, ..Self::faster(subject, factor, other) }
    }

    /// `subject`'s latency at `percentile` is at most that of `other`.
    pub fn sooner(subject: &str, percentile: f64, other: &str) -> Self {
        Self { figure: Figure::Latency(percentile), ..Self::smaller(subject, 1.0, other) }
    }

    /// `subject`'s median is at least this.
    pub fn at_least(subject: &str, value: f64) -> Self {
        Self { other: None, ..Self::faster(subject, value, "") }
    }

    /// Holds it against what was measured.
    pub fn judge(&self, measured: &[Series]) -> Verdict {
        let found = self.find(measured);
        let is_met = found.is_some_and(|found| match self.bound {
            Bound::AtLeast => found >= self.factor,
            Bound::AtMost => found <= self.factor,
        });
        Verdict { claim: self.to_string(), found, is_factor: self.other.is_some(), is_met }
    }

    fn find(&self, measured: &[Series]) -> Option<f64> {
        let named = |name: &str| measured.iter().find(|series| series.target == name);
        let subject = named(&self.subject)?;
        let Some(other) = &self.other else { return Some(subject.median()) };
        let other = named(other)?;
        match self.figure {
            Figure::Median => Some(subject.ratio_to(other)),
            Figure::Latency(percent) => {
                Some(subject.percentile(percent)? as f64 / other.percentile(percent)? as f64)
            }
        }
    }
}

impl std::fmt::Display for Claim {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.subject)?;
        if let Figure::Latency(percent) = self.figure {
            write!(formatter, " p{percent}")?;
        }
        formatter.write_str(if self.bound == Bound::AtLeast { " ≥ " } else { " ≤ " })?;
        match &self.other {
            Some(other) if self.factor == 1.0 => formatter.write_str(other),
            Some(other) => write!(formatter, "{} × {other}", self.factor),
            None => write!(formatter, "{}", self.factor),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a verdict is what the figures say. Method: series with plain figures.

    use super::*;
    use crate::bench::results::Unit;

    fn series(target: &str, rate: f64, latency_ns: u64) -> Series {
        let mut series = Series::new(target, Unit::OperationsPerSecond);
        series.values = vec![rate; 3];
        series.latency.saturating_record_n(latency_ns, 10);
        series
    }

    #[test]
    fn claim_verdicts_follow_the_figures() {
        let measured = [series("kvs", 300.0, 1_000), series("other", 100.0, 2_000)];
        for (claim, text, is_met) in [
            (Claim::faster("kvs", 3.0, "other"), "kvs ≥ 3 × other", true),
            (Claim::faster("kvs", 3.1, "other"), "kvs ≥ 3.1 × other", false),
            (Claim::faster("kvs", 1.0, "other"), "kvs ≥ other", true),
            (Claim::smaller("other", 0.7, "kvs"), "other ≤ 0.7 × kvs", true),
            (Claim::sooner("kvs", 99.9, "other"), "kvs p99.9 ≤ other", true),
            (Claim::sooner("other", 50.0, "kvs"), "other p50 ≤ kvs", false),
            (Claim::at_least("kvs", 20_000.0), "kvs ≥ 20000", false),
        ] {
            let verdict = claim.judge(&measured);
            assert_eq!((verdict.claim.as_str(), verdict.is_met), (text, is_met));
            assert!(verdict.found.is_some());
        }
    }

    #[test]
    fn claim_about_what_was_not_measured_is_not_met() {
        let verdict = Claim::faster("kvs", 1.0, "absent").judge(&[series("kvs", 1.0, 1)]);
        assert_eq!((verdict.found, verdict.is_met), (None, false));
    }
}
