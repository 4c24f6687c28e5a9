//! `export`: all keys and values as lines of JSON.
//!
//! A file gets its name when it is complete and on disk: an export that fails leaves what was there before. Memory is bounded: no
//! more values are asked for at once than fit a budget if all were as large as a value can be.

use std::fs::{self, File};
use std::io::{self, BufWriter, StdoutLock, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use kvs_client::{Answer, Client, Statistic};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::figures;
use crate::output::{self, Format, Outcome};
use crate::progress::{Progress, Unit};
use crate::record;
use crate::target::Target;

/// Keys asked for in one page.
const PAGE_KEYS: u32 = 512;
/// Most values asked for at once.
const BATCH_KEYS_MAX: u64 = 64;
/// Memory for the values asked for at once, in bytes.
const BATCH_BYTES_MAX: u64 = 256 << 20;

/// Writes all entries to `file`, or to standard output for `-`.
pub fn run(target: &Target, format: Format, file: &Path) -> anyhow::Result<Outcome> {
    let mut client = target.connect()?;
    let mut sink = Sink::open(file)?;
    let totals = write_entries(&mut client, &mut sink)?;
    let to_output = sink.is_output();
    sink.finish()?;
    let Totals { entries, bytes } = totals;
    let document = json!({"entries": entries, "bytes": bytes});
    match format {
        // Standard output has the entries.
        Format::Json if to_output => output::tell(&document.to_string()),
        Format::Json => output::print_json(&document)?,
        Format::Text => output::tell(&format!(
            "exported {}, {} of keys and values",
            figures::counted(entries, "entry", "entries"),
            figures::rounded(bytes)
        )),
    }
    Ok(Outcome::Done)
}

/// What was exported.
#[derive(Default)]
struct Totals {
    entries: u64,
    /// Of keys and values.
    bytes: u64,
}

fn write_entries(client: &mut Client, sink: &mut Sink) -> anyhow::Result<Totals> {
    // Entries that scroll over the terminal show progress enough.
    let progress = if sink.is_output() && output::on_terminal() {
        Progress::hidden()
    } else {
        Progress::new(entries_of(client)?, Unit::Entries)
    };
    let batch = (BATCH_BYTES_MAX / client.value_bytes_max().max(1)).clamp(1, BATCH_KEYS_MAX) as usize;
    let mut totals = Totals::default();
    let mut cursor = Some(0);
    while let Some(from) = cursor {
        let page = client.list_page("", from, PAGE_KEYS)?;
        for keys in page.keys.chunks(batch) {
            write_batch(client, sink, keys, &mut totals)?;
            progress.set(totals.entries);
        }
        cursor = page.next;
    }
    Ok(totals)
}

/// Writes the entries of some keys; a key that was deleted meanwhile is none.
fn write_batch(
    client: &mut Client,
    sink: &mut Sink,
    keys: &[Vec<u8>],
    totals: &mut Totals,
) -> anyhow::Result<()> {
    let mut pipeline = client.pipeline();
    for key in keys {
        pipeline.get(key);
    }
    for (key, answer) in keys.iter().zip(pipeline.run()?) {
        match answer {
            Answer::Value(Some(value)) => {
                sink.write(key, &value)?;
                totals.entries += 1;
                totals.bytes += (key.len() + value.len()) as u64;
            }
            Answer::Value(None) => {}
            Answer::Failed(error) => bail!("can't read {}: {error}", output::for_people(key)),
            other => bail!("{other:?} is no answer to a get; use matching releases"),
        }
    }
    Ok(())
}

/// How many entries there are about now.
fn entries_of(client: &mut Client) -> anyhow::Result<Option<u64>> {
    let all = client.stats()?;
    Ok(all.into_iter().find_map(|(name, value)| match value {
        Statistic::Number(number) if name == "entries" => Some(number),
        _ => None,
    }))
}

/// Where the lines go.
enum Destination {
    Output(StdoutLock<'static>),
    /// Something that can't be replaced: a pipe, a device.
    Special(File),
    /// A file beside the one that it will replace.
    New(NamedTempFile, PathBuf),
}

impl Destination {
    fn open(file: &Path) -> anyhow::Result<Self> {
        if file == Path::new("-") {
            return Ok(Self::Output(io::stdout().lock()));
        }
        // A link stays one; what it leads to is replaced.
        let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_path_buf());
        let special = fs::metadata(&file).is_ok_and(|found| !found.is_file() && !found.is_dir());
        if special {
            return Ok(Self::Special(File::options().write(true).open(file)?));
        }
        let Some(name) = file.file_name().filter(|_| !file.is_dir()) else {
            bail!("it is a directory; name a file in it");
        };
        let directory =
            file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let prefix = format!(".{}.", name.to_string_lossy());
        let temporary = tempfile::Builder::new().prefix(&prefix).suffix(".partial").tempfile_in(directory)?;
        Ok(Self::New(temporary, file))
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Output(_) | Self::Special(_) => Ok(()),
            Self::New(temporary, file) => {
                temporary.as_file().sync_all()?;
                temporary.persist(file).map(|_| ()).map_err(|error| error.error)
            }
        }
    }
}

impl Write for Destination {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Output(output) => output.write(bytes),
            Self::Special(file) => file.write(bytes),
            Self::New(file, _) => file.as_file_mut().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Output(output) => output.flush(),
            Self::Special(file) => file.flush(),
            Self::New(file, _) => file.as_file_mut().flush(),
        }
    }
}

/// A destination with a buffer, whose errors name it.
struct Sink {
    writer: BufWriter<Destination>,
    shown: String,
}

impl Sink {
    fn open(file: &Path) -> anyhow::Result<Self> {
        let shown = file.display().to_string();
        let destination = Destination::open(file).with_context(|| format!("can't write {shown}"))?;
        Ok(Self { writer: BufWriter::with_capacity(256 << 10, destination), shown })
    }

    fn is_output(&self) -> bool {
        matches!(self.writer.get_ref(), Destination::Output(_))
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
        record::write(&mut self.writer, key, value).map_err(|error| self.trouble(error))
    }

    fn finish(mut self) -> anyhow::Result<()> {
        self.writer.flush().map_err(|error| self.trouble(error))?;
        let Self { writer, shown } = self;
        let (destination, _) = writer.into_parts();
        destination.finish().with_context(|| format!("can't write {shown}"))
    }

    fn trouble(&self, error: io::Error) -> anyhow::Error {
        if self.is_output() {
            return output::write_error(error);
        }
        anyhow::Error::new(error).context(format!("can't write {}", self.shown))
    }
}
