//! What the clients do, each until the storm is over; what they began they finish. Each knows what every answer must be.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kvs_client::ConnectOptions;
use kvs_harness::connection::{Answer, Socket, delete, get, increment, set};
use kvs_harness::random::Random;
use kvs_harness::store::Ready;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

use super::talker::{Talker, Transport, insert};
use super::weather::Weather;

/// Pause of clients that would else leave no time to others.
const REST: Duration = Duration::from_millis(2);

/// What counters must hold in the end.
pub type Counters = Mutex<Vec<(String, i64)>>;

fn settle(counters: &Counters, name: &str, count: i64) {
    counters.lock().expect("nobody panics with the counters").push((name.to_owned(), count));
}

/// Increments a counter of its own, up to 32 at once.
pub fn count_pipelined(client: &mut Talker<'_>, counters: &Counters) -> Result<()> {
    let (key, mut count) = (client.name().to_owned(), 0);
    while !client.weather().is_over() {
        let at_once = client.random.between(1, 32);
        (0..at_once).for_each(|_| client.queue(increment(key.as_bytes(), 1)));
        client.send()?;
        for _ in 0..at_once {
            count += 1;
            client.expect(&Answer::Number(count))?;
        }
        client.pause(REST);
    }
    settle(counters, &key, count);
    Ok(())
}

/// Increments a counter that others increment as well, one at a time. No number is ever given to two.
pub fn count_together(client: &mut Talker<'_>, key: &str, given: &Mutex<Vec<i64>>) -> Result<()> {
    let mut mine = Vec::new();
    while !client.weather().is_over() {
        client.queue(increment(key.as_bytes(), 1));
        client.send()?;
        match client.take()? {
            Answer::Number(number) => {
                ensure!(mine.last().is_none_or(|last| number > *last), "{number} after {:?}", mine.last());
                mine.push(number);
            }
            other => bail!("an increment is answered {other:?}"),
        }
        client.pause(REST / 2);
    }
    given.lock().expect("nobody panics with the numbers").extend(mine);
    Ok(())
}

/// Inserts keys that exist nowhere; each is stored once, exists then, is read, deleted once and is missing then.
pub fn insert_unique(client: &mut Talker<'_>, counters: &Counters) -> Result<()> {
    let (mut inserted, mut kept) = (0_i64, 0);
    while !client.weather().is_over() {
        let at_once = client.random.between(1, 12) as i64;
        let keys: Vec<String> =
            (0..at_once).map(|at| format!("{} {}", client.name(), inserted + at)).collect();
        let stays = client.random.once_in(20);
        for key in &keys {
            client.queue(insert(key.as_bytes(), key.as_bytes()));
            client.queue(insert(key.as_bytes(), b"another"));
            client.queue(get(key.as_bytes()));
            if !stays {
                client.queue(delete(key.as_bytes()));
                client.queue(delete(key.as_bytes()));
            }
        }
        client.send()?;
        for key in keys {
            client.expect(&Answer::Stored)?;
            client.expect(&Answer::Exists)?;
            client.expect(&Answer::Value(key.into_bytes()))?;
            if !stays {
                client.expect(&Answer::Deleted)?;
                client.expect(&Answer::Missing)?;
            }
        }
        inserted += at_once;
        kept += if stays { at_once } else { 0 };
        client.pause(REST);
    }
    let name = format!("{} kept", client.name());
    client.demand(set(name.as_bytes(), kept.to_string().as_bytes()), &Answer::Stored)?;
    settle(counters, &name, kept);
    Ok(())
}

/// Reads a number, writes the one that follows from it, reads that, over and over: a chain breaks at the first link that is lost or
/// made twice.
pub fn follow_chain(client: &mut Talker<'_>, counters: &Counters) -> Result<()> {
    let (key, steps) = (format!("{} chain", client.name()), format!("{} steps", client.name()));
    let (mut link, mut count) = (7_u64, 0);
    client.demand(set(key.as_bytes(), link.to_string().as_bytes()), &Answer::Stored)?;
    while !client.weather().is_over() {
        client.demand(get(key.as_bytes()), &Answer::Value(link.to_string().into_bytes()))?;
        link = Random::new(link).number();
        // Of different lengths, so that answers don't all have the same.
        link >>= link % 60;
        client.demand(set(key.as_bytes(), link.to_string().as_bytes()), &Answer::Stored)?;
        client.demand(increment(steps.as_bytes(), 1), &Answer::Number(count + 1))?;
        count += 1;
        client.pause(REST);
    }
    client.demand(get(key.as_bytes()), &Answer::Value(link.to_string().into_bytes()))?;
    settle(counters, &steps, count);
    Ok(())
}

