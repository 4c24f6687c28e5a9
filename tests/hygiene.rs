//! The promise: whoever connects and leaves, in whatever way, leaves nothing: no descriptor in any process, no connection slot, no
//! buffer; also when servers die meanwhile.
//!
//! Method: clients connect over TCP and unix sockets and leave in order, in the middle of a request or of an answer, by a reset, before a
//! word, after nonsense, or refused because there are too many, while servers are killed. Before and after that each server is killed
//! once and the store left alone, so that both times it stands in the same way; then everything must be what it was.
//!
//! `KVS_CONNECTS` sets how many clients (6,000 in a normal run; `KVS_CONNECTS=1000000` is the whole), `KVS_KILLS` how many kills (40).

#[allow(dead_code, reason = "shared with the storm")]
#[path = "storm/conductor.rs"]
mod conductor;
#[allow(dead_code, reason = "shared with the storm")]
#[path = "storm/weather.rs"]
mod weather;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use conductor::{Conductor, Victims};
use kvs_core::wire::ErrorCode;
use kvs_harness::connection::{Answer, Connection, Socket, get, hello, increment, set};
use kvs_harness::processes::{of_store, open_descriptors, program_of};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Ready, Store};
use kvs_harness::wait::{SOON, SetOnDrop};
use rustix::net::sockopt::set_socket_linger;
use weather::Weather;

/// Nothing that is under way when a store is left alone takes so long.
const SETTLED: Duration = Duration::from_millis(300);
const CLIENTS: usize = 12;
const PHASES: u64 = 4;
/// Fewer than all clients and the test itself at once, so that some are refused.
const CONNECTIONS_MAX: usize = CLIENTS;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The ways to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    InOrder,
    WithoutAWord,
    InHalfAFrame,
    InHalfALargeValue,
    BeforeTheAnswers,
    Reset,
    HalfClosed,
    AfterNonsense,
    AsHttp,
}

const WAYS: [Way; 9] = [
    Way::InOrder,
    Way::WithoutAWord,
    Way::InHalfAFrame,
    Way::InHalfALargeValue,
    Way::BeforeTheAnswers,
    Way::Reset,
    Way::HalfClosed,
    Way::AfterNonsense,
    Way::AsHttp,
];

/// How far clients came.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    left: u64,
    /// There were too many.
    refused: u64,
    /// Their server died before they were welcomed.
    lost: u64,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.left += other.left;
        self.refused += other.refused;
        self.lost += other.lost;
    }

    fn count(&mut self, result: &io::Result<()>) {
        match result {
            Ok(()) => self.left += 1,
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => self.refused += 1,
            Err(_) => self.lost += 1,
        }
    }
}

/// A client comes and leaves that way.
fn come_and_leave(way: Way, ready: &Ready, random: &mut Random) -> io::Result<()> {
    let mut client =
        if random.once_in(2) { Connection::tcp(ready.tcp)? } else { Connection::unix(&ready.unix)? };
    match way {
        Way::WithoutAWord => return Ok(()),
        Way::AfterNonsense => {
            client.send_raw(&[7, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9])?;
            return client.read_to_end().map(drop);
        }
        Way::AsHttp => {
            client.send_raw(b"GET / HTTP/1.1\r\n\r\n")?;
            return client.read_to_end().map(drop);
        }
        _ => {}
    }
    match client.ask(&hello())? {
        Answer::Welcome { .. } => {}
        Answer::Error(ErrorCode::TooManyConnections, _) => return Err(io::ErrorKind::QuotaExceeded.into()),
        other => return Err(io::Error::other(format!("{other:?}"))),
    }
    match way {
        Way::InHalfAFrame => leave_in_half(&mut client, 30, random),
        Way::InHalfALargeValue => leave_in_half(&mut client, 300_000, random),
        Way::BeforeTheAnswers => ask_much(&mut client),
        Way::Reset => {
            ask_much(&mut client)?;
            match client.socket() {
                Socket::Tcp(stream) => set_socket_linger(stream, Some(Duration::ZERO))?,
                Socket::Unix(_) => {}
            }
            Ok(())
        }
        Way::HalfClosed => {
            ask_much(&mut client)?;
            client.socket().shutdown(Shutdown::Write)?;
            client.socket().read_to_end(&mut Vec::new()).map(drop)
        }
        _ => {
            client.ask(&increment(b"came", 1))?;
            client.ask(&set(b"small", b"value")).map(drop)
        }
    }
}

fn leave_in_half(client: &mut Connection, length: usize, random: &mut Random) -> io::Result<()> {
    client.queue(&set(b"half", &vec![b'h'; length]));
    let frame = client.take_queued();
    client.socket().write_all(&frame[..1 + random.below(frame.len() as u64 - 1) as usize])
}

/// Asks for more than a connection's buffers hold.
fn ask_much(client: &mut Connection) -> io::Result<()> {
    (0..30).for_each(|_| _ = client.queue(&get(b"some kilobytes")));
    client.flush()
}

/// What must be the same before and after.
#[derive(Debug, PartialEq, Eq)]
struct Belongings {
    /// Open descriptors of each process, by its program.
    descriptors: Vec<(String, usize)>,
    /// Connection slots in use.
    slots: usize,
    /// Large values and buffers, in bytes, and blocks of entries in use.
    block_bytes: u64,
    entry_blocks: u64,
    /// Descriptors, slots and buffers as `kvs-tools stats` counts them.
    counted: BTreeMap<String, u64>,
}

