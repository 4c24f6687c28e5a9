//! The promise: either server may be killed at any moment, again and again, and the other one replaces it; clients that
//! are served don't notice the front server's death, and an orderly end is one with whatever front server there is.
//!
//! Method: real SIGKILLs under load. Connections that were welcomed before a front server's death must live on, and
//! new ones wait for the next. Where both may die the journals of the writers are held against the store, and
//! `kvs-tools check` verifies the segment. `KVS_KILLS` sets how many random kills are made (80 in a normal run).

#[allow(
    dead_code,
    reason = "shared with the test of the data server's death, which measures with many entries"
)]
mod journal;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use journal::{Journal, Writer};
use kvs_harness::binaries;
use kvs_harness::connection::{Answer, Connection, get, hello, increment, set};
use kvs_harness::processes::{MARK, Paused, kill_store, of_store, open_descriptors, program_of, send};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, SetOnDrop, eventually, eventually_some};
use rustix::process::{Pid, Signal};

const WRITERS: u64 = 4;

/// Writes with all journals while `deeds` are done.
fn under_load<T>(store: &Store, journals: &mut [Journal], deeds: impl FnOnce(&AtomicU64) -> T) -> T {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for journal in journals.iter_mut() {
            let writer = Writer::new(store.ready(), journal, &stop, &written);
            scope.spawn(|| writer.run());
        }
        let _stops = SetOnDrop(&stop);
        await_progress(&written);
        deeds(&written)
    })
}

