//! The end of the store, in order; and the same before this process becomes the front server that is on disk.
//!
//! Invariants
//! - Nothing is launched in the place of anything: the data server is told first, and the standby is ended before it.
//! - The segment is kept aside only after an end in order: else the backup file may not have everything.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvs_core::control::{DataMessage, FrontMessage};
use kvs_core::segment::kept_aside_path;
use kvs_core::wire::ErrorCode;
use kvs_front::program;

use super::Supervisor;
use crate::data_server::DataServer;
use crate::front::Event;
use crate::notify::notify;
use crate::refuse;

/// How long the data server has to end in order.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

impl Supervisor {
    /// Ends the store in order.
    pub(super) fn end(&mut self, server: Option<&DataServer>) {
        notify("STOPPING=1");
        self.wind_down(server);
    }

    /// Ends the store in order, and starts it again from the programs on disk, in this process's place. When they can't `attach` to
    /// the segment it is kept aside, and what it has is loaded from the backup file.
    pub(super) fn reload(mut self, server: &DataServer, attach: bool) -> anyhow::Result<()> {
        let in_order = self.wind_down(Some(server));
        if !attach {
            if !in_order {
                bail!(
                    "the data server did not end in order, so the backup file may not have everything; the segment stays. \
                     Start the version that made it, and try again"
                );
            }
            self.keep_segment_aside()?;
        }
        Err(self.become_next().into())
    }

    fn keep_segment_aside(&self) -> anyhow::Result<()> {
        let path = self.front.options.name.segment_path();
        let kept = kept_aside_path(&path);
        std::fs::rename(&path, &kept).with_context(|| format!("can't keep {} aside", path.display()))?;
        log::info!("{} is kept as {}", path.display(), kept.display());
        Ok(())
    }

    /// Becomes the front server that is on disk, at the same addresses. The ready line was printed once.
    fn become_next(&self) -> std::io::Error {
        let path = match program::find("kvs-front") {
            Ok(path) => path,
            Err(error) => return std::io::Error::other(error.to_string()),
        };
        let mut options = self.front.options.clone();
        options.listen = Some(self.front.tcp_address);
        options.unix = Some(self.front.unix_path.clone());
        // What systemd gave this process it has taken.
        let mut command = Command::new(path);
        command.args(options.to_arguments()).env_remove("LISTEN_FDS").stdout(Stdio::null()).exec()
    }

    /// Ends the store in order; whether the data server has done so.
    fn wind_down(&mut self, server: Option<&DataServer>) -> bool {
        if let Some(server) = server {
            // First of all: from now on no other front server is launched, should this one die.
            if let Err(error) = server.tell(&FrontMessage::Ending) {
                log::debug!("can't tell data server {} of the end: {error}", server.pid);
            }
        }
        // Before the data server, whose end it would take for a death.
        if let Some(standby) = self.standby.take() {
            standby.fence();
        }
        log::info!("ending");
        self.front.end_estate();
        if let Some(accepting) = self.accepting.take() {
            accepting.stop();
        }
        self.dismiss_waiting();
        server.is_none_or(|server| self.stop(server))
    }

    /// Tells the clients whom no data server got why they aren't served.
    fn dismiss_waiting(&self) {
        for (_, client) in self.front.clients.take_waiting(usize::MAX, 0) {
            refuse::tell(
                &client.socket,
                ErrorCode::ShuttingDown,
                "the server is ending; connect again later",
            );
        }
    }

    /// Ends the data server in order, or not in order when that takes too long; which of both.
    fn stop(&mut self, server: &DataServer) -> bool {
        let until = Instant::now() + STOP_PATIENCE;
        if let Err(error) = server.tell(&FrontMessage::Stop) {
            log::debug!("can't tell data server {} to stop: {error}", server.pid);
        }
        let mut finished = false;
        loop {
            match self.next_event(Some(until)) {
                Some(Event::Said(_, DataMessage::Stopped, _)) => finished = true,
                Some(Event::Ended(generation, status)) if generation == server.generation => {
                    if !finished {
                        let status = status.map_or_else(String::new, |status| format!(" ({status})"));
                        log::warn!("data server {} ended{status} before it had finished", server.pid);
                    }
                    return finished;
                }
                Some(_) => {}
                None => {
                    log::error!(
                        "data server {} doesn't end within {STOP_PATIENCE:?}; killing it",
                        server.pid
                    );
                    server.fence();
                    return false;
                }
            }
        }
    }
}
