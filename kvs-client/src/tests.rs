//! Goal: the client keeps its promises whatever a server does. Method: a server of a few lines in a thread, on a real socket, that
//! answers, dies, or talks nonsense as told. The real server is met in the workspace's tests.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use kvs_core::wire::{
    self, ErrorCode, FRAME_HEADER_BYTES, PROTOCOL, Request, RequestBody, Response, ResponseBody,
    SessionToken, decode_request, encode_response,
};

use super::*;

/// What the server does after its welcome on one connection.
enum Act {
    /// Answers so many requests, then closes.
    AnswerThenClose(usize),
    /// Executes so many requests, then closes without an answer.
    ReadThenClose(usize),
    /// Reads so many requests, then closes and has forgotten them.
    LoseThenClose(usize),
    /// Forgets all there was, then answers so many requests.
    ForgetThenAnswer(usize),
    /// Says to so many requests that another connection has the session, then closes.
    RefuseThenClose(usize),
    /// Sends these bytes and closes.
    Say(&'static [u8]),
}

/// What the server knows.
#[derive(Default)]
struct Memory {
    /// Whether clients have sessions.
    keeps_sessions: bool,
    tokens: HashSet<SessionToken>,
    attempt: u64,
    /// Sums by the number of their increment.
    results: HashMap<u32, i64>,
    sum: i64,
    numbers: Vec<u32>,
}

fn server(acts: Vec<Act>) -> (String, JoinHandle<Memory>) {
    serve(acts, Memory::default())
}

fn server_with_sessions(acts: Vec<Act>) -> (String, JoinHandle<Memory>) {
    serve(acts, Memory { keeps_sessions: true, ..Memory::default() })
}

fn serve(acts: Vec<Act>, mut memory: Memory) -> (String, JoinHandle<Memory>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        for act in acts {
            let (mut socket, _) = listener.accept().expect("a client");
            let mut peer = Peer { socket: &mut socket, input: Vec::new(), memory: &mut memory };
            match act {
                Act::Say(bytes) => peer.socket.write_all(bytes).expect("a reader"),
                Act::AnswerThenClose(count) => (0..=count).for_each(|_| peer.answer()),
                Act::ForgetThenAnswer(count) => {
                    *peer.memory = Memory { keeps_sessions: true, ..Memory::default() };
                    (0..=count).for_each(|_| peer.answer());
                }
                Act::ReadThenClose(count) => {
                    peer.answer();
                    (0..count).for_each(|_| drop(peer.execute()));
                }
                Act::LoseThenClose(count) => {
                    peer.answer();
                    (0..count).for_each(|_| drop(peer.request()));
                }
                Act::RefuseThenClose(count) => {
                    peer.answer();
                    (0..count).for_each(|_| peer.refuse());
                }
            }
        }
        memory
    });
    (address, thread)
}

struct Peer<'p> {
    socket: &'p mut TcpStream,
    input: Vec<u8>,
    memory: &'p mut Memory,
}

