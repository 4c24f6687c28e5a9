//! Measures whether values of many sizes fragment the store: values of 1 KiB to 1 MiB under random keys are overwritten by others
//! of random size. What would exceed the wanted part of the capacity has others deleted first. Counts "store full".
//!
//! ```text
//! cargo run --release -p kvs-client --example overwrite -- 127.0.0.1:9999 600 80
//! ```

use std::time::{Duration, Instant};

use kvs_client::{Client, Statistic};

const SIZE_MIN: f64 = 1024.0;
const SIZE_MAX: f64 = 1024.0 * 1024.0;

/// SplitMix64: the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Sizes of every magnitude are equally frequent.
    fn size(&mut self) -> usize {
        let part = self.next() as f64 / u64::MAX as f64;
        (SIZE_MIN * (SIZE_MAX / SIZE_MIN).powf(part)) as usize
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:9999".into());
    let seconds: u64 = arguments.next().map_or(Ok(600), |text| text.parse())?;
    let percent: u64 = arguments.next().map_or(Ok(80), |text| text.parse())?;
    let mut client = Client::connect(address)?;
    let wanted = (number(&mut client, "capacity_bytes")? * percent / 100) as usize;
    let mut random = Random(7);
    let bytes: Vec<u8> = (0..SIZE_MAX as usize).map(|at| (at * 31 + at / 251) as u8).collect();
    // Enough keys to exceed the wanted fill, so that it is always near it.
    let mean = (SIZE_MAX - SIZE_MIN) / (SIZE_MAX / SIZE_MIN).ln();
    let mut sizes = vec![0usize; (wanted as f64 / mean * 1.1) as usize];
    let (mut live, mut writes, mut written, mut full) = (0, 0u64, 0u64, 0u64);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(seconds) {
        let (which, size) = (random.below(sizes.len()), random.size());
        while live - sizes[which] + size > wanted {
            let other = random.below(sizes.len());
            if client.delete(key_of(other))? {
                live -= std::mem::take(&mut sizes[other]);
            }
        }
        match client.set(key_of(which), &bytes[..size]) {
            Ok(()) => {
                live = live - sizes[which] + size;
                sizes[which] = size;
                (writes, written) = (writes + 1, written + size as u64);
            }
            Err(error) => {
                full += 1;
                if full == 1 {
                    eprintln!("after {writes} writes, {live} bytes live, a value of {size}: {error}");
                }
            }
        }
    }
    let segment = number(&mut client, "segment_bytes")?;
    println!(
        "{writes} writes of {written} bytes in {:.0} s, {full} refused; {} values of {live} bytes live ({percent} % of the \
         capacity), {segment} bytes taken",
        started.elapsed().as_secs_f64(),
        sizes.iter().filter(|&&size| size > 0).count()
    );
    Ok(())
}

fn key_of(which: usize) -> String {
    format!("value {which}")
}

fn number(client: &mut Client, wanted: &str) -> Result<u64, kvs_client::Error> {
    let found = client.stats()?.into_iter().find_map(|(name, value)| match value {
        Statistic::Number(number) if name == wanted => Some(number),
        _ => None,
    });
    Ok(found.unwrap_or(0))
}
