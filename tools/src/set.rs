//! `set`: stores a value.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::{Context as _, bail};
use kvs_core::instance::ByteSize;

use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Stores `value`, or standard input for `-`, under `key`.
pub fn run(
    target: &Target,
    format: Format,
    key: &OsStr,
    value: &OsStr,
    if_absent: bool,
) -> anyhow::Result<Outcome> {
    let key = key.as_bytes();
    let mut client = target.connect()?;
    let input;
    let value = if value == "-" {
        input = read_input(client.value_bytes_max())?;
        &input[..]
    } else {
        value.as_bytes()
    };
    let stored = if if_absent {
        client.set_if_absent(key, value)?
    } else {
        client.set(key, value)?;
        true
    };
    if format == Format::Json {
        let mut object = output::object_of_key(key);
        object.insert("stored".to_owned(), stored.into());
        output::print_json(&object.into())?;
    }
    if stored {
        return Ok(Outcome::Done);
    }
    output::complain(&format!("the key exists already: {}", output::for_people(key)));
    Ok(Outcome::No)
}

/// Standard input to its end, unless that is longer than any value can be.
fn read_input(value_bytes_max: u64) -> anyhow::Result<Vec<u8>> {
    let mut value = Vec::new();
    let mut input = std::io::stdin().lock().take(value_bytes_max.saturating_add(1));
    input.read_to_end(&mut value).context("can't read standard input")?;
    if value.len() as u64 > value_bytes_max {
        bail!(
            "standard input has more than {}, the server's limit of a value; send a smaller one or start the server with a \
             larger --max-value",
            ByteSize(value_bytes_max)
        );
    }
    Ok(value)
}