/// Stores and reads values of one to six megabytes; every byte counts.
pub fn carry_large_values(client: &mut Talker<'_>) -> Result<()> {
    let key = format!("{} large", client.name());
    let pattern = Random::new(client.random.number()).bytes(7 << 20);
    while !client.weather().is_over() {
        let length = client.random.between(1 << 20, 6 << 20) as usize;
        let start = client.random.below(1 << 20) as usize;
        let value = &pattern[start..start + length];
        client.demand(set(key.as_bytes(), value), &Answer::Stored)?;
        let (reads, value) = (client.random.between(1, 3), Answer::Value(value.to_vec()));
        (0..reads).for_each(|_| client.queue(get(key.as_bytes())));
        client.send()?;
        (0..reads).try_for_each(|_| client.expect(&value))?;
        client.pause(20 * REST);
    }
    client.demand(delete(key.as_bytes()), &Answer::Deleted)
}

/// Sends the first part of a request, lets a kill pass, and sends the rest.
pub fn send_in_halves(client: &mut Talker<'_>, counters: &Counters) -> Result<()> {
    let (key, value_key, mut count) = (client.name().to_owned(), format!("{} value", client.name()), 0);
    while !client.weather().is_over() {
        let ahead = client.random.below(5) as i64;
        (0..ahead).for_each(|_| client.queue(increment(key.as_bytes(), 1)));
        let before = client.take_queued();
        let large = client.random.once_in(2);
        let length = if large { client.random.between(20_000, 400_000) as usize } else { 10 };
        let value = client.random.bytes(length);
        client.queue(set(value_key.as_bytes(), &value));
        let cut = client.take_queued();
        let at = 1 + client.random.below(cut.len() as u64 - 1) as usize;
        client.send_raw(&[&before, &cut[..at]].concat())?;
        client.weather().await_kill();
        client.send_raw(&cut[at..])?;
        for _ in 0..ahead {
            count += 1;
            client.expect(&Answer::Number(count))?;
        }
        client.expect(&Answer::Stored)?;
        client.demand(get(value_key.as_bytes()), &Answer::Value(value))?;
    }
    settle(counters, &key, count);
    Ok(())
}

/// What a long pipeline must be answered.
enum Due {
    Number(i64),
    Missing,
    Stored,
    Value(Vec<u8>),
}

impl From<Due> for Answer {
    fn from(due: Due) -> Self {
        match due {
            Due::Number(number) => Answer::Number(number),
            Due::Missing => Answer::Missing,
            Due::Stored => Answer::Stored,
            Due::Value(value) => Answer::Value(value),
        }
    }
}

/// Queues `count` requests of all kinds and says what they must be answered.
fn queue_many(client: &mut Talker<'_>, numbers: u64, counted: &mut i64) -> VecDeque<Due> {
    let (key, value_key) = (client.name().to_owned(), format!("{} value", client.name()));
    let mut due = VecDeque::new();
    for _ in 0..numbers {
        let value = client.random.number().to_string().repeat(3);
        client.queue(increment(key.as_bytes(), 1));
        client.queue(set(value_key.as_bytes(), value.as_bytes()));
        client.queue(get(value_key.as_bytes()));
        client.queue(get(b"not there"));
        *counted += 1;
        due.extend([Due::Number(*counted), Due::Stored, Due::Value(value.into_bytes()), Due::Missing]);
    }
    due
}

