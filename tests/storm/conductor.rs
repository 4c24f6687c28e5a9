//! Who kills, whom and when.
//!
//! Invariant: among the servers that hold every client's socket, one is left alone until another one has them all as well, which the
//! counters of the store say. That is the whole promise: connections end when all who hold them are dead, and not before. The
//! others die at random: one by one, at the same instant, while they take over, while they start.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvs_harness::connection::{Connection, get};
use kvs_harness::present::Servers;
use kvs_harness::processes::{of_store, program_of, send};
use kvs_harness::random::Random;
use kvs_harness::store::Store;
use kvs_harness::wait::{SOON, eventually, eventually_some};
use rustix::process::{Pid, Signal};

use super::weather::Weather;

/// Most kills between two moments at which the store is whole: one that dies again and again at its start is launched after
/// growing pauses, and the storm is not about those.
const KILLS_A_ROUND_MAX: u64 = 5;

/// Who may be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victims {
    /// Front servers only.
    Front,
    /// Data servers only, the standby included.
    Data,
    /// All.
    All,
}

/// Kills servers of one store.
pub struct Conductor<'a> {
    store: &'a Store,
    weather: &'a Weather,
    random: Random,
    victims: Victims,
    has_standby: bool,
    waits: bool,
    /// Whether there are clients that count their answers.
    counts: bool,
    /// Who was killed since the store was whole; the kernel may still be at it.
    dead: Vec<Pid>,
    /// A client like the others: it is not to notice anything either.
    control: Connection,
}

impl<'a> Conductor<'a> {
    /// One for `store`, which has a standby or not.
    pub fn new(
        store: &'a Store,
        weather: &'a Weather,
        random: Random,
        victims: Victims,
        has_standby: bool,
    ) -> Self {
        let waits = std::env::var_os("KVS_STORM_WAIT").is_some();
        let control = store.connect_unix();
        Self { store, weather, random, victims, has_standby, waits, counts: false, dead: Vec::new(), control }
    }

    /// Demands that the clients of the storm get on before the next kill.
    pub fn with_clients(mut self) -> Self {
        self.counts = true;
        self
    }

    /// Kills until there were `kills` of them, or a fault, or somebody `has_left`.
    pub fn conduct(&mut self, kills: u64, has_left: &dyn Fn() -> bool) {
        while self.weather.kills() < kills && !self.weather.is_over() && !has_left() {
            let servers = self.await_whole();
            self.pause(30_000);
            let spared = self.spare(servers);
            let most = (kills - self.weather.kills()).min(KILLS_A_ROUND_MAX);
            let most = if self.waits { 1 } else { self.random.between(1, most) };
            self.round(spared, most);
        }
    }

    /// Waits until the store has come through the last kill.
    pub fn calm(&mut self) {
        if !self.weather.is_over() {
            self.await_whole();
        }
    }

    /// Kills each server once, one after the other, so that a store stands as it did the last time this was done.
    pub fn kill_each_once(&mut self) {
        let servers = self.await_whole();
        if self.victims != Victims::Data {
            self.kill(servers.front, "kvs-front, in order");
            self.await_whole();
        }
        if self.victims != Victims::Front {
            self.kill(servers.data, "kvs-data, in order");
            self.await_whole();
        }
    }

    fn kill(&mut self, pid: Pid, whom: &str) {
        self.weather.killing(format!("{whom} {pid}"));
        self.dead.push(pid);
        send(pid, Signal::KILL);
    }

    /// Who survives the next kills: any of those that hold all sockets, the active data server less often than others.
    fn spare(&mut self, servers: Servers) -> Pid {
        match (self.victims, servers.standby) {
            (Victims::Front, _) => servers.data,
            (Victims::Data, _) => servers.front,
            (Victims::All, None) if self.random.once_in(2) => servers.data,
            (Victims::All, None) => servers.front,
            (Victims::All, Some(standby)) => match self.random.below(5) {
                0 => servers.data,
                1 | 2 => servers.front,
                _ => standby,
            },
        }
    }

    fn round(&mut self, spared: Pid, most: u64) {
        let mut left = most;
        while left > 0 {
            let mut living = self.living_but(spared);
            // One of them, or all at the same instant.
            if !living.is_empty() && !self.random.once_in(3) {
                living = vec![living[self.random.below(living.len() as u64) as usize].clone()];
            }
            living.truncate(left as usize);
            let instant = if living.len() > 1 { " at the same instant" } else { "" };
            for (pid, program) in &living {
                self.weather.killing(format!("{program} {pid}{instant}, {spared} is spared"));
                self.dead.push(*pid);
            }
            living.iter().for_each(|(pid, _)| send(*pid, Signal::KILL));
            left = left.saturating_sub(living.len().max(1) as u64);
            match self.random.below(4) {
                0 => {}
                1 => self.pause(40_000),
                _ => self.pause(6_000),
            }
        }
    }

    fn living_but(&self, spared: Pid) -> Vec<(Pid, String)> {
        let programs: &[&str] = match self.victims {
            Victims::Front => &["kvs-front"],
            Victims::Data => &["kvs-data"],
            Victims::All => &["kvs-front", "kvs-data"],
        };
        let all = of_store(self.store.place().name()).into_iter().filter(|pid| *pid != spared);
        all.filter_map(|pid| Some((pid, program_of(pid)?)))
            .filter(|(_, program)| programs.contains(&program.as_str()))
            .collect()
    }

    fn pause(&mut self, most_us: u64) {
        std::thread::sleep(Duration::from_micros(self.random.below(most_us)));
    }

    /// Waits until each server that there should be holds every socket, and clients get on.
    fn await_whole(&mut self) -> Servers {
        let begun = Instant::now();
        let before = self.weather.answers().load(Ordering::Relaxed);
        let servers = eventually_some("all servers are there", SOON, || self.servers());
        // The next front server accepts when it knows all clients, and the next data server serves new ones behind all others.
        eventually("a new client is served", SOON, || {
            let new = Connection::welcomed_unix(&self.store.ready().unix);
            new.and_then(|mut new| new.ask(&get(b"any"))).is_ok()
        });
        eventually("the clients get on", SOON, || {
            let now = self.weather.answers().load(Ordering::Relaxed);
            !self.counts || now > before + 100 || self.weather.is_over()
        });
        self.dead.clear();
        self.weather.whole_again(begun.elapsed());
        servers
    }

    /// The servers, if all of them live.
    fn servers(&mut self) -> Option<Servers> {
        match Servers::told_to(&mut self.control) {
            Ok(servers) => {
                servers.filter(|all| all.standby.is_some() == self.has_standby && !all.any_of(&self.dead))
            }
            Err(error) => {
                self.weather.fault(format!("control: {error}"));
                self.weather.assert_fair();
                None
            }
        }
    }
}
