//! `list`: prints keys as they come.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use serde_json::Value;

use crate::output::{self, Format, Outcome, Printer};
use crate::target::Target;

/// Prints the keys that begin with `prefix`.
pub fn run(target: &Target, format: Format, prefix: &OsStr) -> anyhow::Result<Outcome> {
    let mut client = target.connect()?;
    let mut printer = Printer::new();
    let keys = client.list(prefix.as_bytes());
    match format {
        Format::Json => {
            printer.bytes(br#"{"keys":["#)?;
            for (index, key) in keys.enumerate() {
                if index > 0 {
                    printer.bytes(b",")?;
                }
                printer.json(&as_json(&key?))?;
            }
            printer.bytes(b"]}\n")?;
        }
        Format::Text => {
            let escaped = output::on_terminal();
            for key in keys {
                let key = key?;
                if escaped {
                    printer.bytes(output::for_people(&key).as_bytes())?;
                } else {
                    printer.bytes(&key)?;
                }
                printer.bytes(b"\n")?;
            }
        }
    }
    printer.finish()?;
    Ok(Outcome::Done)
}

/// A key as a string, or as an object when it isn't text.
fn as_json(key: &[u8]) -> Value {
    match std::str::from_utf8(key) {
        Ok(text) => text.into(),
        Err(_) => output::object_of_key(key).into(),
    }
}
