//! The promise: `kvs-tools` does what its help says, with the exit status and the kind of output that scripts rely on.
//!
//! Method: every command is run as a process against a store of its own; status, standard output and standard error are checked
//! to the byte where the contract fixes them. An error is one line that says what, why and what to do.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use kvs_client::Client;
use kvs_harness::binaries;
use kvs_harness::connection::get;
use kvs_harness::processes::{MARK, Paused, kill_store, of_store};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, eventually};
use rustix::process::test_kill_process;
use serde_json::{Value, json};

/// How a run ended and what it said.
#[derive(Debug)]
struct Said {
    status: i32,
    out: Vec<u8>,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        assert_eq!(self.out.iter().filter(|byte| **byte == b'\n').count(), 1, "one line: {self:?}");
        serde_json::from_slice(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// It is done, and said nothing beside.
    #[track_caller]
    fn done(self) -> Self {
        assert_eq!((self.status, self.err.as_str()), (0, ""), "{self:?}");
        self
    }

    /// It ended with `status` and one line on standard error that has all `words` in it.
    #[track_caller]
    fn complains(self, status: i32, words: &[&str]) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.err.starts_with("kvs-tools: ") && self.err.ends_with('\n'), "{self:?}");
        assert_eq!(self.err.lines().count(), 1, "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {self:?}");
        }
        self
    }
}

/// `kvs-tools` with nothing that the environment says.
fn plain() -> Command {
    let mut command = Command::new(binaries::program("kvs-tools"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"KVS_")) {
        command.env_remove(name);
    }
    command
}

/// `kvs-tools` for an instance, by its name.
fn named(place: &Place) -> Command {
    let mut command = plain();
    command.env(MARK, place.name()).args(["--name", place.name()]);
    command
}