impl Peer<'_> {
    /// The next request that is not about a session; those are answered on the way.
    fn request(&mut self) -> Option<Vec<u8>> {
        loop {
            let frame = next_frame(self.socket, &mut self.input)?;
            let Request { number, body } = decode_request(&frame[FRAME_HEADER_BYTES..]).expect("a request");
            let body = match body {
                RequestBody::Session { token, attempt } if self.memory.keeps_sessions => {
                    assert!(attempt > self.memory.attempt, "attempt {attempt}");
                    self.memory.attempt = attempt;
                    ResponseBody::Session { resumed: !self.memory.tokens.insert(token), window: 64 }
                }
                RequestBody::Session { .. } => {
                    ResponseBody::Error { code: ErrorCode::UnknownMessage, message: "what is that?" }
                }
                _ => return Some(frame),
            };
            self.say(number, body);
        }
    }

    fn say(&mut self, number: u32, body: ResponseBody<'_>) {
        let mut out = Vec::new();
        encode_response(&mut out, &Response { number, body });
        // The client may be gone.
        let _ = self.socket.write_all(&out);
    }

    /// Executes the next request; its frame and, for an increment, the sum.
    fn execute(&mut self) -> Option<(Vec<u8>, i64)> {
        let frame = self.request()?;
        let Request { number, body } = decode_request(&frame[FRAME_HEADER_BYTES..]).expect("a request");
        if body.is_change() {
            self.memory.numbers.push(number);
        }
        let RequestBody::Increment { by, .. } = body else { return Some((frame, 0)) };
        if let Some(sum) = self.memory.results.get(&number).filter(|_| self.memory.keeps_sessions) {
            return Some((frame, *sum));
        }
        self.memory.sum += by;
        self.memory.results.insert(number, self.memory.sum);
        Some((frame, self.memory.sum))
    }

    fn refuse(&mut self) {
        let Some(frame) = self.request() else { return };
        let number = decode_request(&frame[FRAME_HEADER_BYTES..]).expect("a request").number;
        self.say(number, ResponseBody::Error { code: ErrorCode::Session, message: "another has it" });
    }

    fn answer(&mut self) {
        let Some((frame, sum)) = self.execute() else { return };
        let Request { number, body } = decode_request(&frame[FRAME_HEADER_BYTES..]).expect("a request");
        let body = match body {
            RequestBody::Hello { .. } => ResponseBody::Welcome {
                protocol: PROTOCOL,
                server: "fake",
                connection: 1,
                value_bytes_max: 1000,
            },
            RequestBody::Get { key } => ResponseBody::Value { value: key },
            RequestBody::Set { .. } => ResponseBody::Stored,
            RequestBody::Increment { .. } => ResponseBody::Number { value: sum },
            RequestBody::Delete { .. } => {
                ResponseBody::Error { code: ErrorCode::StoreFull, message: "full of it" }
            }
            _ => ResponseBody::Missing,
        };
        self.say(number, body);
    }
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
fn client_of_a_server_without_sessions_says_interrupted_for_what_must_not_be_repeated() {
    let (address, thread) = server(vec![Act::ReadThenClose(1), Act::AnswerThenClose(1)]);
    let mut client = impatient(&address);
    assert!(matches!(client.increment("a", 1), Err(Error::Interrupted)));
    assert_eq!(client.increment("a", 1).expect("a new one"), 2, "it had been executed");
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

#[test]
fn client_in_a_session_repeats_changes_and_each_happens_once() {
    let (address, thread) = server_with_sessions(vec![
        Act::AnswerThenClose(1),
        // Executed, and the answer lost; then not even executed, twice; then answered.
        Act::ReadThenClose(1),
        Act::LoseThenClose(1),
        Act::LoseThenClose(0),
        Act::AnswerThenClose(2),
    ]);
    let mut client = impatient(&address);
    assert_eq!(client.increment("n", 1).expect("answered"), 1);
    assert_eq!(client.increment("n", 1).expect("repeated"), 2);
    assert_eq!(client.increment("n", 1).expect("answered"), 3);
    drop(client);
    let memory = thread.join().expect("the server");
    assert_eq!(memory.sum, 3);
    let first = memory.numbers[0];
    assert_eq!(memory.numbers, [first, first + 1, first + 1, first + 2], "one number a change");
}

#[test]
fn client_of_a_server_that_lost_its_memory_says_interrupted_only_for_what_is_in_doubt() {
    let (address, thread) = server_with_sessions(vec![Act::ReadThenClose(3), Act::ForgetThenAnswer(5)]);
    let mut client = impatient(&address);
    let mut pipeline = client.pipeline();
    pipeline.increment("n", 1).set("k", "v").get("k");
    let answers = pipeline.run().expect("answered");
    assert!(
        matches!(&answers[..], [Answer::Failed(Error::Interrupted), Answer::Stored, Answer::Value(Some(_))]),
        "{answers:?}"
    );
    assert_eq!(client.increment("n", 1).expect("answered"), 1);
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_whose_session_another_connection_took_takes_it_back() {
    let (address, thread) = server_with_sessions(vec![Act::RefuseThenClose(1), Act::AnswerThenClose(1)]);
    let mut client = impatient(&address);
    assert_eq!(client.increment("n", 5).expect("repeated"), 5);
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_pipeline_longer_than_the_window_has_no_more_unanswered() {
    // The server answers nothing until 64 changes have come, and then nothing until the client had those answers.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let mut memory = Memory { keeps_sessions: true, ..Memory::default() };
        let mut peer = Peer { socket: &mut socket, input: Vec::new(), memory: &mut memory };
        peer.answer();
        let (mut unanswered, mut executed) = (Vec::new(), 0);
        while executed < 1000 {
            let (frame, sum) = peer.execute().expect("a request");
            executed += 1;
            unanswered.push((decode_request(&frame[FRAME_HEADER_BYTES..]).expect("one").number, sum));
            if unanswered.len() == 64 || executed == 1000 {
                peer.socket.set_nonblocking(true).expect("a socket");
                let more = peer.socket.read(&mut [0; 1]);
                assert!(more.is_err() && peer.input.is_empty(), "more than 64 are unanswered");
                peer.socket.set_nonblocking(false).expect("a socket");
                unanswered
                    .drain(..)
                    .for_each(|(number, value)| peer.say(number, ResponseBody::Number { value }));
            }
        }
    });
    let mut client = impatient(&address);
    let mut pipeline = client.pipeline();
    for _ in 0..1000 {
        pipeline.increment("n", 1);
    }
    let answers = pipeline.run().expect("answered");
    assert!(
        (1..).zip(&answers).all(|(sum, answer)| matches!(answer, Answer::Number(found) if *found == sum))
    );
    drop(client);
    thread.join().expect("the server");
}

#[test]
fn client_numbers_go_on_over_their_end_and_over_pipelines_that_are_not_run() {
    let (address, thread) = server_with_sessions(vec![Act::AnswerThenClose(3_000)]);
    let mut client = impatient(&address);
    client.pipeline().increment("n", 1).increment("n", 1);
    for round in 0..3 {
        let mut pipeline = client.pipeline();
        for _ in 0..1_000 {
            pipeline.increment("n", 1);
        }
        let answers = pipeline.run().expect("answered");
        assert!(matches!(answers.last(), Some(Answer::Number(sum)) if *sum == (round + 1) * 1_000));
    }
    drop(client);
    let numbers = thread.join().expect("the server").numbers;
    assert!(numbers.windows(2).all(|two| two[1] == two[0].wrapping_add(1)), "{numbers:?}");
    assert!(numbers[0] > numbers[2_999], "they came round: {} {}", numbers[0], numbers[2_999]);
}
