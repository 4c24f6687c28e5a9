//! The promise: either server may be killed or stopped at any moment, again and again, and the other one replaces it; clients that
//! are served don't notice the front server's death, and an orderly end is one with whatever front server there is.
//!
//! Method: real SIGKILLs and SIGSTOPs under load. Connections that were welcomed before a front server's death must live on, and
//! new ones wait for the next. Where both may die the journals of the writers are held against the store, and
//! `kvs-tools check` verifies the segment. `KVS_KILLS` sets how many random kills are made (80 in a normal run).

#[allow(
    dead_code,
    reason = "shared with the test of the data server's death, which measures with many entries"
)]
mod journal;

use std::fs::{self, File};
use std::mem::offset_of;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use journal::{Journal, Writer};
use kvs_core::segment::layout::{Regions, WorkerSlot};
use kvs_harness::binaries;
use kvs_harness::connection::{Answer, Connection, get, hello, increment, set};
use kvs_harness::processes::{Paused, kill_store, of_store, open_descriptors, send};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, eventually, eventually_some};
use rustix::process::Signal;
use serde_json::Value;

const WRITERS: u64 = 4;

/// Writes with all journals while `deeds` are done.
fn under_load<T>(store: &Store, journals: &mut [Journal], deeds: impl FnOnce(&AtomicU64) -> T) -> T {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for journal in journals.iter_mut() {
            let writer = Writer::new(store.ready(), journal, &stop, &written);
            scope.spawn(|| writer.run());
        }
        let _stops = StopOnDrop(&stop);
        await_progress(&written);
        deeds(&written)
    })
}

fn await_progress(written: &AtomicU64) {
    let before = written.load(Ordering::Relaxed);
    eventually("the writers get on", SOON, || written.load(Ordering::Relaxed) > before + 200);
}

/// Lets the writers stop in a panic too; without it the scope would wait for them for ever.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn journals(random: &mut Random) -> Vec<Journal> {
    (0..WRITERS).map(|which| Journal::new(which, random)).collect()
}

fn verify(store: &Store, journals: &[Journal]) {
    let mut connection = store.connect_unix();
    let faults: Vec<String> =
        journals.iter().flat_map(|journal| journal.faults(&mut connection)).take(20).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let check = store.place().tools_by_name(&["check"]);
    assert!(check.status.success(), "kvs-tools check: {}", String::from_utf8_lossy(&check.stdout));
}

/// A new connection that is served. One that reached a front server just before its death may be lost; the next one counts.
fn new_client(store: &Store) -> Connection {
    eventually_some("a new client is served", SOON, || {
        let mut client = Connection::welcomed_tcp(store.ready().tcp).ok()?;
        client.ask(&get(b"any")).ok()?;
        Some(client)
    })
}

fn statistics(place: &Place) -> Value {
    eventually_some("the store tells its counters", SOON, || {
        let told = place.tools(&["stats", "--json"]);
        told.status.success().then(|| serde_json::from_slice(&told.stdout).expect("JSON"))
    })
}

