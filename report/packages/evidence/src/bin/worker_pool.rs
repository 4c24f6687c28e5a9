//! What handing a job to a worker costs: `threadpool` against `std::thread` with `crossbeam-channel`.
//!
//! Method: one thread submits 200,000 jobs that add to a counter, two workers run them, timed until the last has
//! run; the same with 64-byte messages over a bounded channel. Then what an overloaded pool does with its queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use kvs_package_evidence::nanoseconds_each;
use threadpool::ThreadPool;

const JOBS: u64 = 200_000;
const WORKERS: usize = 2;

fn main() {
    let pool = ThreadPool::new(WORKERS);
    println!(
        "threadpool 1.8:            {} a job",
        nanoseconds_each(15, JOBS, |count| run_in_pool(&pool, count))
    );
    println!("crossbeam-channel, 1,024:  {} a message", nanoseconds_each(15, JOBS, run_over_channel));
    show_queue(&pool);
}

fn run_in_pool(pool: &ThreadPool, count: u64) {
    let sum = Arc::new(AtomicU64::new(0));
    for job in 0..count {
        let sum = Arc::clone(&sum);
        pool.execute(move || {
            sum.fetch_add(job & 1, Ordering::Relaxed);
        });
    }
    pool.join();
    assert_eq!(sum.load(Ordering::Relaxed), count / 2);
}

fn run_over_channel(count: u64) {
    let (sender, receiver) = bounded::<[u64; 8]>(1024);
    let workers: Vec<_> = (0..WORKERS).map(|_| spawn_worker(receiver.clone())).collect();
    for job in 0..count {
        sender.send([job & 1; 8]).expect("workers live");
    }
    drop(sender);
    let sum: u64 = workers.into_iter().map(|worker| worker.join().expect("worker")).sum();
    assert_eq!(sum, count / 2);
}

fn spawn_worker(receiver: Receiver<[u64; 8]>) -> thread::JoinHandle<u64> {
    thread::spawn(move || receiver.iter().map(|job| job[0]).sum())
}

fn show_queue(pool: &ThreadPool) {
    let (release, wait) = bounded::<()>(0);
    for _ in 0..1_000_000 {
        let wait = wait.clone();
        pool.execute(move || {
            let _ = wait.recv();
        });
    }
    println!("two blocked workers: threadpool has queued {} jobs without refusing one", pool.queued_count());
    drop(release);
    pool.join();
}
