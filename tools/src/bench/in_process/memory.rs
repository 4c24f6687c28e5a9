//! Memory that an entry takes: all that the processes of a store have when it is full, by the number of entries.
//!
//! It is what the machine has less: of kvs the segment's pages and what its processes have of their own; of the others what is
//! resident. Redis tells besides what it has asked its allocator for, which is less.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvs_core::segment::SegmentView;

use super::store;
use crate::bench::network::connection::Address;
use crate::bench::network::kvs::Kvs;
use crate::bench::network::text::Text;
use crate::bench::results::Unit;
use crate::bench::scenario::Case;
use crate::bench::servers::kvs::KvsServer;
use crate::bench::servers::memcached::MemcachedServer;
use crate::bench::servers::redis::RedisServer;
use crate::bench::servers::{Demand, find_program};
use crate::bench::stores::Settings;
use crate::bench::target::{Measurement, Span, Target};

/// kvs.
pub const KVS: &str = "kvs";
/// Redis, what is resident.
pub const REDIS: &str = "redis";
/// Redis, what it has asked for.
pub const REDIS_USED: &str = "redis-used";
/// memcached, what is resident.
pub const MEMCACHED: &str = "memcached";

/// Servers still move memory about after they were filled: a figure counts when it was the same for so long.
const SETTLED: Duration = Duration::from_millis(500);
/// It is not waited longer for that.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);
/// How long a server has to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Size of a block of [`std::os::unix::fs::MetadataExt::blocks`], in bytes.
const FILE_BLOCK_BYTES: u64 = 512;

/// Bytes of memory, with the names of their targets.
type Figures = Vec<(&'static str, u64)>;
/// Starts a program, fills it, and finds its figures.
type Fill<'f> = dyn Fn(&Path, &Demand, &Case, &Settings) -> Result<Figures> + 'f;

/// A figure that was found before the first round; it doesn't change.
struct MemoryTarget {
    name: &'static str,
    bytes_per_entry: f64,
}

impl Target for MemoryTarget {
    fn name(&self) -> &str {
        self.name
    }

    fn unit(&self) -> Unit {
        Unit::BytesPerEntry
    }

    fn measure(&mut self, _span: &Span) -> Result<Measurement> {
        Ok(Measurement::Figure(self.bytes_per_entry))
    }
}

/// Fills one store after the other, and notes what memory it has.
///
/// # Errors
/// A store that is here can't be filled.
pub fn targets(case: &Case, settings: &Settings, missing: &mut Vec<String>) -> Result<Vec<Box<dyn Target>>> {
    let has = |name: &str| case.targets.contains(&name);
    let mut found = Figures::new();
    let mut measure = |program: &str, fill: &Fill| {
        let Some(path) = find_program(program) else {
            missing.push(format!("{program} is not here; install it to compare its memory"));
            return Ok(());
        };
        found.extend(
            fill(&path, &settings.demand(case), case, settings)
                .with_context(|| format!("filling {program}"))?,
        );
        anyhow::Ok(())
    };
    if has(KVS) {
        measure("kvs-front", &kvs)?;
    }
    if has(REDIS) || has(REDIS_USED) {
        measure("redis-server", &redis)?;
    }
    if has(MEMCACHED) {
        measure("memcached", &memcached)?;
    }
    let target = |(name, bytes): (&'static str, u64)| -> Box<dyn Target> {
        Box::new(MemoryTarget { name, bytes_per_entry: bytes as f64 / case.workload.keys as f64 })
    };
    Ok(found.into_iter().filter(|(name, _)| has(name)).map(target).collect())
}

fn kvs(program: &Path, demand: &Demand, case: &Case, settings: &Settings) -> Result<Figures> {
    let server = KvsServer::start(program, demand)?;
    store::fill(case, &Address::Unix(server.unix.clone()), Kvs::new(&case.workload), settings)?;
    let path = server.name.segment_path();
    let view = SegmentView::open(&path)?;
    let header = view.header()?;
    let bytes = settled(|| {
        let segment =
            std::fs::metadata(&path).context("can't look at the segment")?.blocks() * FILE_BLOCK_BYTES;
        let pids = [&header.front_process, &header.data_process, &header.standby_process]
            .map(|process| process[0].load());
        // Without a standby there is no process to look at.
        let own = pids.iter().filter(|pid| **pid != 0).map(|pid| status_bytes(*pid, "RssAnon:").unwrap_or(0));
        Ok(segment + own.sum::<u64>())
    })?;
    Ok(vec![(KVS, bytes)])
}

fn redis(program: &Path, demand: &Demand, case: &Case, settings: &Settings) -> Result<Figures> {
    let server = RedisServer::start(program, demand)?;
    store::fill(case, &Address::Unix(server.unix.clone()), Text::redis(&case.workload), settings)?;
    let used = settled(|| used_memory(server.tcp))?;
    let resident = settled(|| status_bytes(server.pid().into(), "VmRSS:"))?;
    Ok(vec![(REDIS, resident), (REDIS_USED, used)])
}

fn memcached(program: &Path, demand: &Demand, case: &Case, settings: &Settings) -> Result<Figures> {
    let server = MemcachedServer::start(program, demand)?;
    store::fill(case, &Address::Tcp(server.tcp), Text::memcached(&case.workload), settings)?;
    Ok(vec![(MEMCACHED, settled(|| status_bytes(server.pid().into(), "VmRSS:"))?)])
}

/// The figure once it no longer changes.
fn settled(look: impl Fn() -> Result<u64>) -> Result<u64> {
    let begun = Instant::now();
    let (mut found, mut since) = (look()?, begun);
    while since.elapsed() < SETTLED && begun.elapsed() < PATIENCE {
        std::thread::sleep(LOOK_PAUSE);
        let now = look()?;
        if now != found {
            (found, since) = (now, Instant::now());
        }
    }
    Ok(found)
}

/// A line of `/proc/PID/status`, in bytes.
fn status_bytes(pid: u64, name: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    field_kib(&text, name).map(|kib| kib << 10).with_context(|| format!("{path} has no {name}"))
}

/// A number of KiB behind `name`, in the kernel's text about a process.
pub fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// What Redis has asked its allocator for, in bytes.
fn used_memory(address: SocketAddr) -> Result<u64> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_PATIENCE)?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    stream.write_all(b"INFO memory\r\nQUIT\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("Redis doesn't tell its memory")?;
    let used = answer.lines().find_map(|line| line.strip_prefix("used_memory:"));
    used.and_then(|used| used.trim().parse().ok()).context("Redis doesn't tell its memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_fields_are_found_by_their_whole_name() {
        let text = "VmRSS:\t    1234 kB\nRssAnon:\t     56 kB\nThreads:\t3\n";
        assert_eq!(field_kib(text, "RssAnon:"), Some(56));
        assert_eq!(field_kib(text, "VmRSS:"), Some(1234));
        assert_eq!(field_kib(text, "Threads:"), None);
        assert_eq!(field_kib(text, "RssShmem:"), None);
    }

    #[test]
    fn memory_of_this_process_is_known() {
        assert!(status_bytes(std::process::id().into(), "VmRSS:").expect("there is one") > 0);
        assert!(status_bytes(u64::MAX, "VmRSS:").is_err());
    }

    #[test]
    fn memory_is_settled_when_it_no_longer_changes() {
        let looks = std::cell::Cell::new(0);
        let found = settled(|| {
            looks.set(looks.get() + 1);
            Ok(looks.get().min(3))
        });
        assert_eq!(found.expect("nothing fails"), 3);
    }
}
