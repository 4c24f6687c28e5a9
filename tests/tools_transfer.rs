//! The promise: what `kvs-tools export` writes, `kvs-tools import` stores again, whatever bytes it is made of; and neither leaves
//! half a file or half a truth behind when it fails.
//!
//! Method: a store is filled with every kind of bytes and sizes, exported, imported into a second store, and the two are held
//! against each other key by key. Failures are made with wrong lines, full files and missing servers.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvs_client::Client;
use kvs_harness::random::Random;
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::SOON;
use serde_json::{Value, json};

type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

fn client(store: &Store) -> Client {
    Client::connect(store.unix_address()).expect("the store takes a client")
}

fn fill(store: &Store, entries: &Entries) {
    let mut client = client(store);
    for (key, value) in entries {
        client.set(key, value).expect("stored");
    }
}

fn contents(store: &Store) -> Entries {
    let mut client = client(store);
    let keys: Vec<Vec<u8>> = client.list("").map(|key| key.expect("a key")).collect();
    let value = |key: &Vec<u8>| client.get(key).expect("read").expect("it is there");
    keys.iter().map(value).zip(&keys).map(|(value, key)| (key.clone(), value)).collect()
}

/// Every kind of entry: text, what JSON escapes, what is no text, and large values of each.
fn samples() -> Entries {
    let mut random = Random::new(21);
    let mut entries = Entries::new();
    let mut add = |key: &[u8], value: Vec<u8>| _ = entries.insert(key.to_vec(), value);
    add(b"text", b"hello".to_vec());
    add(b"empty", Vec::new());
    add("grün \"\\\u{0}\n\u{2028}".as_bytes(), "☃\r\n\t\u{7f}".into());
    add(b"\xff\x00\xfe", b"\x80".to_vec());
    add(b"no text", b"text and \xc3".to_vec());
    add(&[b'k'; 65_535], b"longest key".to_vec());
    add(b"large text", vec![b'x'; 1 << 20]);
    // JSON writes each of these with six bytes.
    add(b"large zeros", vec![0; 1 << 20]);
    add(b"large binary", random.bytes(1 << 20));
    for index in 0..3_000_usize {
        let (key, length) = (format!("many:{index}"), index % 200);
        add(key.as_bytes(), random.bytes(length));
    }
    entries
}

fn bytes_of(entries: &Entries) -> usize {
    entries.iter().map(|(key, value)| key.len() + value.len()).sum()
}

fn error_of(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.starts_with("kvs-tools: ") && text.lines().count() == 1, "{text}");
    text
}

