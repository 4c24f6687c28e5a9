//! The promise: no client notices that servers die. Not one connection is closed, no call fails, no answer is lost, doubled or out of
//! order, and every counter is exact.
//!
//! Method: 200 clients over TCP and unix sockets (frames by hand, the Rust library, C programs, a program in Python) each know what every
//! answer must be, and never connect again, while front server, data server and standby are killed at random moments: one, two at
//! the same instant, again while the next one takes over. In the end the counters are read over a new connection, `kvs-tools check`
//! verifies the segment, and the store is loaded once more from its backup file.
//!
//! - `KVS_STORM_KILLS` sets how many kills (100 in a normal run), `KVS_SEED` repeats one's decisions.
//! - `KVS_STORM_VICTIMS=front|data` spares the others.
//! - `KVS_STORM_WAIT=1` lets the store become whole again after each kill.

#[path = "storm/clients.rs"]
mod clients;
#[allow(dead_code, reason = "shared with the test of what clients leave")]
#[path = "storm/conductor.rs"]
mod conductor;
#[path = "storm/foreign.rs"]
mod foreign;
#[allow(dead_code, reason = "shared with tests that measure with many entries")]
mod journal;
#[path = "storm/talker.rs"]
mod talker;
#[path = "storm/weather.rs"]
mod weather;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Scope, scope};

use anyhow::Result;
use clients::Counters;
use conductor::{Conductor, Victims};
use foreign::Program;
use journal::{Journal, Writer};
use kvs_harness::connection::{Answer, get};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Ready, Store};
use kvs_harness::wait::SetOnDrop;
use talker::{Talker, Transport};
use weather::Weather;

/// How many clients of each kind there are, half of them over TCP: 200 connections in all.
const PIPELINED: usize = 40;
const TOGETHER: usize = 24;
const INSERTERS: usize = 30;
const CHAINS: usize = 24;
const LARGE: usize = 6;
const HALVES: usize = 16;
const THOUSANDS: usize = 8;
const LATE: usize = 8;
const HALF_CLOSED: usize = 12;
const JOURNALS: usize = 8;
const LIBRARY: usize = 8;
const C_PROGRAMS: usize = 2;
const C_THREADS: usize = 4;
const PYTHON_OVER_EACH: usize = 4;
const ALL: usize = PIPELINED
    + TOGETHER
    + INSERTERS
    + CHAINS
    + LARGE
    + HALVES
    + THOUSANDS
    + LATE
    + HALF_CLOSED
    + JOURNALS
    + LIBRARY
    + C_PROGRAMS * C_THREADS
    + 2 * PYTHON_OVER_EACH;
const _: () = assert!(ALL == 200);

/// What the clients share beside the store.
struct Crowd<'a> {
    ready: Ready,
    weather: &'a Weather,
    counters: Counters,
    /// Every number that was given for the shared counter.
    given: Mutex<Vec<i64>>,
    /// How often a client waited in `send`.
    waited: AtomicU64,
}

const SHARED_COUNTER: &str = "counted together";

impl<'a> Crowd<'a> {
    fn new(ready: &Ready, weather: &'a Weather) -> Self {
        let (counters, given) = (Mutex::default(), Mutex::default());
        Self { ready: ready.clone(), weather, counters, given, waited: AtomicU64::new(0) }
    }

    /// Connects `count` clients and lets each do `what` in a thread of its own.
    fn send_out<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        (kind, count): (&str, usize),
        random: &mut Random,
        what: impl Fn(&mut Talker<'a>) -> Result<()> + Send + Copy + 'scope,
    ) {
        for which in 0..count {
            let (name, transport) = called(kind, which);
            let mut client = Talker::connect(name, &self.ready, transport, self.weather, random)
                .expect("connected before the first kill");
            scope.spawn(move || {
                if let Err(fault) = what(&mut client) {
                    self.weather.fault(format!("{}: {fault:#}", client.name()));
                }
            });
        }
    }

