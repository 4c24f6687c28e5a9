//! `check --backup FILE --salvage OUT`: everything that is sound in a damaged backup file, in a new one.
//!
//! Sound records of a torn end are saved, too: nobody was told that they are safe, but they are changes that were made. The new file
//! has an identity of its own, so that it is never taken for the whole. It gets its name when it is complete and on disk.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use kvs_core::backup::disk::{Disk as _, SystemDisk};
use kvs_core::backup::log::Log;
use kvs_core::backup::next_path;
use kvs_core::backup::record::{FileHeader, Kind};
use kvs_core::backup::survey::{self, Survey};
use serde_json::{Value, json};

use crate::check_backup::{Opened, open, told};
use crate::figures::counted;
use crate::output::{self, Format, Outcome};
use crate::progress::{Progress, Unit};

/// Bytes written at once.
const BATCH_BYTES: usize = 4 << 20;

/// Writes what is sound in the backup file at `path` to `target`.
pub fn run(path: &Path, target: &Path, format: Format) -> anyhow::Result<Outcome> {
    if fs::symlink_metadata(target).is_ok() {
        bail!("{} exists already and is left as it is; choose another name for --salvage", target.display());
    }
    let opened = open(path)?;
    let unfinished = Unfinished(next_path(target));
    let survey = copy(&opened, &unfinished.0)
        .with_context(|| format!("can't write what is sound to {}", unfinished.0.display()))?;
    // A link is never put over a file that came in between.
    fs::hard_link(&unfinished.0, target).with_context(|| format!("can't make {}", target.display()))?;
    drop(unfinished);
    SystemDisk
        .sync_directory(target)
        .with_context(|| format!("can't sync the directory of {}", target.display()))?;
    match format {
        Format::Text => output::print(text(path, target, &survey).as_bytes())?,
        Format::Json => output::print_json(&object(path, target, &survey))?,
    }
    Ok(Outcome::Done)
}

/// The file before it has its name; gone with this.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What is left of it is overwritten by the next try.
        let _ = fs::remove_file(&self.0);
    }
}

fn copy(opened: &Opened, target: &Path) -> anyhow::Result<Survey> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())?;
    let id = u128::from_le_bytes(id);
    let header = FileHeader {
        id: [id as u64, (id >> 64) as u64],
        generation: 1,
        created_ns: opened.header.created_ns,
    };
    let mut log = Log::create(&SystemDisk, target, &header)?;
    let progress = Progress::new(Some(opened.length), Unit::Bytes);
    let mut failed = None;
    let survey = survey::survey(&*opened.file, &opened.header, opened.length, &mut |at, record| {
        if record.header.kind == Kind::Synced || failed.is_some() {
            return;
        }
        let (key, value) = (record.key(), record.value());
        let gathered =
            log.append(record.header.kind, record.header.version, (key.len(), value.len()), |bytes| {
                bytes.extend_from_slice(key);
                bytes.extend_from_slice(value);
                Ok(())
            });
        if log.pending() >= BATCH_BYTES {
            progress.set(at);
            failed = gathered.and_then(|()| log.flush()).err();
        }
    })?;
    failed.map_or(Ok(()), Err)?;
    log.flush()?;
    log.file().sync()?;
    // How many of them are live shows when they are loaded.
    log.append_synced(log.mark().position, 0);
    log.flush()?;
    log.file().sync()?;
    if survey.sets + survey.deletes == 0 {
        return Err(anyhow!("there is no sound record in it"));
    }
    Ok(survey)
}

fn text(path: &Path, target: &Path, survey: &Survey) -> String {
    let mut text = String::new();
    for gap in &survey.gaps {
        text.push_str(&format!("{}\n", told(gap)));
    }
    let untold = survey.gap_count - survey.gaps.len() as u64;
    if untold > 0 {
        text.push_str(&format!("and {untold} more\n"));
    }
    let (path, target) = (path.display(), target.display());
    let records = counted(survey.sets + survey.deletes, "sound record", "sound records");
    text.push_str(&format!("{target}: {records} of {path}; `kvs-front --backup {target}` loads them\n"));
    if survey.gap_count > 0 {
        text.push_str(
            "of the keys whose last change is missing, some have an earlier value, some are gone, and some that were deleted are back\n",
        );
    }
    text
}

fn object(path: &Path, target: &Path, survey: &Survey) -> Value {
    let missing: Vec<Value> = survey
        .gaps
        .iter()
        .map(|gap| json!({"offset": gap.from, "bytes": gap.to - gap.from, "records_lost": gap.records_lost}))
        .collect();
    json!({
        "backup": path.display().to_string(),
        "salvaged": target.display().to_string(),
        "records": survey.sets + survey.deletes,
        "missing_count": survey.gap_count,
        "missing": missing,
    })
}
