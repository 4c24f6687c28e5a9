//! `get`: prints a value.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use crate::output::{self, Format, Outcome, Printer};
use crate::target::Target;

/// Prints the value of `key`.
pub fn run(target: &Target, format: Format, key: &OsStr) -> anyhow::Result<Outcome> {
    let key = key.as_bytes();
    let value = target.connect()?.get(key)?;
    match (value, format) {
        (Some(value), Format::Json) => {
            let mut object = output::object_of_key(key);
            output::put_bytes(&mut object, "value", &value);
            output::print_json(&object.into())?;
            Ok(Outcome::Done)
        }
        (Some(value), Format::Text) => {
            let mut printer = Printer::new();
            printer.bytes(&value)?;
            if output::on_terminal() {
                printer.bytes(b"\n")?;
            }
            printer.finish()?;
            Ok(Outcome::Done)
        }
        (None, format) => {
            if format == Format::Json {
                let mut object = output::object_of_key(key);
                object.insert("found".to_owned(), false.into());
                output::print_json(&object.into())?;
            }
            output::complain(&format!("no such key: {}", output::for_people(key)));
            Ok(Outcome::No)
        }
    }
}
