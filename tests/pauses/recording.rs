//! A client that says what it sees: one connection, opened once, and no code that would open another.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::figures::{grouped, readable};
use super::speak::{Answer, Speak, Wire};

/// How often it says something, and how many times.
const EVERY: Duration = Duration::from_secs(1);
const TIMES: u32 = 4;

/// Counts up in a closed loop; any answer but the next number is an error, and the end.
pub fn run(address: SocketAddr) -> Result<()> {
    let mut wire = Wire::connect(Speak::Kvs, address)?;
    let Answer::Number(mut number) = wire.increment()? else { bail!("no number") };
    let first = number;
    let (begun, mut last, mut longest, mut said) = (Instant::now(), Instant::now(), Duration::ZERO, 0);
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
            let answers = grouped((number - first) as u64);
            println!(
                "client: {answers} answers, each one more than the last; longest wait {}",
                readable(longest)
            );
            longest = Duration::ZERO;
        }
    }
    Ok(())
}
