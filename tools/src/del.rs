//! `del`: removes keys.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::bail;
use kvs_client::{Answer, Client};
use serde_json::json;

use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Requests sent together.
const BATCH_KEYS: usize = 256;

/// Removes `keys`.
pub fn run(target: &Target, format: Format, keys: &[OsString]) -> anyhow::Result<Outcome> {
    let mut client = target.connect()?;
    let mut deleted = 0;
    for batch in keys.chunks(BATCH_KEYS) {
        deleted += delete(&mut client, batch)?;
    }
    if format == Format::Json {
        output::print_json(&json!({"deleted": deleted, "missing": keys.len() - deleted}))?;
    }
    if deleted > 0 {
        return Ok(Outcome::Done);
    }
    match keys {
        [key] => output::complain(&format!("no such key: {}", output::for_people(key.as_bytes()))),
        _ => output::complain(&format!("none of the {} keys exists", keys.len())),
    }
    Ok(Outcome::No)
}

/// Removes a batch; how many of the keys were there.
fn delete(client: &mut Client, keys: &[OsString]) -> anyhow::Result<usize> {
    let mut pipeline = client.pipeline();
    for key in keys {
        pipeline.delete(key.as_bytes());
    }
    let mut deleted = 0;
    for (key, answer) in keys.iter().zip(pipeline.run()?) {
        match answer {
            Answer::Deleted(true) => deleted += 1,
            Answer::Deleted(false) => {}
            Answer::Failed(error) => bail!("{}: {error}", output::for_people(key.as_bytes())),
            other => bail!("{other:?} is no answer to a delete; use matching releases"),
        }
    }
    Ok(deleted)
}
