//! Goal: what is counted was answered, and rightly. Method: a store of a few lines that answers in pieces, wrongly, or not at all.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::scope;
use std::time::Duration;

use super::NetworkTarget;
use super::connection::Address;
use super::text::Text;
use crate::bench::results::Sample;
use crate::bench::scenario::Load;
use crate::bench::target::{Interrupted, Measurement, Span, Target};
use crate::bench::workload::{Distribution, Workload, key};

const VALUE_BYTES: usize = 100;
/// Bytes of the key in a request, and what a request ends with.
const KEY_AT: usize = 3;
const READ_END: &str = " v\r\n";

/// What the store does with an answer.
type Answer = fn(&mut UnixStream, &[u8]) -> std::io::Result<()>;

fn workload() -> Workload {
    Workload {
        keys: 50,
        key_bytes: 16,
        value_bytes: VALUE_BYTES,
        read_share: 1.0,
        distribution: Distribution::Uniform,
        seed: 1,
    }
}

/// Answers reads as memcached would, each by `answer`, until the client is gone.
fn serve(mut stream: UnixStream, answer: Answer) {
    let values = workload().values();
    let mut request = vec![0; KEY_AT + 16 + READ_END.len()];
    while stream.read_exact(&mut request).is_ok() {
        let asked = &request[KEY_AT..KEY_AT + 16];
        let index = (0..50).find(|index| key::<16>(*index) == asked).expect("a key");
        let head = format!("VA {VALUE_BYTES}\r\n");
        let bytes = [head.as_bytes(), values.of(index), b"\r\n"].concat();
        if answer(&mut stream, &bytes).is_err() {
            return;
        }
    }
}

fn whole(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes)
}

fn in_pieces(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    bytes.chunks(7).try_for_each(|piece| stream.write_all(piece))
}

fn of_another(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    let mut bytes = bytes.to_vec();
    bytes[50] ^= 1;
    stream.write_all(&bytes)
}

fn missing(stream: &mut UnixStream, _bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(b"EN\r\n")
}

fn too_often(stream: &mut UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(&[bytes, bytes, bytes].concat())
}

fn none(_stream: &mut UnixStream, _bytes: &[u8]) -> std::io::Result<()> {
    Err(std::io::ErrorKind::ConnectionAborted.into())
}

/// Measures such a store with two connections.
fn measure(answer: Answer, pipeline: usize, rate: Option<f64>) -> anyhow::Result<Sample> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("sock");
    let listener = UnixListener::bind(&path)?;
    let mut target = NetworkTarget {
        name: "test".into(),
        address: Address::Unix(path),
        protocol: Text::memcached(&workload()),
        checks_values: true,
        workload: workload(),
        values: workload().values(),
        load: Load { connections: 2, pipeline, threads: Some(1), rate },
        _server: std::rc::Rc::new(()),
    };
    let span = Span {
        warm_up: Duration::from_millis(10),
        duration: Duration::from_millis(50),
        interrupted: Interrupted::default(),
    };
    scope(|scope| {
        for _ in 0..2 {
            let listener = &listener;
            scope.spawn(move || serve(listener.accept().expect("a client").0, answer));
        }
        match target.measure(&span)? {
            Measurement::Load(sample) => Ok(sample),
            Measurement::Figure(_) => anyhow::bail!("no sample"),
        }
    })
}

#[test]
fn driver_counts_answers_whole_and_in_pieces() {
    for answer in [whole as Answer, in_pieces] {
        for pipeline in [1, 16] {
            let sample = measure(answer, pipeline, None).expect("measured");
            assert!(sample.operations > 0 && sample.seconds >= 0.05, "{sample:?}");
            assert_eq!(sample.latency.len(), sample.operations);
        }
    }
}

#[test]
fn driver_in_an_open_loop_asks_as_often_as_it_is_told() {
    let sample = measure(whole, 4, Some(2_000.0)).expect("measured");
    // Those that were due are counted, be they answered or not; on a busy machine some from before come on top.
    assert!(sample.latency.len() as f64 >= sample.seconds * 2_000.0 - 2.0, "{sample:?}");
}

#[test]
fn driver_refuses_wrong_answers() {
    for (answer, why) in [
        (of_another as Answer, "another key's value"),
        (missing, "is gone"),
        (too_often, "nobody asked"),
        (none, "closed a connection"),
    ] {
        let refused = measure(answer, 1, None).expect_err("no figure comes of this").to_string();
        assert!(refused.contains(why), "{refused}");
    }
}
