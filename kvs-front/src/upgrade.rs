//! Trying a program that lies on disk, before a server that serves gives way to it.
//!
//! It is run with a flag that makes it say who it is and end. What doesn't do so in time, whatever the reason, is no successor.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use kvs_core::control::CONTROL_VERSION;
use kvs_front::{probe, process, program};

/// How long a program may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// What it says is cut off here, in bytes; more than a pipe holds it can't say at all.
const WORDS_BYTES_MAX: u64 = 4096;
/// A program that was tried, and starts.
#[derive(Debug)]
pub struct Tried {
    /// Where it lies.
    pub path: PathBuf,
    /// What it says of itself.
    pub words: String,
    /// What it is good for.
    pub fit: Fit,
}

/// How a program fits the store that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It can take the place of a server at once.
    Whole,
    /// Only together with the other server's program: these two don't understand each other.
    OtherControl,
    /// Only together with the other server's program, and by way of the backup file: it can't attach to the segment.
    OtherLayout,
}

/// The front server's program on disk.
///
/// # Errors
/// Why it can't be started, for the operator.
pub fn try_front() -> anyhow::Result<Tried> {
    run("kvs-front", &[])
}

/// The data server's program on disk, for the instance `name`.
///
/// # Errors
/// Why it can't be started, for the operator.
pub fn try_data(name: &str) -> anyhow::Result<Tried> {
    run("kvs-data", &["--name", name])
}

fn fit(status: ExitStatus) -> Option<Fit> {
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(0) => Some(Fit::Whole),
        Some(probe::OTHER_CONTROL) => Some(Fit::OtherControl),
        Some(probe::OTHER_LAYOUT) => Some(Fit::OtherLayout),
        _ => None,
    }
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<Tried> {
    let path = program::find(program).map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut child = Command::new(&path)
        .args(["--probe", &CONTROL_VERSION.to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("can't start {}", path.display()))?;
    let ended = process::of_child(&child).is_ok_and(|process| process::ends_within(&process, PATIENCE));
    if !ended {
        // It is not reaped yet, so this is its pid.
        let _ = child.kill();
    }
    let status = child.wait().with_context(|| format!("can't wait for {}", path.display()))?;
    if !ended {
        bail!("{} said nothing for {} s", path.display(), PATIENCE.as_secs());
    }
    let words = words(&mut child);
    match fit(status) {
        None => bail!("{} does not start ({status}): {words}", path.display()),
        Some(_) if !words.starts_with(program) => {
            bail!("{} is another program: it says {words:?}", path.display())
        }
        Some(fit) => Ok(Tried { path, words, fit }),
    }
}

/// What an ended child has written, in one line. Nothing in it may move the operator's cursor.
fn words(child: &mut Child) -> String {
    let mut bytes = Vec::new();
    // What can't be read was not said.
    let _ = child.stdout.take().map(|output| output.take(WORDS_BYTES_MAX).read_to_end(&mut bytes));
    let _ = child.stderr.take().map(|output| output.take(WORDS_BYTES_MAX).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ").replace(char::is_control, "?")
}
