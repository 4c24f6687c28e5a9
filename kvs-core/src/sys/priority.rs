//! Making the dead give way to the living.
//!
//! The last thread of a killed process gives back its memory and its descriptors, in the kernel, on some core: 0.4 ms, with
//! ten thousand connections 15 ms. Whoever was put behind it on that core waits for it, unless it is made to give way. Half of that
//! time goes to its epolls, which each client's socket has to be taken out of. So the front server keeps a duplicate of
//! them, and lets it go, giving way as well, when nobody waits for it.
#![allow(unsafe_code)]

use std::fs;
use std::io;

use super::process::is_ending;

/// A tenth of the weight of those that it gives way to.
const NICE: i32 = 10;
/// The shortest slice there is, in nanoseconds.
const SLICE_NS: u64 = 100_000;

/// Lets what is left of the process that has `pid`, if it is ending, give way to every other thread that wants its core. One that isn't
/// ending is left as it is: so it does no harm when the pid has gone to another.
///
/// # Errors
/// What the kernel says: that it has just gone, or is another user's.
pub fn give_way_if_ending(pid: u32) -> io::Result<()> {
    if !is_ending(pid) {
        return Ok(());
    }
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let id = name.to_str().and_then(|name| name.parse::<i32>().ok());
        id.map_or(Ok(()), give_way)?;
    }
    Ok(())
}

/// Lets the calling thread give way to every other that wants its core, from now on.
///
/// # Errors
/// What the kernel says.
pub fn give_way_from_now_on() -> io::Result<()> {
    give_way(0)
}

/// What `sched_setattr` takes (sched(7), `struct sched_attr`, version 0).
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// The thread (0: the calling one) is still an ordinary one, so that it comes to its end on a busy machine, too. A change of the nice
/// value makes the scheduler choose again, for those who wait on its core; the short slice (from Linux 6.12 on, before it is ignored)
/// lets those go first who wake up there later.
fn give_way(thread: i32) -> io::Result<()> {
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_OTHER.cast_unsigned(),
        flags: 0,
        nice: NICE,
        priority: 0,
        runtime_ns: SLICE_NS,
        deadline_ns: 0,
        period_ns: 0,
    };
    // SAFETY: the kernel only reads the attributes, whose size they tell and which outlive the call; no memory is shared with that
    // thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    //! Goal: only who is ending gives way. Method: a child that has ended and isn't waited for yet, and one that runs.

    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    fn nice(pid: u32) -> i32 {
        // SAFETY: plain numbers.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, pid) }
    }

    #[test]
    fn priority_of_who_is_ending_is_the_lowest_and_of_others_stays() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat");
        give_way_if_ending(child.id()).expect("it is left alone");
        let before = nice(child.id());
        assert_ne!(before, NICE);
        child.kill().expect("it runs");
        let until = Instant::now() + Duration::from_secs(10);
        while !is_ending(child.id()) {
            assert!(Instant::now() < until, "it was killed");
            std::thread::yield_now();
        }
        give_way_if_ending(child.id()).expect("it is this user's");
        assert_eq!(nice(child.id()), NICE);
        child.wait().expect("it is dead");
        assert!(!is_ending(child.id()), "nobody has the pid");
    }
}
