//! Goal: the client keeps its promises whatever a server does. Method: a server of a few lines in a thread, on a real socket, that
//! answers, dies, or talks nonsense as told. The real server is met in the workspace's tests.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use kvs_core::wire::{
    self, ErrorCode, FRAME_HEADER_BYTES, PROTOCOL, Request, RequestBody, Response, ResponseBody,
    decode_request, encode_response,
};

use super::*;

/// What the server does after its welcome on one connection.
enum Act {
    /// Answers so many requests, then closes.
    AnswerThenClose(usize),
    /// Reads so many requests, then closes without an answer.
    ReadThenClose(usize),
    /// Sends these bytes and closes.
    Say(&'static [u8]),
}

fn server(acts: Vec<Act>) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        for act in acts {
            let (mut socket, _) = listener.accept().expect("a client");
            let mut input = Vec::new();
            match act {
                Act::Say(bytes) => socket.write_all(bytes).expect("a reader"),
                Act::AnswerThenClose(count) => (0..=count).for_each(|_| answer(&mut socket, &mut input)),
                Act::ReadThenClose(count) => {
                    answer(&mut socket, &mut input);
                    (0..count).for_each(|_| drop(next_frame(&mut socket, &mut input)));
                }
            }
        }
    });
    (address, thread)
}

fn next_frame(socket: &mut TcpStream, input: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Ok(Some(extent)) = wire::peek(input, usize::MAX)
            && input.len() >= extent.total
        {
            return Some(input.drain(..extent.total).collect());
        }
        let mut part = [0; 4096];
        match socket.read(&mut part) {
            Ok(0) | Err(_) => return None,
            Ok(count) => input.extend_from_slice(&part[..count]),
        }
    }
}

fn answer(socket: &mut TcpStream, input: &mut Vec<u8>) {
    let Some(frame) = next_frame(socket, input) else { return };
    let Request { number, body } = decode_request(&frame[FRAME_HEADER_BYTES..]).expect("a request");
    let body = match body {
        RequestBody::Hello { .. } => {
            ResponseBody::Welcome { protocol: PROTOCOL, server: "fake", connection: 1, value_bytes_max: 1000 }
        }
        RequestBody::Get { key } => ResponseBody::Value { value: key },
        RequestBody::Set { .. } => ResponseBody::Stored,
        RequestBody::Increment { by, .. } => ResponseBody::Number { value: by },
        RequestBody::Delete { .. } => {
            ResponseBody::Error { code: ErrorCode::StoreFull, message: "full of it" }
        }
        _ => ResponseBody::Missing,
    };
    let mut out = Vec::new();
    encode_response(&mut out, &Response { number, body });
    // The client may be gone.
    let _ = socket.write_all(&out);
}

fn impatient(address: &str) -> Client {
    ConnectOptions::new().retry_for(Duration::from_millis(200)).connect(address).expect("a server")
}

#[test]
fn client_connects_again_and_repeats_what_may_be_repeated() {
    let (address, thread) =
        server(vec![Act::AnswerThenClose(1), Act::ReadThenClose(1), Act::AnswerThenClose(2)]);
    let mut client = impatient(&address);
    assert_eq!(client.get("a").expect("answered").as_deref(), Some(&b"a"[..]));
    assert_eq!(client.get("b").expect("repeated twice").as_deref(), Some(&b"b"[..]));
    client.set("c", "v").expect("answered");
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_says_interrupted_for_what_must_not_be_repeated() {
    let (address, thread) = server(vec![Act::ReadThenClose(1), Act::AnswerThenClose(1)]);
    let mut client = impatient(&address);
    assert!(matches!(client.increment("a", 1), Err(Error::Interrupted)));
    assert_eq!(client.increment("a", 1).expect("a new one"), 1);
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_pipeline_is_answered_in_order_with_single_failures() {
    let (address, thread) = server(vec![Act::AnswerThenClose(4)]);
    let mut client = impatient(&address);
    let mut pipeline = client.pipeline();
    pipeline.set("a", "1").get("").get("k").delete("x").increment("n", 7).set("b", vec![0; 1001]);
    let answers = pipeline.run().expect("answered");
    assert!(
        matches!(
            &answers[..],
            [
                Answer::Stored,
                Answer::Failed(Error::KeyLength { found: 0 }),
                Answer::Value(Some(_)),
                Answer::Failed(Error::StoreFull { .. }),
                Answer::Number(7),
                Answer::Failed(Error::ValueLength { found: 1001, max: 1000 })
            ]
        ),
        "{answers:?}"
    );
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_and_server_do_not_wait_for_each_other_with_both_directions_full() {
    let count = 100_000;
    let (address, thread) = server(vec![Act::AnswerThenClose(count)]);
    let mut client = impatient(&address);
    let mut pipeline = client.pipeline();
    let key = [b'k'; 200];
    for _ in 0..count {
        pipeline.get(key);
    }
    let answers = pipeline.run().expect("answered");
    assert_eq!(answers.len(), count);
    assert!(answers.iter().all(|answer| matches!(answer, Answer::Value(Some(value)) if value[..] == key)));
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_of_somebody_else_says_so() {
    let (address, thread) = server(vec![
        Act::Say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Act::Say(b"220 mail.example ESMTP ready for a long talk\r\n"),
    ]);
    for _ in 0..2 {
        assert!(matches!(Client::connect(&address), Err(Error::NotKvs { .. })));
    }
    thread.join().expect("the server");
}

#[test]
fn client_gives_up_when_nobody_comes_back() {
    let (address, thread) = server(vec![Act::AnswerThenClose(0)]);
    let mut client = impatient(&address);
    thread.join().expect("the server");
    assert!(matches!(client.get("a"), Err(Error::Disconnected { .. })));
    assert!(matches!(Client::connect(&address), Err(Error::Connect { .. })));
    for bad in ["", "host", ":1", "host:99999", "host:x"] {
        assert!(matches!(Client::connect(bad), Err(Error::Address { .. })), "{bad:?}");
    }
}
