//! A run as tables, for a terminal and for a page.

use std::fmt::Write as _;

use crate::bench::claim::Verdict;
use crate::bench::results::Series;
use crate::bench::run::Measured;
use crate::columns::Columns;
use crate::figures;

/// Percentiles that are shown.
pub const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("max", 100.0)];
const COLUMNS: usize = 9;

/// What each column says.
fn names(measured: &Measured) -> [String; COLUMNS] {
    let subject = measured.subject().map_or("", |series| &series.target);
    let unit = measured.subject().map_or("", |series| series.unit.name());
    let [p50, p90, p99, p999, max] = PERCENTILES.map(|(name, _)| format!("{name} µs"));
    ["target".into(), unit.into(), "min–max".into(), format!("{subject} ÷ it"), p50, p90, p99, p999, max]
}

fn row(series: &Series, subject: &Series) -> [String; COLUMNS] {
    let (least, most) = series.range();
    let [p50, p90, p99, p999, max] = PERCENTILES.map(|(_, percent)| latency(series.percentile(percent)));
    let ratio = format!("{:.2}", subject.ratio_to(series));
    let range = format!("{}–{}", figure(least), figure(most));
    [series.target.clone(), figure(series.median()), range, ratio, p50, p90, p99, p999, max]
}

/// A number with the digits that say something.
fn figure(value: f64) -> String {
    if value < 1_000.0 { format!("{value:.1}") } else { figures::grouped(value.round() as u64) }
}

/// Microseconds with three digits or more.
fn latency(latency_ns: Option<u64>) -> String {
    let Some(latency_ns) = latency_ns else { return "-".into() };
    let latency_us = latency_ns as f64 / 1e3;
    match latency_us {
        us if us < 10.0 => format!("{us:.2}"),
        us if us < 100.0 => format!("{us:.1}"),
        us => figures::grouped(us.round() as u64),
    }
}

/// Whether a promise was kept, in a line.
pub fn verdict_line(verdict: &Verdict) -> String {
    match verdict.found {
        None => format!("{}: not measured", verdict.claim),
        Some(found) => {
            let met = if verdict.is_met { "met" } else { "MISSED" };
            let found = if verdict.is_factor { format!("{found:.2} ×") } else { figure(found) };
            format!("{}: {found}, {met}", verdict.claim)
        }
    }
}

/// For a terminal.
pub fn text(measured: &Measured) -> String {
    let mut text = format!("{}: {}\n", measured.case.name, measured.case.describe());
    if let Some(subject) = measured.subject() {
        let names = names(measured);
        let mut columns = Columns::new(names.each_ref().map(String::as_str));
        measured.series.iter().for_each(|series| columns.row(row(series, subject)));
        text.push_str(&columns.lines());
    }
    for line in measured.verdicts.iter().map(verdict_line).chain(measured.missing.iter().cloned()) {
        _ = writeln!(text, "  {line}");
    }
    text
}

/// For a page in Markdown.
pub fn markdown(measured: &Measured) -> String {
    let mut text = format!("## {}\n\n{}.\n\n", measured.case.name, measured.case.describe());
    if let Some(subject) = measured.subject() {
        let mut add = |cells: [String; COLUMNS]| _ = writeln!(text, "| {} |", cells.join(" | "));
        add(names(measured));
        add(std::array::from_fn(|column| if column == 0 { "---" } else { "---:" }.to_owned()));
        measured.series.iter().for_each(|series| add(row(series, subject)));
        text.push('\n');
    }
    for line in measured.verdicts.iter().map(verdict_line).chain(measured.missing.iter().cloned()) {
        _ = writeln!(text, "- {line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::claim::Claim;
    use crate::bench::results::Unit;
    use crate::bench::scenario;

    fn series(target: &str, values: &[f64], latency_ns: u64) -> Series {
        let mut series = Series::new(target, Unit::OperationsPerSecond);
        series.values = values.to_vec();
        series.latency.saturating_record_n(latency_ns, 100);
        series
    }

    fn measured() -> Measured {
        let mut case = scenario::all().flat_map(|scenario| (scenario.cases)()).next().expect("the first");
        case.load.threads = Some(2);
        let mut silent = series("memory", &[1.0, 2.0, 4.0], 1);
        silent.latency.reset();
        let series =
            vec![series("kvs-tcp", &[2e5, 3e5, 4e5], 7_890), series("redis-tcp", &[1e5; 3], 123_000), silent];
        let claims = [Claim::faster("kvs-tcp", 1.0, "redis-tcp"), Claim::faster("kvs-tcp", 1.0, "absent")];
        let verdicts = claims.iter().map(|claim| claim.judge(&series)).collect();
        Measured { case, series, verdicts, missing: vec!["absent is not here".into()] }
    }

    #[test]
    fn table_has_figures_ratios_and_verdicts() {
        let expected = "\
tcp: 50 connections from 2 threads, pipeline 1; 1,000,000 keys of 16 B, values of 32 B, 90% reads, uniform
target         ops/s          min–max  kvs-tcp ÷ it  p50 µs  p90 µs  p99 µs  p99.9 µs  max µs
  kvs-tcp    300,000  200,000–400,000          1.00    7.89    7.89    7.89      7.89    7.89
  redis-tcp  100,000  100,000–100,000          3.00     123     123     123       123     123
  memory         2.0          1.0–4.0     150000.00       -       -       -         -       -
  kvs-tcp ≥ redis-tcp: 3.00 ×, met
  kvs-tcp ≥ absent: not measured
  absent is not here
";
        assert_eq!(text(&measured()), expected);
    }

    #[test]
    fn table_in_markdown_has_a_row_for_each_target() {
        let page = markdown(&measured());
        assert!(page.contains("| kvs-tcp | 300,000 | 200,000–400,000 | 1.00 |"), "{page}");
        assert!(page.contains("\n- kvs-tcp ≥ redis-tcp: 3.00 ×, met\n"), "{page}");
    }
}
