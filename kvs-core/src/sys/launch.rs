//! Launching a program from a process that has thousands of descriptors, which the program is not to get.
//!
//! The usual ways copy the table of descriptors for the child and close all of them in `exec`: with ten thousand clients several
//! milliseconds in the kernel, on a core that clients wait for. Here the child shares the table, and then takes a copy of its own
//! of nothing but what lies below the pad: two descriptors with low numbers, which were made when the process began. The
//! socket that the child is to get is put there.
//!
//! ```text
//! 0 1 2   pad: what becomes the child's 0 and 1   │ thousands of others
//! └──────────── the child's copy ───────────────┘ └ never copied
//! ```
//!
//! Invariants
//! - One thread at a time launches.
//! - Between `clone` and `exec` the child shares this process's memory, and the thread that launches stands still: it makes system
//!   calls only, from what was prepared before, and no signal handler runs in it.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, statat};
use rustix::io::{DupFlags, dup3};
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, WaitOptions, waitid, waitpid};

use super::priority::{self, Rank};

/// Words of 16 bytes of the child's stack; it calls nothing but the C library's thinnest functions.
const STACK_WORDS: usize = 4096;
/// What a child ends with that could not become the program.
const NOT_EXECUTED: c_int = 127;
/// Signals are numbered from 1 to this.
const SIGNAL_LAST: c_int = 64;

static PAD: Mutex<Option<Pad>> = Mutex::new(None);

struct Pad {
    /// What becomes the child's standard input; else `/dev/null`.
    input: OwnedFd,
    /// What becomes its standard output: `/dev/null`.
    output: OwnedFd,
}

/// How soon a program is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody waits for it.
    Now,
    /// Clients are served meanwhile: it gives way to them while it is loaded.
    Soon,
    /// Nobody does: it gives way to whoever wants its core, if it may stop doing so, which is up to the program
    /// ([`Rank`]).
    AtLeisure,
}

/// Entries of a dead process in `/proc` that are looked for at once: some fifty microseconds.
const LOOKS_AT_ONCE: u32 = 32;
/// And then not for so long, so that the kernel frees them in small numbers, too.
const BETWEEN_LOOKS: Duration = Duration::from_micros(250);

/// A program that was launched, to be reaped.
pub struct Child(Pid);