fn import(place: &Place, lines: &[u8]) -> Output {
    let mut command = place.tools_command();
    command.args(["import", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kvs-tools can be started");
    let mut to_child = child.stdin.take().expect("a pipe");
    let lines = lines.to_vec();
    // A program that stops reading at a wrong line is no failure of this one.
    let feeder = std::thread::spawn(move || _ = to_child.write_all(&lines));
    let output = child.wait_with_output().expect("it ends");
    feeder.join().expect("no panic");
    output
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn transfer_through_a_file_brings_every_byte_to_the_other_store() {
    let (from, to) = (Store::start(), Store::start());
    let entries = samples();
    fill(&from, &entries);
    let file = from.place().directory().join("out.jsonl");
    let name = file.to_str().expect("plain");
    let expected = json!({"entries": entries.len(), "bytes": bytes_of(&entries)});
    let exported = from.place().tools(&["export", name, "--json"]);
    assert!(exported.status.success() && exported.stderr.is_empty(), "{exported:?}");
    assert_eq!(serde_json::from_slice::<Value>(&exported.stdout).expect("JSON"), expected);
    let text = fs::read_to_string(&file).expect("an export is text");
    assert_eq!(text.lines().count(), entries.len());
    assert!(text.lines().any(|line| line == r#"{"key":"text","value":"hello"}"#));
    assert!(text.lines().any(|line| line == r#"{"key_base64":"/wD+","value_base64":"gA=="}"#));
    let imported = to.place().tools(&["import", name, "--json"]);
    assert!(imported.status.success() && imported.stderr.is_empty(), "{imported:?}");
    assert_eq!(serde_json::from_slice::<Value>(&imported.stdout).expect("JSON"), expected);
    assert!(contents(&to) == entries, "both stores have the same");
}

#[test]
fn transfer_through_a_pipe_brings_every_byte_to_the_other_store() {
    let (from, to) = (Store::start(), Store::start());
    let entries = samples();
    fill(&from, &entries);
    fill(&to, &Entries::from([(b"kept".to_vec(), b"1".to_vec()), (b"text".to_vec(), b"old".to_vec())]));
    let mut export = from.place().tools_command();
    let mut export =
        export.args(["export", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    let pipe = export.stdout.take().expect("a pipe");
    let imported = to.place().tools_command().args(["import", "-"]).stdin(pipe).output().expect("it runs");
    let exported = export.wait_with_output().expect("it ends");
    assert!(exported.status.success() && imported.status.success(), "{exported:?} {imported:?}");
    for (said, word) in [(exported, "exported"), (imported, "imported")] {
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(text.starts_with(&format!("{word} 3,009 entries, ")), "{text}");
        assert_eq!(text.lines().count(), 1);
    }
    let mut expected = entries;
    expected.insert(b"kept".to_vec(), b"1".to_vec());
    assert!(contents(&to) == expected, "what was there and is not in the file stays");
}

#[test]
fn transfer_of_largest_values_fits() {
    let limit = |store: Launch| store.option("--max-value", "4MiB").start();
    let (from, to) = (limit(Launch::new()), limit(Launch::new()));
    let mut random = Random::new(22);
    let entries: Entries = (0..8_u8).map(|index| (vec![index], random.bytes(4 << 20))).collect();
    fill(&from, &entries);
    let exported = from.place().tools(&["export", "-"]);
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let imported = import(to.place(), &exported.stdout);
    assert!(imported.status.success(), "{imported:?}");
    assert!(contents(&to) == entries);
}

#[test]
fn export_while_keys_come_and_go_has_each_one_that_stays_once() {
    const STAYING: usize = 5_000;
    let store = Store::start();
    fill(&store, &(0..STAYING).map(|index| (format!("stays:{index}").into(), b"1".to_vec())).collect());
    let ended = &AtomicBool::new(false);
    let exported = std::thread::scope(|scope| {
        let (mut churner, until) = (client(&store), Instant::now() + SOON);
        let goes_on = move || !ended.load(Ordering::Relaxed) && Instant::now() < until;
        scope.spawn(move || {
            for index in (0..1_000).cycle().take_while(|_| goes_on()) {
                churner.set(format!("goes:{index}"), "2").expect("stored");
                churner.delete(format!("goes:{}", (index + 500) % 1_000)).expect("deleted");
            }
        });
        let exported: Vec<Output> = (0..5).map(|_| store.place().tools(&["export", "-"])).collect();
        ended.store(true, Ordering::Relaxed);
        exported
    });
    for output in exported {
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).expect("an export is text");
        let mut staying: Vec<&str> = text.lines().filter(|line| line.contains("stays:")).collect();
        assert_eq!(staying.len(), STAYING);
        staying.sort_unstable();
        staying.dedup();
        assert_eq!(staying.len(), STAYING);
    }
}

#[test]
fn import_stops_at_a_wrong_line_names_it_and_counts_what_is_stored() {
    let store = Launch::new().option("--max-value", "1MiB").start();
    let place = store.place();
    let says = |lines: &str, words: &[&str]| {
        let text = error_of(&import(place, lines.as_bytes()));
        words.iter().for_each(|word| assert!(text.contains(word), "no {word:?} in {text}"));
    };
    let good = |key: &str| format!("{{\"key\":\"{key}\",\"value\":\"1\"}}\n");
    says(
        &format!("{}\n{}oops\n{}", good("a"), good("b"), good("c")),
        &["line 4", "no JSON", "2 entries stored"],
    );
    assert_eq!(contents(&store).len(), 2, "what comes behind the wrong line is not stored");
    says("{\"key\":\"a\"}", &["line 1", "\"value\" is missing", "0 entries stored"]);
    says("{\"key\":\"a\",\"value_base64\":\"?\"}", &["line 1", "no base64"]);
    says("{\"key\":\"a\",\"value\":\"1\",\"value_base64\":\"MQ==\"}", &["line 1", "both"]);
    says("{\"key\":\"\",\"value\":\"1\"}", &["line 1", "1 to 65535"]);
    let too_large = format!("{{\"key\":\"a\",\"value\":\"{}\"}}\n", "v".repeat((1 << 20) + 1));
    says(&format!("{}{too_large}{}", good("d"), good("e")), &["line 2", "1048576", "--max-value"]);
    says(&"x".repeat(8 << 20), &["line 1", "more than"]);
    let missing = error_of(&place.tools(&["import", "/nowhere/file"]));
    assert!(missing.contains("/nowhere/file"), "{missing}");
    assert!(error_of(&place.tools(&["import", "/"])).contains("directory"));
}

#[test]
fn export_that_fails_leaves_the_file_of_before_and_nothing_else() {
    let store = Store::start();
    fill(&store, &samples());
    let place = store.place();
    let directory = place.directory().join("exports");
    fs::create_dir(&directory).expect("made");
    let file = directory.join("out.jsonl");
    fs::write(&file, "of before").expect("written");
    let tools = place.tools_command();
    // The file may not grow beyond 512 KiB, which the samples exceed.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$0\" \"$@\""]);
    limited.arg(tools.get_program()).args(tools.get_args()).arg("export").arg(&file);
    let text = error_of(&limited.output().expect("sh can be started"));
    assert!(text.contains("out.jsonl") && text.contains("too large"), "{text}");
    assert_eq!(fs::read(&file).expect("still there"), b"of before");
    assert_eq!(names_in(&directory), ["out.jsonl"]);
    let text = error_of(&place.tools(&["export", directory.to_str().expect("plain")]));
    assert!(text.contains("directory"), "{text}");
    let text = error_of(&place.tools(&["export", "/nowhere/file"]));
    assert!(text.contains("/nowhere/file"), "{text}");
}

#[test]
fn export_writes_through_links_and_devices_instead_of_replacing_them() {
    let store = Store::start();
    fill(&store, &Entries::from([(b"a".to_vec(), b"1".to_vec())]));
    let place = store.place();
    let (file, link) = (place.directory().join("real"), place.directory().join("link"));
    fs::write(&file, "of before").expect("written");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    assert!(place.tools(&["export", link.to_str().expect("plain")]).status.success());
    assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
    assert_eq!(fs::read(&file).expect("there"), b"{\"key\":\"a\",\"value\":\"1\"}\n");
    assert!(place.tools(&["export", "/dev/null"]).status.success());
    assert!(!fs::metadata("/dev/null").expect("there").is_file());
    let output = place.tools_command().args(["export", "-"]).output().expect("it runs");
    assert_eq!(output.stdout, b"{\"key\":\"a\",\"value\":\"1\"}\n");
}
