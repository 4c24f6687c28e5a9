//! A thread that is executed one instruction at a time: a child's only one, or one of a server.
//!
//! The child is this program again. It asks to be traced and stops itself with SIGSTOP before and after what is to be
//! looked at. A server knows of nothing; its thread is stopped from outside, and its other threads run on. Addresses are not randomised,
//! so that every run of the same program executes the same instructions.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::personality::{self, Persona};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};

/// What became of the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It executed one instruction.
    Stepped,
    /// It stopped itself, or was stopped.
    Stopped,
    /// It begins a system call, or comes back from one.
    Called,
    /// It waits for something to do.
    Asleep,
}

/// Looks at a thread of a server before it is asked whether it sleeps.
const LOOKS: u32 = 200;
/// Pause between two later looks.
const LOOK_PAUSE: Duration = Duration::from_micros(20);
/// How long a thread of a server may neither stop nor sleep.
const PATIENCE: Duration = Duration::from_secs(20);

/// The addresses of the instructions that are executed from one stop to the next, and how to get to one of them fast.
#[derive(Default)]
pub struct Path {
    addresses: Vec<u64>,
    /// How often the same address was executed before; None where that can't be counted.
    passes: Vec<Option<u32>>,
}

impl Path {
    /// Instructions that are stepped at most from the nearest landmark.
    const NEAR: usize = 400;
    /// Passes of a landmark that cost as much as so many steps.
    const PASS_STEPS: usize = 2;

    /// How many instructions there are.
    pub fn length(&self) -> usize {
        self.addresses.len()
    }

    /// The path over these addresses.
    pub fn new(addresses: Vec<u64>) -> Self {
        let mut seen = HashMap::<u64, u32>::new();
        // An instruction that repeats itself counts once for the processor and many times for who steps it.
        let repeated: HashSet<u64> =
            addresses.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        let first = addresses.first().copied();
        let passes = addresses.iter().map(|address| {
            let count = seen.entry(*address).or_insert(0);
            *count += 1;
            Some(*count - 1).filter(|_| !repeated.contains(address) && Some(*address) != first)
        });
        let passes = passes.collect();
        Self { addresses, passes }
    }

    /// A place shortly before `count` that is reached after few passes, and how many.
    fn landmark(&self, count: usize) -> Option<(usize, usize)> {
        let cost = |&(place, passes): &(usize, usize)| count - place + passes * Self::PASS_STEPS;
        (count.saturating_sub(Self::NEAR)..=count)
            .filter_map(|place| Some((place, self.passes[place]? as usize)))
            .min_by_key(cost)
            .filter(|landmark| cost(landmark) < count)
    }
}

/// A thread that is traced; its process is killed when this is dropped.
pub struct Tracee {
    pid: Pid,
    process: Pid,
    /// It is a server's: it sleeps while nobody wants anything of it.
    serves: bool,
    alive: bool,
}

impl Tracee {
    /// Starts this program with `arguments`, the segment's `file` as its standard input, up to its first stop.
    ///
    /// # Errors
    /// When it can't be started, can't be traced or ends.
    pub fn start(arguments: &[&str], file: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("can't find this program")?;
        let child = Command::new(program)
            .args(arguments)
            .env_remove("RUST_BACKTRACE")
            .env(PARENT, std::process::id().to_string())
            .stdin(Stdio::from(file.try_clone_to_owned()?))
            .spawn()
            .context("can't start the child")?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let mut tracee = Self { pid, process: pid, serves: false, alive: true };
        tracee.wait()?;
        ptrace::setoptions(pid, ptrace::Options::PTRACE_O_EXITKILL).context("can't trace the child")?;
        Ok(tracee)
    }

    /// Stops `thread` of the server `process`.
    ///
    /// # Errors
    /// When there is none, or tracing it is forbidden here.
    pub fn seize(process: Pid, thread: Pid) -> anyhow::Result<Self> {
        let options = ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_EXITKILL;
        ptrace::seize(thread, options).context("can't trace the server")?;
        let mut tracee = Self { pid: thread, process, serves: true, alive: true };
        tracee.wake()?;
        Ok(tracee)
    }

    /// Lets a server that sleeps go on as if nothing had been.
    ///
    /// # Errors
    /// When it is dead.
    pub fn release(mut self) -> anyhow::Result<()> {
        // A step into its sleep ends with a trap behind the stop, which would kill it if nobody took it.
        self.wake()?;
        while self.run_to_call()? != Event::Asleep {}
        self.wake()?;
        self.alive = false;
        ptrace::detach(self.pid, None).context("can't let the server go")
    }

    fn wake(&mut self) -> anyhow::Result<()> {
        ptrace::interrupt(self.pid).context("can't stop the server")?;
        while self.wait()? == Event::Asleep {}
        Ok(())
    }

    /// On to the beginning or the end of the next system call.
    ///
    /// # Errors
    /// When it ends.
    pub fn run_to_call(&mut self) -> anyhow::Result<Event> {
        ptrace::syscall(self.pid, None).context("can't continue the server")?;
        self.wait()
    }

