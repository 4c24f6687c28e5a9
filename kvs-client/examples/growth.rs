//! Measures what a growing store does to single requests, and what an entry costs: fills an empty store, then writes the same keys
//! again, when nothing grows any more. What only the first has is owed to growth.
//!
//! ```text
//! cargo run --release -p kvs-client --example growth -- 127.0.0.1:9999 10000000
//! ```

use std::time::{Duration, Instant};

use kvs_client::{Answer, Client, Error, Statistic};

const KEY_BYTES: u64 = 16;
const VALUE: [u8; 32] = [7; 32];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:9999".into());
    let entries: u64 = arguments.next().map_or(Ok(1_000_000), |text| text.parse())?;
    let mut client = Client::connect(address)?;
    let before = number(&mut client, "entries")?;
    if before != 0 {
        return Err(format!("the store has {before} entries already; start an empty one").into());
    }
    for at_once in [1, 16] {
        // One by one only the first million: each waits for its answer.
        let count = if at_once == 1 { entries.min(1_000_000) } else { entries };
        for what in ["growing", "grown"] {
            let started = Instant::now();
            let mut times = write_all(&mut client, count, at_once)?;
            let rate = count as f64 / started.elapsed().as_secs_f64();
            report(&format!("{what}, {at_once} at once, {count} writes, {rate:.0}/s"), &mut times);
        }
        if at_once == 1 {
            memory(&mut client)?;
            delete_all(&mut client, count)?;
        }
    }
    memory(&mut client)?;
    Ok(())
}

fn key_of(number: u64) -> String {
    format!("key:{number:012}")
}

fn write_all(client: &mut Client, entries: u64, at_once: u64) -> Result<Vec<Duration>, Error> {
    let mut times = Vec::with_capacity((entries / at_once) as usize);
    for first in (0..entries).step_by(at_once as usize) {
        let mut pipeline = client.pipeline();
        for number in first..entries.min(first + at_once) {
            pipeline.set(key_of(number), VALUE);
        }
        let sent = Instant::now();
        let answers = pipeline.run()?;
        times.push(sent.elapsed());
        for answer in answers {
            if let Answer::Failed(error) = answer {
                return Err(error);
            }
        }
    }
    Ok(times)
}

fn delete_all(client: &mut Client, entries: u64) -> Result<(), Error> {
    for first in (0..entries).step_by(1000) {
        let mut pipeline = client.pipeline();
        (first..entries.min(first + 1000)).for_each(|number| {
            pipeline.delete(key_of(number));
        });
        pipeline.run()?;
    }
    Ok(())
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    let slow = times.iter().filter(|time| time.as_micros() >= 1000).count();
    println!(
        "{what}: median {:.0} us, p99.9 {:.0} us, p99.99 {:.0} us, longest {:.0} us, {slow} of {} over 1 ms",
        at(0.5),
        at(0.999),
        at(0.9999),
        at(1.0),
        times.len()
    );
}

fn memory(client: &mut Client) -> Result<(), Error> {
    let entries = number(client, "entries")?.max(1);
    let segment = number(client, "segment_bytes")?;
    let over = segment as f64 / entries as f64 - (KEY_BYTES + VALUE.len() as u64) as f64;
    println!("{entries} entries in {segment} bytes: {over:.2} bytes an entry over key and value");
    Ok(())
}

fn number(client: &mut Client, wanted: &str) -> Result<u64, Error> {
    let found = client.stats()?.into_iter().find_map(|(name, value)| match value {
        Statistic::Number(number) if name == wanted => Some(number),
        _ => None,
    });
    Ok(found.unwrap_or(0))
}
