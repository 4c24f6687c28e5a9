//! `check`: verifies every invariant of a segment, server or not.

use anyhow::anyhow;
use kvs_core::check::{self, Report};
use serde_json::{Value, json};

use crate::figures::{counted, rounded};
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Verifies the segment.
pub fn run(target: &Target, format: Format) -> anyhow::Result<Outcome> {
    let name = target.name_for("check")?;
    let path = name.segment_path();
    let report = check::check(&path)?;
    let shown = path.display().to_string();
    match format {
        Format::Text => output::print(text(&shown, &report).as_bytes())?,
        Format::Json => output::print_json(&object(&shown, &report))?,
    }
    if report.fault_count == 0 {
        return Ok(Outcome::Done);
    }
    Err(anyhow!(
        "segment {shown} has {}, as listed; save what can be read with `kvs-tools --name {name} export`, then quit, \
         purge and import",
        counted(report.fault_count, "fault", "faults")
    ))
}

fn text(path: &str, report: &Report) -> String {
    let mut text = String::new();
    for fault in &report.faults {
        text.push_str(&format!("{fault}\n"));
    }
    let untold = report.fault_count - report.faults.len() as u64;
    if untold > 0 {
        text.push_str(&format!("and {untold} more\n"));
    }
    let verdict = match report.fault_count {
        0 => "sound".to_owned(),
        count => counted(count, "fault", "faults"),
    };
    let served = if report.served { ", checked while it is served" } else { "" };
    text.push_str(&format!(
        "{path}: {verdict}; {}, {} of content, {}, {}{served}\n",
        counted(report.entries, "entry", "entries"),
        rounded(report.content_bytes),
        counted(report.extents, "extent of 2 MiB", "extents of 2 MiB"),
        counted(report.connections, "connection", "connections"),
    ));
    if report.intents > 0 {
        let changes = counted(report.intents, "decided change", "decided changes");
        text.push_str(&format!("{changes} of a killed data server will be completed by the next start\n"));
    }
    text
}

fn object(path: &str, report: &Report) -> Value {
    json!({
        "segment": path,
        "sound": report.fault_count == 0,
        "served": report.served,
        "entries": report.entries,
        "content_bytes": report.content_bytes,
        "extents": report.extents,
        "connections": report.connections,
        "sessions": report.sessions,
        "pending_intents": report.intents,
        "fault_count": report.fault_count,
        "faults": report.faults,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_text_tells_the_faults_before_the_verdict() {
        let mut report = Report { entries: 1, content_bytes: 2048, extents: 3, ..Report::default() };
        let sound =
            "/dev/shm/kvs-a: sound; 1 entry, 2.00 KiB of content, 3 extents of 2 MiB, 0 connections\n";
        assert_eq!(text("/dev/shm/kvs-a", &report), sound);
        report.faults = vec!["shard 3: something".into()];
        report.fault_count = 5;
        report.intents = 1;
        let lines = text("/dev/shm/kvs-a", &report);
        assert!(lines.starts_with("shard 3: something\nand 4 more\n/dev/shm/kvs-a: 5 faults; "), "{lines}");
        assert!(
            lines.ends_with("1 decided change of a killed data server will be completed by the next start\n")
        );
        assert_eq!(object("x", &report)["sound"], false);
    }
}