    /// One instruction.
    ///
    /// # Errors
    /// When the child ends.
    #[inline]
    pub fn step(&mut self) -> anyhow::Result<Event> {
        ptrace::step(self.pid, None).context("can't step the child")?;
        self.wait()
    }

    /// `count` instructions, or up to the next stop; returns how many it were.
    ///
    /// # Errors
    /// When the child ends.
    pub fn steps(&mut self, count: u64) -> anyhow::Result<u64> {
        for done in 0..count {
            if self.step()? != Event::Stepped {
                return Ok(done);
            }
        }
        Ok(count)
    }

    /// On to where `count` instructions of `path` are executed, at full speed for most of the way; false when it isn't there,
    /// because it took another path or this machine has no breakpoints.
    ///
    /// # Errors
    /// When the child ends.
    pub fn follow(&mut self, path: &Path, count: usize) -> anyhow::Result<bool> {
        let Some((place, passes)) = path.landmark(count) else {
            self.steps(count as u64)?;
            return Ok(self.instruction()? == path.addresses[count]);
        };
        if !self.set_breakpoint(Some(path.addresses[place]))? {
            return Ok(false);
        }
        for _ in 0..=passes {
            ptrace::cont(self.pid, None).context("can't continue the child")?;
            if self.wait()? != Event::Stepped {
                return Ok(false);
            }
        }
        self.set_breakpoint(None)?;
        self.steps((count - place) as u64)?;
        Ok(self.instruction()? == path.addresses[count])
    }

    /// Lets the processor stop the child before it executes the instruction there; false when that can't be had.
    #[cfg(target_arch = "x86_64")]
    fn set_breakpoint(&self, address: Option<u64>) -> anyhow::Result<bool> {
        use nix::libc::{c_long, user};
        const REGISTERS: usize = std::mem::offset_of!(user, u_debugreg);
        let write = |register: usize, value: u64| {
            let offset = std::ptr::without_provenance_mut(REGISTERS + register * 8);
            ptrace::write_user(self.pid, offset, value as c_long).is_ok()
        };
        // Register 7 switches the one in register 0 on, for execution.
        Ok(match address {
            Some(address) => write(7, 0) && write(0, address) && write(7, 1),
            None => write(7, 0),
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn set_breakpoint(&self, _: Option<u64>) -> anyhow::Result<bool> {
        Ok(false)
    }

    /// On, at full speed, to the next stop.
    ///
    /// # Errors
    /// When the child ends.
    pub fn run(&mut self) -> anyhow::Result<()> {
        ptrace::cont(self.pid, None).context("can't continue the child")?;
        self.wait()?;
        Ok(())
    }

    /// Waits until it stops, or, of a server, sleeps.
    ///
    /// # Errors
    /// When it ends.
    pub fn wait(&mut self) -> anyhow::Result<Event> {
        if !self.serves {
            return self.event_of(waitpid(self.pid, None).context("can't wait for the child")?);
        }
        let (flags, until) = (WaitPidFlag::__WALL | WaitPidFlag::WNOHANG, Instant::now() + PATIENCE);
        for look in 0u32.. {
            match waitpid(self.pid, Some(flags)).context("can't wait for the server")? {
                WaitStatus::StillAlive if look < LOOKS => std::thread::yield_now(),
                WaitStatus::StillAlive if self.is_asleep() => return Ok(Event::Asleep),
                WaitStatus::StillAlive if Instant::now() < until => std::thread::sleep(LOOK_PAUSE),
                status => return self.event_of(status),
            }
        }
        bail!("the server neither stops nor sleeps")
    }

    fn event_of(&mut self, status: WaitStatus) -> anyhow::Result<Event> {
        match status {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => Ok(Event::Stepped),
            WaitStatus::Stopped(_, Signal::SIGSTOP) | WaitStatus::PtraceEvent(..) => Ok(Event::Stopped),
            WaitStatus::PtraceSyscall(_) => Ok(Event::Called),
            other => {
                self.alive = !matches!(other, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
                bail!("process {} should have stopped: {other:?}", self.process)
            }
        }
    }

    /// Whether it sleeps in the kernel until there is something to do.
    fn is_asleep(&self) -> bool {
        let read =
            |what: &str| fs::read_to_string(format!("/proc/{}/task/{}/{what}", self.process, self.pid));
        let (Ok(state), Ok(call)) = (read("stat"), read("syscall")) else { return false };
        let sleeps = state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        let number = call.split(' ').next().and_then(|number| number.parse().ok());
        sleeps && number.is_some_and(|number| EPOLL_CALLS.contains(&number))
    }

    /// Where it is: the address of its next instruction.
    ///
    /// # Errors
    /// When the child is gone.
    #[inline]
    pub fn instruction(&self) -> anyhow::Result<u64> {
        let registers = ptrace::getregs(self.pid).context("can't read the child's registers")?;
        #[cfg(target_arch = "x86_64")]
        return Ok(registers.rip);
        #[cfg(target_arch = "aarch64")]
        return Ok(registers.pc);
    }

    /// Number and first argument of the system call that its next instruction is; None if it is another.
    ///
    /// # Errors
    /// When it is gone.
    #[inline]
    pub fn next_call(&self, at: u64) -> anyhow::Result<Option<(i64, u64)>> {
        let text = ptrace::read(self.pid, std::ptr::without_provenance_mut(at as usize))?;
        if text as u64 & CALL_MASK != CALL_INSTRUCTION {
            return Ok(None);
        }
        let registers = ptrace::getregs(self.pid).context("can't read the registers")?;
        #[cfg(target_arch = "x86_64")]
        return Ok(Some((registers.rax as i64, registers.rdi)));
        #[cfg(target_arch = "aarch64")]
        return Ok(Some((registers.regs[8] as i64, registers.regs[0])));
    }

    /// What the system call it comes from gave.
    ///
    /// # Errors
    /// When it is gone.
    pub fn call_result(&self) -> anyhow::Result<i64> {
        let registers = ptrace::getregs(self.pid).context("can't read the registers")?;
        #[cfg(target_arch = "x86_64")]
        return Ok(registers.rax as i64);
        #[cfg(target_arch = "aarch64")]
        return Ok(registers.regs[0] as i64);
    }

    /// Where the code of its C library is.
    ///
    /// # Errors
    /// When it has none of its own.
    pub fn c_library(&self) -> anyhow::Result<Range<u64>> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid))?;
        let line = maps
            .lines()
            .find(|line| line.contains("r-xp") && line.contains("libc"))
            .context("the program is linked statically: calls of lock and unlock can't be told apart")?;
        let (range, _) = line.split_once(' ').context("an empty line")?;
        let (start, end) = range.split_once('-').context("no range")?;
        Ok(u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?)
    }

    /// Kills it with SIGKILL and waits until it is dead.
    ///
    /// # Errors
    /// When it was dead already.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.end()
    }

