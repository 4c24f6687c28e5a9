//! What huge pages change, measured on a real segment full of memory: how long a process takes to map it, what a random access
//! costs, how long the process takes to die, and how long who uses a page waits while it is made huge.
//!
//! ```text
//! cargo run --release -p kvs-core --example huge_pages -- 1024
//! ```
//! with the MiB to measure with. The program starts itself again for what a process of its own is needed for.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvs_core::arena::extents;
use kvs_core::segment::layout::EXTENT_BYTES;
use kvs_core::segment::{self, Segment};
use kvs_core::transaction::Transaction;

const ACCESSES: u64 = 4_000_000;
const DEATHS: usize = 5;
/// Pieces in which a segment is mapped.
const PIECE_BYTES: u64 = 32 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [path, word] if word == "populate" => child(path),
        [mib] => measure(mib.parse().expect("a number of MiB")),
        _ => measure(1024),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A segment of which `mib` are reserved and written to.
fn filled(path: &std::path::Path, mib: u64) -> Segment {
    let segment = Segment::open_or_create(path, (mib + 64) << 20).expect("room in /dev/shm").segment;
    segment.claim_worker(0).expect("room");
    let slot = segment.memory().object(segment.regions().worker(0)).expect("claimed");
    for _ in 0..(mib << 20) / EXTENT_BYTES {
        let mut transaction = Transaction::begin(&segment, slot);
        let offset = extents::allocate(&mut transaction, 9).expect("room");
        transaction.commit().expect("small");
        segment.memory().zero(offset, EXTENT_BYTES).expect("its own");
    }
    segment
}

fn measure(mib: u64) {
    let path = std::path::PathBuf::from(format!("/dev/shm/kvs-huge-pages-{}", std::process::id()));
    let segment = filled(&path, mib);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).expect("named")) * 512;
    report("4 KiB pages", &path, &segment, mib);
    let before = blocks();
    collapse_all(&segment);
    println!("memory taken: {before} B with 4 KiB pages, {} B with huge ones", blocks());
    report("huge pages", &path, &segment, mib);
    drop(segment);
    segment::remove(&path).expect("ours");
}

fn report(pages: &str, path: &std::path::Path, segment: &Segment, mib: u64) {
    let (mut populated, mut died) = (Vec::new(), Vec::new());
    for _ in 0..DEATHS {
        let (populate, death) = life_and_death(path, segment);
        populated.push(populate);
        died.push(death);
    }
    populated.sort_by(f64::total_cmp);
    died.sort_by(f64::total_cmp);
    println!(
        "{pages}: {mib} MiB mapped by populate in {:.2} ms, process dead after {:.2} ms, random access {:.0} ns",
        populated[DEATHS / 2],
        died[DEATHS / 2],
        accesses(segment)
    );
}

/// A process that maps everything, and how long it takes from SIGKILL until it is gone.
fn life_and_death(path: &std::path::Path, segment: &Segment) -> (f64, f64) {
    let mut child = Command::new(std::env::current_exe().expect("known"))
        .args([path.as_os_str(), "populate".as_ref()])
        .stdin(segment.file().expect("a file").try_clone_to_owned().expect("a descriptor"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut line = [0; 16];
    let count = child.stdout.as_mut().expect("piped").read(&mut line).expect("it speaks");
    let populate = String::from_utf8_lossy(&line[..count]).trim().parse().expect("a figure");
    let begun = Instant::now();
    child.kill().expect("it lives");
    child.wait().expect("ours");
    (populate, ms(begun.elapsed()))
}

/// Maps what the parent has, whose open file, and with it the lock, is standard input.
fn child(path: &str) {
    let file = std::io::stdin().as_fd().try_clone_to_owned().expect("a descriptor");
    let segment = Segment::attach(path.as_ref(), file).expect("a segment");
    let begun = Instant::now();
    segment.populate(PIECE_BYTES, || true).expect("mapped");
    println!("{:.3}", ms(begun.elapsed()));
    std::thread::sleep(Duration::from_secs(60));
}

/// Nanoseconds of a dependent random access.
fn accesses(segment: &Segment) -> f64 {
    let (memory, regions) = (segment.memory(), segment.regions());
    let bytes = segment.header().expect("mapped").extents_reserved.load() * EXTENT_BYTES;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let begun = Instant::now();
    for _ in 0..ACCESSES {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = memory.word(regions.data + (state >> 20) % (bytes / 8) * 8).expect("in bounds");
        // What is there is zero, but the processor doesn't know.
        state ^= word.load();
    }
    begun.elapsed().as_nanos() as f64 / ACCESSES as f64
}

/// Makes all extents huge, while another thread uses the very one that is at work.
fn collapse_all(segment: &Segment) {
    let (at_work, done, longest) = (AtomicU64::new(0), AtomicBool::new(false), AtomicU64::new(0));
    let (mut took, mut waited) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut step = 0;
            while !done.load(Ordering::Relaxed) {
                step = (step + 4096 * 7) % EXTENT_BYTES;
                let begun = Instant::now();
                let offset = at_work.load(Ordering::Relaxed) + step;
                segment.memory().word(offset).expect("in bounds").load();
                longest.fetch_max(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
        });
        for page in segment.huge_pages().expect("sound") {
            at_work.store(page, Ordering::Relaxed);
            longest.store(0, Ordering::Relaxed);
            let begun = Instant::now();
            let result = segment.collapse(page);
            took.push(ms(begun.elapsed()));
            if let Err(error) = result {
                println!("refused: {error}");
            }
            waited.push(longest.load(Ordering::Relaxed) as f64 / 1e6);
        }
        done.store(true, Ordering::Relaxed);
    });
    for (what, figures) in
        [("one page made huge", &mut took), ("longest access to it meanwhile", &mut waited)]
    {
        figures.sort_by(f64::total_cmp);
        let at = |part: usize| figures[figures.len() * part / 100];
        println!("{what}: median {:.2} ms, p90 {:.2} ms, p99 {:.2} ms", at(50), at(90), at(99));
    }
}
