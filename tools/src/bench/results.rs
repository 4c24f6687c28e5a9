//! What was measured, and what follows from it: medians, spread, ratios.

use hdrhistogram::Histogram;

/// Longest latency that is told apart, in nanoseconds: a minute. Longer ones count as that.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// Digits of a latency that are kept.
const LATENCY_DIGITS: u8 = 3;

/// One round of one target.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Requests answered.
    pub operations: u64,
    /// In this time.
    pub seconds: f64,
    /// How long each took, in nanoseconds. Empty where single requests are too short for a clock.
    pub latency: Histogram<u64>,
}

impl Sample {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds
    }
}

/// A histogram of latencies in nanoseconds, the same for all so that they can be added; record with `saturating_record`.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, LATENCY_DIGITS).expect("the bounds are sound")
}

/// What a number of a target counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Operations a second: more is better.
    OperationsPerSecond,
    /// Connections made a second: more is better.
    ConnectionsPerSecond,
    /// Bytes of memory an entry: less is better.
    BytesPerEntry,
}

impl Unit {
    /// For tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::OperationsPerSecond => "ops/s",
            Self::ConnectionsPerSecond => "connections/s",
            Self::BytesPerEntry => "bytes/entry",
        }
    }
}

/// All rounds of one target.
#[derive(Debug, Clone)]
pub struct Series {
    /// Name of the target.
    pub target: String,
    /// What the values count.
    pub unit: Unit,
    /// One value a round.
    pub values: Vec<f64>,
    /// Latencies of all rounds together, in nanoseconds; empty when there were none.
    pub latency: Histogram<u64>,
}

impl Series {
    /// Of a target that was not measured yet.
    pub fn new(target: &str, unit: Unit) -> Self {
        Self { target: target.to_owned(), unit, values: Vec::new(), latency: latencies() }
    }

    /// Adds a round.
    pub fn add(&mut self, sample: &Sample) {
        self.values.push(sample.rate());
        self.latency += &sample.latency;
    }

    /// The median of the rounds.
    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    /// The least and the most of the rounds.
    pub fn range(&self) -> (f64, f64) {
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (least, most)
    }

    /// How far a round is from the median, in the median.
    pub fn deviation(&self) -> f64 {
        let middle = self.median();
        median(&self.values.iter().map(|value| (value - middle).abs()).collect::<Vec<_>>())
    }

    /// The median of the ratios to another target, round by round: what slows the machine for a while slows both.
    pub fn ratio_to(&self, other: &Self) -> f64 {
        let pairs = self.values.iter().zip(&other.values);
        median(&pairs.map(|(own, others)| own / others).collect::<Vec<_>>())
    }

    /// A percentile of the latencies, in nanoseconds; none when there are no latencies.
    pub fn percentile(&self, percent: f64) -> Option<u64> {
        (!self.latency.is_empty()).then(|| self.latency.value_at_percentile(percent))
    }
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the figures of a table are what the rounds say. Method: rounds whose figures are plain.

    use super::*;

    fn series(values: &[f64]) -> Series {
        Series { values: values.to_vec(), ..Series::new("target", Unit::OperationsPerSecond) }
    }

    #[test]
    fn results_median_is_the_middle_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn results_spread_is_range_and_median_deviation() {
        let series = series(&[10.0, 11.0, 9.0, 50.0, 10.5]);
        assert_eq!(series.range(), (9.0, 50.0));
        assert_eq!((series.median(), series.deviation()), (10.5, 0.5));
    }

    #[test]
    fn results_ratio_is_taken_round_by_round() {
        // The machine was half as fast in the last two rounds, for both.
        let (own, other) = (series(&[20.0, 10.0, 10.0]), series(&[10.0, 5.0, 5.0]));
        assert_eq!(own.ratio_to(&other), 2.0);
    }

    #[test]
    fn results_latencies_of_rounds_are_added() {
        let mut series = series(&[]);
        assert_eq!(series.percentile(50.0), None);
        for latency_ns in [1_000, 2_000, 3_000] {
            let mut latency = latencies();
            latency.saturating_record_n(latency_ns, 10);
            series.add(&Sample { operations: 10, seconds: 0.5, latency });
        }
        assert_eq!(series.values, [20.0, 20.0, 20.0]);
        let percentile = series.percentile(50.0).expect("latencies");
        assert!((2_000..2_002).contains(&percentile), "{percentile}");
    }

    #[test]
    fn results_latency_beyond_all_bounds_counts_as_the_longest() {
        let mut latency = latencies();
        latency.saturating_record(u64::MAX);
        assert!(latency.max() >= LATENCY_NS_MAX);
    }
}
