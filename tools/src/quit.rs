//! `quit`: ends an instance in order.

use serde_json::json;

use crate::operator::Operator;
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Ends the instance and returns when its servers are gone.
pub fn run(target: &Target, format: Format) -> anyhow::Result<Outcome> {
    let front_pid = Operator::connect(target)?.quit()?;
    match format {
        Format::Json => output::print_json(&json!({"ended": true, "front_pid": front_pid}))?,
        Format::Text => output::print_line(format_args!("{target} has ended; its segment stays"))?,
    }
    Ok(Outcome::Done)
}
