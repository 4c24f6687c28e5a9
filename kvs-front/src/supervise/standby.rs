//! The standby, kept standing by; and the exchange of the data server for one that was launched to take over from it.
//!
//! Invariants
//! - There is at most one standby, and it is fenced before another one is launched.
//! - The data server that serves is told of each, and of its end: it names in the segment who takes over from it.
//! - Whoever asked for an exchange is answered once: when the next one stands by, or when there will be none.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::Sender;
use kvs_core::control::{DataMessage, FrontMessage};
use kvs_front::options::StandbyMode;
use kvs_front::process;

use super::Supervisor;
use crate::data_server::{DataServer, Purpose};
use crate::front::Event;
use crate::heart::own_identity;
use crate::inherit::InheritedServer;

/// How long a standby may take until it could take over from a data server that is to be exchanged.
const EXCHANGE_PATIENCE: Duration = Duration::from_secs(20);

/// An exchange of the data server.
pub(super) struct Exchange {
    /// Who asked for it.
    reply: Sender<Result<u32, String>>,
    /// When the standby has to stand by.
    until: Instant,
}

impl Supervisor {
    /// Keeps a standby standing by; gives the time at which the next one may be launched.
    pub(super) fn tend_standby(&mut self, active: &DataServer) -> Option<Instant> {
        if self.front.options.standby == StandbyMode::Off || self.standby.is_some() {
            return None;
        }
        if Instant::now() < self.standby_due {
            return Some(self.standby_due);
        }
        match self.launch_standby(active) {
            Ok(standby) => {
                log::debug!("launched standby {}", standby.pid);
                self.standby = Some(standby);
                None
            }
            Err(error) => {
                log::error!("no standby could be launched: {error:#}");
                self.put_standby_off();
                Some(self.standby_due)
            }
        }
    }

    /// Launches a standby from what is on disk, in the place of the one that there is, to take over as soon as it can.
    pub(super) fn begin_exchange(&mut self, active: &DataServer, reply: Sender<Result<u32, String>>) {
        if self.exchange.is_some() {
            // Who asked may have given up; so below.
            let _ = reply.send(Err("the data server is being exchanged already".to_owned()));
            return;
        }
        self.dismiss_standby(active);
        match self.launch_standby(active) {
            Ok(standby) => {
                log::info!(
                    "launched standby {}, for which data server {} is to give way",
                    standby.pid,
                    active.pid
                );
                self.standby = Some(standby);
                self.exchange = Some(Exchange { reply, until: Instant::now() + EXCHANGE_PATIENCE });
            }
            Err(error) => _ = reply.send(Err(format!("the next one can't be launched: {error:#}"))),
        }
    }

    /// Gives up an exchange that takes too long; gives the time at which it does.
    pub(super) fn tend_exchange(&mut self, active: &DataServer) -> Option<Instant> {
        let until = self.exchange.as_ref()?.until;
        if Instant::now() < until {
            return Some(until);
        }
        self.dismiss_standby(active);
        self.put_standby_off();
        self.fail_exchange(&format!("the next one is not ready after {} s", EXCHANGE_PATIENCE.as_secs()));
        None
    }

    fn fail_exchange(&mut self, why: &str) {
        if let Some(exchange) = self.exchange.take() {
            log::error!("the data server is not exchanged: {why}");
            let _ = exchange.reply.send(Err(why.to_owned()));
        }
    }

    /// Ends the standby, if there is one.
    fn dismiss_standby(&mut self, active: &DataServer) {
        if let Some(standby) = self.standby.take() {
            standby.fence();
            self.heart.forget_standby();
            if let Err(error) = active.tell(&FrontMessage::NoStandby) {
                log::debug!("can't tell data server {}: {error}", active.pid);
            }
        }
    }

    fn launch_standby(&mut self, active: &DataServer) -> anyhow::Result<DataServer> {
        self.generation += 1;
        let segment = self.segment.as_ref().context("there is no segment yet")?;
        let purpose = Purpose::StandBy(segment, active);
        let standby =
            self.front.keep_standby(|| DataServer::launch(&self.front, self.generation, &purpose))?;
        self.heart.watch_standby(standby.pid, standby.process());
        Ok(standby)
    }

    /// Goes on with the standby of a front server that died.
    pub(super) fn inherit_standby(&mut self, standby: InheritedServer) -> anyhow::Result<()> {
        self.generation += 1;
        let standby =
            self.front.keep_standby(|| DataServer::inherit(&self.front, self.generation, standby))?;
        standby.introduce_itself(
            &self.front,
            &FrontMessage::Watching { front: own_identity()?, group: process::own_group() },
        )?;
        self.heart.watch_standby(standby.pid, standby.process());
        self.standby = Some(standby);
        Ok(())
    }

    /// The next standby is launched after a pause, if this one was not the first to fail.
    fn put_standby_off(&mut self) {
        self.standby_pace.failed();
        let now = Instant::now();
        self.standby_due = now + self.standby_pace.pause(now);
    }

    /// Takes what was said by the standby, or became of it.
    pub(super) fn hear_of_standby(&mut self, active: &DataServer, event: Event) {
        let Some(standby) = &self.standby else { return };
        match event {
            Event::Said(generation, message, _) if generation == standby.generation => match message {
                DataMessage::Standing => {
                    log::debug!("standby {} stands by", standby.pid);
                    self.standby_pace.ready();
                    if let Some(exchange) = self.exchange.take() {
                        let _ = exchange.reply.send(Ok(standby.pid));
                        active.kill();
                    }
                }
                DataMessage::Failed { message } => {
                    log::error!("standby {}: {message}", standby.pid);
                    self.fail_exchange(&message);
                }
                _ => {}
            },
            Event::Dead(generation) if generation == standby.generation => {
                log::warn!("standby {} died; launching the next", standby.pid);
                self.dismiss_standby(active);
                self.put_standby_off();
                self.fail_exchange("the next one died at its start");
            }
            _ => {}
        }
    }
}
