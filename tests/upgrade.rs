//! The promise: `kvs-tools restart` exchanges a server for the program on disk under load, without losing a connection or an answer; a
//! program that does not start exchanges nothing; and a data server of another layout takes over by way of the
//! backup file, with all data.
//!
//! Method: a store is started from copies of the programs, so that others can be put in their place. Clients count meanwhile, each on a
//! key of its own, and know what each answer must be. Another layout is a version number that is changed in the header of
//! the running store's segment: who serves it looks at that no more, and who attaches does so first.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvs_client::Client;
use kvs_harness::binaries;
use kvs_harness::connection::{Answer, Connection, get, increment};
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually};
use serde_json::Value;

/// Restarts of a server in one test.
const RESTARTS: usize = 5;
/// Where the header has the version of the layout.
const LAYOUT_VERSION_AT: u64 = 8;

/// Programs in a directory of their own, and a store that was started from them.
struct Upgradable {
    store: Store,
    programs: tempfile::TempDir,
}

impl Upgradable {
    fn start(launch: Launch) -> Self {
        let programs = tempfile::tempdir().expect("a directory");
        for name in ["kvs-front", "kvs-data"] {
            copy(&binaries::program(name), &programs.path().join(name));
        }
        Self { store: launch.front(programs.path().join("kvs-front")).start(), programs }
    }

    /// Puts another program in the place of one, as an upgrade does: the file that runs stays as it is.
    fn put(&self, name: &str, contents: &[u8], mode: u32) {
        let (written, new) = (self.programs.path().join("written"), self.programs.path().join("new"));
        fs::write(&written, contents).expect("written");
        copy(&written, &new);
        fs::set_permissions(&new, fs::Permissions::from_mode(mode)).expect("marked");
        fs::rename(&new, self.programs.path().join(name)).expect("put in place");
    }

    /// The same program as another file.
    fn put_again(&self, name: &str) {
        self.put(name, &fs::read(binaries::program(name)).expect("there"), 0o755);
    }

    fn restart(&self, server: &str) -> Output {
        self.store.place().tools(&["--json", "restart", server])
    }

    fn statistics(&self) -> Value {
        let output = self.store.place().tools(&["--json", "stats"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }
}

/// Copies a program in a process of its own: what this one, which starts others all the time, has open for writing, they have too for a
/// moment, and what is open for writing can't be started.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg(from).arg(to).status().expect("cp can be started");
    assert!(status.success(), "cp {} {}: {status}", from.display(), to.display());
}

fn done(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Counts on a connection, one by one, until told to stop; every answer must be the next number.
fn count(client: &mut Connection, key: &str, stop: &AtomicBool) -> i64 {
    let mut counted = 0;
    while !stop.load(Ordering::Relaxed) {
        counted += 1;
        let answer = client.ask(&increment(key.as_bytes(), 1)).expect("the connection lasts");
        assert_eq!(answer, Answer::Number(counted), "{key}");
    }
    counted
}

/// Runs `act` while clients count on plain connections over TCP and unix sockets, none of which may end.
fn while_plain_clients_count(store: &Store, act: impl FnOnce()) {
    const CLIENTS: usize = 8;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let counting: Vec<_> = (0..CLIENTS)
            .map(|which| {
                let mut client = if which % 2 == 0 { store.connect() } else { store.connect_unix() };
                let stop = &stop;
                scope.spawn(move || {
                    let key = format!("plain {which}");
                    let counted = count(&mut client, &key, stop);
                    let found = client.ask(&get(key.as_bytes())).expect("the connection lasts");
                    assert_eq!(found, Answer::Value(counted.to_string().into_bytes()));
                    counted
                })
            })
            .collect();
        let _stop = StopAtLast(&stop);
        act();
        stop.store(true, Ordering::Relaxed);
        assert!(counting.into_iter().all(|client| client.join().expect("counted") > 0));
    });
}

/// Stops those who count also when the test fails.
struct StopAtLast<'s>(&'s AtomicBool);

impl Drop for StopAtLast<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn upgrade_of_the_front_server_under_load_ends_no_connection() {
    let upgradable = Upgradable::start(Launch::new());
    while_plain_clients_count(&upgradable.store, || {
        for round in 1..=RESTARTS as u64 {
            upgradable.put_again("kvs-front");
            let before = upgradable.store.present_front_pid().as_raw_nonzero().get();
            let said = done(&upgradable.restart("front"));
            assert_eq!((&said["restarted"], &said["pid_before"]), (&"front".into(), &before.into()));
            let statistics = upgradable.statistics();
            assert_eq!(statistics["front_pid"], said["pid_after"]);
            assert_ne!(said["pid_after"], said["pid_before"]);
            assert_eq!(
                (&statistics["front_restarts"], &statistics["data_restarts"]),
                (&round.into(), &0.into())
            );
        }
    });
}

#[test]
fn upgrade_of_the_data_server_under_load_ends_no_connection() {
    for standby in ["on", "off"] {
        let upgradable = Upgradable::start(Launch::new().option("--standby", standby));
        while_plain_clients_count(&upgradable.store, || {
            for round in 1..=RESTARTS as u64 {
                upgradable.put_again("kvs-data");
                let said = done(&upgradable.restart("data"));
                assert_ne!(said["pid_after"], said["pid_before"]);
                let words = said["said"].as_str().unwrap_or_default();
                assert!(words.contains(&format!("gives way to {}", said["pid_after"])), "{said}");
                let statistics = upgradable.statistics();
                assert_eq!(statistics["data_pid"], said["pid_after"]);
                let restarts = (&statistics["data_restarts"], &statistics["front_restarts"]);
                assert_eq!(restarts, (&round.into(), &0.into()));
            }
        });
    }
}

