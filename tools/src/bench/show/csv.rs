//! Raw data as comma-separated values: no name has a comma in it.

use std::fmt::Write as _;

use crate::bench::run::Run;

/// Steps of the latency curve for each halving of what is above.
const STEPS_PER_HALF: u32 = 4;

/// A line for each round of each target.
pub fn rounds(run: &Run) -> String {
    let mut text = String::from("case,target,unit,round,value\n");
    for measured in &run.cases {
        for series in &measured.series {
            for (round, value) in (1..).zip(&series.values) {
                let (case, target, unit) = (&measured.case.name, &series.target, series.unit.name());
                _ = writeln!(text, "{case},{target},{unit},{round},{value:.1}");
            }
        }
    }
    text
}

/// The distribution of latencies of all rounds together.
pub fn latencies(run: &Run) -> String {
    let mut text = String::from("case,target,percentile,latency_ns,count_up_to\n");
    for measured in &run.cases {
        for series in &measured.series {
            let mut count = 0;
            for step in series.latency.iter_quantiles(STEPS_PER_HALF) {
                count += step.count_since_last_iteration();
                let (case, target) = (&measured.case.name, &series.target);
                let (percentile, latency_ns) = (step.percentile(), step.value_iterated_to());
                _ = writeln!(text, "{case},{target},{percentile:.5},{latency_ns},{count}");
            }
        }
    }
    text
}
