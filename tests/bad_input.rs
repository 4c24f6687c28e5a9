//! The promise: whatever arrives on a socket ends at most the connection it arrived on, with an error that says what was
//! wrong; nothing that is stored is lost, and the others are served on.
//!
//! Method: a store with one worker, so that anything that blocks it shows. A witness stays connected through everything and
//! must be served after each piece of bad input; at the end its data is there and the server that started is the one that runs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{ErrorCode, PROTOCOL, RequestBody};
use kvs_harness::connection::{Answer, Connection, get, hello, set};
use kvs_harness::processes::open_descriptors;
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually};

/// A store and a client that is connected to it all the while.
struct Scene {
    witness: Connection,
    served: u64,
    store: Store,
}

impl Scene {
    fn new() -> Self {
        Self::with(&Launch::new().option("--workers", "1"))
    }

    fn with(launch: &Launch) -> Self {
        let store = launch.start();
        let mut witness = store.connect();
        let stored = witness.ask(&set(b"witness", b"still here")).expect("stored");
        assert_eq!(stored, Answer::Stored);
        Self { witness, served: 0, store }
    }

    fn stranger(&self) -> Connection {
        Connection::tcp(self.store.ready().tcp).expect("connection")
    }

    /// The witness is served, on the connection it had before.
    fn witness_is_served(&mut self) {
        self.served += 1;
        let value = self.served.to_string();
        assert_eq!(self.witness.ask(&set(b"served", value.as_bytes())).expect("stored"), Answer::Stored);
        assert_eq!(
            self.witness.ask(&get(b"served")).expect("read"),
            Answer::Value(value.into_bytes()),
            "the witness reads what it wrote"
        );
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        self.witness_is_served();
        assert_eq!(self.witness.ask(&get(b"witness")).expect("read"), Answer::Value(b"still here".to_vec()));
        assert_eq!(self.store.data_pid(), self.store.ready().data, "the data server was never replaced");
        assert!(!self.store.place().log().contains("panicked"), "{}", self.store.place().log());
    }
}

/// The answer is an error with this code and a message for a person, and then the connection ends.
fn assert_refused(mut connection: Connection, code: ErrorCode) {
    let (_, answer) = connection.receive().expect("an answer before the end");
    let Answer::Error(found, message) = answer else { panic!("{code:?} expected, not {answer:?}") };
    assert_eq!(found, code, "{message}");
    assert!(message.len() > 20, "too short to be of help: {message}");
    assert_eq!(connection.read_to_end().expect("the connection ends"), b"", "nothing follows the error");
}

#[test]
fn frames_with_bad_headers_are_refused_with_a_reason() {
    let mut scene = Scene::new();
    let too_large = 2 * VALUE_BYTES_MAX_LIMIT as u32;
    let frames: [(&[u8], ErrorCode); 5] = [
        (&[0, 0, 0, 0], ErrorCode::Malformed),
        (&[2, 0, 0, 0, 1, 1], ErrorCode::Malformed),
        (&too_large.to_le_bytes(), ErrorCode::FrameTooLarge),
        (&[0xff; 4], ErrorCode::FrameTooLarge),
        (&[5, 0, 0, 0, 99, 1, 1, 1, 1], ErrorCode::UnsupportedVersion),
    ];
    for (bytes, code) in frames {
        for welcomed in [false, true] {
            let mut connection = if welcomed { scene.store.connect() } else { scene.stranger() };
            connection.send_raw(bytes).expect("sent");
            assert_refused(connection, code);
            scene.witness_is_served();
        }
    }
}

#[test]
fn messages_that_cannot_be_decoded_are_refused_with_a_reason() {
    let mut scene = Scene::new();
    let payloads: [&[u8]; 4] = [
        // A get whose key is longer than the frame.
        &[7, 1, 200, b'a'],
        // A set with an impossible condition.
        &[7, 2, 9, 1, b'a', 1, b'b'],
        // A get with a byte left over.
        &[7, 1, 1, b'a', 0],
        // A number that does not end.
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    ];
    for payload in payloads {
        let mut connection = scene.store.connect();
        connection.send_raw(&frame(payload)).expect("sent");
        assert_refused(connection, ErrorCode::Malformed);
        scene.witness_is_served();
    }
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32 + 1;
    [&length.to_le_bytes()[..], &[kvs_core::wire::WIRE_VERSION], payload].concat()
}