/// Runs a command with `input` on its standard input.
fn run_with(command: &mut Command, input: &[u8]) -> Said {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kvs-tools can be started");
    let mut to_child = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    // A program that stops reading is no failure of this one.
    let feeder = std::thread::spawn(move || _ = to_child.write_all(&input));
    let output = child.wait_with_output().expect("it ends");
    feeder.join().expect("no panic");
    Said {
        status: output.status.code().expect("it ends by itself"),
        out: output.stdout,
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn run(command: &mut Command) -> Said {
    run_with(command, b"")
}

/// Runs `kvs-tools` on the store's instance.
fn tools<A: AsRef<OsStr>>(place: &Place, arguments: &[A]) -> Said {
    run(named(place).args(arguments))
}

fn os(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

fn client(store: &Store) -> Client {
    Client::connect(store.unix_address()).expect("the store takes a client")
}

#[test]
fn tools_values_go_in_and_out_byte_for_byte() {
    let store = Store::start();
    let place = store.place();
    assert_eq!(tools(place, &["set", "greeting", "hello"]).done().out, b"");
    assert_eq!(tools(place, &["get", "greeting"]).done().out, b"hello");
    let (key, value) = (os(b"\xff\n\x01key"), os(b"\x80\xfe value\n"));
    tools(place, &[OsStr::new("set"), &key, &value]).done();
    assert_eq!(tools(place, &[OsStr::new("get"), &key]).done().out, value.as_bytes());
    let large: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    run_with(named(place).args(["set", "large", "-"]), &large).done();
    assert!(tools(place, &["get", "large"]).done().out == large);
    run_with(named(place).args(["set", "empty", "-"]), b"").done();
    assert_eq!(tools(place, &["get", "empty"]).done().out, b"");
    tools(place, &["set", "-7", "-8"]).done();
    assert_eq!(tools(place, &["get", "-7"]).done().out, b"-8");
    tools(place, &["set", "option", "--", "--verbose"]).done();
    assert_eq!(tools(place, &["get", "option"]).done().out, b"--verbose");
}

#[test]
fn tools_answer_no_with_status_2() {
    let store = Store::start();
    let place = store.place();
    let said = tools(place, &["get", "nothing"]).complains(2, &["no such key: nothing"]);
    assert_eq!(said.out, b"");
    assert_eq!(tools(place, &["get", "a\x1b[2J"]).err, "kvs-tools: no such key: a\\u{1b}[2J\n");
    tools(place, &["set", "--if-absent", "lock", "first"]).done();
    tools(place, &["set", "--if-absent", "lock", "second"]).complains(2, &["exists already: lock"]);
    assert_eq!(tools(place, &["get", "lock"]).out, b"first");
    tools(place, &["del", "nothing"]).complains(2, &["no such key: nothing"]);
    tools(place, &["del", "no", "nay"]).complains(2, &["none of the 2 keys"]);
    tools(place, &["del", "no", "lock", "nay"]).done();
    tools(place, &["get", "lock"]).complains(2, &[]);
}

#[test]
fn tools_incr_adds_and_keeps_what_is_no_number() {
    let store = Store::start();
    let place = store.place();
    assert_eq!(tools(place, &["incr", "visits"]).done().out, b"1\n");
    assert_eq!(tools(place, &["incr", "visits", "41"]).done().out, b"42\n");
    assert_eq!(tools(place, &["incr", "visits", "-50"]).done().out, b"-8\n");
    assert_eq!(tools(place, &["get", "visits"]).out, b"-8");
    tools(place, &["set", "text", "12 apples"]).done();
    tools(place, &["incr", "text"]).complains(1, &["text", "not a decimal number"]);
    assert_eq!(tools(place, &["get", "text"]).out, b"12 apples");
    tools(place, &["incr", "visits", &i64::MIN.to_string()]).complains(1, &["range"]);
}

#[test]
fn tools_json_is_one_document_for_every_command() {
    let store = Store::start();
    let place = store.place();
    let key = os(b"\xff");
    let json_of = |arguments: &[&OsStr]| run(named(place).arg("--json").args(arguments));
    let ask = |arguments: &[&str]| json_of(&arguments.iter().map(OsStr::new).collect::<Vec<_>>());
    assert_eq!(ask(&["set", "k", "v"]).done().json(), json!({"key": "k", "stored": true}));
    let said = ask(&["set", "k", "w", "--if-absent"]).complains(2, &[]);
    assert_eq!(said.json(), json!({"key": "k", "stored": false}));
    assert_eq!(ask(&["get", "k"]).done().json(), json!({"key": "k", "value": "v"}));
    assert_eq!(ask(&["get", "x"]).complains(2, &[]).json(), json!({"key": "x", "found": false}));
    assert_eq!(ask(&["incr", "n", "5"]).done().json(), json!({"key": "n", "value": 5}));
    json_of(&["set".as_ref(), &key, &os(b"\xfe")]).done();
    let binary = json!({"key_base64": "/w==", "value_base64": "/g=="});
    assert_eq!(json_of(&["get".as_ref(), &key]).done().json(), binary);
    let mut listed = ask(&["list"]).done().json()["keys"].as_array().expect("keys").clone();
    listed.sort_by_key(Value::to_string);
    assert_eq!(listed, [json!("k"), json!("n"), json!({"key_base64": "/w=="})]);
    assert_eq!(ask(&["list", "none"]).done().json(), json!({"keys": []}));
    assert_eq!(ask(&["del", "k", "x"]).done().json(), json!({"deleted": 1, "missing": 1}));
    let said = ask(&["console", "help"]).done().json();
    assert_eq!(said["command"], "help");
    assert!(said["output"].as_str().is_some_and(|text| text.contains("quit")));
    let said = run_with(named(place).args(["console", "--json"]), b"help\nexit\n").done().json();
    assert_eq!(said[0]["command"], "help");
    assert!(ask(&["completions", "bash"]).done().json()["script"].is_string());
    assert!(ask(&["man"]).done().json()["page"].is_string());
    assert_eq!(ask(&["quit"]).done().json()["ended"], true);
    let said = ask(&["purge"]).done().json();
    assert_eq!((&said["removed"], &said["segment"]), (&json!(true), &json!(place.segment())));
}

#[test]
fn tools_stats_have_what_the_contract_names() {
    let store = Store::start();
    let place = store.place();
    tools(place, &["set", "a", "1"]).done();
    let stats = tools(place, &["stats", "--json"]).done().json();
    assert_eq!(stats["name"], place.name());
    assert_eq!(stats["front_pid"], store.front_pid().as_raw_nonzero().get());
    assert_eq!(stats["data_pid"], store.ready().data.as_raw_nonzero().get());
    let standby = &stats.as_object().expect("an object")["standby_pid"];
    assert!(standby.is_null() || standby.is_u64(), "{standby}");
    assert_eq!((&stats["entries"], &stats["connections"]), (&json!(1), &json!(1)));
    for name in ["segment_bytes", "data_restarts", "front_restarts"] {
        assert!(stats[name].is_u64(), "{name}: {stats}");
    }
    let text = tools(place, &["stats"]).done().text();
    for part in ["Processes\n", "segment_bytes", " MiB (", "standby_pid"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let over_tcp = run(plain().args(["--server", &store.address(), "stats", "--json"])).done().json();
    assert_eq!(over_tcp["name"], place.name());
}

#[test]
fn tools_stats_count_what_connections_hold_and_give_back() {
    const CLIENTS: u64 = 100;
    let store = Store::start();
    let held = || {
        let stats = tools(store.place(), &["stats", "--json"]).done().json();
        let names = ["descriptors_front", "descriptors_data", "descriptors_standby", "connection_slots"];
        let held = names.map(|name| stats[name].as_u64().unwrap_or(0));
        (held, stats["connection_buffers"].as_u64().expect("counted"))
    };
    store.await_standby();
    let idle = held();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| store.connect()).collect();
    for client in &mut clients {
        // Half of a frame, which waits in a buffer for the rest.
        client.queue(&get(b"a"));
        let frame = client.take_queued();
        client.send_raw(&frame[..frame.len() - 1]).expect("sent");
    }
    let each_holds = || {
        let (now, buffers) = held();
        (0..4).all(|index| now[index] >= idle.0[index] + CLIENTS) && buffers >= idle.1 + CLIENTS
    };
    eventually("slots, buffers and descriptors are held", SOON, each_holds);
    drop(clients);
    // The one that asks is counted, and the one that asked before may not be gone yet.
    let all_are_back = || {
        let (now, buffers) = held();
        (0..4).all(|index| now[index] <= idle.0[index] + 1) && buffers <= idle.1 + 1
    };
    eventually("they are given back", SOON, all_are_back);
}

#[test]
fn tools_list_gives_each_key_once_and_stops_quietly_with_its_reader() {
    const KEYS: usize = 20_000;
    let store = Store::start();
    let mut filler = client(&store);
    for batch in (0..KEYS).collect::<Vec<_>>().chunks(1000) {
        let mut pipeline = filler.pipeline();
        for index in batch {
            pipeline.set(format!("user:{index}"), "x");
        }
        pipeline.run().expect("stored");
    }
    filler.set(b"raw\n\xff", "x").expect("stored");
    let mut listed: Vec<String> =
        tools(store.place(), &["list", "user:"]).done().text().lines().map(str::to_owned).collect();
    assert_eq!(listed.len(), KEYS);
    listed.sort_unstable();
    listed.dedup();
    assert_eq!(listed.len(), KEYS);
    assert_eq!(tools(store.place(), &["list", "raw"]).done().out, b"raw\n\xff\n");
    let mut child = named(store.place())
        .arg("list")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut reader = BufReader::new(child.stdout.take().expect("a pipe"));
    reader.read_line(&mut String::new()).expect("a first key");
    drop(reader);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn tools_limits_and_full_outputs_are_errors() {
    let store = Launch::new().option("--max-value", "1MiB").start();
    let place = store.place();
    let value = vec![b'v'; (1 << 20) + 1];
    run_with(named(place).args(["set", "k", "-"]), &value).complains(1, &["1MiB", "--max-value"]);
    run_with(named(place).args(["set", "k", "-"]), &value[1..]).done();
    tools(place, &["get", ""]).complains(1, &["1 to 65535"]);
    tools(place, &["del", ""]).complains(1, &["1 to 65535"]);
    let full = File::options().write(true).open("/dev/full").expect("/dev/full is there");
    let output = named(place).args(["get", "k"]).stdout(full).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't write to standard output"));
}

#[test]
fn tools_console_does_one_command_or_many() {
    let store = Store::start();
    let place = store.place();
    let status = tools(place, &["console", "status"]).done().text();
    assert!(status.contains(place.name()), "{status}");
    let stats = tools(place, &["console", "stats", "--json"]).done().json();
    assert_eq!(stats["name"], place.name());
    tools(place, &["console", "make", "tea"]).complains(1, &["make tea", "help"]);
    tools(place, &["console", "status\nquit"]).complains(1, &["one line"]);
    let said = run_with(named(place).arg("console"), b"\nhelp\n  clients \nexit\nnonsense\n").done().text();
    assert!(said.contains("quit") && said.contains("CONNECTION"), "{said}");
    let said = run_with(named(place).arg("console"), b"help\nnonsense\nquit\n").complains(1, &["nonsense"]);
    assert!(said.text().contains("quit"), "what came before is done: {said:?}");
    tools(place, &["get", "x"]).complains(2, &[]);
    let said = run(plain().args(["--server", &store.address(), "console"]));
    said.complains(1, &["its own machine", "--name"]);
    let said = run_with(named(place).arg("console"), b"quit\n").done();
    assert!(said.text().contains("has ended"), "{said:?}");
}

#[test]
fn tools_quit_returns_when_the_servers_are_gone() {
    let store = Store::start();
    let (front, data) = (store.front_pid(), store.data_pid());
    let place = store.place();
    tools(place, &["set", "kept", "yes"]).done();
    let said = run(plain().arg("--unix").arg(place.unix()).arg("quit")).done();
    assert!(said.text().contains("has ended"), "{said:?}");
    assert!(test_kill_process(data).is_err(), "the data server is gone");
    assert!(!of_store(place.name()).contains(&front), "the front server is gone");
    tools(place, &["get", "kept"]).complains(1, &["no instance named", place.name(), "kvs-front --name"]);
    tools(place, &["quit"]).complains(1, &["no instance named"]);
    let store = store.restart();
    assert_eq!(tools(store.place(), &["get", "kept"]).done().out, b"yes");
}

#[test]
fn tools_quit_waits_for_servers_that_take_their_time() {
    let store = Store::start();
    let paused = Paused::new(store.data_pid());
    let mut quit = named(store.place()).arg("quit").stdout(Stdio::null()).spawn().expect("started");
    eventually("the front server was told", SOON, || store.place().log().contains("ending"));
    // A quit that doesn't wait would end within this time; one that does can't, while the data server stands still.
    std::thread::sleep(Duration::from_millis(300));
    assert!(quit.try_wait().expect("it can be asked").is_none(), "the servers have not ended yet");
    drop(paused);
    assert!(quit.wait().expect("it ends").success());
    assert!(of_store(store.place().name()).is_empty(), "nothing of the store runs");
}

#[test]
fn tools_purge_spares_what_runs_and_removes_what_does_not() {
    let store = Store::start();
    let place = store.place();
    tools(place, &["set", "kept", "yes"]).done();
    tools(place, &["purge"]).complains(1, &["is running", "quit"]);
    assert_eq!(tools(place, &["get", "kept"]).done().out, b"yes");
    kill_store(place.name());
    let sockets = [place.unix(), kvs_core::instance::console_path(&place.unix())];
    assert!(sockets.iter().all(|path| path.exists()), "a killed server leaves its sockets");
    let said = tools(place, &["purge"]).done();
    assert!(said.text().contains("removed /dev/shm/kvs-"), "{said:?}");
    assert!(!place.segment().exists());
    assert!(sockets.iter().all(|path| !path.exists()), "{said:?}");
    tools(place, &["purge"]).complains(1, &["nothing to remove", place.name()]);
    let said = run(plain().arg("--unix").arg(place.unix()).arg("purge"));
    assert_eq!(said.status, 64, "{said:?}");
}

#[test]
fn tools_find_the_store_they_are_told() {
    let store = Store::start();
    let place = store.place();
    tools(place, &["set", "here", "yes"]).done();
    let get = |command: &mut Command| run(command.args(["get", "here"]));
    assert_eq!(get(plain().env("KVS_NAME", place.name())).done().out, b"yes");
    assert_eq!(get(plain().args(["--server", &store.address()])).done().out, b"yes");
    assert_eq!(get(plain().arg("--unix").arg(place.unix())).done().out, b"yes");
    let absent = format!("{}-absent", place.name());
    get(plain().env("KVS_NAME", &absent)).complains(1, &["no instance named", &absent, "/dev/shm"]);
    // What the command line says counts, whatever the environment says.
    assert_eq!(get(plain().env("KVS_NAME", &absent).args(["--server", &store.address()])).out, b"yes");
    assert_eq!(get(plain().env("KVS_NAME", "../odd").arg("--unix").arg(place.unix())).out, b"yes");
    assert_eq!(run(named(place).env("KVS_NAME", &absent).args(["get", "here"])).done().out, b"yes");
    let odd = get(plain().env("KVS_NAME", "../odd"));
    assert!(odd.status == 64 && odd.err.contains("KVS_NAME"), "{odd:?}");
    get(plain().args(["--server", "127.0.0.1:1"])).complains(1, &["127.0.0.1:1", "running"]);
    get(plain().args(["--server", "nowhere"])).complains(1, &["no port"]);
    get(plain().args(["--unix", "/nowhere/sock"])).complains(1, &["/nowhere/sock"]);
    run(plain().args(["--unix", "/nowhere/sock", "quit"])).complains(1, &["/nowhere/sock"]);
}

#[test]
fn tools_wrong_usage_has_status_64_and_help_has_0() {
    let wrong: [&[&str]; 10] = [
        &[],
        &["frobnicate"],
        &["get"],
        &["get", "a", "b"],
        &["set", "a"],
        &["del"],
        &["incr", "a", "many"],
        &["--name", "../x", "get", "a"],
        &["--name", "a", "get", "k", "--server", "b:1"],
        &["--frob", "stats"],
    ];
    for arguments in wrong {
        let said = run(plain().args(arguments));
        assert_eq!((said.status, said.out.as_slice()), (64, &b""[..]), "{arguments:?}: {said:?}");
        assert!(!said.err.is_empty(), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["-h"], &["--version"], &["help", "set"], &["export", "--help"]] {
        let said = run(plain().args(arguments)).done();
        assert!(said.text().contains("kvs-tools"), "{said:?}");
    }
    let help = run(plain().arg("--help")).text().split_whitespace().collect::<Vec<_>>().join(" ");
    for part in ["Store:", "Output:", "Examples:", "KVS_NAME", "64 wrong usage"] {
        assert!(help.contains(part), "no {part:?} in {help}");
    }
}

#[test]
fn tools_completions_and_manual_come_from_the_same_definition() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(plain().args(["completions", shell])).done().text();
        assert!(script.contains("if-absent"), "{shell}");
    }
    assert_eq!(run(plain().args(["completions", "tcsh"])).status, 64);
    assert!(run(plain().arg("man")).done().text().contains(".TH kvs-tools 1"));
    let place = Place::new();
    let directory = place.directory().join("man/man1");
    let said = run(plain().args(["--json", "man"]).arg(&directory)).done().json();
    let pages = said["pages"].as_array().expect("pages").clone();
    let mut found: Vec<String> = fs::read_dir(&directory)
        .expect("made")
        .map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned())
        .collect();
    let mut told: Vec<String> = pages.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    found.sort();
    told.sort();
    assert_eq!(found, told);
    assert!(told.contains(&"kvs-tools-export.1".to_owned()) && told.contains(&"kvs-tools.1".to_owned()));
    let said = run(plain().args(["man", "/dev/null/man"]));
    said.complains(1, &["/dev/null/man"]);
}

#[test]
fn tools_console_at_its_end_does_not_end_the_store() {
    let store = Store::start();
    run(named(store.place()).arg("console")).done();
    // A console that is killed is no more than closed.
    let mut console = named(store.place());
    console.arg("console").stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
    let mut child = console.spawn().expect("started");
    writeln!(child.stdin.as_mut().expect("a pipe"), "help").expect("sent");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe"));
    lines.read_line(&mut String::new()).expect("it is connected");
    child.kill().expect("killed");
    child.wait().expect("ended");
    eventually("the store serves", SOON, || tools(store.place(), &["get", "x"]).status == 2);
}
