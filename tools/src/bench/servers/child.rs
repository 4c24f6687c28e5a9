//! A server that bench started, and that ends with it.
//!
//! It ends in order when this is dropped, whatever made that happen. Killed before it could do so, bench takes it along: the server is
//! started by [`exec_below`], which has the kernel end it when bench is dead. Servers are in a process group of their own, so that
//! Ctrl-C reaches bench alone, which then ends them.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

use crate::bench::CHILD;
use crate::bench::target::Interrupted;

/// How long a server has to end in order.
const END_PATIENCE: Duration = Duration::from_secs(20);
/// How long a server has to become ready.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// A server that ends when this is dropped.
pub struct Server {
    process: Child,
    program: String,
}

impl Server {
    /// Starts a program in a directory, with what it prints going to `log` there.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(program: &Path, arguments: &[OsString], directory: &Path) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("can't find this program")?;
        let log = std::fs::File::create(directory.join("log")).context("can't make a log")?;
        let mut command = Command::new(own);
        command.arg(CHILD).arg(std::process::id().to_string()).arg("--").arg(program).args(arguments);
        command.current_dir(directory).stdin(Stdio::null()).process_group(0);
        command.stdout(log.try_clone().context("can't make a log")?).stderr(log);
        // What is set for the user's own store is not meant for this one.
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_option(name.as_encoded_bytes())) {
            command.env_remove(name);
        }
        let process = command.spawn().with_context(|| format!("can't start {}", program.display()))?;
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { process, program })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until `look` finds what tells that it is ready.
    ///
    /// # Errors
    /// It ends or takes too long; what it printed is told.
    pub fn await_ready<R>(
        &mut self,
        directory: &Path,
        interrupted: &Interrupted,
        mut look: impl FnMut() -> Option<R>,
    ) -> anyhow::Result<R> {
        let begun = Instant::now();
        loop {
            if let Some(ready) = look() {
                return Ok(ready);
            }
            interrupted.check()?;
            let ended = self.process.try_wait().context("can't look after it")?;
            if ended.is_some() || begun.elapsed() > READY_PATIENCE {
                let what = if ended.is_some() { "did not start" } else { "does not get ready" };
                bail!("{} {what}: {}", self.program, last_lines(directory));
            }
            sleep(LOOK_PAUSE);
        }
    }

    /// Ends it in order, by force when it takes too long.
    fn end(&mut self) {
        if matches!(self.process.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.process.id() as i32) {
            // It is not reaped yet, so the number is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        let begun = Instant::now();
        while begun.elapsed() < END_PATIENCE {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            sleep(LOOK_PAUSE);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether a variable of the environment is an option of a store; those of its tests stay, for whoever looks for what tests left.
fn is_option(name: &[u8]) -> bool {
    name.starts_with(b"KVS_") && !name.starts_with(b"KVS_TEST_")
}

/// What a server printed last, in one line.
fn last_lines(directory: &Path) -> String {
    let text = std::fs::read(directory.join("log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().replace('\n', "; ");
    let from = text.char_indices().rev().nth(500).map_or(0, |(at, _)| at);
    if text.is_empty() { "it says nothing".into() } else { text[from..].to_owned() }
}

/// Becomes `program`, which the kernel ends when the process `parent` is dead.
///
/// # Errors
/// It can't be executed.
pub fn exec_below(parent: u32, program: &OsString, arguments: &[OsString]) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM)).context("can't be bound to bench")?;
    // It may have died before that.
    let alive = getppid().is_some_and(|pid| pid.as_raw_nonzero().get() == parent as i32);
    ensure!(alive, "bench is gone");
    let error: io::Error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("can't execute {}", program.to_string_lossy()))
}
