//! What the evidence programs share: playing a second process, medians, deadlines.

use std::env;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// The part this process plays when it was started by [`play`]: a role and its argument.
pub fn role() -> Option<(String, String)> {
    let mut arguments = env::args().skip(1);
    Some((arguments.next()?, arguments.next().unwrap_or_default()))
}

/// Starts this very program again in another part.
pub fn play(role: &str, argument: &str) -> io::Result<Child> {
    Command::new(env::current_exe()?).args([role, argument]).spawn()
}

/// Waits until `child` has ended; kills it at the deadline and returns nothing then.
pub fn wait_or_kill(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + deadline;
    while Instant::now() < end {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(1));
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// Ends this process by SIGKILL, as an operator or the kernel's out-of-memory killer would.
pub fn kill_self() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    unreachable!("SIGKILL cannot be survived")
}

/// Median over `rounds` rounds of the nanoseconds one of `count` repetitions takes, with the fastest and slowest.
pub fn nanoseconds_each(rounds: usize, count: u64, mut work: impl FnMut(u64)) -> Spread {
    let mut samples: Vec<f64> = (0..rounds).map(|_| time_one_round(count, &mut work)).collect();
    samples.sort_by(f64::total_cmp);
    Spread { median: samples[rounds / 2], lowest: samples[0], highest: samples[rounds - 1] }
}

fn time_one_round(count: u64, work: &mut impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    work(count);
    start.elapsed().as_nanos() as f64 / count as f64
}

/// A median and what it lies between.
pub struct Spread {
    /// Middle of all rounds, in nanoseconds.
    pub median: f64,
    /// Fastest round, in nanoseconds.
    pub lowest: f64,
    /// Slowest round, in nanoseconds.
    pub highest: f64,
}

impl std::fmt::Display for Spread {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:8.1} ns  ({:.1} to {:.1})", self.median, self.lowest, self.highest)
    }
}