fn console(place: &Place, command: &str) -> String {
    use std::io::Write;
    use std::process::Stdio;
    let mut tool = place.tools_command();
    let mut tool = tool.arg("console").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("started");
    writeln!(tool.stdin.take().expect("a pipe"), "{command}").expect("it reads");
    let output = tool.wait_with_output().expect("ended");
    assert!(output.status.success(), "console: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

fn assert_nothing_left(place: &Place) {
    assert_eq!(of_store(place.name()), [], "no process is left");
    assert!(!place.unix().exists(), "the socket's file is removed");
    assert!(!place.unix().with_extension("console").exists(), "the console's file is removed");
    assert!(place.segment().exists(), "the segment stays");
}

#[test]
fn front_killed_under_load_clients_notice_nothing_and_new_ones_are_served() {
    const KILLS: u64 = 20;
    let store = Store::start();
    let mut journals = journals(&mut Random::new(seed()));
    under_load(&store, &mut journals, |written| {
        let descriptors = open_descriptors(store.data_pid()).expect("it runs");
        for kill in 1..=KILLS {
            let dead = store.kill_front();
            new_client(&store);
            assert_ne!(store.present_front_pid(), dead);
            let told = statistics(store.place());
            assert_eq!((&told["front_restarts"], &told["data_restarts"]), (&kill.into(), &0.into()));
            await_progress(written);
        }
        // Two came with the first front server's successor: its process, and the socket that is no longer standard input.
        eventually("no descriptor is left over", SOON, || {
            open_descriptors(store.data_pid()).expect("it runs") <= descriptors + 2
        });
    });
    assert_eq!(journals.iter().map(Journal::in_doubt).sum::<u64>(), 0, "no connection was lost");
    assert_eq!(store.data_pid(), store.ready().data, "the data server is the same");
    assert_eq!(store.further_output(), Vec::<String>::new(), "the ready line was printed once");
    verify(&store, &journals);
}

#[test]
fn front_relaunched_knows_all_clients_and_keeps_the_limit() {
    let store = Launch::new().option("--max-connections", "150").start();
    let mut clients: Vec<Connection> =
        (0..149).map(|at| if at % 2 == 0 { store.connect() } else { store.connect_unix() }).collect();
    store.kill_front();
    let last = new_client(&store);
    let refused = Connection::welcomed_tcp(store.ready().tcp).expect_err("one too many");
    assert!(refused.to_string().contains("TooManyConnections"), "{refused}");
    clients.truncate(100);
    drop(last);
    eventually("the places of clients that left are free", SOON, || {
        Connection::welcomed_unix(&store.ready().unix).is_ok()
    });
    let listed = console(store.place(), "clients");
    assert_eq!(listed.matches("  tcp   127.0.0.1:").count(), 50, "{listed}");
    for client in &mut clients {
        assert!(matches!(client.ask(&increment(b"all", 1)).expect("served"), Answer::Number(_)));
    }
}

#[test]
fn front_relaunched_lets_nobody_in_before_it_knows_all_clients() {
    let place = Place::new();
    let store = launch_of_copies(&place).option("--max-connections", "50").start_at(place);
    let clients: Vec<Connection> = (0..48).map(|_| store.connect()).collect();
    replace_by_script(store.place(), "kvs-front", "#!/bin/sh\nexit 3\n");
    store.kill_front();
    let mut waiting: Vec<Connection> = (0..10)
        .map(|_| {
            let mut new = Connection::tcp(store.ready().tcp).expect("the port is open");
            new.queue(&hello());
            new.flush().expect("sent");
            new
        })
        .collect();
    put_back(store.place(), "kvs-front");
    let welcomed = |new: &mut Connection| matches!(new.receive(), Ok((_, Answer::Welcome { .. })));
    assert_eq!(waiting.iter_mut().map(welcomed).filter(|welcomed| *welcomed).count(), 2);
    drop(clients);
}

#[test]
fn data_killed_under_a_relaunched_front_is_replaced_as_ever() {
    let store = Store::start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    for round in 1..=5 {
        store.kill_front();
        let mut before = new_client(&store);
        store.kill_data();
        assert!(before.ask(&get(b"kept")).is_err(), "its connection has ended");
        assert_eq!(new_client(&store).ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
        let told = statistics(store.place());
        assert_eq!((&told["front_restarts"], &told["data_restarts"]), (&round.into(), &round.into()));
    }
}

/// Kills that are made at random; how many. Between two of them there is no time, a little, or as much as a relaunch takes.
fn kill_at_random(store: &Store, random: &mut Random) -> usize {
    let pause = |random: &mut Random| thread::sleep(Duration::from_micros(random.below(6_000)));
    let programs = match random.below(6) {
        0 | 1 => vec!["kvs-front"],
        2 => vec!["kvs-data"],
        3 => vec!["kvs-front", "kvs-data"],
        4 => vec!["kvs-data", "kvs-front"],
        _ => vec!["kvs-front", "kvs-front", "kvs-data", "kvs-data"],
    };
    let mut sent = 0;
    for program in programs {
        if let Some(pid) = store.find(program) {
            send(pid, Signal::KILL);
            sent += 1;
        }
        pause(random);
    }
    sent
}

/// Whether the store has come through: it serves, or else nothing of it is left.
fn survives(store: &Store) -> bool {
    eventually_some("the store serves, or all of it is dead", SOON, || {
        let served = Connection::welcomed_unix(&store.ready().unix).and_then(|mut new| new.ask(&get(b"any")));
        let dead = || of_store(store.place().name()).is_empty();
        if served.is_ok() { Some(true) } else { dead().then_some(false) }
    })
}

#[test]
fn servers_killed_at_random_lose_no_acknowledged_write_and_are_never_two() {
    let kills = std::env::var("KVS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(80);
    let mut random = Random::new(seed());
    let mut journals = journals(&mut random);
    let (mut sent, mut restarts) = (0, 0);
    let mut store = Launch::new().capacity("512MiB").start();
    while sent < kills {
        let survived = under_load(&store, &mut journals, |written| {
            let mut survived = true;
            let phase = sent + 40;
            while survived && sent < phase.min(kills) {
                sent += kill_at_random(&store, &mut random);
                survived = survives(&store);
                if survived {
                    await_progress(written);
                }
            }
            survived
        });
        if !survived {
            restarts += 1;
            let (place, launch, _) = store.await_end();
            store = launch.start_at(place);
            assert_eq!(store.ready().start, "attached");
        }
        new_client(&store);
        let mut living: Vec<_> = of_store(store.place().name())
            .into_iter()
            .filter_map(kvs_harness::processes::program_of)
            .collect();
        living.sort();
        assert_eq!(living, ["kvs-data", "kvs-front"], "one of each");
        verify(&store, &journals);
    }
    let acknowledged: u64 = journals.iter().map(Journal::acknowledged).sum();
    println!("{sent} kills, {restarts} times nobody was left; {acknowledged} writes acknowledged");
    // The backup file has come through as well.
    assert!(store.place().tools(&["quit"]).status.success());
    let (place, launch, _) = store.await_end();
    std::fs::remove_file(place.segment()).expect("a segment");
    let store = launch.start_at(place);
    assert_eq!(store.ready().start, "loaded");
    verify(&store, &journals);
}

#[test]
fn both_killed_and_started_by_hand_go_on_where_they_were() {
    let store = Store::start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    store.kill_front();
    new_client(&store);
    kill_store(store.place().name());
    let (place, launch, _) = store.await_end();
    assert!(place.unix().exists() && place.unix().with_extension("console").exists(), "stale files");
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 1));
    assert_eq!(store.connect_unix().ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert!(console(store.place(), "status").contains("entries"));
}

#[test]
fn front_stopped_is_killed_and_replaced_within_the_timeout() {
    let store = Launch::new().option("--hang-timeout", "500ms").start();
    let mut before = store.connect();
    let hung = store.front_pid();
    send(hung, Signal::STOP);
    eventually("the one that hangs is dead", SOON, || !of_store(store.place().name()).contains(&hung));
    new_client(&store);
    assert_eq!(before.ask(&set(b"served", b"on")).expect("served"), Answer::Stored);
    assert!(store.place().log().contains("the front server has stood still for 500ms"));
    assert_eq!(statistics(store.place())["front_restarts"], 1);
}

#[test]
fn data_stopped_is_killed_and_replaced_within_the_timeout() {
    let store = Launch::new().option("--hang-timeout", "500ms").start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    for _ in 0..2 {
        let hung = store.data_pid();
        send(hung, Signal::STOP);
        let mut next = new_client(&store);
        assert_eq!(next.ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
        assert_ne!(store.data_pid(), hung);
        // The next one is stopped under a front server that did not launch it.
        store.kill_front();
        new_client(&store);
    }
    assert!(store.place().log().contains("has stood still for 500ms"));
}

#[test]
fn servers_that_work_are_not_taken_for_hung() {
    let store = Launch::new().option("--hang-timeout", "1s").start();
    let servers = [store.front_pid(), store.data_pid()];
    under_load(&store, &mut journals(&mut Random::new(seed())), |_| {
        // Much longer than the time-out: it is what is tried here.
        thread::sleep(Duration::from_millis(3_500));
    });
    assert_eq!([store.present_front_pid(), store.data_pid()], servers, "{}", store.place().log());
}

#[test]
fn worker_that_does_not_get_on_is_a_hang_of_the_data_server() {
    let store = Launch::new().option("--hang-timeout", "500ms").option("--workers", "1").start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    let hung = store.data_pid();
    // What a worker that stands still in its turn leaves there; an idle one does not touch it.
    let segment = File::options().read(true).write(true).open(store.place().segment()).expect("a segment");
    let capacity = 256 << 20;
    let turn = Regions::new(capacity).worker(0).bytes() + offset_of!(WorkerSlot, turn) as u64;
    let mut word = [0; 8];
    eventually("the worker is idle", SOON, || {
        segment.read_exact_at(&mut word, turn).expect("read");
        u64::from_le_bytes(word).is_multiple_of(2)
    });
    segment.write_all_at(&(u64::from_le_bytes(word) + 1).to_le_bytes(), turn).expect("written");
    eventually("the one that hangs is dead", SOON, || !of_store(store.place().name()).contains(&hung));
    assert_eq!(new_client(&store).ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert!(store.place().log().contains("worker 0 has not got on for 500ms"), "{}", store.place().log());
}

#[test]
fn both_stopped_and_continued_are_not_taken_for_hung() {
    let store = Launch::new().option("--hang-timeout", "2s").start();
    let servers = [store.front_pid(), store.data_pid()];
    let paused = servers.map(Paused::new);
    // Longer than the time-out: it is what is tried here.
    thread::sleep(Duration::from_millis(2_500));
    drop(paused);
    thread::sleep(Duration::from_millis(500));
    new_client(&store);
    assert_eq!([store.present_front_pid(), store.data_pid()], servers, "{}", store.place().log());
}

#[test]
fn hang_timeout_of_zero_takes_nobody_for_hung() {
    let store = Launch::new().option("--hang-timeout", "0s").start();
    let mut before = store.connect();
    let paused = Paused::new(store.front_pid());
    assert_eq!(before.ask(&set(b"served", b"on")).expect("served"), Answer::Stored);
    thread::sleep(Duration::from_millis(500));
    drop(paused);
    store.kill_front();
    new_client(&store);
    store.kill_data();
    new_client(&store);
}

/// A launch from a directory of its own, in which programs can be taken away.
fn launch_of_copies(place: &Place) -> Launch {
    for program in ["kvs-front", "kvs-data"] {
        put_back(place, program);
    }
    Launch::new().front(place.directory().join("kvs-front"))
}

fn put_back(place: &Place, program: &str) {
    // Beside it first, so that nobody runs half a program.
    let path = place.directory().join(program);
    let beside = path.with_extension("new");
    fs::copy(binaries::program(program), &beside).expect("copied");
    fs::rename(beside, path).expect("put in place");
}

fn replace_by_script(place: &Place, program: &str, script: &str) {
    let path = place.directory().join(program);
    let beside = path.with_extension("new");
    fs::write(&beside, script).expect("written");
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).expect("mode");
    fs::rename(beside, path).expect("put in place");
}

#[test]
fn data_that_can_not_start_again_and_again_is_said_and_the_front_waits() {
    let place = Place::new();
    let store = launch_of_copies(&place).start_at(place);
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    replace_by_script(store.place(), "kvs-data", "#!/bin/sh\necho no such luck >&2\nexit 3\n");
    store.kill_data();
    eventually("pauses grow", SOON, || store.place().log().contains("launching it in 80 ms"));
    for said in ["died before it was ready", "no such luck", "launching it in 20 ms", "launching it in 40 ms"]
    {
        assert!(store.place().log().contains(said), "no {said:?} in {}", store.place().log());
    }
    assert!(console(store.place(), "status").contains("the next one is starting"));
    put_back(store.place(), "kvs-data");
    assert_eq!(new_client(&store).ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert_eq!(store.present_front_pid(), store.front_pid());
}

#[test]
fn front_that_can_not_start_again_and_again_is_said_and_clients_are_served_on() {
    let place = Place::new();
    let store = launch_of_copies(&place).start_at(place);
    let mut before = store.connect();
    replace_by_script(store.place(), "kvs-front", "#!/bin/sh\necho no such luck >&2\nexit 3\n");
    store.kill_front();
    eventually("pauses grow", SOON, || store.place().log().contains("launching it in 80 ms"));
    for said in ["no front server: the one launched ended at its start", "no such luck"] {
        assert!(store.place().log().contains(said), "no {said:?} in {}", store.place().log());
    }
    assert_eq!(before.ask(&set(b"kept", b"yes")).expect("served"), Answer::Stored);
    let mut waiting = Connection::tcp(store.ready().tcp).expect("the port is open");
    waiting.queue(&hello());
    waiting.flush().expect("sent");
    put_back(store.place(), "kvs-front");
    assert!(matches!(waiting.receive().expect("welcomed").1, Answer::Welcome { .. }));
    assert_eq!(statistics(store.place())["front_restarts"], 1);
}

#[test]
fn quit_of_a_store_whose_front_was_relaunched_leaves_nothing() {
    type Quit = fn(&Store);
    let ways: [(&str, Quit); 4] = [
        ("kvs-tools quit", |store| assert!(store.place().tools(&["quit"]).status.success())),
        ("console", |store| assert!(console(store.place(), "quit").contains("ended"))),
        ("SIGTERM to the front server", |store| send(store.present_front_pid(), Signal::TERM)),
        ("SIGTERM to the data server", |store| send(store.data_pid(), Signal::TERM)),
    ];
    for (way, quit) in ways {
        let store = Store::start();
        let mut client = store.connect();
        assert_eq!(client.ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
        store.kill_front();
        new_client(&store);
        store.kill_data();
        new_client(&store);
        quit(&store);
        let (place, launch, _) = store.await_end();
        assert_nothing_left(&place);
        let store = launch.start_at(place);
        assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 1), "{way}");
    }
}

#[test]
fn data_told_to_end_by_a_signal_ends_the_store_in_order() {
    let store = Store::start();
    send(store.data_pid(), Signal::TERM);
    let (place, _, status) = store.await_end();
    assert_eq!(status.code(), Some(0), "{}", place.log());
    assert_nothing_left(&place);
}

#[test]
fn data_told_to_end_while_there_is_no_front_ends_in_order() {
    let place = Place::new();
    let store = launch_of_copies(&place).start_at(place);
    replace_by_script(store.place(), "kvs-front", "#!/bin/sh\nexit 3\n");
    store.kill_front();
    eventually("it is tried again", SOON, || store.place().log().contains("launching it in 40 ms"));
    send(store.data_pid(), Signal::TERM);
    let (place, ..) = store.await_end();
    assert_nothing_left(&place);
}

#[test]
fn console_on_standard_input_goes_on_with_the_next_front() {
    let mut store = Launch::new().console().start();
    store.type_line("help");
    eventually("the console answers", SOON, || store.place().log().contains("who is connected"));
    let dead = store.kill_front();
    new_client(&store);
    let next = store.present_front_pid();
    store.type_line("status");
    eventually("the next one answers", SOON, || store.place().log().contains(&format!("pid {next}, up")));
    assert!(!store.place().log().contains(&format!("pid {dead}, up")));
    store.type_line("quit");
    assert_nothing_left(&store.await_end().0);
}

#[test]
fn front_is_not_stopped_by_the_terminal() {
    let store = Store::start();
    for _ in 0..2 {
        send(store.present_front_pid(), Signal::TSTP);
        eventually("it says so", SOON, || store.place().log().contains("Ctrl-Z is ignored"));
        new_client(&store);
        store.kill_front();
        new_client(&store);
    }
    assert_eq!(statistics(store.place())["front_restarts"], 2);
}

#[test]
fn systemd_is_told_of_the_next_front() {
    let place = Place::new();
    let path = place.directory().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(SOON)).expect("a time-out");
    let told = |socket: &UnixDatagram| {
        let mut message = [0; 100];
        let length = socket.recv(&mut message).expect("told");
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let store = Launch::new().environment("NOTIFY_SOCKET", &path.display().to_string()).start_at(place);
    assert_eq!(told(&socket), "READY=1");
    for _ in 0..2 {
        store.kill_front();
        let next = told(&socket);
        assert_eq!(next, format!("MAINPID={}\nREADY=1", store.present_front_pid()));
        // The next one is launched by a data server that the first front server did not launch.
        store.kill_data();
        new_client(&store);
    }
    send(store.present_front_pid(), Signal::TERM);
    assert_eq!(told(&socket), "STOPPING=1");
}

/// Figures for the report: run with `cargo test --release -p kvs-harness --test supervision -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: needs a quiet machine and takes minutes"]
fn times_from_a_kill_or_a_stop_to_serving_again_are_measured() {
    for clients in [0, 1_000, 9_000] {
        let store = Store::start();
        let _held: Vec<Connection> = (0..clients).map(|_| store.connect()).collect();
        let times = (0..100).map(|_| time_to_new_client(&store, "kvs-front", Signal::KILL));
        report(&format!("front killed, {clients} clients: new one served"), times);
        let mut served = store.connect();
        let times = (0..100).map(|_| longest_answer(&store, &mut served));
        report(&format!("front killed, {clients} clients: longest answer of one served"), times);
    }
    let store = Launch::new().option("--hang-timeout", "1s").start();
    for program in ["kvs-front", "kvs-data"] {
        let times = (0..30).map(|_| time_to_new_client(&store, program, Signal::STOP));
        report(&format!("{program} stopped, --hang-timeout 1s: new one served"), times);
    }
}

fn time_to_new_client(store: &Store, program: &str, signal: Signal) -> Duration {
    thread::sleep(Duration::from_millis(100));
    let pid = eventually_some("the server runs", SOON, || store.find(program));
    send(pid, signal);
    let start = Instant::now();
    new_client(store);
    start.elapsed()
}

/// The longest of the answers in the time around the front server's death.
fn longest_answer(store: &Store, served: &mut Connection) -> Duration {
    thread::sleep(Duration::from_millis(50));
    send(store.present_front_pid(), Signal::KILL);
    let start = Instant::now();
    let mut longest = Duration::ZERO;
    while start.elapsed() < Duration::from_millis(30) {
        let asked = Instant::now();
        served.ask(&get(b"any")).expect("served on");
        longest = longest.max(asked.elapsed());
    }
    longest
}

fn report(what: &str, times: impl Iterator<Item = Duration>) {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{what}: median {:?}, p99 {:?}, longest {:?}, {} times",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}