#[test]
fn message_of_an_unknown_kind_is_refused() {
    let mut scene = Scene::new();
    let mut connection = scene.store.connect();
    connection.send_raw(&frame(&[7, 100, 1, 2, 3])).expect("sent");
    let (number, answer) = connection.receive().expect("answered");
    assert_eq!((number, answer.code()), (7, Some(ErrorCode::UnknownMessage)));
    scene.witness_is_served();
}

#[test]
fn first_message_other_than_hello_is_refused() {
    let mut scene = Scene::new();
    let mut connection = scene.stranger();
    connection.queue(&get(b"witness"));
    connection.flush().expect("sent");
    assert_refused(connection, ErrorCode::HelloExpected);
    scene.witness_is_served();
}

#[test]
fn hello_of_another_protocol_is_refused() {
    let mut scene = Scene::new();
    let mut connection = scene.stranger();
    connection.queue(&RequestBody::Hello { protocol: PROTOCOL + 41, name: "from the future", pid: 1 });
    connection.flush().expect("sent");
    assert_refused(connection, ErrorCode::UnsupportedVersion);
    scene.witness_is_served();
}

#[test]
fn http_request_gets_an_answer_a_person_can_read() {
    let mut scene = Scene::new();
    for request in
        ["GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"]
    {
        let mut connection = scene.stranger();
        connection.send_raw(request.as_bytes()).expect("sent");
        let answer = connection.read_to_end().expect("the connection ends");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("kvs"), "the answer does not say who answers: {answer:?}");
        scene.witness_is_served();
    }
}

#[test]
fn truncated_frames_are_forgotten_when_their_sender_leaves() {
    let mut scene = Scene::new();
    let mut whole = scene.stranger();
    whole.queue(&hello());
    whole.queue(&set(b"truncated", &[7; 100_000]));
    let bytes = whole.take_queued();
    for end in [1, 4, 5, 6, 20, 50, 5_000, bytes.len() - 1] {
        let mut connection = scene.stranger();
        connection.send_raw(&bytes[..end]).expect("sent");
        drop(connection);
        scene.witness_is_served();
    }
    assert_eq!(scene.witness.ask(&get(b"truncated")).expect("read"), Answer::Missing);
}

#[test]
fn garbage_of_every_kind_ends_its_connection_only() {
    let mut scene = Scene::new();
    let mut random = Random::new(seed());
    for _ in 0..300 {
        let length = 1 + random.below(5_000) as usize;
        let garbage = random.bytes(length);
        let welcomed = random.once_in(2);
        let mut connection = if welcomed { scene.store.connect() } else { scene.stranger() };
        // It may be refused before all of it is sent.
        let _ = connection.send_raw(&garbage);
        let _ = connection.socket().shutdown(std::net::Shutdown::Write);
        connection.read_to_end().expect("the connection ends");
        scene.witness_is_served();
    }
}

#[test]
fn good_frames_with_changed_bytes_never_hurt_the_server() {
    let mut scene = Scene::new();
    let mut random = Random::new(seed());
    for _ in 0..300 {
        let mut connection = scene.store.connect();
        connection.queue(&set(b"changed", &[1; 300]));
        connection.queue(&RequestBody::List { prefix: b"c", cursor: random.number(), limit: u32::MAX });
        connection.queue(&RequestBody::Increment { key: b"changed too", by: i64::MIN });
        let mut bytes = connection.take_queued();
        for _ in 0..random.between(1, 4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.number() as u8;
        }
        let _ = connection.send_raw(&bytes);
        let _ = connection.socket().shutdown(std::net::Shutdown::Write);
        connection.read_to_end().expect("the connection ends");
    }
    scene.witness_is_served();
}

#[test]
fn port_scan_is_not_noticed_by_others() {
    let mut scene = Scene::new();
    for round in 0..500 {
        let stream = TcpStream::connect(scene.store.ready().tcp).expect("connection");
        if round % 2 == 0 {
            // A reset instead of an orderly end, as scanners do.
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger");
        }
        drop(stream);
    }
    scene.witness_is_served();
}