fn await_progress(written: &AtomicU64) {
    let before = written.load(Ordering::Relaxed);
    eventually("the writers get on", SOON, || written.load(Ordering::Relaxed) > before + 200);
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

#[test]
fn front_killed_under_load_clients_notice_nothing_and_new_ones_are_served() {
    const KILLS: u64 = 20;
    let store = Store::start();
    let mut journals = journals(&mut Random::new(seed()));
    under_load(&store, &mut journals, |written| {
        store.await_standby();
        let descriptors = open_descriptors(store.data_pid()).expect("it runs");
        for kill in 1..=KILLS {
            let dead = store.kill_front();
            store.new_client();
            assert_ne!(store.present_front_pid(), dead);
            let told = store.place().statistics();
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
fn clients_whose_descriptors_have_not_their_numbers_outlive_data_servers_too() {
    const CLIENTS: usize = 40;
    const KILLS: i64 = 6;
    // The numbers of clients' descriptors begin above that.
    let store = Launch::new().open_files(256).start();
    let connect = |at: usize| if at.is_multiple_of(2) { store.connect() } else { store.connect_unix() };
    let mut clients: Vec<Connection> = (0..CLIENTS).map(connect).collect();
    for kill in 1..=KILLS {
        store.await_standby();
        store.kill_data();
        for (at, client) in (1..).zip(&mut clients) {
            let expected = (kill - 1) * CLIENTS as i64 + at;
            assert_eq!(client.ask(&increment(b"all", 1)).expect("served"), Answer::Number(expected));
        }
        // Others get the slots of those who leave.
        clients.drain(..CLIENTS / 2);
        clients.extend((0..CLIENTS / 2).map(connect));
        let asking = 1;
        eventually("those who left are gone", SOON, || {
            store.place().statistics()["connections"] == CLIENTS + asking
        });
    }
}

#[test]
fn front_relaunched_knows_all_clients_and_keeps_the_limit() {
    let store = Launch::new().option("--max-connections", "150").start();
    let mut clients: Vec<Connection> =
        (0..149).map(|at| if at % 2 == 0 { store.connect() } else { store.connect_unix() }).collect();
    store.kill_front();
    let last = store.new_client();
    let refused = Connection::welcomed_tcp(store.ready().tcp).expect_err("one too many");
    assert!(refused.to_string().contains("TooManyConnections"), "{refused}");
    clients.truncate(100);
    drop(last);
    eventually("the places of clients that left are free", SOON, || {
        Connection::welcomed_unix(&store.ready().unix).is_ok()
    });
    let listed = store.place().console("clients");
    assert_eq!(listed.matches("  tcp   127.0.0.1:").count(), 50, "{listed}");
    for client in &mut clients {
        assert!(matches!(client.ask(&increment(b"all", 1)).expect("served"), Answer::Number(_)));
    }
}

#[test]
fn front_relaunched_lets_nobody_in_before_it_knows_all_clients() {
    let place = Place::new();
    let store = place.launch_of_copies().option("--max-connections", "50").start_at(place);
    let clients: Vec<Connection> = (0..48).map(|_| store.connect()).collect();
    store.place().replace_by_script("kvs-front", "#!/bin/sh\nexit 3\n");
    store.kill_front();
    let mut waiting: Vec<Connection> = (0..10)
        .map(|_| {
            let mut new = Connection::tcp(store.ready().tcp).expect("the port is open");
            new.queue(&hello());
            new.flush().expect("sent");
            new
        })
        .collect();
    store.place().put_back("kvs-front");
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
        let mut before = store.new_client();
        store.kill_data();
        assert_eq!(before.ask(&get(b"kept")).expect("it goes on"), Answer::Value(b"yes".to_vec()));
        assert_eq!(store.new_client().ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
        let told = store.place().statistics();
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
        store.new_client();
        eventually("there is one front server, and a data server with its standby", SOON, || {
            let mut living: Vec<_> =
                of_store(store.place().name()).into_iter().filter_map(program_of).collect();
            living.sort();
            living == ["kvs-data", "kvs-data", "kvs-front"]
        });
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

/// Threads of a process that have another nice value or class than the first one of `other`, by their names.
fn threads_of_other_rank(pid: Pid, other: Pid) -> Vec<String> {
    // The nice value, and whether it is in the class of those who get what others leave.
    let rank = |stat: &str| -> Option<(String, bool)> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(((*fields.get(16)?).to_owned(), *fields.get(38)? == "5"))
    };
    let own = fs::read_to_string(format!("/proc/{other}/stat")).ok().and_then(|stat| rank(&stat));
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    stats.filter(|stat| rank(stat) != own).collect()
}

/// How many threads of the process have this name.
fn threads_named(pid: Pid, name: &str) -> usize {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    names.filter(|found| found.trim_end() == name).count()
}

#[test]
fn data_watches_the_front_server_of_the_moment_alone_whoever_launched_which() {
    let store = Store::start();
    for kills_data in [false, true, false, false, true] {
        store.await_standby();
        if kills_data {
            let dead = store.data_pid();
            send(dead, Signal::KILL);
            eventually("the standby has taken over", SOON, || store.data_pid() != dead);
        } else {
            let dead = store.kill_front();
            eventually("there is another front server", SOON, || store.present_front_pid() != dead);
        }
        eventually("one thread waits for its death", SOON, || {
            threads_named(store.data_pid(), "watch-front") == 1
                && threads_named(store.data_pid(), "reap-front") == 0
        });
    }
}

#[test]
fn data_that_took_over_has_the_rank_that_it_gave_up_while_it_stood_by() {
    let store = Store::start();
    let (mut client, own) = (store.connect(), rustix::process::getpid());
    for _ in 0..3 {
        store.await_standby();
        let dead = store.data_pid();
        send(dead, Signal::KILL);
        assert!(matches!(client.ask(&increment(b"one", 1)).expect("it notices nothing"), Answer::Number(_)));
        eventually("no thread gives way any longer", SOON, || {
            // The main thread does until a client comes who waits for it.
            let _next = store.new_client();
            let (data, front) = (store.data_pid(), store.present_front_pid());
            data != dead && threads_of_other_rank(data, front).is_empty()
        });
        let launched = store.kill_front();
        eventually("the next front server has this one's rank", SOON, || {
            let _next = store.new_client();
            let (data, front) = (store.data_pid(), store.present_front_pid());
            front != launched
                && threads_of_other_rank(front, own).is_empty()
                && threads_of_other_rank(data, own).is_empty()
        });
    }
}

#[test]
fn both_killed_and_started_by_hand_go_on_where_they_were() {
    let store = Store::start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    store.kill_front();
    store.new_client();
    kill_store(store.place().name());
    let (place, launch, _) = store.await_end();
    assert!(place.unix().exists() && place.unix().with_extension("console").exists(), "stale files");
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 1));
    assert_eq!(store.connect_unix().ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert!(store.place().console("status").contains("entries"));
}

#[test]
fn data_that_can_not_start_again_and_again_is_said_and_the_front_waits() {
    let place = Place::new();
    let store = place.launch_of_copies().option("--standby", "off").start_at(place);
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    store.place().replace_by_script("kvs-data", "#!/bin/sh\necho no such luck >&2\nexit 3\n");
    store.kill_data();
    eventually("pauses grow", SOON, || store.place().log().contains("launching it in 80 ms"));
    for said in ["died before it was ready", "no such luck", "launching it in 20 ms", "launching it in 40 ms"]
    {
        assert!(store.place().log().contains(said), "no {said:?} in {}", store.place().log());
    }
    assert!(store.place().console("status").contains("the next one is starting"));
    store.place().put_back("kvs-data");
    assert_eq!(store.new_client().ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert_eq!(store.present_front_pid(), store.front_pid());
}

#[test]
fn front_that_can_not_start_again_and_again_is_said_and_clients_are_served_on() {
    let place = Place::new();
    let store = place.launch_of_copies().start_at(place);
    let mut before = store.connect();
    store.place().replace_by_script("kvs-front", "#!/bin/sh\necho no such luck >&2\nexit 3\n");
    store.kill_front();
    eventually("pauses grow", SOON, || store.place().log().contains("launching it in 80 ms"));
    for said in ["no front server: the one launched ended at its start", "no such luck"] {
        assert!(store.place().log().contains(said), "no {said:?} in {}", store.place().log());
    }
    assert_eq!(before.ask(&set(b"kept", b"yes")).expect("served"), Answer::Stored);
    let mut waiting = Connection::tcp(store.ready().tcp).expect("the port is open");
    waiting.queue(&hello());
    waiting.flush().expect("sent");
    store.place().put_back("kvs-front");
    assert!(matches!(waiting.receive().expect("welcomed").1, Answer::Welcome { .. }));
    assert_eq!(store.place().statistics()["front_restarts"], 1);
}

#[test]
fn quit_of_a_store_whose_front_was_relaunched_leaves_nothing() {
    type Quit = fn(&Store);
    let ways: [(&str, Quit); 5] = [
        ("kvs-tools quit", |store| assert!(store.place().tools(&["quit"]).status.success())),
        ("console", |store| assert!(store.place().console("quit").contains("ended"))),
        ("SIGTERM to the front server", |store| send(store.present_front_pid(), Signal::TERM)),
        ("SIGTERM to the data server", |store| send(store.data_pid(), Signal::TERM)),
        // As systemd does it.
        ("SIGTERM to both", |store| {
            for pid in [store.present_front_pid(), store.data_pid()] {
                send(pid, Signal::TERM);
            }
        }),
    ];
    for (way, quit) in ways {
        let store = Store::start();
        let mut client = store.connect();
        assert_eq!(client.ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
        store.kill_front();
        store.new_client();
        store.kill_data();
        store.new_client();
        quit(&store);
        let (place, launch, _) = store.await_end();
        place.assert_ended_in_order();
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
    place.assert_ended_in_order();
}

#[test]
fn data_told_to_end_while_there_is_no_front_ends_in_order() {
    let place = Place::new();
    let store = place.launch_of_copies().start_at(place);
    store.place().replace_by_script("kvs-front", "#!/bin/sh\nexit 3\n");
    store.kill_front();
    eventually("it is tried again", SOON, || store.place().log().contains("launching it in 40 ms"));
    send(store.data_pid(), Signal::TERM);
    let (place, ..) = store.await_end();
    place.assert_ended_in_order();
}

#[test]
fn front_killed_while_the_store_ends_does_not_keep_it_from_ending() {
    let store = Store::start();
    let paused = Paused::new(store.data_pid());
    send(store.front_pid(), Signal::TERM);
    eventually("the end has begun", SOON, || store.place().log().contains("ending"));
    // What it has told the data server is there, read or not.
    store.kill_front();
    drop(paused);
    store.await_end().0.assert_ended_in_order();
}

#[test]
fn front_relaunched_has_the_terminal_while_the_job_has_it() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("skipped: there is no `script` to play a terminal");
        return;
    }
    let place = Place::new();
    let front = binaries::program("kvs-front");
    let job = format!(
        "{} --name {} --unix {} --listen 127.0.0.1:0 --backup {}; echo the job goes on; sleep 600",
        front.display(),
        place.name(),
        place.unix().display(),
        place.backup().display()
    );
    let output = place.directory().join("typescript");
    // A shell that runs the tests in the background has them ignore Ctrl-C, and with them whatever they start.
    let mut terminal = Command::new("env")
        .args(["--default-signal=INT", "script", "-qefc", &job])
        .arg(&output)
        .env(MARK, place.name())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    let shows = |text: &str| {
        eventually(text, SOON, || {
            fs::read(&output).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
        });
    };
    let mut keys = terminal.stdin.take().expect("a pipe");
    shows("ready name=");
    keys.write_all(b"\x1a").expect("typed");
    shows("Ctrl-Z is ignored");
    let front = || {
        let is_front = |pid: &Pid| program_of(*pid).is_some_and(|program| program == "kvs-front");
        of_store(place.name()).into_iter().find(is_front)
    };
    send(front().expect("it runs"), Signal::KILL);
    shows("has taken over");
    keys.write_all(b"status\n").expect("typed");
    shows("relaunched once");
    // Ctrl-C ends the store, and the shell's job with it.
    keys.write_all(b"\x03").expect("typed");
    // But for the terminal: `script` now and then overlooks that what it ran has ended.
    let is_other = |pid: &Pid| program_of(*pid).is_some_and(|program| program != "script");
    eventually("all of it has ended", SOON, || !of_store(place.name()).iter().any(is_other));
    terminal.kill().expect("it is not waited for yet");
    terminal.wait().expect("it has ended");
    place.assert_ended_in_order();
}

#[test]
fn console_on_standard_input_goes_on_with_the_next_front() {
    let mut store = Launch::new().console().start();
    store.type_line("help");
    eventually("the console answers", SOON, || store.place().log().contains("who is connected"));
    let dead = store.kill_front();
    store.new_client();
    let next = store.present_front_pid();
    store.type_line("status");
    eventually("the next one answers", SOON, || store.place().log().contains(&format!("pid {next}, up")));
    assert!(!store.place().log().contains(&format!("pid {dead}, up")));
    store.type_line("quit");
    store.await_end().0.assert_ended_in_order();
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
        store.new_client();
    }
    send(store.present_front_pid(), Signal::TERM);
    assert_eq!(told(&socket), "STOPPING=1");
}
