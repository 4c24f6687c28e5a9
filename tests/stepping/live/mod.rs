//! Real servers, killed at every instruction of the worker's loop while a client is connected that must not notice.
//!
//! ```text
//! client   sends ──────────────────────────► gets every answer, to the byte, on the same connection; asks on
//! worker   asleep ─► wakes ─ step, step … ─ SIGKILL
//! next one                                  takes over
//! ```
//!
//! One way of the worker, from where it wakes to where it sleeps again, is recorded instruction by instruction; then the data server is killed
//! at one instruction of it after the other, each time the one that took over from the one before.
//!
//! | module | what it is |
//! |---|---|
//! | [`cases`] | what the client does |
//! | [`talk`] | a client that knows every byte that must come |
//! | [`servers`] | the store |
//! | [`profile`] | one way of the worker |

mod cases;
mod profile;
mod servers;
mod talk;

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use cases::{Case, KINDS, Kind};
use kvs_core::control::Transport;
use kvs_core::wire::ResponseBody;
use kvs_harness::connection::increment;
use kvs_harness::random::{self, Random};
use nix::unistd::Pid;
use profile::Profile;
use servers::{Positions, Servers};
use talk::Talk;

use crate::pages::{Pages, Watch};
use crate::tracee::{self, Event, Tracee};
use crate::violation::Violation;

/// Tries to kill at an instruction again when the worker went another way.
const RETRIES: u32 = 5;
/// How long a worker may sleep on when the client has done something.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time for the kills of a case in a sample, at least.
const SHARE_MIN: Duration = Duration::from_millis(1500);
/// Of a sample, one kill in so many is at any instruction.
const ANY_EVERY: u64 = 5;

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
struct Tried {
    points: u64,
    edges: u64,
    kills: u64,
    /// Kills at an instruction of [`Profile::edges`].
    edge_kills: u64,
    /// The kernel had more of the input, or of the output, than the slot said.
    ahead: (u64, u64),
    /// Kills elsewhere than planned, since the worker went another way.
    elsewhere: u64,
    /// Instructions at which every try ended elsewhere.
    missed: u64,
}

impl Tried {
    fn add(&mut self, other: Tried) {
        self.points += other.points;
        self.edges += other.edges;
        self.kills += other.kills;
        self.edge_kills += other.edge_kills;
        self.ahead.0 += other.ahead.0;
        self.ahead.1 += other.ahead.1;
        self.elsewhere += other.elsewhere;
        self.missed += other.missed;
    }
}

