//! `import`: stores the entries of a file of lines of JSON.
//!
//! Memory is bounded: a line has an end, and entries are sent in batches of limited size. Everything before a line that is wrong
//! is stored.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use kvs_client::{Answer, Client};
use serde_json::json;

use crate::figures;
use crate::output::{self, Format, Outcome};
use crate::progress::{Progress, Unit};
use crate::record::{self, Record};
use crate::target::Target;

/// Most entries sent at once.
const BATCH_ENTRIES_MAX: usize = 256;
/// A batch is sent when its keys and values have so many bytes.
const BATCH_BYTES: u64 = 4 << 20;

/// Stores the entries of `file`, or of standard input for `-`.
pub fn run(target: &Target, format: Format, file: &Path) -> anyhow::Result<Outcome> {
    let client = target.connect()?;
    let mut source = Source::open(file)?;
    let mut import =
        Import { client, batch: Vec::new(), batch_bytes: 0, entries: 0, bytes: 0, lost_count: false };
    let result = import.run(&mut source);
    let Import { entries, bytes, lost_count, .. } = import;
    let shown_entries = figures::counted(entries, "entry", "entries");
    result.with_context(|| {
        let at_least = if lost_count { "at least " } else { "" };
        format!("import of {} stopped with {at_least}{shown_entries} stored", source.shown)
    })?;
    match format {
        Format::Json => output::print_json(&json!({"entries": entries, "bytes": bytes}))?,
        Format::Text => {
            output::tell(&format!("imported {shown_entries}, {} of keys and values", figures::rounded(bytes)))
        }
    }
    Ok(Outcome::Done)
}

/// Where the lines come from.
struct Source {
    reader: Box<dyn BufRead>,
    /// Bytes of the file, when it is one.
    length: Option<u64>,
    shown: String,
}

impl Source {
    fn open(file: &Path) -> anyhow::Result<Self> {
        if file == Path::new("-") {
            let reader = Box::new(io::stdin().lock());
            return Ok(Self { reader, length: None, shown: "standard input".to_owned() });
        }
        let shown = file.display().to_string();
        let opened = File::open(file).with_context(|| format!("can't read {shown}"))?;
        let found = fs::metadata(file).with_context(|| format!("can't read {shown}"))?;
        let length = found.is_file().then_some(found.len());
        Ok(Self { reader: Box::new(BufReader::with_capacity(256 << 10, opened)), length, shown })
    }

    /// Reads the next line into `line`; false at the end.
    fn next_line(&mut self, line: &mut Vec<u8>, bytes_max: u64) -> anyhow::Result<bool> {
        line.clear();
        self.reader.by_ref().take(bytes_max + 1).read_until(b'\n', line).context("can't read it")?;
        if line.len() as u64 > bytes_max {
            bail!(
                "it has more than {bytes_max} bytes, which no entry needs; is it a file that `export` wrote?"
            );
        }
        Ok(!line.is_empty())
    }
}

/// An entry that waits to be sent, and its line.
struct Waiting {
    line: u64,
    record: Record,
}

/// An import under way.
struct Import {
    client: Client,
    batch: Vec<Waiting>,
    batch_bytes: u64,
    /// Stored so far.
    entries: u64,
    /// Of their keys and values.
    bytes: u64,
    /// Whether a batch was lost on its way, and with it the count of what of it was stored.
    lost_count: bool,
}

impl Import {
    fn run(&mut self, source: &mut Source) -> anyhow::Result<()> {
        let progress = Progress::new(source.length, Unit::Bytes);
        let line_bytes_max = record::line_bytes_max(self.client.value_bytes_max());
        let (mut line, mut number, mut position) = (Vec::new(), 0, 0);
        loop {
            number += 1;
            match source.next_line(&mut line, line_bytes_max) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => return self.stop(number, error),
            }
            position += line.len() as u64;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match record::parse(&line) {
                Ok(record) => self.add(number, record)?,
                Err(reason) => return self.stop(number, anyhow!(reason)),
            }
            progress.set(position);
        }
        self.send()
    }

    /// Stores what came before a wrong line; the error that comes first in the file counts.
    fn stop(&mut self, number: u64, error: anyhow::Error) -> anyhow::Result<()> {
        self.send()?;
        Err(error.context(format!("line {number}")))
    }

    fn add(&mut self, line: u64, record: Record) -> anyhow::Result<()> {
        self.batch_bytes += bytes_of(&record);
        self.batch.push(Waiting { line, record });
        if self.batch.len() >= BATCH_ENTRIES_MAX || self.batch_bytes >= BATCH_BYTES {
            self.send()?;
        }
        Ok(())
    }

    /// Sends the batch; of several failures the first counts.
    fn send(&mut self) -> anyhow::Result<()> {
        let mut pipeline = self.client.pipeline();
        for Waiting { record, .. } in &self.batch {
            pipeline.set(&record.key, &record.value);
        }
        let answers = pipeline.run();
        self.lost_count = answers.is_err();
        let mut failed = None;
        for (Waiting { line, record }, answer) in self.batch.drain(..).zip(answers?) {
            match answer {
                Answer::Stored => {
                    self.entries += 1;
                    self.bytes += bytes_of(&record);
                }
                Answer::Failed(error) => {
                    failed.get_or_insert(anyhow::Error::new(error).context(format!("line {line}")));
                }
                other => bail!("{other:?} is no answer to a set; use matching releases"),
            }
        }
        self.batch_bytes = 0;
        failed.map_or(Ok(()), Err)
    }
}

fn bytes_of(record: &Record) -> u64 {
    (record.key.len() + record.value.len()) as u64
}
