//! `check --backup`: verifies every record of a backup file, also of one that a running store writes.
//!
//! Nothing is changed and nothing locked: the file is read up to the length it had at first. What lies behind the last mark that
//! says "synced" and is not whole is a torn end, or a batch on its way; what lies before it is damage.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::BuildHasher as _;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use kvs_core::backup::disk::{DiskFile, SystemDisk};
use kvs_core::backup::record::{FileHeader, HeaderError, Kind};
use kvs_core::backup::scan::Sound;
use kvs_core::backup::survey::{self, Gap, Survey};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::figures::{counted, grouped, rounded};
use crate::output::{self, Format, Outcome};
use crate::progress::{Progress, Unit};

/// Bytes between two moves of the progress bar.
const BAR_STEP: u64 = 8 << 20;

/// Verifies the backup file at `path`.
pub fn run(path: &Path, format: Format) -> anyhow::Result<Outcome> {
    let report = examine(path)?;
    let shown = path.display().to_string();
    match format {
        Format::Text => output::print(text(&shown, &report).as_bytes())?,
        Format::Json => output::print_json(&object(&shown, &report))?,
    }
    if report.faults() == 0 {
        return Ok(Outcome::Done);
    }
    Err(anyhow!(
        "backup file {shown} has {}, as listed; `kvs-tools check --backup {shown} --salvage FILE` writes all that is sound to a new \
         file",
        counted(report.faults(), "fault", "faults")
    ))
}

/// A backup file, open for reading.
pub struct Opened {
    /// The file.
    pub file: Box<dyn DiskFile>,
    /// Who it is.
    pub header: FileHeader,
    /// What is wrong with its first bytes all the same.
    pub header_fault: Option<HeaderError>,
    /// Its length when it was opened.
    pub length: u64,
}

/// Opens the backup file at `path`.
pub fn open(path: &Path) -> anyhow::Result<Opened> {
    let cannot = || format!("can't read {}", path.display());
    let file = SystemDisk.open_to_read(path).with_context(cannot)?;
    let file = file.ok_or_else(|| anyhow!("there is no file {}", path.display()))?;
    let length = file.length().with_context(cannot)?;
    if length == 0 {
        return Err(anyhow!(
            "{} is empty: a store that is started with it begins with no entries",
            path.display()
        ));
    }
    let identified = survey::identify(&*file).with_context(cannot)?;
    let (header, header_fault) =
        identified.map_err(|error| anyhow!("{} can't be verified: at byte 0, {error}", path.display()))?;
    Ok(Opened { file, header, header_fault, length })
}

/// What is in a backup file.
struct Report {
    header: FileHeader,
    header_fault: Option<HeaderError>,
    survey: Survey,
    content: Content,
    /// Where the torn end begins, its bytes, and the whole records in it.
    torn: Option<(u64, u64, u64)>,
    /// The torn end is a batch that a running store is writing.
    in_use: bool,
}

impl Report {
    fn faults(&self) -> u64 {
        let behind = self.survey.gaps.len() - self.survey.damage().count();
        self.survey.gap_count - behind as u64 + u64::from(self.header_fault.is_some())
    }
}

fn examine(path: &Path) -> anyhow::Result<Report> {
    let Opened { file, header, header_fault, length } = open(path)?;
    let (mut survey, mut content) = look(&*file, &header, length)?;
    let torn = survey.torn.map(|(from, records)| (from, length - from, records));
    if let Some((from, _, 1..)) = torn {
        // What is behind it is cut off by the next start: it does not count.
        (survey, content) = look(&*file, &header, from)?;
    }
    let in_use = torn.is_some() && is_locked(path);
    Ok(Report { header, header_fault, survey, content, torn, in_use })
}

fn look(file: &dyn DiskFile, header: &FileHeader, end: u64) -> anyhow::Result<(Survey, Content)> {
    let progress = Progress::new(Some(end), Unit::Bytes);
    let (mut content, mut shown) = (Content::default(), 0);
    let survey = survey::survey(file, header, end, &mut |at, record| {
        content.take(record);
        if at > shown + BAR_STEP {
            shown = at;
            progress.set(at);
        }
    })?;
    Ok((survey, content))
}

/// Whether a store has the file: it keeps its lock. Taken for a moment; a store that is just starting tries again.
fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
}

/// Which entries the records make, by the hashes of their keys.
#[derive(Default)]
struct Content {
    latest: HashMap<u64, (u64, Option<u64>)>,
    hasher: RandomState,
}

impl Content {
    fn take(&mut self, record: &Sound<'_>) {
        let (version, bytes) = match record.header.kind {
            Kind::Synced => return,
            Kind::Delete => (record.header.version, None),
            Kind::Set => (record.header.version, Some((record.key().len() + record.value().len()) as u64)),
        };
        let latest = self.latest.entry(self.hasher.hash_one(record.key())).or_insert((version, bytes));
        if version > latest.0 {
            *latest = (version, bytes);
        }
    }

    fn entries(&self) -> u64 {
        self.latest.values().filter(|(_, bytes)| bytes.is_some()).count() as u64
    }

    fn bytes(&self) -> u64 {
        self.latest.values().filter_map(|(_, bytes)| *bytes).sum()
    }
}