    fn end(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.alive) {
            kill(self.process, Signal::SIGKILL)?;
            let flags = self.serves.then_some(WaitPidFlag::__WALL);
            while !matches!(waitpid(self.pid, flags)?, WaitStatus::Signaled(..) | WaitStatus::Exited(..)) {}
        }
        Ok(())
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // It is gone already, then.
        let _ = self.end();
    }
}

/// The system calls in which a server waits.
#[cfg(target_arch = "x86_64")]
const EPOLL_CALLS: [i64; 3] =
    [nix::libc::SYS_epoll_wait, nix::libc::SYS_epoll_pwait, nix::libc::SYS_epoll_pwait2];
#[cfg(not(target_arch = "x86_64"))]
const EPOLL_CALLS: [i64; 2] = [nix::libc::SYS_epoll_pwait, nix::libc::SYS_epoll_pwait2];

/// The instruction that calls the system, and which bits of a word of code it takes.
#[cfg(target_arch = "x86_64")]
const CALL_INSTRUCTION: u64 = 0x050f;
#[cfg(target_arch = "x86_64")]
const CALL_MASK: u64 = 0xffff;
#[cfg(not(target_arch = "x86_64"))]
const CALL_INSTRUCTION: u64 = 0xd400_0001;
#[cfg(not(target_arch = "x86_64"))]
const CALL_MASK: u64 = 0xffff_ffff;

/// Where a child finds the id of its parent.
const PARENT: &str = "KVS_STEPPING_PARENT";

/// Called in the child: asks to be traced, and to die with its parent.
///
/// # Errors
/// When tracing is forbidden here, or the parent is dead already.
pub fn be_traced() -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let parent = std::env::var(PARENT).context("this is for the program itself to start")?;
    // Nobody would ever go on with a child whose parent died before it asked for its own death.
    ensure!(parent == getppid().to_string(), "the parent is dead");
    ptrace::traceme().context("tracing is forbidden here")
}

/// Called in the child: stops until the parent goes on.
///
/// # Errors
/// Never.
pub fn stop() -> anyhow::Result<()> {
    Ok(raise(Signal::SIGSTOP)?)
}

/// From now on children get the same addresses every time.
///
/// # Errors
/// When the kernel refuses.
pub fn fix_addresses() -> anyhow::Result<()> {
    let persona = personality::get()? | Persona::ADDR_NO_RANDOMIZE;
    personality::set(persona).context("can't switch off random addresses")?;
    Ok(())
}

/// Traces a child that does nothing.
///
/// # Errors
/// When that is forbidden, or random addresses can't be switched off.
pub fn try_it() -> anyhow::Result<()> {
    fix_addresses()?;
    let nothing = std::fs::File::open("/dev/null")?;
    let mut child = Tracee::start(&["idle"], nothing.as_fd())?;
    child.steps(10)?;
    child.instruction()?;
    child.kill()
}
