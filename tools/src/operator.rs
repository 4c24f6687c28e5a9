//! The operator's socket of a store: a command is a line, its answer is `ok N` or `error N` and N bytes of text.
//!
//! Bounds: every answer is waited for with a deadline, and one that claims to be longer than any list of clients is refused.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use kvs_core::instance::console_path;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::target::Target;

/// How long an answer may take; the front server itself waits for the data server.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// How long the servers may take to end.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Longest first line of an answer, in bytes.
const HEAD_BYTES_MAX: u64 = 64;
/// Longest text of an answer, in bytes: a line for each of the most connections, with room to spare.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What the store said to a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Whether it was done.
    pub done: bool,
    /// What the operator is told.
    pub text: String,
}

/// The operator of a running instance.
pub struct Operator {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    shown: String,
}

impl Operator {
    /// Connects to the console of `target`.
    pub fn connect(target: &Target) -> anyhow::Result<Self> {
        let connect = |path: &Path| UnixStream::connect(path).map(|stream| (stream, path.to_path_buf()));
        let (stream, path) = target.connect_local(console_path, connect)?;
        Ok(Self { stream: with_patience(stream)?, path, shown: target.to_string() })
    }

    /// Connects to the same console again, where another front server may serve it by now.
    pub fn connect_again(&mut self) -> anyhow::Result<()> {
        let stream = UnixStream::connect(&self.path).with_context(|| self.trouble())?;
        self.stream = with_patience(stream)?;
        Ok(())
    }

    /// Gives a command and waits for the answer.
    pub fn ask(&mut self, command: &str) -> anyhow::Result<Reply> {
        if command.contains(['\n', '\r']) {
            bail!("a command of the console is one line; give several one after the other");
        }
        let line = format!("{command}\n");
        self.stream.get_mut().write_all(line.as_bytes()).with_context(|| self.trouble())?;
        let mut head = String::new();
        let read = self.stream.by_ref().take(HEAD_BYTES_MAX).read_line(&mut head);
        read.with_context(|| self.trouble())?;
        if head.is_empty() {
            bail!("{}: it closed the connection; is it ending?", self.trouble());
        }
        let (done, length) = parse_head(&head)
            .ok_or_else(|| anyhow!("{}: what answers is no console of kvs", self.trouble()))?;
        let mut text = Vec::new();
        let read = self.stream.by_ref().take(length).read_to_end(&mut text);
        read.with_context(|| self.trouble())?;
        if text.len() as u64 != length {
            bail!("{}: it closed the connection in the middle of an answer", self.trouble());
        }
        Ok(Reply { done, text: String::from_utf8_lossy(&text).into_owned() })
    }

    /// Ends the instance and waits until its front server, which is the last to go, is gone. Returns its process id, when it is
    /// known.
    pub fn quit(mut self) -> anyhow::Result<Option<u64>> {
        let pid = self.front_pid()?;
        // Taken while the process still serves, so that it can't be another one with the same number.
        let process = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let process = process.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let reply = self.ask("quit")?;
        if !reply.done {
            bail!("{} refused to quit: {}", self.shown, reply.text.trim_end());
        }
        self.await_end(process)?;
        Ok(pid)
    }

    /// All counters; None while the data server is not there to tell.
    pub fn statistics(&mut self) -> anyhow::Result<Option<serde_json::Value>> {
        let reply = self.ask("stats --json")?;
        Ok(serde_json::from_str(&reply.text).ok().filter(|_| reply.done))
    }

    /// Process id of the front server; None while the data server is not there to tell.
    fn front_pid(&mut self) -> anyhow::Result<Option<u64>> {
        Ok(self.statistics()?.and_then(|all| all.get("front_pid")?.as_u64()))
    }

    /// The connection ends with the process; its descriptor tells when the rest of it is gone too.
    fn await_end(&mut self, process: Option<OwnedFd>) -> anyhow::Result<()> {
        let until = Instant::now() + END_PATIENCE;
        let late = || {
            let seconds = END_PATIENCE.as_secs();
            anyhow!(
                "{} was told to quit but has not ended for {seconds} s; look at its log, then try again",
                self.shown
            )
        };
        let mut rest = Vec::new();
        match self.stream.get_mut().read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(late());
            }
            // However the connection ended, it ended.
            Err(_) => {}
        }
        let Some(process) = process else { return Ok(()) };
        loop {
            let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
            match poll(&mut [PollFd::new(&process, PollFlags::IN)], left.as_ref()) {
                Ok(0) => return Err(late()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("can't wait for the front server's end"),
            }
        }
    }

    fn trouble(&self) -> String {
        format!("no answer from the console of {}", self.shown)
    }
}

fn with_patience(stream: UnixStream) -> anyhow::Result<BufReader<UnixStream>> {
    stream
        .set_read_timeout(Some(ANSWER_PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(ANSWER_PATIENCE)))
        .context("can't set how long the console may take")?;
    Ok(BufReader::new(stream))
}

/// Reads `ok N` or `error N`.
fn parse_head(line: &str) -> Option<(bool, u64)> {
    let (word, length) = line.strip_suffix('\n')?.split_once(' ')?;
    let length = length.parse().ok().filter(|length| *length <= TEXT_BYTES_MAX)?;
    match word {
        "ok" => Some((true, length)),
        "error" => Some((false, length)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operator_head_of_an_answer_is_read_strictly() {
        assert_eq!(parse_head("ok 0\n"), Some((true, 0)));
        assert_eq!(parse_head("error 17\n"), Some((false, 17)));
        for odd in ["", "ok", "ok 1", "ok -1\n", "ok 1 \n", "OK 1\n", "ok 99999999999\n", "HTTP/1.1 400\n"] {
            assert_eq!(parse_head(odd), None, "{odd:?}");
        }
    }
}