/// Sends `bytes` in a thread of its own while `reading` is done.
fn send_beside<T>(
    client: &mut Talker<'_>,
    bytes: &[u8],
    reading: impl FnOnce(&mut Talker<'_>, &AtomicU64) -> Result<T>,
) -> Result<T> {
    let mut socket = client.socket().try_clone().context("a second handle")?;
    let sent = AtomicU64::new(0);
    thread::scope(|scope| {
        let sending = scope.spawn(|| send_all(&mut socket, bytes, &sent));
        let read = reading(client, &sent);
        if read.is_err() {
            // Nobody reads any more, so who sends would wait for ever.
            let _ = client.socket().shutdown(std::net::Shutdown::Both);
        }
        let sent = sending.join().expect("the sender doesn't panic");
        read.and_then(|value| sent.map(|()| value))
    })
}

fn send_all(socket: &mut Socket, mut bytes: &[u8], sent: &AtomicU64) -> Result<()> {
    while !bytes.is_empty() {
        let count = socket.write(bytes).context("sending")?;
        ensure!(count > 0, "nothing is taken any more");
        sent.fetch_add(count as u64, Ordering::Relaxed);
        bytes = &bytes[count..];
    }
    Ok(())
}

/// Sends thousands of requests without waiting for one answer.
pub fn send_thousands(client: &mut Talker<'_>, counters: &Counters) -> Result<()> {
    let mut counted = 0;
    while !client.weather().is_over() {
        let numbers = client.random.between(500, 2_000);
        let due = queue_many(client, numbers, &mut counted);
        let bytes = client.take_queued();
        send_beside(client, &bytes, |client, _| {
            due.into_iter().try_for_each(|due| client.expect(&due.into()))
        })?;
        client.pause(20 * REST);
    }
    settle(counters, client.name(), counted);
    Ok(())
}

/// Sends more than all buffers hold and reads nothing, so that it waits in `send`; reads when a kill has passed. Returns how often it
/// waited.
pub fn read_late(client: &mut Talker<'_>) -> Result<u64> {
    let (key, mut waited) = (format!("{} late", client.name()), 0);
    match client.socket() {
        Socket::Tcp(stream) => small_buffers(stream),
        Socket::Unix(stream) => small_buffers(stream),
    }
    .context("small buffers")?;
    while !client.weather().is_over() {
        let values: Vec<Vec<u8>> = (0..40).map(|_| client.random.bytes(64 << 10)).collect();
        for value in &values {
            client.queue(set(key.as_bytes(), value));
            client.queue(get(key.as_bytes()));
            client.queue(get(key.as_bytes()));
        }
        let bytes = client.take_queued();
        waited += send_beside(client, &bytes, |client, sent| {
            client.weather().await_kill();
            let blocked = (sent.load(Ordering::Relaxed) as usize) < bytes.len();
            for value in values {
                client.expect(&Answer::Stored)?;
                let value = Answer::Value(value);
                client.expect(&value)?;
                client.expect(&value)?;
            }
            Ok(u64::from(blocked))
        })?;
        client.pause(20 * REST);
    }
    Ok(waited)
}

fn small_buffers(socket: impl rustix::fd::AsFd) -> rustix::io::Result<()> {
    set_socket_send_buffer_size(&socket, 32 << 10)?;
    set_socket_recv_buffer_size(&socket, 32 << 10)
}

/// Connects, asks, ends its sending side, lets a kill pass, and takes all answers; again and again.
pub fn close_half<'a>(
    connect: &mut dyn FnMut() -> Result<Talker<'a>>,
    weather: &Weather,
    counters: &Counters,
) -> Result<()> {
    let (mut name, mut count) = (String::new(), 0);
    while !weather.is_over() {
        let mut client = connect()?;
        client.name().clone_into(&mut name);
        let value_key = format!("{name} value");
        let length = client.random.between(1, 60_000) as usize;
        let value = client.random.bytes(length);
        client.queue(set(value_key.as_bytes(), &value));
        let at_once = client.random.between(1, 100);
        for _ in 0..at_once {
            client.queue(increment(name.as_bytes(), 1));
            client.queue(get(value_key.as_bytes()));
        }
        client.send()?;
        client.half_close()?;
        client.weather().await_kill();
        client.expect(&Answer::Stored)?;
        let value = Answer::Value(value);
        for _ in 0..at_once {
            count += 1;
            client.expect(&Answer::Number(count))?;
            client.expect(&value)?;
        }
        client.expect_end()?;
    }
    settle(counters, &name, count);
    Ok(())
}

/// The client library: no call fails, and the connection is the same in the end.
pub fn use_library(
    name: &str,
    ready: &Ready,
    transport: Transport,
    weather: &Weather,
    random: &mut Random,
    counters: &Counters,
) -> Result<()> {
    let address = match transport {
        Transport::Tcp => ready.tcp.to_string(),
        Transport::Unix => format!("unix:{}", ready.unix.display()),
    };
    let mut client = ConnectOptions::new().name(name).connect(address)?;
    let connection = client.connection();
    let mut count = 0;
    while !weather.is_over() {
        let at_once = random.between(1, 64);
        let mut pipeline = client.pipeline();
        (0..at_once).for_each(|_| _ = pipeline.increment(name, 1));
        for answer in pipeline.run()? {
            count += 1;
            let expected = matches!(answer, kvs_client::Answer::Number(number) if number == count);
            ensure!(expected, "increment {count} is answered {answer:?}");
        }
        let key = format!("{name} {count}");
        ensure!(client.set_if_absent(&key, &key)?, "{key} exists before it was stored");
        ensure!(client.get(&key)?.as_deref() == Some(key.as_bytes()), "{key} is something else");
        ensure!(client.delete(&key)?, "{key} is not there");
        weather.answered(at_once + 3);
        std::thread::sleep(Duration::from_micros(random.below(2_000)));
    }
    ensure!(client.connection() == connection, "the connection is another one");
    settle(counters, name, count);
    Ok(())
}
