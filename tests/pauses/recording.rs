//! A client that says what it sees: one connection, opened once, and no code that would open another.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::figures::grouped;
use super::speak::{Answer, Speak, Wire};

/// How often it says something, and how many times.
const EVERY: Duration = Duration::from_secs(1);
const TIMES: u32 = 3;

/// Counts up in a closed loop; any answer but the next number is an error, and the end.
pub fn run(address: SocketAddr) -> Result<()> {
    let mut wire = Wire::connect(Speak::Kvs, address)?;
    let Answer::Number(mut number) = wire.increment()? else { bail!("no number") };
    println!("connected once; counts up in a loop, and ends at the first error");
    let (first, begun) = (number, Instant::now());
    let (mut last, mut longest, mut said) = (begun, Duration::ZERO, 0);
    while said < TIMES {
        match wire.increment()? {
            Answer::Number(found) if found == number + 1 => number = found,
            other => bail!("{other:?} came after {number}"),
        }
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        if begun.elapsed() >= EVERY * (said + 1) {
            said += 1;
            let (answers, ms) = (grouped((number - first) as u64), longest.as_secs_f64() * 1e3);
            println!("{answers} answers, each one more than the last; longest wait {ms:.2} ms");
            longest = Duration::ZERO;
        }
    }
    println!("no error, and still the first connection");
    Ok(())
}
