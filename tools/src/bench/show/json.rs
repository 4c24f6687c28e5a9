//! A run for programs.

use serde_json::{Map, Value, json};

use super::machine::Facts;
use super::table::PERCENTILES;
use crate::bench::claim::Verdict;
use crate::bench::results::Series;
use crate::bench::run::{Measured, Run};
use crate::bench::scenario::{Kind, Persistence};

/// The document.
pub fn document(run: &Run, facts: &Facts) -> Value {
    json!({
        "command": run.command,
        "begun_unix_seconds": run.begun,
        "rounds": run.rounds,
        "duration_seconds": run.duration.as_secs_f64(),
        "warm_up_seconds": run.warm_up.as_secs_f64(),
        "machine": object(&facts.machine),
        "versions": object(&facts.versions),
        "cases": run.cases.iter().map(case).collect::<Vec<_>>(),
    })
}

fn object(facts: &[(&'static str, String)]) -> Value {
    facts
        .iter()
        .map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str())))
        .collect::<Map<_, _>>()
        .into()
}

fn case(measured: &Measured) -> Value {
    let (case, workload, load) = (&measured.case, &measured.case.workload, &measured.case.load);
    let persistence = match case.persistence {
        Persistence::Usual => "usual",
        Persistence::EverySecond => "everysec",
        Persistence::Always => "always",
    };
    let keys_at_once = if let Kind::InProcess(reads) = case.kind { Some(reads.batch) } else { None };
    json!({
        "name": case.name,
        "about": case.describe(),
        "keys": workload.keys,
        "key_bytes": workload.key_bytes,
        "value_bytes": workload.value_bytes,
        "read_share": workload.read_share,
        "distribution": workload.distribution.to_string(),
        "seed": workload.seed,
        "connections": load.connections,
        "pipeline": load.pipeline,
        "threads": case.thread_count(),
        "keys_at_once": keys_at_once,
        "rate": load.rate,
        "persistence": persistence,
        "targets": measured.series.iter().map(|series| target(series, measured)).collect::<Vec<_>>(),
        "claims": measured.verdicts.iter().map(claim).collect::<Vec<_>>(),
        "missing": measured.missing,
    })
}

fn target(series: &Series, measured: &Measured) -> Value {
    let (least, most) = series.range();
    let latency: Map<String, Value> = PERCENTILES
        .iter()
        .filter_map(|(name, percent)| Some(((*name).to_owned(), series.percentile(*percent)?.into())))
        .collect();
    let ratio = |other: &Series| (other.target.clone(), series.ratio_to(other).into());
    let ratios: Map<String, Value> = measured.series.iter().map(ratio).collect();
    json!({
        "target": series.target,
        "unit": series.unit.name(),
        "median": series.median(),
        "min": least,
        "max": most,
        "median_absolute_deviation": series.deviation(),
        "values": series.values,
        "latency_ns": latency,
        "ratio_to": ratios,
    })
}

fn claim(verdict: &Verdict) -> Value {
    json!({ "claim": verdict.claim, "found": verdict.found, "met": verdict.is_met })
}