impl Child {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end, after which the id is still its own.
    ///
    /// # Errors
    /// What the kernel says: somebody else has reaped it.
    pub fn await_end(&self) -> io::Result<ExitStatus> {
        loop {
            match waitid(WaitId::Pid(self.0), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Ok(Some(status)) => return Ok(exit_status(&status)),
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for its end, and takes it out of the kernel's lists, in pieces short enough for those who want the core.
    ///
    /// Whoever looks at its descriptors in `/proc`, as programs that watch over a machine do, leaves an entry for each of
    /// them in the kernel's cache. They would all be thrown away when it is reaped, and then freed: with ten thousand
    /// some milliseconds, in which the kernel lets nobody else have the core. One that is asked for again is found to be stale, and thrown
    /// away alone. `descriptors` says up to which number.
    ///
    /// # Errors
    /// What the kernel says: somebody else has reaped it.
    pub fn reap_at_leisure(self, descriptors: u32) -> io::Result<ExitStatus> {
        self.await_end()?;
        if let Ok(directory) = File::open(format!("/proc/{}/fd", self.pid())) {
            for number in 0..descriptors {
                // It is not there.
                let _ = statat(&directory, number.to_string(), AtFlags::SYMLINK_NOFOLLOW);
                if number % LOOKS_AT_ONCE == LOOKS_AT_ONCE - 1 {
                    std::thread::sleep(BETWEEN_LOOKS);
                }
            }
        }
        self.wait()
    }

    /// Waits for its end, after which the id may be another's.
    ///
    /// # Errors
    /// What the kernel says: somebody else has reaped it.
    pub fn wait(self) -> io::Result<ExitStatus> {
        loop {
            match waitpid(Some(self.0), WaitOptions::empty()) {
                Ok(Some((_, status))) => return Ok(ExitStatus::from_raw(status.as_raw())),
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    // As wait(2) has it: the code above, the signal in the lowest byte.
    let code = status.exit_status().unwrap_or(0) << 8;
    ExitStatus::from_raw(code | status.terminating_signal().unwrap_or(0))
}

/// Makes the pad. To be called when the process has few descriptors; else the first launch does it, and copies more.
///
/// # Errors
/// No descriptor is left.
pub fn prepare() -> io::Result<()> {
    pad().map(|_| ())
}

fn pad() -> io::Result<MutexGuard<'static, Option<Pad>>> {
    let mut pad = PAD.lock().unwrap_or_else(PoisonError::into_inner);
    if pad.is_none() {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        *pad = Some(Pad { input: null.try_clone()?.into(), output: null.into() });
    }
    Ok(pad)
}

/// Launches the program at `path` in a process group of its own. Its standard input is `input`, its standard output nowhere, its error
/// output and environment this process's; it gets no other descriptor that this process has opened. Gives the child, and the descriptor by which anybody can kill it
/// and wait for its end.
///
/// # Errors
/// What the kernel says; nothing was launched then.
pub fn launch<A: AsRef<OsStr>>(
    path: &Path,
    arguments: impl IntoIterator<Item = A>,
    input: OwnedFd,
    urgency: Urgency,
) -> io::Result<(Child, OwnedFd)> {
    let mut guard = pad()?;
    let Some(Pad { input: place, output }) = &mut *guard else { return Err(io::ErrorKind::Other.into()) };
    let program = CString::new(path.as_os_str().as_bytes())?;
    let mut words = vec![program.clone()];
    for argument in arguments {
        words.push(CString::new(argument.as_ref().as_bytes())?);
    }
    let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let variables = std::env::vars_os().map(variable).collect::<Result<Vec<_>, _>>()?;
    let (arguments, environment) = (pointers(&words), pointers(&variables));
    let plan = Plan {
        program: program.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        input: place.as_raw_fd(),
        output: output.as_raw_fd(),
        signals: no_signals(),
        rank: match urgency {
            Urgency::Now | Urgency::Soon => None,
            Urgency::AtLeisure => Some(priority::rank_at_birth()?),
        },
        urgency,
        error: 0,
    };
    dup3(&input, place, DupFlags::CLOEXEC)?;
    drop(input);
    let launched = plan.carry_out();
    // The socket has its other end to tell of the child's death.
    if dup3(&*output, place, DupFlags::CLOEXEC).is_err() {
        // Closed with it; the next launch makes another pad.
        *guard = None;
    }
    launched
}

/// The same strings as C wants a list of them.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

fn no_signals() -> libc::sigset_t {
    // SAFETY: a set of signals is plain data, which the call fills.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        signals
    }
}

/// All that the child needs.
struct Plan {
    program: *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    input: c_int,
    output: c_int,
    /// Those that were blocked.
    signals: libc::sigset_t,
    /// So that others go first already while it is loaded; else it is this thread's.
    rank: Option<Rank>,
    urgency: Urgency,
    /// Why the program could not be executed.
    error: c_int,
}

impl Plan {
    fn carry_out(mut self) -> io::Result<(Child, OwnedFd)> {
        let mut stack = vec![0u128; STACK_WORDS];
        let mut process: c_int = -1;
        let flags =
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_PIDFD | libc::SIGCHLD;
        // SAFETY: the stack and the plan, with all that it points to, outlive the child's use of them: with CLONE_VFORK this thread
        // stands still until the child has ended or become another program. No handler of this process runs in the child:
        // every signal is blocked from before it is made, and it sets all handlers back before it lets any through.
        let pid = unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut self.signals);
            let end = stack.as_mut_ptr_range().end.cast::<c_void>();
            let plan = (&raw mut self).cast::<c_void>();
            let pid = libc::clone(become_program, end, flags, plan, &raw mut process);
            let error = io::Error::last_os_error();
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.signals, ptr::null_mut());
            Pid::from_raw(pid).filter(|_| pid > 0).ok_or(error)?
        };
        // SAFETY: the kernel has just opened it for this process, and nobody else knows of it.
        let process = unsafe { OwnedFd::from_raw_fd(process) };
        let child = Child(pid);
        // SAFETY: the child may have stored to it, through a pointer, before `clone` returned.
        match unsafe { (&raw const self.error).read_volatile() } {
            0 => {
                if self.urgency != Urgency::Now {
                    // At worst it takes its share.
                    let _ = priority::load_at_leisure(child.pid());
                }
                Ok((child, process))
            }
            error => {
                // Its end, not its status, is what matters.
                let _ = child.wait();
                Err(io::Error::from_raw_os_error(error))
            }
        }
    }
}

/// What the child does.
extern "C" fn become_program(plan: *mut c_void) -> c_int {
    // SAFETY: it is the plan of the thread that stands still meanwhile.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    plan.error = execute(plan);
    NOT_EXECUTED
}

/// Returns only when it has failed, with the error's number.
fn execute(plan: &Plan) -> c_int {
    let error = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    // SAFETY: nothing but system calls, about the child itself: its handlers, its group, its own table of descriptors. What the plan
    // points to lives; see `carry_out`.
    unsafe {
        for signal in 1..=SIGNAL_LAST {
            let mut action: libc::sigaction = std::mem::zeroed();
            let known = libc::sigaction(signal, ptr::null(), &raw mut action) == 0;
            if known && action.sa_sigaction != libc::SIG_IGN && action.sa_sigaction != libc::SIG_DFL {
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const action, ptr::null_mut());
            }
        }
        plan.rank.into_iter().for_each(priority::take_at_birth);
        if libc::setpgid(0, 0) != 0 {
            return error();
        }
        let beyond = plan.input.max(plan.output) + 1;
        let unshared =
            libc::syscall(libc::SYS_close_range, beyond.unsigned_abs(), u32::MAX, libc::CLOSE_RANGE_UNSHARE);
        // An older kernel: all are copied, and closed by the other program's beginning.
        if unshared != 0 && libc::unshare(libc::CLONE_FILES) != 0 {
            return error();
        }
        if libc::dup2(plan.input, libc::STDIN_FILENO) < 0 || libc::dup2(plan.output, libc::STDOUT_FILENO) < 0
        {
            return error();
        }
        libc::sigprocmask(libc::SIG_SETMASK, &raw const plan.signals, ptr::null_mut());
        libc::execve(plan.program, plan.arguments, plan.environment);
    }
    error()
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn run(script: &str, urgency: Urgency) -> (String, ExitStatus) {
        let (mut own, its) = UnixStream::pair().expect("a pair");
        let (child, process) =
            launch(Path::new("/bin/sh"), ["-c", script], its.into(), urgency).expect("a shell");
        assert_eq!(rustix::process::pidfd_send_signal(&process, rustix::process::Signal::CONT), Ok(()));
        let mut said = String::new();
        own.read_to_string(&mut said).expect("it speaks until it ends");
        (said, child.wait().expect("a child"))
    }

