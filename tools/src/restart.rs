//! `restart`: exchanges a server for the program on disk, under load.
//!
//! The store itself tries the program and lets the old server go; this command waits until another process serves in its place.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use kvs_core::instance::InstanceName;
use kvs_core::segment::kept_aside_path;
use serde_json::json;

use crate::cli::Server;
use crate::operator::Operator;
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// How long the next server may take to serve; one that has to load the backup file first may need minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// Pause between two questions whether it does.
const PAUSE: Duration = Duration::from_millis(5);

/// Exchanges the server and returns when the next one serves.
pub fn run(target: &Target, format: Format, server: Server) -> anyhow::Result<Outcome> {
    let (word, pid_name) = match server {
        Server::Front => ("front", "front_pid"),
        Server::Data => ("data", "data_pid"),
    };
    let mut operator = Operator::connect(target)?;
    let all = operator.statistics()?;
    let before = all.as_ref().and_then(|all| all.get(pid_name)?.as_u64());
    let before = before
        .ok_or_else(|| anyhow!("the data server of {target} does not answer; try again in a moment"))?;
    let kept_aside = all.as_ref().and_then(kept_aside).filter(|path| !path.exists());
    let begun = Instant::now();
    let reply = operator.ask(&format!("restart {word}"))?;
    if !reply.done {
        bail!("{}", reply.text.trim_end());
    }
    let after = await_next(&mut operator, pid_name, before, begun).ok_or_else(|| {
        anyhow!(
            "{}, but no other {word} server has served for {} s; look at the log of {target}",
            reply.text.trim_end(),
            PATIENCE.as_secs()
        )
    })?;
    // A segment of another layout, which was kept until its contents were loaded.
    let removed = kept_aside.filter(|path| std::fs::remove_file(path).is_ok());
    let took = begun.elapsed();
    match format {
        Format::Json => output::print_json(&json!({
            "restarted": word,
            "pid_before": before,
            "pid_after": after,
            "took_us": u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            "said": reply.text.trim_end(),
            "removed": removed.map(|path| path.to_string_lossy().into_owned()),
        }))?,
        Format::Text => {
            output::print_line(format_args!("{}", output::for_people(reply.text.trim_end().as_bytes())))?;
            if let Some(path) = removed {
                output::print_line(format_args!("removed {}, whose contents are loaded", path.display()))?;
            }
            let ms = took.as_secs_f64() * 1e3;
            output::print_line(format_args!("{word} server {after} serves, {ms:.0} ms later"))?;
        }
    }
    Ok(Outcome::Done)
}

/// The process id of another server than `before`, once there is one; None when that takes too long.
fn await_next(operator: &mut Operator, name: &str, before: u64, begun: Instant) -> Option<u64> {
    while begun.elapsed() < PATIENCE {
        // Connections end and are refused while front servers change.
        match pid(operator, name) {
            Ok(Some(pid)) if pid != before => return Some(pid),
            Ok(_) => thread::sleep(PAUSE),
            Err(_) => {
                thread::sleep(PAUSE);
                // Tried again in the next round.
                let _ = operator.connect_again();
            }
        }
    }
    None
}

fn pid(operator: &mut Operator, name: &str) -> anyhow::Result<Option<u64>> {
    Ok(operator.statistics()?.and_then(|all| all.get(name)?.as_u64()))
}

/// Where the segment of the instance is kept when it is of no use any more.
fn kept_aside(all: &serde_json::Value) -> Option<PathBuf> {
    let name: InstanceName = all.get("name")?.as_str()?.parse().ok()?;
    Some(kept_aside_path(&name.segment_path()))
}