/// Kills at every instruction of every case whose name contains `only`; or, given a time, at some.
///
/// # Errors
/// A [`Violation`] at the first that a client notices.
pub fn run(only: &str, time: Option<Duration>) -> anyhow::Result<()> {
    tracee::fix_addresses()?;
    println!(
        "| case | instructions | edges | kills | at edges | input ahead | output ahead | elsewhere | missed | seconds |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let (seed, began, total) = (random::seed(), Instant::now(), Mutex::new(Tried::default()));
    let lane = |has_standby: bool| {
        let done = Lane::start(has_standby, seed)?.sweep(only, time)?;
        total.lock().map_err(|_| anyhow::anyhow!("the other lane failed"))?.add(done);
        anyhow::Ok(())
    };
    thread::scope(|scope| {
        let lanes = [true, false].map(|has_standby| scope.spawn(move || lane(has_standby)));
        lanes
            .into_iter()
            .try_for_each(|lane| lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let total = *total.lock().map_err(|_| anyhow::anyhow!("a lane failed"))?;
    row("all", &total, began.elapsed());
    Ok(())
}

fn row(name: &str, tried: &Tried, took: Duration) {
    let Tried { points, edges, kills, edge_kills, ahead, elsewhere, missed } = tried;
    println!(
        "| {name} | {points} | {edges} | {kills} | {edge_kills} | {} | {} | {elsewhere} | {missed} | {:.0} |",
        ahead.0,
        ahead.1,
        took.as_secs_f64()
    );
}

/// A store that is killed again and again.
struct Lane {
    servers: Servers,
    has_standby: bool,
    random: Random,
    /// A client that nobody serves while servers die; it is to notice nothing either.
    bystander: Talk,
    bystander_count: i64,
}

/// A worker that has just been woken.
struct Woken {
    data: Pid,
    worker: Tracee,
    talk: Talk,
    before: Option<Positions>,
}

impl Lane {
    fn start(has_standby: bool, seed: u64) -> anyhow::Result<Self> {
        let servers = Servers::start(has_standby)?;
        let bystander = Talk::new(servers.store.ready(), Transport::Tcp, false)?;
        Ok(Self { servers, has_standby, random: Random::new(seed), bystander, bystander_count: 0 })
    }

    fn sweep(mut self, only: &str, time: Option<Duration>) -> anyhow::Result<Tried> {
        let mut chosen = Vec::new();
        for (kind, name) in KINDS {
            for (transport, over) in [(Transport::Tcp, "TCP"), (Transport::Unix, "unix socket")] {
                let standby = if self.has_standby { "standby" } else { "no standby" };
                let name = format!("{name}, {over}, {standby}");
                if name.contains(only) {
                    chosen.push((kind, transport, name));
                }
            }
        }
        let (began, mut total) = (Instant::now(), Tried::default());
        while !chosen.is_empty() && time.is_none_or(|time| began.elapsed() < time) {
            let next = if time.is_some() { self.random.below(chosen.len() as u64) as usize } else { 0 };
            let (kind, transport, name) = chosen.remove(next);
            let start = Instant::now();
            let share = time.map(|time| {
                let left = time.saturating_sub(began.elapsed());
                (left / (chosen.len() as u32 + 1)).max(SHARE_MIN)
            });
            let tried = self.try_case(kind, transport, share);
            let tried = tried.map_err(|error| self.explain(&name, error))?;
            row(&name, &tried, start.elapsed());
            total.add(tried);
        }
        self.servers.await_whole()?;
        self.servers.check()?;
        Ok(total)
    }

    fn explain(&self, name: &str, error: anyhow::Error) -> anyhow::Error {
        let log = self.servers.store.place().log();
        let tail: Vec<&str> = log.lines().rev().take(12).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        let inspected = self.servers.store.place().tools_by_name(&["inspect"]);
        let inspected = String::from_utf8_lossy(&inspected.stdout);
        let what = format!("{name}: {error:#}\n{}\n{inspected}", tail.join("\n"));
        if error.chain().any(|cause| cause.is::<Violation>()) {
            Violation(what).into()
        } else {
            anyhow::anyhow!(what)
        }
    }

    fn try_case(
        &mut self,
        kind: Kind,
        transport: Transport,
        share: Option<Duration>,
    ) -> anyhow::Result<Tried> {
        let mut case = Case::new(&self.servers, kind, transport)?;
        // The one that is recorded has taken over, like all that are killed.
        let woken = self.wake(&mut case)?;
        self.kill(&mut case, woken, "it woke")?;
        let mut profile = self.record(&mut case)?;
        let mut tried = Tried::default();
        let (mut next, mut missed, mut is_new) = (0, 0u32, true);
        let until = share.map(|share| Instant::now() + share);
        let mut edges = self.shuffled(&profile.edges);
        while until.is_none_or(|until| Instant::now() < until) {
            let index = match until {
                None if next >= profile.path.length() => break,
                None => next,
                Some(_) => match edges.pop() {
                    Some(edge) if !self.random.once_in(ANY_EVERY) => edge,
                    _ => self.random.below(profile.path.length() as u64) as usize,
                },
            };
            let followed = self.kill_at(&mut case, &profile, index, &mut tried)?;
            missed = if followed { 0 } else { missed + 1 };
            if missed > RETRIES && !is_new {
                // Once it went another way when it was recorded: a list that grew, a lock that was held.
                (profile, missed, is_new) = (self.record(&mut case)?, 0, true);
            } else if followed || missed > RETRIES {
                tried.missed += u64::from(!followed);
                (next, missed, is_new) = (next + 1, 0, false);
            }
        }
        (tried.points, tried.edges) = (profile.path.length() as u64, profile.edges.len() as u64);
        self.servers.await_whole()?;
        self.servers.check()?;
        Ok(tried)
    }

    fn shuffled(&mut self, edges: &[usize]) -> Vec<usize> {
        let mut edges = edges.to_vec();
        for index in (1..edges.len()).rev() {
            edges.swap(index, self.random.below(index as u64 + 1) as usize);
        }
        edges
    }

    /// Brings the worker to where it has just been woken by the client.
    fn wake(&mut self, case: &mut Case) -> anyhow::Result<Woken> {
        let data = self.servers.await_whole()?;
        let mut talk = case.prepare(&self.servers)?;
        let mut worker = self.servers.stop_worker(data)?;
        let before = self.servers.positions(talk.id)?;
        case.act(&mut talk)?;
        let until = Instant::now() + PATIENCE;
        while worker.wait()? == Event::Asleep {
            ensure!(Instant::now() < until, "the worker does not wake for what the client does");
            case.act_on(&mut talk)?;
        }
        Ok(Woken { data, worker, talk, before })
    }

    /// Records the way that the worker goes.
    fn record(&mut self, case: &mut Case) -> anyhow::Result<Profile> {
        let Woken { mut worker, talk, .. } = self.wake(case)?;
        let mut pages = Pages::default();
        let mut watch = Watch::new(self.servers.view.view(), &self.servers.pages()?)?;
        while worker.run_to_call()? != Event::Asleep {}
        watch.changed(self.servers.view.view(), |change| _ = pages.add(change.offset))?;
        worker.release()?;
        case.finish(talk)?;
        let Woken { mut worker, talk, .. } = self.wake(case)?;
        let profile = Profile::record(&self.servers, &mut worker, &pages)?;
        worker.release()?;
        case.finish(talk)?;
        Ok(profile)
    }

    /// Kills at one instruction; false if the worker never came there.
    fn kill_at(
        &mut self,
        case: &mut Case,
        profile: &Profile,
        index: usize,
        tried: &mut Tried,
    ) -> anyhow::Result<bool> {
        let mut woken = self.wake(case)?;
        let followed = woken.worker.follow(&profile.path, index)?;
        let now = self.servers.positions(woken.talk.id)?;
        tried.kills += 1;
        let mut place = format!("killed after {index} of {} instructions", profile.path.length());
        if !followed {
            tried.elsewhere += 1;
            place.push_str(", or elsewhere");
        } else if let (Some(before), Some(now)) = (woken.before, now) {
            let (input, output) = profile.is_ahead(index, before, now);
            tried.ahead.0 += u64::from(input);
            tried.ahead.1 += u64::from(output);
            place.push_str(&format!("; its slot said {now:?}, and {before:?} when it woke"));
        }
        tried.edge_kills += u64::from(followed && profile.edges.binary_search(&index).is_ok());
        self.kill(case, woken, &place)?;
        Ok(followed)
    }

    /// Kills, and holds the promise against what the clients get.
    fn kill(&mut self, case: &mut Case, woken: Woken, place: &str) -> anyhow::Result<()> {
        let Woken { data, worker, talk, .. } = woken;
        self.servers.kill(data, worker)?;
        case.finish(talk).context(place.to_owned())?;
        self.bystander_count += 1;
        let answer = ResponseBody::Number { value: self.bystander_count };
        self.bystander.queue(increment(b"bystander", 1), answer);
        self.bystander.finish().with_context(|| format!("{place}: a client that was idle"))
    }
}
