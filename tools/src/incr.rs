//! `incr`: adds to a decimal value.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::Context as _;

use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Adds `by` to the value of `key` and prints the sum.
pub fn run(target: &Target, format: Format, key: &OsStr, by: i64) -> anyhow::Result<Outcome> {
    let key = key.as_bytes();
    let sum = target
        .connect()?
        .increment(key, by)
        .with_context(|| format!("can't add {by} to {}", output::for_people(key)))?;
    match format {
        Format::Text => output::print_line(sum)?,
        Format::Json => {
            let mut object = output::object_of_key(key);
            object.insert("value".to_owned(), sum.into());
            output::print_json(&object.into())?;
        }
    }
    Ok(Outcome::Done)
}
