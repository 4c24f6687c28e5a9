//! SIGINT and SIGTERM end the store in order, and a second one at once. SIGHUP, the end of the terminal, does the first
//! too, unless this process was started to ignore it (`nohup`). Ctrl-Z (SIGTSTP) does nothing: a front server that was stopped
//! would be taken for a hung one.
//!
//! A front server whose data server launched it is sent SIGHUP, and continued, by the kernel too when it stands still while the data
//! server dies: its job has lost its last parent. That is no reason to end, so there SIGHUP counts only when the terminal is gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;

use crate::front::{Event, Front};

/// How long the kernel may take from SIGHUP to taking the terminal away.
const HANG_UP_PAUSE: Duration = Duration::from_millis(100);

/// What SIGHUP means.
pub enum HangUp {
    /// The end of the store, whoever sent it.
    Ends,
    /// The end of the store if this terminal is gone, if there was one.
    EndsWith(Option<OwnedFd>),
}

impl HangUp {
    /// For a front server that the data server launched.
    pub fn of_successor() -> Self {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        Self::EndsWith(rustix::fs::open("/dev/tty", flags, Mode::empty()).ok())
    }

    fn ends(&self) -> bool {
        match self {
            Self::Ends => true,
            Self::EndsWith(None) => false,
            Self::EndsWith(Some(terminal)) => {
                std::thread::sleep(HANG_UP_PAUSE);
                rustix::termios::tcgetpgrp(terminal).is_err()
            }
        }
    }
}

/// Starts the thread that waits for signals.
///
/// # Errors
/// When none can be waited for.
pub fn watch(front: &Arc<Front>, hang_up: HangUp) -> anyhow::Result<()> {
    let mut wanted = vec![SIGINT, SIGTERM, SIGTSTP];
    if !is_ignored(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted).context("can't wait for signals")?;
    let front = Arc::clone(front);
    let thread = std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut ending = false;
        for signal in signals.forever() {
            if signal == SIGTSTP {
                log::warn!(
                    "Ctrl-Z is ignored: a server that is stopped serves nobody; `quit` ends the store"
                );
                continue;
            }
            if signal == SIGHUP && !hang_up.ends() {
                log::info!("SIGHUP is ignored: it was not the end of the terminal");
                continue;
            }
            if ending && signal != SIGHUP {
                front.end_at_once(128 + signal);
            }
            ending = true;
            // The supervisor listens for as long as the process runs.
            let _ = front.events.send(Event::Quit);
        }
    });
    thread.map(|_| ()).context("can't start a thread to wait for signals")
}

/// Whether this process was told to ignore `signal`; no when that can't be known.
fn is_ignored(signal: i32) -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores(&status, signal))
}

fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_ignored_from_the_start_are_known() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\tffffffffffffffff\n";
        assert!(ignores(status, SIGHUP));
        assert!(!ignores(status, SIGINT));
        assert!(!ignores("", SIGHUP));
    }
}