fn belongings(place: &Place) -> Belongings {
    let is_counted = |name: &str| {
        name.starts_with("descriptors_")
            || ["connection_slots", "connection_buffers", "connection_buffer_bytes"].contains(&name)
    };
    let statistics = place.statistics();
    let counted: BTreeMap<String, u64> = statistics
        .as_object()
        .expect("counters")
        .iter()
        .filter(|(name, _)| is_counted(name))
        .filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)))
        .collect();
    assert!(counted.len() >= 5, "{counted:?}");
    let inspected = place.tools_by_name(&["--json", "inspect"]);
    let segment: serde_json::Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    let classes = segment["memory"]["classes"].as_array().expect("size classes");
    let mut descriptors: Vec<(String, usize)> = of_store(place.name())
        .into_iter()
        .filter_map(|pid| Some((program_of(pid)?, open_descriptors(pid).ok()?)))
        .collect();
    descriptors.sort();
    Belongings {
        descriptors,
        slots: segment["connections"].as_array().expect("connections").len(),
        block_bytes: segment["memory"]["block_bytes"].as_u64().expect("a number"),
        entry_blocks: classes.iter().filter_map(|class| class["used"].as_u64()).sum(),
        counted,
    }
}

/// Lets clients come and leave: `count` of them, and more until it is `calm`.
fn come_and_leave_all(
    ready: &Ready,
    count: u64,
    calm: &AtomicBool,
    random: &mut Random,
) -> BTreeMap<Way, Tally> {
    let come = AtomicU64::new(0);
    let goes_on = &|| come.fetch_add(1, Ordering::Relaxed) < count || !calm.load(Ordering::Relaxed);
    let mut all: BTreeMap<Way, Tally> = BTreeMap::new();
    scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let mut random = Random::new(random.number());
                scope.spawn(move || {
                    let mut tallies: BTreeMap<Way, Tally> = BTreeMap::new();
                    while goes_on() {
                        let way = WAYS[random.below(WAYS.len() as u64) as usize];
                        tallies.entry(way).or_default().count(&come_and_leave(way, ready, &mut random));
                    }
                    tallies
                })
            })
            .collect();
        for client in clients {
            for (way, tally) in client.join().expect("a client") {
                all.entry(way).or_default().add(tally);
            }
        }
    });
    all
}

#[test]
fn clients_that_come_and_leave_while_servers_die_leave_nothing() {
    let (connects, kills) = (number("KVS_CONNECTS", 6_000), number("KVS_KILLS", 40));
    let mut random = Random::new(seed());
    let store = Launch::new().option("--max-connections", &CONNECTIONS_MAX.to_string()).start();
    let ready = store.ready().clone();
    fill(&store);
    let weather = Weather::new();
    let mut conductor = Conductor::new(&store, &weather, Random::new(random.number()), Victims::All, true);
    conductor.kill_each_once();
    let before = settled(store.place());
    let mut all = Tally::default();
    for phase in 1..=PHASES {
        let calm = AtomicBool::new(false);
        let tallies = scope(|scope| {
            let mut random = Random::new(random.number());
            let (ready, calm) = (&ready, &calm);
            let clients =
                scope.spawn(move || come_and_leave_all(ready, connects / PHASES, calm, &mut random));
            let calms = SetOnDrop(calm);
            conductor.conduct(weather.kills() + kills / PHASES, &|| clients.is_finished());
            drop(calms);
            clients.join().expect("clients")
        });
        for (way, tally) in tallies {
            assert!(tally.left > 0, "no client ever left {way:?} in phase {phase}");
            all.add(tally);
        }
        conductor.kill_each_once();
        assert_same(&store, &before);
    }
    weather.assert_fair();
    println!("{all:?}; {}; {before:?}", weather.summary());
    assert!(all.refused > 0, "nobody was refused");
    let check = store.place().tools_by_name(&["check"]);
    assert!(check.status.success(), "kvs-tools check: {}", String::from_utf8_lossy(&check.stdout));
}

/// What clients read and write over; each value in one block of a slab, so that blocks of entries and buffers are told apart.
fn fill(store: &Store) {
    let mut connection = store.connect();
    connection.ask(&set(b"some kilobytes", &[b's'; 2_000])).expect("stored");
    connection.ask(&set(b"small", b"value")).expect("stored");
    connection.ask(&increment(b"came", 1)).expect("counted");
}

/// What there is when nothing has changed for a while: who was killed last, or has just left, may still be given back.
fn settled(place: &Place) -> Belongings {
    let end = Instant::now() + SOON;
    let (mut last, mut since) = (belongings(place), Instant::now());
    while since.elapsed() < SETTLED {
        let now = belongings(place);
        if now != last {
            assert!(Instant::now() < end, "it goes on changing: {last:?}, {now:?}");
            (last, since) = (now, Instant::now());
        }
    }
    last
}

fn assert_same(store: &Store, before: &Belongings) {
    let end = Instant::now() + SOON;
    while belongings(store.place()) != *before {
        assert!(Instant::now() < end, "before {before:?}, now {:?}", belongings(store.place()));
    }
}
