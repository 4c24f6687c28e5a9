//! The promise: after a client is accepted, the front server takes no part in its data traffic, and the data server serves every
//! kind of client without one costing the others.
//!
//! Method: real sockets, TCP and unix. The front server is stopped while clients are served; requests are pipelined by the
//! thousand, values are larger than any socket buffer, clients send a byte at a time, never read, or close one direction.

use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use kvs_harness::binaries;
use kvs_harness::connection::{Answer, Connection, delete, get, hello, increment, set};
use kvs_harness::processes::Paused;
use kvs_harness::random::Random;
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually_some};

/// Longest time in which another client's small request may be answered while one misbehaves. Generous: the test
/// is about being served at all, on a machine that is busy with other tests.
const SERVED_WITHIN: Duration = Duration::from_secs(10);

fn both_transports(store: &Store) -> [Connection; 2] {
    [store.connect(), store.connect_unix()]
}

/// The same connection for a thread that only writes. It has said hello, as request 1.
fn second_handle(connection: &mut Connection) -> Connection {
    let socket = connection.socket().try_clone().expect("second handle");
    let mut writer = Connection::from_socket(socket).expect("the same socket");
    writer.set_number(1);
    writer
}

fn assert_served(connection: &mut Connection) {
    let start = Instant::now();
    assert_eq!(connection.ask(&set(b"served", b"yes")).expect("stored"), Answer::Stored);
    assert_eq!(connection.ask(&get(b"served")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert!(start.elapsed() < SERVED_WITHIN, "served after {:?} only", start.elapsed());
}

#[test]
fn front_stopped_connected_clients_are_served_on() {
    let store = Store::start();
    let mut clients = both_transports(&store);
    let _paused = Paused::new(store.front_pid());
    for (which, client) in clients.iter_mut().enumerate() {
        let key = format!("key {which}");
        for round in 0..1_000_i64 {
            assert_eq!(
                client.ask(&increment(key.as_bytes(), 1)).expect("counted"),
                Answer::Number(round + 1)
            );
        }
        assert_eq!(client.ask(&get(key.as_bytes())).expect("read"), Answer::Value(b"1000".to_vec()));
        assert_eq!(client.ask(&delete(key.as_bytes())).expect("deleted"), Answer::Deleted);
    }
}

#[test]
fn front_stopped_new_client_is_served_when_it_goes_on() {
    let store = Store::start();
    let paused = Paused::new(store.front_pid());
    let mut late = Connection::tcp(store.ready().tcp).expect("the kernel accepts for the listening socket");
    late.queue(&hello());
    late.queue(&set(b"late", b"1"));
    late.flush().expect("sent before anybody reads");
    drop(paused);
    assert!(matches!(late.receive().expect("welcome"), (1, Answer::Welcome { .. })));
    assert_eq!(late.receive().expect("stored"), (2, Answer::Stored));
}

#[test]
fn pipeline_of_many_requests_is_answered_in_order() {
    const REQUESTS: u32 = 100_000;
    let store = Store::start();
    for mut reader in both_transports(&store) {
        let mut writer = second_handle(&mut reader);
        let sender = thread::spawn(move || {
            for _ in 0..REQUESTS / 4 {
                writer.queue(&set(b"pipelined", b"value"));
                writer.queue(&get(b"pipelined"));
                writer.queue(&increment(b"pipelined count", 1));
                writer.queue(&get(b"not there"));
            }
            writer.flush().expect("sent");
        });
        for at in 0..REQUESTS {
            let (number, answer) = reader.receive().expect("answered");
            assert_eq!(number, at + 2, "answers come in the order of requests");
            let expected = match at % 4 {
                0 => Answer::Stored,
                1 => Answer::Value(b"value".to_vec()),
                2 => Answer::Number(i64::from(at / 4) + 1),
                _ => Answer::Missing,
            };
            assert_eq!(answer, expected, "request {at}");
        }
        sender.join().expect("sender");
        store.connect().ask(&delete(b"pipelined count")).expect("cleared");
    }
}

#[test]
fn large_values_over_both_transports_come_back_whole() {
    let store = Store::start();
    let mut random = Random::new(8);
    let mut clients = both_transports(&store);
    for length in [100 << 10, 1 << 20, (8 << 20) - 1, 8 << 20] {
        for (which, client) in clients.iter_mut().enumerate() {
            let (key, value) = (format!("large {which}"), random.bytes(length));
            assert_eq!(client.ask(&set(key.as_bytes(), &value)).expect("stored"), Answer::Stored);
            let Answer::Value(read) = client.ask(&get(key.as_bytes())).expect("read") else {
                panic!("no value of {length} bytes");
            };
            assert!(read == value, "{length} bytes came back changed");
        }
    }
}

#[test]
fn large_values_pipelined_with_small_ones_keep_their_order() {
    let store = Store::start();
    let mut client = store.connect();
    let value = Random::new(9).bytes(8 << 20);
    let mut writer = second_handle(&mut client);
    let large = value.clone();
    let sending = thread::spawn(move || {
        for _ in 0..4 {
            writer.queue(&set(b"large", &large));
            writer.queue(&get(b"large"));
            writer.queue(&increment(b"small", 1));
            writer.flush().expect("sent");
        }
    });
    for round in 0..4 {
        assert_eq!(client.receive().expect("stored").1, Answer::Stored);
        assert!(client.receive().expect("read").1 == Answer::Value(value.clone()), "round {round}");
        assert_eq!(client.receive().expect("counted"), (round * 3 + 4, Answer::Number(i64::from(round) + 1)));
    }
    sending.join().expect("sender");
}

#[test]
fn slow_client_sending_byte_by_byte_is_served_and_delays_nobody() {
    let store = Launch::new().option("--workers", "1").start();
    let mut slow = Connection::tcp(store.ready().tcp).expect("connection");
    slow.queue(&hello());
    slow.queue(&set(b"slow", b"a value, a byte at a time"));
    slow.queue(&get(b"slow"));
    let bytes = slow.take_queued();
    let mut others = both_transports(&store);
    for byte in bytes {
        slow.send_raw(&[byte]).expect("sent");
        others.iter_mut().for_each(assert_served);
    }
    assert!(matches!(slow.receive().expect("welcome"), (1, Answer::Welcome { .. })));
    assert_eq!(slow.receive().expect("stored"), (2, Answer::Stored));
    assert_eq!(slow.receive().expect("read"), (3, Answer::Value(b"a value, a byte at a time".to_vec())));
}

#[test]
fn slow_client_in_the_middle_of_a_large_value_delays_nobody() {
    let store = Launch::new().option("--workers", "1").start();
    let value = Random::new(10).bytes(4 << 20);
    let mut slow = store.connect();
    slow.queue(&set(b"slow large", &value));
    let bytes = slow.take_queued();
    let mut others = both_transports(&store);
    for piece in bytes.chunks(200_000) {
        slow.send_raw(piece).expect("sent");
        others.iter_mut().for_each(assert_served);
        // Nothing of the value shows before all of it is there.
        if piece.len() == 200_000 {
            assert_eq!(others[0].ask(&get(b"slow large")).expect("read"), Answer::Missing);
        }
    }
    assert_eq!(slow.receive().expect("stored").1, Answer::Stored);
    assert!(others[1].ask(&get(b"slow large")).expect("read") == Answer::Value(value));
}

#[test]
fn clients_that_never_read_cost_no_worker() {
    let store = Launch::new().option("--workers", "1").start();
    let value = Random::new(11).bytes(8 << 20);
    store.connect().ask(&set(b"unread", &value)).expect("stored");
    let mut deaf: Vec<Connection> = (0..20).flat_map(|_| both_transports(&store)).collect();
    for client in &mut deaf {
        (0..50).for_each(|_| _ = client.queue(&get(b"unread")));
        client.flush().expect("small requests fit the socket's buffer");
    }
    let mut others = both_transports(&store);
    for _ in 0..100 {
        others.iter_mut().for_each(assert_served);
    }
    // One that changes its mind gets everything it asked for.
    let last = deaf.last_mut().expect("there are some");
    for _ in 0..50 {
        let answer = last.receive().expect("answered").1;
        assert!(answer == Answer::Value(value.clone()), "{:?}", answer.code());
    }
}

#[test]
fn client_that_closes_its_sending_side_gets_all_answers() {
    let store = Store::start();
    let value = Random::new(12).bytes(1 << 20);
    store.connect().ask(&set(b"half", &value)).expect("stored");
    for mut client in both_transports(&store) {
        (0..10).for_each(|_| _ = client.queue(&get(b"half")));
        client.flush().expect("sent");
        client.socket().shutdown(Shutdown::Write).expect("half closed");
        for _ in 0..10 {
            assert!(client.receive().expect("answered").1 == Answer::Value(value.clone()));
        }
        assert_eq!(client.read_to_end().expect("the server closes too"), b"");
    }
}

#[test]
fn many_clients_at_once_see_each_others_writes() {
    const CLIENTS: i64 = 64;
    const ROUNDS: i64 = 200;
    let store = Store::start();
    thread::scope(|scope| {
        for which in 0..CLIENTS {
            let mut client = if which % 2 == 0 { store.connect() } else { store.connect_unix() };
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    let answer = client.ask(&increment(b"all together", 1)).expect("counted");
                    assert!(matches!(answer, Answer::Number(_)), "{answer:?}");
                }
            });
        }
    });
    let total = (CLIENTS * ROUNDS).to_string().into_bytes();
    assert_eq!(store.connect().ask(&get(b"all together")).expect("read"), Answer::Value(total));
}

#[test]
fn data_server_started_by_hand_starts_the_whole_store() {
    let store = Launch::new().front(binaries::program("kvs-data")).start();
    let mut connection = store.connect();
    assert_eq!(connection.ask(&set(b"key", b"value")).expect("stored"), Answer::Stored);
    store.kill_data();
    let answer = eventually_some("the next data server answers", SOON, || {
        Connection::welcomed_tcp(store.ready().tcp).and_then(|mut new| new.ask(&get(b"key"))).ok()
    });
    assert_eq!(answer, Answer::Value(b"value".to_vec()));
}
