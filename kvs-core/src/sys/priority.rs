//! Making the dead, and those who prepare, give way to the living.
//!
//! The last thread of a killed process gives back its memory and its descriptors, in the kernel, on some core: 0.4 ms, with
//! ten thousand connections some milliseconds. Whoever was put behind it on that core waits for it, unless it is made to give way; and
//! the one who does that, the thread that has waited for the death, is put there first of all. It goes before every other where it may.
//!
//! The next standby costs as much: a program to be loaded, thousands of sockets to be taken, the segment to be mapped. The fair scheduler lets
//! it have its share in turns that last until the clock ticks, 4 ms on many kernels, while clients wait. The share goes with the weight,
//! so what is nobody's hurry is done by threads of little weight, and a turn of theirs is rare. Not everybody may go back to the weight that
//! they had: who may not keeps it.
//!
//! A turn that is due is not rare enough for a process that is ending or being loaded, since both run for a millisecond and more without
//! sleeping. The kernel's idle class alone gives a core back to whoever wakes up there, at once and always. On a busy machine who is in it
//! gets next to nothing, so nobody is left in it for long: the dead are taken out of it after [`PATIENCE`], and a program takes
//! itself out when it begins.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, getpriority_process, setpriority_process};

use super::process::{is_ending, is_running};

/// A tenth of the weight of those that are given way to.
const NICE: i32 = 10;
/// A seventieth; the least that an ordinary thread can have.
const NICE_MOST: i32 = 19;
/// The longest slice there is, in nanoseconds.
const SLICE_LONGEST_NS: u64 = 100_000_000;
/// That of all who haven't asked for another.
const SLICE_USUAL: u64 = 0;
/// The calling thread.
const CALLING: i32 = 0;
/// The lowest of the priorities that stand above all ordinary threads.
const FIRST_OF_ALL: u32 = 1;

/// How long somebody who has much to do, and for whom nobody waits, sleeps between two pieces of it, so that others get the core. The scheduler
/// may take who only yields for the one whose turn it is.
pub const BREATH: Duration = Duration::from_micros(50);
/// Time between two choices that the scheduler is made to make.
const BETWEEN_CHOICES: Duration = Duration::from_micros(150);
/// How long the dead may be starved by whoever else wants their cores.
const PATIENCE: Duration = Duration::from_millis(20);

/// Lets what is left of the process that has `pid`, if it is ending, give way to every other thread that wakes up on its core. One that isn't
/// ending is left as it is: so it does no harm when the pid has gone to another. Whoever calls this sees to it that
/// [it comes to its end](see_off).
///
/// # Errors
/// What the kernel says: that it has just gone, or is another user's.
pub fn give_way_if_ending(pid: u32) -> io::Result<()> {
    if can_return() {
        return change_if_ending(pid, |thread, _| leave_to_others(thread));
    }
    // One that gave way more while it lived goes on doing so.
    change_if_ending(pid, |thread, nice| set(thread, nice.max(NICE), SLICE_LONGEST_NS))
}

/// Stays with those who gave way until they have come to their end.
///
/// Whoever wakes up gets the core, but who waited for it already, or has to wait while one of several threads that are ending is chosen for a
/// turn that it was due, waits until the clock ticks. So the scheduler is made to choose again, every now and then. And on a busy machine
/// they might not come to their end at all, and somebody may wait for what they hold: after [`PATIENCE`] they have a share of their cores.
pub fn see_off(pids: &[u32]) {
    if !can_return() {
        return;
    }
    let until = Instant::now() + PATIENCE;
    while pids.iter().any(|pid| is_ending(*pid) && is_running(*pid)) {
        if Instant::now() > until {
            return pids.iter().for_each(|pid| let_end(*pid));
        }
        for pid in pids {
            // It makes no difference in the idle class, but the scheduler chooses again when it becomes the least.
            let _ = change_if_ending(*pid, |thread, _| {
                let thread = Pid::from_raw(thread);
                setpriority_process(thread, NICE_MOST - 1)?;
                Ok(setpriority_process(thread, NICE_MOST)?)
            });
        }
        thread::sleep(BETWEEN_CHOICES);
    }
}

fn let_end(pid: u32) {
    // It may have ended by now.
    let _ = change_if_ending(pid, |thread, _| set(thread, NICE, SLICE_LONGEST_NS));
}

/// Calls `change` with each thread of the process that has `pid`, and its nice value, if that process is ending.
fn change_if_ending(pid: u32, change: impl Fn(i32, i32) -> io::Result<()>) -> io::Result<()> {
    if is_ending(pid) { change_threads(pid, change) } else { Ok(()) }
}

fn change_threads(pid: u32, change: impl Fn(i32, i32) -> io::Result<()>) -> io::Result<()> {
    let mut done = Ok(());
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let id = name.to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(id) = id else { continue };
        // One that has just ended keeps none of the others from being changed.
        let nice = getpriority_process(Pid::from_raw(id)).map_err(io::Error::from);
        done = done.and(nice.and_then(|nice| change(id, nice)));
    }
    done
}