    #[test]
    fn program_gets_its_three_descriptors_and_none_beyond_the_pad() {
        // One that would be inherited otherwise.
        let null = File::open("/dev/null").expect("exists");
        let kept = rustix::io::fcntl_dupfd_cloexec(null, 900).expect("room");
        rustix::io::fcntl_setfd(&kept, rustix::io::FdFlags::empty()).expect("open");
        let (said, status) =
            run("for at in /proc/$$/fd/*; do echo -n \"${at##*/} \"; done >&0; exit 3", Urgency::Now);
        let numbers: Vec<u32> = said.split_whitespace().map(|word| word.parse().expect("a number")).collect();
        // Some may be inherited from whoever started the tests.
        assert!([0, 1, 2].iter().all(|number| numbers.contains(number)), "{said}");
        assert!(!numbers.contains(&900), "{said}");
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn program_has_the_environment_a_group_of_its_own_and_no_signal_blocked() {
        let script =
            "echo $$ $(cut -d' ' -f5 /proc/$$/stat) $PATH $(grep SigBlk /proc/$$/status) >&0; kill $$";
        let (said, status) = run(script, Urgency::Now);
        let words: Vec<&str> = said.split_whitespace().collect();
        assert_eq!(words[0], words[1], "{said}");
        assert_eq!(words[2], std::env::var("PATH").expect("there is one"), "{said}");
        assert_eq!(words[4].trim_start_matches('0'), "", "{said}");
        assert_eq!(status.signal(), Some(libc::SIGTERM));
    }

    #[test]
    fn program_that_nobody_waits_for_gives_way_if_it_may_stop_doing_so() {
        // The nice value and the policy. It is put in the idle class when it runs already.
        let rank = |urgency, until: &str| -> (i32, i32) {
            let script = format!(
                "until set -- $(cut -d' ' -f19,41 /proc/$$/stat); [ $2 = {until} ]; do :; done; echo $* >&0"
            );
            let (said, _) = run(&script, urgency);
            let (nice, policy) = said.trim().split_once(' ').expect("two");
            (nice.parse().expect("a number"), policy.parse().expect("a number"))
        };
        let own = rank(Urgency::Now, "$2").0;
        if priority::can_return() {
            let idle = (own + 10, libc::SCHED_IDLE);
            assert_eq!(rank(Urgency::AtLeisure, &libc::SCHED_IDLE.to_string()), idle);
        } else {
            assert_eq!(rank(Urgency::AtLeisure, "$2").0, own);
        }
    }

    #[test]
    fn child_that_has_ended_is_reaped_once_in_one_piece_or_in_many() {
        let launched = || {
            let (_, its) = UnixStream::pair().expect("a pair");
            launch(Path::new("/bin/sh"), ["-c", "exit 5"], its.into(), Urgency::Now).expect("a shell").0
        };
        let (child, pid) = (launched(), launched().pid());
        assert_eq!(child.await_end().expect("a child").code(), Some(5));
        assert_eq!(child.await_end().expect("not reaped yet").code(), Some(5));
        assert_eq!(child.wait().expect("a child").code(), Some(5));
        let again = Child(Pid::from_raw(pid.cast_signed()).expect("a pid"));
        assert_eq!(again.reap_at_leisure(100).expect("a child").code(), Some(5));
        let again = Child(Pid::from_raw(pid.cast_signed()).expect("a pid"));
        assert!(again.reap_at_leisure(100).is_err(), "it is gone");
    }

    #[test]
    fn status_of_a_child_that_was_killed_names_the_signal() {
        let (_, its) = UnixStream::pair().expect("a pair");
        let (child, _) =
            launch(Path::new("/bin/sh"), ["-c", "kill -9 $$"], its.into(), Urgency::Now).expect("a shell");
        assert_eq!(child.await_end().expect("a child").signal(), Some(libc::SIGKILL));
        assert_eq!(child.wait().expect("a child").signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn program_that_is_not_there_is_an_error() {
        let (mut own, its) = UnixStream::pair().expect("a pair");
        let launched = launch(Path::new("/nowhere/nothing"), ["x"], its.into(), Urgency::Now);
        assert_eq!(launched.err().map(|error| error.kind()), Some(io::ErrorKind::NotFound));
        assert_eq!(own.read(&mut [0]).expect("the other end is closed"), 0);
    }
}