#[test]
fn ten_thousand_connects_and_disconnects_leave_nothing_behind() {
    let mut scene = Scene::new();
    scene.store.await_standby();
    let (front, data) = (scene.store.front_pid(), scene.store.ready().data);
    let before = (open_descriptors(front).expect("front"), open_descriptors(data).expect("data"));
    thread::scope(|scope| {
        for which in 0..4 {
            let ready = scene.store.ready();
            scope.spawn(move || {
                for round in 0..2_500 {
                    match (which, round % 10) {
                        (0, _) => drop(Connection::welcomed_unix(&ready.unix).expect("welcomed")),
                        (_, 0) => drop(TcpStream::connect(ready.tcp).expect("connection")),
                        _ => drop(Connection::welcomed_tcp(ready.tcp).expect("welcomed")),
                    }
                }
            });
        }
    });
    scene.witness_is_served();
    eventually("both servers have as few descriptors as before", SOON, || {
        let now = (open_descriptors(front).expect("front"), open_descriptors(data).expect("data"));
        now.0 <= before.0 + 1 && now.1 <= before.1 + 1
    });
    eventually("only the witness counts as connected", SOON, || connections(&mut scene.witness) == 1);
}

fn connections(witness: &mut Connection) -> u64 {
    let Answer::Stats(statistics) = witness.ask(&RequestBody::Stats).expect("statistics") else {
        panic!("no statistics");
    };
    let found = statistics.iter().find(|(name, _)| name == "connections").and_then(|(_, number)| *number);
    found.expect("connections are counted")
}

#[test]
fn connection_above_the_limit_is_refused_until_one_leaves() {
    let mut scene = Scene::with(&Launch::new().option("--workers", "1").option("--max-connections", "10"));
    let mut others: Vec<Connection> = (0..9).map(|_| scene.store.connect()).collect();
    for _ in 0..50 {
        assert_refused(scene.stranger(), ErrorCode::TooManyConnections);
    }
    let mut unix = Connection::unix(&scene.store.ready().unix).expect("connection");
    assert_eq!(unix.receive().expect("refused").1.code(), Some(ErrorCode::TooManyConnections));
    scene.witness_is_served();
    others.iter_mut().for_each(|other| {
        assert_eq!(other.ask(&get(b"witness")).expect("read"), Answer::Value(b"still here".to_vec()));
    });
    others.pop();
    eventually("the free place is given to somebody", SOON, || {
        Connection::welcomed_tcp(scene.store.ready().tcp).is_ok()
    });
}

#[test]
fn descriptor_limit_reached_refuses_new_clients_and_serves_the_others() {
    let mut scene = Scene::with(&Launch::new().option("--workers", "1").open_files(64));
    let mut kept: Vec<Connection> = Vec::new();
    let mut refused = 0;
    for _ in 0..100 {
        let mut connection = scene.stranger();
        match connection.ask(&hello()) {
            Ok(Answer::Welcome { .. }) => kept.push(connection),
            Ok(answer) => {
                assert_eq!(answer.code(), Some(ErrorCode::TooManyConnections), "{answer:?}");
                refused += 1;
            }
            // The refusal may be overtaken by the reset that our unread hello causes.
            Err(_) => refused += 1,
        }
    }
    assert!(kept.len() >= 5 && refused >= 36, "{} welcomed, {refused} refused", kept.len());
    scene.witness_is_served();
    kept.clear();
    eventually("new clients are welcomed again", SOON, || {
        Connection::welcomed_tcp(scene.store.ready().tcp).is_ok()
    });
}

#[test]
fn client_dying_in_the_midst_of_large_answers_is_forgotten() {
    let mut scene = Scene::new();
    let value = Random::new(1).bytes(4 << 20);
    assert_eq!(scene.witness.ask(&set(b"large", &value)).expect("stored"), Answer::Stored);
    for _ in 0..50 {
        let mut connection = scene.store.connect();
        (0..10).for_each(|_| _ = connection.queue(&get(b"large")));
        connection.flush().expect("sent");
        let mut some = [0; 1000];
        connection.socket().read_exact(&mut some).expect("the first bytes");
        drop(connection);
        scene.witness_is_served();
    }
}

#[test]
fn urgent_data_is_no_surprise() {
    let mut scene = Scene::new();
    let mut connection = scene.store.connect();
    connection.queue(&get(b"witness"));
    let bytes = connection.take_queued();
    let (last, first) = bytes.split_last().expect("a frame");
    connection.socket().write_all(first).expect("sent");
    let kvs_harness::connection::Socket::Tcp(stream) = connection.socket() else {
        unreachable!("a TCP socket")
    };
    rustix::net::send(&*stream, &[*last], rustix::net::SendFlags::OOB).expect("sent as urgent");
    let (_, answer) = connection.receive().expect("answered");
    assert_eq!(answer, Answer::Value(b"still here".to_vec()));
    scene.witness_is_served();
}