    fn send_out_all<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, random: &mut Random) {
        let counters = &self.counters;
        self.send_out(scope, ("pipelined", PIPELINED), random, |client| {
            clients::count_pipelined(client, counters)
        });
        self.send_out(scope, ("together", TOGETHER), random, |client| {
            clients::count_together(client, SHARED_COUNTER, &self.given)
        });
        self.send_out(scope, ("unique", INSERTERS), random, |client| {
            clients::insert_unique(client, counters)
        });
        self.send_out(scope, ("chain", CHAINS), random, |client| clients::follow_chain(client, counters));
        self.send_out(scope, ("large", LARGE), random, clients::carry_large_values);
        self.send_out(scope, ("halves", HALVES), random, |client| clients::send_in_halves(client, counters));
        self.send_out(scope, ("thousands", THOUSANDS), random, |client| {
            clients::send_thousands(client, counters)
        });
        self.send_out(scope, ("late", LATE), random, |client| {
            clients::read_late(client).map(|waited| _ = self.waited.fetch_add(waited, Ordering::Relaxed))
        });
        self.send_out_half_closers(scope, random);
        self.send_out_library(scope, random);
    }

    fn send_out_half_closers<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, random: &mut Random) {
        for which in 0..HALF_CLOSED {
            let (name, transport) = called("half closed", which);
            let mut random = Random::new(random.number());
            scope.spawn(move || {
                let (ready, weather) = (&self.ready, self.weather);
                let mut connect = || Talker::connect(name.clone(), ready, transport, weather, &mut random);
                if let Err(fault) = clients::close_half(&mut connect, weather, &self.counters) {
                    weather.fault(format!("{name}: {fault:#}"));
                }
            });
        }
    }

    fn send_out_library<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, random: &mut Random) {
        for which in 0..LIBRARY {
            let (name, transport) = called("library", which);
            let mut random = Random::new(random.number());
            scope.spawn(move || {
                let (ready, weather) = (&self.ready, self.weather);
                let used =
                    clients::use_library(&name, ready, transport, weather, &mut random, &self.counters);
                if let Err(fault) = used {
                    weather.fault(format!("{name}: {fault:#}"));
                }
            });
        }
    }

    /// Holds every counter against what was answered, over a new connection.
    fn assert_counters(&self, store: &Store) {
        let mut given = self.given.lock().expect("all clients have left").clone();
        given.sort_unstable();
        assert!(given.iter().copied().eq(1..=given.len() as i64), "a number is missing or was given twice");
        let mut counters = self.counters.lock().expect("all clients have left").clone();
        counters.push((SHARED_COUNTER.into(), given.len() as i64));
        assert!(counters.len() > 100, "only {} counters", counters.len());
        let mut connection = store.connect_unix();
        for (name, count) in counters {
            let found = connection.ask(&get(name.as_bytes())).expect("read");
            let exact = match &found {
                Answer::Value(text) => *text == count.to_string().into_bytes(),
                Answer::Missing => count == 0,
                _ => false,
            };
            assert!(exact, "{name}: {found:?}, not {count}");
        }
    }
}

/// Name and transport of a client.
fn called(kind: &str, which: usize) -> (String, Transport) {
    let transport = if which.is_multiple_of(2) { Transport::Tcp } else { Transport::Unix };
    (format!("{kind} {which}"), transport)
}

fn programs(store: &Store) -> Vec<Program> {
    let in_c = (0..C_PROGRAMS).map(|number| Program::in_c(store, number, C_THREADS));
    in_c.chain(Program::in_python(store, PYTHON_OVER_EACH)).collect()
}

/// Lets clients work while `victims` die, and verifies all there is to verify.
fn storm(launch: &Launch, kills: u64, victims: Victims, has_standby: bool) {
    let store = launch.start();
    let mut random = Random::new(seed());
    let weather = Weather::new();
    let crowd = Crowd::new(store.ready(), &weather);
    let mut journals: Vec<Journal> =
        (0..JOURNALS as u64).map(|which| Journal::new(which, &mut random)).collect();
    let programs = programs(&store);
    scope(|scope| {
        let _ends = SetOnDrop(weather.over());
        crowd.send_out_all(scope, &mut random);
        for journal in &mut journals {
            let writer = Writer::new(store.ready(), journal, weather.over(), weather.answers());
            scope.spawn(|| writer.run());
        }
        let random = Random::new(random.number());
        let mut conductor = Conductor::new(&store, &weather, random, victims, has_standby).with_clients();
        conductor.conduct(kills, &|| programs.iter().any(Program::has_ended));
        conductor.calm();
        println!("{}", weather.summary());
    });
    for program in programs {
        match program.finish() {
            Ok(said) => println!("{said}"),
            Err(fault) => weather.fault(format!("{fault:#}")),
        }
    }
    for journal in journals.iter().filter(|journal| journal.in_doubt() > 0) {
        weather.fault(format!("a journal: a connection was lost with {} writes", journal.in_doubt()));
    }
    weather.assert_fair();
    let waited = crowd.waited.load(Ordering::Relaxed);
    println!("{}; {waited} times a client waited in send", weather.summary());
    assert!(waited > 0, "no client ever waited in send");
    assert_sound(&store, &crowd, &journals);
    // The backup file has come through as well.
    assert!(store.place().tools(&["quit"]).status.success());
    let (place, launch, _) = store.await_end();
    std::fs::remove_file(place.segment()).expect("a segment");
    let store = launch.start_at(place);
    assert_eq!(store.ready().start, "loaded");
    assert_sound(&store, &crowd, &journals);
}

fn assert_sound(store: &Store, crowd: &Crowd<'_>, journals: &[Journal]) {
    crowd.assert_counters(store);
    let mut connection = store.connect_unix();
    let faults: Vec<String> = journals.iter().flat_map(|journal| journal.faults(&mut connection)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let check = store.place().tools_by_name(&["check"]);
    assert!(check.status.success(), "kvs-tools check: {}", String::from_utf8_lossy(&check.stdout));
}

fn kills() -> u64 {
    std::env::var("KVS_STORM_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
}

fn victims() -> Victims {
    match std::env::var("KVS_STORM_VICTIMS").as_deref() {
        Ok("front") => Victims::Front,
        Ok("data") => Victims::Data,
        _ => Victims::All,
    }
}

fn launch(standby: &str) -> Launch {
    Launch::new().capacity("512MiB").option("--durability", "os").option("--standby", standby)
}

#[test]
fn no_client_notices_that_servers_die() {
    storm(&launch("on"), kills(), victims(), true);
}

#[test]
fn no_client_notices_that_servers_die_without_a_standby() {
    storm(&launch("off"), kills(), victims(), false);
}
