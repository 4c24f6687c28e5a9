//! One entry, or all of them.

use kvs_core::inspect::entries;
use kvs_core::segment::SegmentView;
use serde_json::Value;

use crate::columns::Columns;
use crate::figures::{grouped, rounded};
use crate::output::{self, Format, Outcome, Printer, for_people, object_of_key, put_bytes};

/// Longest beginning of a value that is shown to people, in bytes.
const VALUE_SHOWN_MAX: usize = 200;

/// Dumps all of them: as text, key and value separated by a tab, escaped; as JSON, whole.
pub fn all(view: &SegmentView, format: Format) -> anyhow::Result<Outcome> {
    let mut printer = Printer::new();
    let mut first = true;
    if format == Format::Json {
        printer.bytes(b"{\"entries\":[")?;
    }
    entries::for_each(view, |key, value| match format {
        Format::Text => printer.bytes(format!("{}\t{}\n", for_people(key), for_people(value)).as_bytes()),
        Format::Json => {
            let mut object = object_of_key(key);
            put_bytes(&mut object, "value", value);
            if !std::mem::take(&mut first) {
                printer.bytes(b",")?;
            }
            printer.json(&Value::Object(object))
        }
    })?;
    if format == Format::Json {
        printer.bytes(b"]}\n")?;
    }
    printer.finish()?;
    Ok(Outcome::Done)
}

/// Shows one, and where it is.
pub fn one(view: &SegmentView, format: Format, key: &[u8]) -> anyhow::Result<Outcome> {
    let Some(entry) = entries::entry(view, key)? else {
        match format {
            Format::Text => output::complain(&format!("no such key: {}", for_people(key))),
            Format::Json => {
                let mut object = object_of_key(key);
                object.insert("found".into(), false.into());
                output::print_json(&object.into())?;
            }
        }
        return Ok(Outcome::No);
    };
    if format == Format::Json {
        let mut object = object_of_key(key);
        put_bytes(&mut object, "value", &entry.value);
        for (name, number) in [
            ("shard", entry.shard),
            ("home", entry.home),
            ("bucket", entry.bucket),
            ("slot", entry.slot as u64),
            ("offset", entry.offset),
            ("version", entry.version),
            ("block_bytes", entry.block_bytes),
            ("chunks", entry.chunks),
            ("chunk_bytes", entry.chunk_bytes),
            ("value_bytes", entry.value.len() as u64),
        ] {
            object.insert(name.into(), number.into());
        }
        object.insert("checksum_fits".into(), entry.checksum_fits.into());
        output::print_json(&object.into())?;
        return Ok(Outcome::Done);
    }
    let mut rows = Columns::list();
    let mut row = |name: &str, value: String| rows.named(name, value);
    row("key", for_people(key));
    row("shard", entry.shard.to_string());
    let probe = entry.bucket - entry.home;
    row("bucket", format!("{} slot {}, {probe} behind its home", entry.bucket, entry.slot));
    row("entry", format!("{:#x}, version {}", entry.offset, grouped(entry.version)));
    row("memory", memory(entry.block_bytes, entry.chunks, entry.chunk_bytes));
    row("checksum", if entry.checksum_fits { "fits" } else { "does not fit" }.into());
    row(
        "value",
        format!("{} ({} bytes)", rounded(entry.value.len() as u64), grouped(entry.value.len() as u64)),
    );
    let beginning = &entry.value[..entry.value.len().min(VALUE_SHOWN_MAX)];
    let more = if beginning.len() < entry.value.len() { "…" } else { "" };
    row("", format!("{}{more}", for_people(beginning)));
    output::print(rows.lines().as_bytes())?;
    Ok(Outcome::Done)
}

fn memory(block_bytes: u64, chunks: u64, chunk_bytes: u64) -> String {
    match chunks {
        0 => format!("{} bytes of a block", grouped(block_bytes)),
        _ => {
            format!("{} bytes of a block, {chunks} chunks of {}", grouped(block_bytes), rounded(chunk_bytes))
        }
    }
}