/// A fault, for people.
pub fn told(gap: &Gap) -> String {
    let lost = match gap.records_lost {
        Some(count) => format!("{} missing", counted(count, "record is", "records are")),
        None => "what was there is not known".into(),
    };
    match gap.to - gap.from {
        0 => format!("byte {}: {lost} before the record there", gap.from),
        bytes => {
            format!("byte {}: {} no sound record; {lost}", gap.from, counted(bytes, "byte is", "bytes are"))
        }
    }
}

fn text(path: &str, report: &Report) -> String {
    let mut text = String::new();
    if let Some(fault) = report.header_fault {
        text.push_str(&format!("byte 0: {fault}\n"));
    }
    for gap in report.survey.damage() {
        text.push_str(&format!("{}\n", told(gap)));
    }
    let untold = report.survey.gap_count - report.survey.gaps.len() as u64;
    if untold > 0 {
        text.push_str(&format!("and {untold} more\n"));
    }
    let verdict = match report.faults() {
        0 => "sound".to_owned(),
        count => counted(count, "fault", "faults"),
    };
    let survey = &report.survey;
    text.push_str(&format!(
        "{path}: {verdict}; file {} of its line, {} ({}), {}, {} of content, {}, known to be synced up to byte {}\n",
        report.header.generation,
        counted(survey.sets + survey.deletes, "record", "records"),
        counted(survey.deletes, "delete", "deletes"),
        counted(report.content.entries(), "entry", "entries"),
        rounded(report.content.bytes()),
        rounded(survey.length),
        survey.synced,
    ));
    if let Some((from, bytes, records)) = report.torn {
        let bytes = grouped(bytes);
        text.push_str(&if report.in_use {
            format!("a store is writing it: its last {bytes} bytes, from byte {from} on, are a batch on its way\n")
        } else {
            let whole = counted(records, "whole record", "whole records");
            format!(
                "torn end: the last {bytes} bytes, from byte {from} on, with {whole} among them, were never known to be synced, as \
                 after a power cut; the next start cuts them off and keeps them aside\n"
            )
        });
    }
    text
}

fn object(path: &str, report: &Report) -> Value {
    let survey = &report.survey;
    let faults: Vec<Value> = report
        .header_fault
        .map(|fault| json!({"offset": 0, "bytes": 64, "what": fault.to_string()}))
        .into_iter()
        .chain(survey.damage().map(|gap| {
            let bytes = gap.to - gap.from;
            json!({"offset": gap.from, "bytes": bytes, "records_lost": gap.records_lost, "what": told(gap)})
        }))
        .collect();
    let torn = report.torn.map(|(from, bytes, records)| {
        json!({"offset": from, "bytes": bytes, "sound_records": records, "being_written": report.in_use})
    });
    json!({
        "backup": path,
        "sound": report.faults() == 0,
        "generation": report.header.generation,
        "created_ns": report.header.created_ns,
        "bytes": survey.length,
        "records": survey.sets + survey.deletes,
        "deletes": survey.deletes,
        "marks": survey.marks,
        "entries": report.content.entries(),
        "content_bytes": report.content.bytes(),
        "synced_bytes": survey.synced,
        "torn_end": torn,
        "fault_count": report.faults(),
        "faults": faults,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(gaps: Vec<Gap>) -> Report {
        let header = FileHeader { id: [1, 2], generation: 3, created_ns: 4 };
        let survey = Survey {
            length: 4096,
            sets: 7,
            deletes: 1,
            synced: 2048,
            gap_count: gaps.len() as u64,
            gaps,
            ..Survey::default()
        };
        let mut content = Content::default();
        content.latest.extend([(1, (5, Some(1000))), (2, (6, None))]);
        Report { header, header_fault: None, survey, content, torn: None, in_use: false }
    }

    #[test]
    fn check_backup_text_tells_what_is_in_it_and_what_is_wrong() {
        let sound = "/b: sound; file 3 of its line, 8 records (1 delete), 1 entry, 0.98 KiB of content, 4.00 KiB, known to be synced \
                     up to byte 2048\n";
        assert_eq!(text("/b", &report(Vec::new())), sound);
        let gaps = vec![
            Gap { from: 64, to: 128, records_lost: Some(1) },
            Gap { from: 200, to: 200, records_lost: Some(3) },
        ];
        let mut damaged = report(gaps);
        damaged.header_fault = Some(HeaderError::Damaged);
        let lines = text("/b", &damaged);
        let told = "byte 0: its first 64 bytes are damaged: the checksum does not fit\n\
                    byte 64: 64 bytes are no sound record; 1 record is missing\n\
                    byte 200: 3 records are missing before the record there\n/b: 3 faults; ";
        assert!(lines.starts_with(told), "{lines}");
        assert_eq!(object("/b", &damaged)["fault_count"], 3);
    }

    #[test]
    fn check_backup_text_tells_a_torn_end_from_a_batch_on_its_way() {
        let mut torn = report(Vec::new());
        torn.torn = Some((4096, 1_500, 2));
        let lines = text("/b", &torn);
        let told = "torn end: the last 1,500 bytes, from byte 4096 on, with 2 whole records among them, were never known";
        assert!(lines.contains(told), "{lines}");
        assert_eq!(object("/b", &torn)["sound"], true);
        torn.in_use = true;
        let lines = text("/b", &torn);
        assert!(lines.contains("a store is writing it: its last 1,500 bytes"), "{lines}");
    }
}