#[test]
fn upgrade_to_a_data_server_that_starts_but_can_not_stand_by_exchanges_nothing() {
    let upgradable = Upgradable::start(Launch::new());
    let before = upgradable.statistics()["data_pid"].clone();
    let pretends = b"#!/bin/sh\n[ \"$1\" = --probe ] && echo kvs-data 9.9 && exit 0\nexit 1\n";
    while_plain_clients_count(&upgradable.store, || {
        upgradable.put("kvs-data", pretends, 0o755);
        let output = upgradable.restart("data");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("died at its start") && said.contains("serves on"), "{said}");
        assert_eq!(upgradable.statistics()["data_pid"], before);
        upgradable.put_again("kvs-data");
        let said = done(&upgradable.restart("data"));
        assert_eq!(said["pid_before"], before);
    });
}

#[test]
fn upgrade_to_a_program_that_does_not_start_exchanges_nothing() {
    let upgradable = Upgradable::start(Launch::new());
    let pids = |statistics: Value| (statistics["front_pid"].clone(), statistics["data_pid"].clone());
    let before = pids(upgradable.statistics());
    let broken: [(&[u8], u32, &str); 5] = [
        (b"#!/bin/sh\necho it is broken >&2\nexit 1\n", 0o755, "it is broken"),
        (b"#!/bin/sh\necho something else\n", 0o755, "another program"),
        (b"no program at all", 0o755, "can't start"),
        (b"", 0o644, "neither in"),
        (b"#!/bin/sh\nexec sleep 600\n", 0o755, "said nothing"),
    ];
    while_plain_clients_count(&upgradable.store, || {
        for (server, name) in [("front", "kvs-front"), ("data", "kvs-data")] {
            for (contents, mode, reason) in broken {
                upgradable.put(name, contents, mode);
                let output = upgradable.restart(server);
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(1), "{said}");
                assert!(said.contains(reason) && said.contains("serves on"), "no {reason:?} in {said}");
                assert_eq!(said.lines().count(), 1, "{said}");
            }
            assert_eq!(pids(upgradable.statistics()), before);
            upgradable.put_again(name);
        }
    });
}

#[test]
fn upgrade_to_servers_that_speak_otherwise_exchanges_both_at_once() {
    let upgradable = Upgradable::start(Launch::new());
    let mut client = Client::connect(upgradable.store.address()).expect("served");
    client.set("key", "value").expect("stored");
    let speaks_otherwise = |name: &str| {
        let real = binaries::program(name);
        format!(
            "#!/bin/sh\n[ \"$1\" = --probe ] && echo {name} 9.9 speaks otherwise && exit 4\nexec {} \"$@\"\n",
            real.display()
        )
    };
    for name in ["kvs-front", "kvs-data"] {
        upgradable.put(name, speaks_otherwise(name).as_bytes(), 0o755);
    }
    let output = upgradable.restart("front");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("`restart data` exchanges both"), "{said}");
    let said = done(&upgradable.restart("data"));
    assert!(said["said"].as_str().unwrap_or_default().contains("speaks otherwise"), "{said}");
    assert_eq!(said["removed"], Value::Null);
    eventually("the client is served again", SOON, || client.get("key").is_ok());
    assert_eq!(client.get("key").expect("served"), Some(b"value".to_vec()));
    assert!(upgradable.store.place().log().contains("ending"));
}

#[test]
fn upgrade_to_another_layout_loads_the_backup_file() {
    const KEYS: usize = 10_000;
    let upgradable = Upgradable::start(Launch::new());
    let mut client = Client::connect(upgradable.store.address()).expect("served");
    let mut pipeline = client.pipeline();
    for key in 0..KEYS {
        pipeline.set(format!("key {key}"), format!("value {key}"));
    }
    pipeline.run().expect("stored");
    let segment = upgradable.store.place().segment();
    let file = fs::File::options().read(true).write(true).open(&segment).expect("the segment");
    let mut version = [0; 8];
    file.read_exact_at(&mut version, LAYOUT_VERSION_AT).expect("read");
    let other = u64::from_le_bytes(version) + 1;
    file.write_all_at(&other.to_le_bytes(), LAYOUT_VERSION_AT).expect("written");

    let said = done(&upgradable.restart("data"));
    let words = said["said"].as_str().unwrap_or_default();
    assert!(words.contains(&format!("layout {other}")) && words.contains("backup file"), "{said}");
    let kept_aside = PathBuf::from(format!("{}~", segment.display()));
    assert_eq!(said["removed"], kept_aside.to_string_lossy().into_owned());
    assert!(!kept_aside.exists());

    let statistics = upgradable.statistics();
    assert_eq!(statistics["entries"], KEYS);
    assert_ne!(statistics["data_pid"], said["pid_before"]);
    eventually("the client is served again", SOON, || client.get("key 0").is_ok());
    for key in [0, KEYS / 2, KEYS - 1] {
        let found = client.get(format!("key {key}")).expect("served");
        assert_eq!(found, Some(format!("value {key}").into_bytes()));
    }
    assert!(upgradable.store.further_output().is_empty(), "the ready line is printed once");
}
