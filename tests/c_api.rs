//! The promise: a C program that uses only psiskv.h finds every return value of the contract, from one and from 16 threads, with 64
//! programs at once, through the shared and the static library; the death of the data server costs it nothing it had stored.
//!
//! Method: the programs in `tests/c` and the example of the client library are compiled with the system's `cc` and run against a real
//! store. They check everything themselves and end with 0.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use kvs_harness::binaries;
use kvs_harness::c_programs::{Library, compile, source};
use kvs_harness::connection::{Answer, get};
use kvs_harness::processes::MARK;
use kvs_harness::store::{Launch, Store};

const BOTH: [Library; 2] = [Library::Shared, Library::Static];

/// A program of `tests/c`, compiled in the store's directory.
fn compile_ours(store: &Store, name: &str, library: Library) -> PathBuf {
    compile(&source(name), store.place().directory(), library)
}

/// A compiled program, for the store it is to connect to.
fn command(store: &Store, program: &Path) -> Command {
    let address = store.ready().tcp;
    let mut command = Command::new(program);
    command.arg(address.ip().to_string()).arg(address.port().to_string()).env(MARK, store.place().name());
    command
}

fn assert_passed(output: &Output) {
    assert!(output.status.success(), "{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}

/// A server that answers whoever connects with something that is not the protocol.
fn stranger() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = (&stream).read(&mut [0; 512]);
        }
    });
    port
}

/// A port where nobody listens: bound, so that nobody else gets it, but not open.
fn closed_port() -> (rustix::fd::OwnedFd, u16) {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, ipproto, socket};
    let held = socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::TCP)).expect("a socket");
    let any = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0);
    bind(&held, &any).expect("bound");
    let address =
        std::net::SocketAddr::try_from(getsockname(&held).expect("its address")).expect("an address");
    (held, address.port())
}

#[test]
fn c_program_gets_every_return_value_of_the_contract() {
    for library in BOTH {
        let store = Launch::new().option("--max-value", "1MiB").start();
        let program = compile_ours(&store, "returns.c", library);
        let (_held, closed) = closed_port();
        let run = command(&store, &program)
            .args([closed.to_string(), stranger().to_string(), (1 << 20).to_string()])
            .output();
        assert_passed(&run.expect("it runs"));
    }
}

#[test]
fn c_program_that_includes_only_the_header_compiles_and_shares_its_keys() {
    for library in BOTH {
        let store = Store::start();
        let program = compile_ours(&store, "header.c", library);
        assert_passed(&command(&store, &program).output().expect("it runs"));
        let stored = store.connect().ask(&get(b"35")).expect("read");
        assert_eq!(stored, Answer::Value(b"stored by C\0".to_vec()), "key 35 is the text 35");
    }
}

#[test]
fn c_program_with_sixteen_threads_gets_what_one_gets() {
    for library in BOTH {
        let store = Store::start();
        let program = compile_ours(&store, "threads.c", library);
        assert_passed(&command(&store, &program).output().expect("it runs"));
    }
}

#[test]
fn c_programs_sixty_four_at_once_get_what_one_gets() {
    let store = Store::start();
    let program = compile_ours(&store, "one_of_many.c", Library::Shared);
    let programs: Vec<Child> = (0..64)
        .map(|number| {
            let mut command = command(&store, &program);
            command.arg(number.to_string()).stderr(Stdio::piped()).spawn().expect("it runs")
        })
        .collect();
    for program in programs {
        assert_passed(&program.wait_with_output().expect("it ends"));
    }
    let Answer::Keys(keys, None) = list_all(&store) else { panic!("more keys than were stored") };
    assert_eq!(keys.len(), 64 * 50);
}

fn list_all(store: &Store) -> Answer {
    let request = kvs_core::wire::RequestBody::List { prefix: b"", cursor: 0, limit: 100_000 };
    let mut connection = store.connect();
    let (mut all, mut answer) = (Vec::new(), connection.ask(&request).expect("listed"));
    while let Answer::Keys(keys, next) = answer {
        all.extend(keys);
        let Some(cursor) = next else { return Answer::Keys(all, None) };
        let request = kvs_core::wire::RequestBody::List { prefix: b"", cursor, limit: 100_000 };
        answer = connection.ask(&request).expect("listed");
    }
    answer
}

#[test]
fn c_program_goes_on_with_its_descriptor_and_data_after_kills() {
    let store = Store::start();
    let program = compile_ours(&store, "survives.c", Library::Shared);
    let mut running = command(&store, &program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut lines = BufReader::new(running.stdout.take().expect("a pipe")).lines();
    let mut input = running.stdin.take().expect("a pipe");
    for _ in 0..10 {
        if lines.next().is_none() {
            break;
        }
        store.kill_data();
        // A write that fails means that the program has ended; its own words follow below.
        let _ = writeln!(input, "go on");
    }
    drop(input);
    lines.for_each(drop);
    assert_passed(&running.wait_with_output().expect("it ends"));
}

#[test]
fn c_and_rust_examples_of_the_client_library_run() {
    let store = Store::start();
    let program = compile(
        &binaries::workspace().join("kvs-client/examples/store.c"),
        store.place().directory(),
        Library::Shared,
    );
    assert_passed(&command(&store, &program).output().expect("it runs"));
    let counter = Command::new(binaries::example("counter")).arg(store.address()).output();
    assert_passed(&counter.expect("it runs"));
}
