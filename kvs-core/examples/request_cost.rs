//! What one request costs a worker without its system calls: from bytes in the input ring to the answer in the output ring.
//!
//! A connection on a segment of this process's memory gets batches of 64 requests on random keys; printed are nanoseconds a request,
//! median of seven rounds, for keys that fit the caches and for a million. Under `valgrind --tool=callgrind` it counts instructions:
//!
//! ```text
//! cargo run --release -p kvs-core --example request_cost
//! valgrind --tool=callgrind target/release/examples/request_cost 1000 get 10
//! ```
//!
//! Arguments, all or none: number of keys, `get` or `set`, batches a round.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use kvs_core::connection::Connection;
use kvs_core::connection::context::{Context, Statistics};
use kvs_core::control::{Adopted, StatisticOwned, Transport};
use kvs_core::segment::Segment;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::table::Table;
use kvs_core::wire::{PROTOCOL, Request, RequestBody, SetCondition, encode_request};

const BATCH: u64 = 64;
const ROUNDS: usize = 7;
const CAPACITY_BYTES: u64 = 256 << 20;
const VALUE: [u8; 32] = [b'v'; 32];

struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        Vec::new()
    }
}

/// Takes in `requests`, executes them, and takes the answers away.
fn serve<'s>(
    connection: &mut Connection<'s>,
    context: &mut Context<'s>,
    requests: &[u8],
) -> anyhow::Result<()> {
    let (first, second) = connection.input_space(context)?;
    let (head, tail) = requests.split_at(requests.len().min(first.len()));
    first[..head.len()].copy_from_slice(head);
    second[..tail.len()].copy_from_slice(tail);
    connection.received(requests.len() as u64);
    connection.execute(context)?;
    let answers: usize = connection.pending(context)?.iter().map(|part| part.len()).sum();
    connection.sent(context, answers as u64)?;
    Ok(())
}

fn request(into: &mut Vec<u8>, number: u64, key: u64, is_set: bool) {
    let key = format!("{key:016}").into_bytes();
    let body = if is_set {
        RequestBody::Set { condition: SetCondition::Always, key: &key, value: &VALUE }
    } else {
        RequestBody::Get { key: &key }
    };
    encode_request(into, &Request { number: number as u32, body });
}

fn batches(keys: u64, is_set: bool, count: u64) -> Vec<Vec<u8>> {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut batch = || {
        let mut bytes = Vec::new();
        for number in 0..BATCH {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            request(&mut bytes, number, random % keys, is_set);
        }
        bytes
    };
    (0..count).map(|_| batch()).collect()
}

/// Nanoseconds a request.
fn measure(keys: u64, is_set: bool, count: u64) -> anyhow::Result<f64> {
    let segment = Segment::on_heap(CAPACITY_BYTES)?;
    segment.claim_worker(0)?;
    let table = Table::new(&segment)?;
    let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0))?;
    let mut context = Context::new(&table, worker, &NoStatistics, 1 << 20, 8);
    let adopted = Adopted { connection: 1, transport: Transport::Tcp };
    let mut connection = Connection::open(&segment, 0, adopted)?;
    let mut hello = Vec::new();
    let body = RequestBody::Hello { protocol: PROTOCOL, name: "request_cost", pid: 1 };
    encode_request(&mut hello, &Request { number: 0, body });
    serve(&mut connection, &mut context, &hello)?;
    for first in (0..keys).step_by(BATCH as usize) {
        let mut bytes = Vec::new();
        (first..keys.min(first + BATCH)).for_each(|key| request(&mut bytes, key, key, true));
        serve(&mut connection, &mut context, &bytes)?;
    }
    let batches = batches(keys, is_set, count);
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for batch in &batches {
            serve(&mut connection, &mut context, batch)?;
        }
        rounds.push(start.elapsed().as_secs_f64() * 1e9 / (count * BATCH) as f64);
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[ROUNDS / 2])
}

fn run(arguments: &[String]) -> anyhow::Result<()> {
    if let [keys, kind, count] = arguments {
        let keys = keys.parse().context("the number of keys")?;
        let cost = measure(keys, kind == "set", count.parse().context("the number of batches")?)?;
        println!("{cost:.0} ns");
        return Ok(());
    }
    println!("{:>10} {:>8} {:>8}", "keys", "get", "set");
    for keys in [1_000, 1_000_000] {
        let (get, set) = (measure(keys, false, 4_000)?, measure(keys, true, 4_000)?);
        println!("{keys:>10} {get:>5.0} ns {set:>5.0} ns");
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("request_cost: {error:#}");
            ExitCode::FAILURE
        }
    }
}