/// Lets the calling thread, and those that it starts, give way to every other that wants its core, from now on.
///
/// # Errors
/// What the kernel says.
pub fn give_way_from_now_on() -> io::Result<()> {
    set(CALLING, NICE_MOST, SLICE_LONGEST_NS)
}

/// Lets the calling thread, and none that it starts, go before every ordinary one from now on: one that sleeps until somebody dies, whom it
/// would be put behind, and then has a fraction of a millisecond to do.
///
/// # Errors
/// This process may not: it isn't the superuser's, and `RLIMIT_RTPRIO` doesn't allow it.
pub fn go_first_from_now_on() -> io::Result<()> {
    apply(
        CALLING,
        &Attributes {
            policy: libc::SCHED_FIFO.cast_unsigned(),
            flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            priority: FIRST_OF_ALL,
            ..Attributes::default()
        },
    )
}

/// How much of a core a thread gets beside others who want it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank(i32);

impl Rank {
    /// That of the first thread of the process that has `pid`.
    ///
    /// # Errors
    /// There is none.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self(getpriority_process(Some(pid))?))
    }

    /// Gives it to the calling thread, and those that it starts.
    ///
    /// # Errors
    /// This process may not have so high a one.
    pub fn take(self) -> io::Result<()> {
        set(CALLING, self.0, SLICE_USUAL)
    }

    /// Lets the calling thread, and those that it starts, give way to every other, until it takes this rank. One that may not take it
    /// keeps its weight.
    pub fn leave(self) {
        let nice = if can_return() { NICE_MOST } else { self.0 };
        // At worst it goes on as it is.
        let _ = set(CALLING, nice, SLICE_LONGEST_NS);
    }
}

/// The rank that a program has while it is loaded, for which nobody waits, if the calling thread launches it. Not as low as can be: who
/// launches it stands still until it has become that program.
pub(super) fn rank_at_birth() -> io::Result<Rank> {
    let own = getpriority_process(None)?;
    Ok(Rank(if can_return() { (own + NICE).min(NICE_MOST) } else { own }))
}

/// Gives it to the calling process, which is about to become that program. Makes a system call only.
pub(super) fn take_at_birth(rank: Rank) {
    // At worst it is one like others.
    let _ = set(CALLING, rank.0, SLICE_LONGEST_NS);
}

/// Lets the process that has just become another program, and has one thread, be loaded in what others leave of the cores. It
/// takes its share when it [begins](begin), or when [`PATIENCE`] is over.
///
/// # Errors
/// What the kernel says; it takes its share then.
pub(super) fn load_at_leisure(pid: u32) -> io::Result<()> {
    if !can_return() {
        return Ok(());
    }
    let nice = getpriority_process(Pid::from_raw(pid.cast_signed()))?;
    leave_to_others(pid.cast_signed())?;
    let in_time = thread::Builder::new().name("load-in-time".into()).spawn(move || {
        thread::sleep(PATIENCE);
        take_share(pid, nice);
    });
    in_time.map(|_| ()).inspect_err(|_| take_share(pid, nice))
}

/// Lets all threads of a process that get what others leave have the share that `nice` gives them. It may have begun before it was put
/// there: then those that it has started since are there, too.
fn take_share(pid: u32, nice: i32) {
    // Who is started while the first thread is changed comes with the second look.
    for _ in 0..2 {
        // It has ended, at worst.
        let _ = change_threads(pid, |thread, _| {
            if is_left_to_others(thread) { set(thread, nice, SLICE_USUAL) } else { Ok(()) }
        });
    }
}

/// What a program begins with that was [launched](super::launch): from now on it takes the share that its nice value gives it, unless the
/// one who launched it doesn't either.
///
/// # Errors
/// What the kernel says.
pub fn begin() -> io::Result<()> {
    let launcher = rustix::process::getppid().map_or(CALLING, |pid| pid.as_raw_nonzero().get());
    if is_left_to_others(CALLING) && !is_left_to_others(launcher) {
        set(CALLING, getpriority_process(None)?, SLICE_USUAL)?;
    }
    Ok(())
}

/// Whether a thread of this process that has given way may take its rank again: the superuser's may, and those whose `RLIMIT_NICE`
/// allows it (`LimitNICE=` of systemd).
pub(super) fn can_return() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    let attempt = || {
        let rank = Rank(getpriority_process(None)?);
        give_way_from_now_on()?;
        rank.take()
    };
    // In a thread of its own, which ends where it is.
    *CAN.get_or_init(|| {
        std::thread::scope(|scope| scope.spawn(attempt).join().is_ok_and(|done| done.is_ok()))
    })
}

/// What `sched_setattr` takes (sched(7), `struct sched_attr`, version 0).
#[derive(Default)]
#[repr(C)]
struct Attributes {
    /// 0 stands for this version's.
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Whoever gives way is still an ordinary thread, so that it comes to its end on a busy machine, too. A change of the nice
/// value makes the scheduler choose again, for those who wait on its core. A thread that runs is not interrupted before its slice is
/// over, but by one whose own slice is shorter (from Linux 6.12 on; before, slices are not a thread's own): so
/// whoever wakes up on its core goes first at once.
fn set(thread: i32, nice: i32, slice_ns: u64) -> io::Result<()> {
    let policy = libc::SCHED_OTHER.cast_unsigned();
    apply(thread, &Attributes { policy, nice, runtime_ns: slice_ns, ..Attributes::default() })
}

/// Puts the thread in the class of those that get what nobody else wants, and that give it back at once.
fn leave_to_others(thread: i32) -> io::Result<()> {
    let policy = libc::SCHED_IDLE.cast_unsigned();
    apply(thread, &Attributes { policy, ..Attributes::default() })
}

fn is_left_to_others(thread: i32) -> bool {
    // SAFETY: plain numbers.
    unsafe { libc::sched_getscheduler(thread) == libc::SCHED_IDLE }
}

fn apply(thread: i32, attributes: &Attributes) -> io::Result<()> {
    // SAFETY: the kernel only reads the attributes, whose size they tell and which outlive the call; no memory is shared with that
    // thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const *attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    //! Goal: only who is ending gives way, and nobody for longer than it wants. Method: a child that has ended and isn't waited for yet,
    //! and one that runs; a thread's nice value.

    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn rank_that_was_left_is_taken_again_where_that_is_allowed() {
        let rank = || getpriority_process(None).expect("a thread");
        std::thread::spawn(move || {
            let own = Rank::of_process(std::process::id()).expect("this process");
            assert_eq!(own.0, rank(), "a new thread has the process's");
            own.leave();
            assert_eq!(rank(), if can_return() { NICE_MOST } else { own.0 });
            own.take().expect("it has left it only if it may");
            assert_eq!(rank(), own.0);
        })
        .join()
        .expect("no panic");
    }

    #[test]
    fn thread_that_goes_first_starts_ordinary_ones() {
        // SAFETY: plain numbers.
        let policy = || unsafe { libc::sched_getscheduler(CALLING) };
        let ordinary = policy();
        std::thread::scope(|scope| {
            scope.spawn(move || match go_first_from_now_on() {
                Ok(()) => {
                    assert_eq!(policy() & !libc::SCHED_RESET_ON_FORK, libc::SCHED_FIFO);
                    let started = std::thread::spawn(policy).join().expect("no panic");
                    assert_eq!(started, ordinary);
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                    assert_eq!(policy(), ordinary);
                }
            });
        });
        assert_eq!(policy(), ordinary, "it is for that thread alone");
    }

    #[test]
    fn thread_that_was_left_to_others_takes_its_share_whichever_it_is() {
        if !can_return() {
            return;
        }
        let idle = std::thread::spawn(|| {
            leave_to_others(CALLING).expect("it may return");
            std::thread::spawn(|| {
                assert!(is_left_to_others(CALLING), "it is as who started it");
                take_share(std::process::id(), 0);
                assert!(!is_left_to_others(CALLING));
            })
            .join()
            .expect("no panic");
            assert!(!is_left_to_others(CALLING));
        });
        idle.join().expect("no panic");
    }

    fn nice(pid: u32) -> i32 {
        // SAFETY: plain numbers.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, pid) }
    }

    fn policy(pid: u32) -> i32 {
        // SAFETY: plain numbers.
        unsafe { libc::sched_getscheduler(pid.cast_signed()) }
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < until, "{what}");
            thread::yield_now();
        }
    }

    #[test]
    fn process_that_is_ending_gives_way_and_only_for_a_while() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("cat");
        let (pid, before) = (child.id(), (nice(child.id()), policy(child.id())));
        give_way_if_ending(pid).expect("it is left alone");
        assert_eq!((nice(pid), policy(pid)), before);
        child.kill().expect("it runs");
        wait_until("it was killed", || is_ending(pid));
        give_way_if_ending(pid).expect("it is this user's");
        if can_return() {
            assert_eq!(policy(pid), libc::SCHED_IDLE);
        } else {
            assert_eq!((nice(pid), policy(pid)), (NICE.max(before.0), before.1));
        }
        wait_until("it was killed", || !is_running(pid));
        see_off(&[pid]);
        let_end(pid);
        assert_eq!((nice(pid), policy(pid)), (NICE.max(before.0), before.1), "it isn't starved for ever");
        child.wait().expect("it is dead");
        assert!(!is_ending(pid), "nobody has the pid");
    }
}
