//! A running store of its own for one test.
//!
//! With `KVS_HOLD` set, a failed test leaves its store running for an hour, for a debugger.
//!
//! Lock: none. A crash of the test program is cleaned up by the guard process, see [`processes`](crate::processes).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvs_core::sys::process::is_ending;
use rustix::process::{Pid, Signal};

use crate::binaries;
use crate::connection::Connection;
use crate::processes::{self, MARK, run_directory, run_name};
use crate::wait::{SOON, eventually, eventually_some};

/// How long a server has for an orderly end before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// A name and a directory for one store. When dropped, nothing of that name is left.
pub struct Place {
    name: String,
    directory: PathBuf,
}

impl Place {
    /// A place nobody else has.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = run_directory().join(count.to_string());
        fs::create_dir(&directory).expect("a directory of our own can be made");
        Self { name: format!("{}-{count}", run_name()), directory }
    }

    /// Name of the instance.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A directory of its own.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the segment of the instance is.
    pub fn segment(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!("kvs-{}", self.name))
    }

    /// The unix socket of the instance.
    pub fn unix(&self) -> PathBuf {
        self.directory.join("sock")
    }

    /// The backup file of the instance.
    pub fn backup(&self) -> PathBuf {
        self.directory.join("backup")
    }

    /// What the servers wrote to standard error since the first start.
    pub fn log(&self) -> String {
        fs::read(self.directory.join("log"))
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs `kvs-tools` on this instance.
    pub fn tools(&self, arguments: &[&str]) -> Output {
        self.tools_command().args(arguments).output().expect("kvs-tools can be started")
    }

    /// `kvs-tools` for this instance, with its command still to be added.
    pub fn tools_command(&self) -> Command {
        let mut command = Command::new(binaries::program("kvs-tools"));
        command.env(MARK, &self.name).arg("--unix").arg(self.unix()).stdin(Stdio::null());
        command
    }

    /// `kvs-tools` by the name of the instance, for what reads the segment instead of asking the server.
    pub fn tools_by_name(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binaries::program("kvs-tools"));
        command.env(MARK, &self.name).args(["--name", &self.name]).args(arguments).stdin(Stdio::null());
        command.output().expect("kvs-tools can be started")
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        processes::kill_store(&self.name);
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(8_000);
            let from = (from..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
            eprintln!("---- log of {}\n{}----", self.name, &log[from..]);
        }
        let _ = fs::remove_file(self.segment());
        // One that was kept aside.
        let _ = fs::remove_file(format!("{}~", self.segment().display()));
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// How a store is started.
#[derive(Clone)]
pub struct Launch {
    front: PathBuf,
    capacity: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    open_files: Option<u32>,
    has_input: bool,
}

impl Launch {
    /// A store of 256 MiB on a free port.
    pub fn new() -> Self {
        Self {
            front: binaries::program("kvs-front"),
            capacity: "256MiB".into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            open_files: None,
            has_input: false,
        }
    }

    /// Another `--capacity`.
    pub fn capacity(mut self, capacity: &str) -> Self {
        self.capacity = capacity.into();
        self
    }

    /// One more option with its value. An option given here replaces the harness's own.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.arguments.push(format!("{name}={value}"));
        self
    }

    /// One more environment variable.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Limits the descriptors each server may have, soft and hard.
    pub fn open_files(mut self, limit: u32) -> Self {
        self.open_files = Some(limit);
        self
    }

    /// A console on standard input, which [`Store::type_line`] writes to.
    pub fn console(mut self) -> Self {
        self.has_input = true;
        self.option("--console", "on")
    }

    /// Another front server program.
    pub fn front(mut self, program: PathBuf) -> Self {
        self.front = program;
        self
    }

    /// Starts a store in a place of its own.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start(&self) -> Store {
        self.start_at(Place::new())
    }

    /// Starts a store in a place that may have a segment already.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start_at(&self, place: Place) -> Store {
        self.try_start_at(place).unwrap_or_else(|refused| {
            panic!("the store did not start: {}\n{}", refused.status, refused.message)
        })
    }

    /// Starts a store; gives back what it said when it refused to start.
    ///
    /// # Errors
    /// The front server ended instead of getting ready.
    pub fn try_start_at(&self, place: Place) -> Result<Store, Refused> {
        let (mut front, lines) = self.spawn(&place);
        match lines.recv_timeout(SOON) {
            Ok(line) => {
                let ready = Ready::parse(&line);
                let input = front.stdin.take();
                Ok(Store { front: Front(front), place, launch: self.clone(), ready, lines, input })
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status =
                    wait_for_end(&mut front, SOON).expect("a front server that closed its output ends");
                let message = place.log();
                Err(Refused { place, status, message })
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = front.kill();
                let _ = front.wait();
                panic!("no ready line within {SOON:?}\n{}", place.log());
            }
        }
    }

    fn spawn(&self, place: &Place) -> (Child, Receiver<String>) {
        let mut front = self.command(place).spawn().expect("kvs-front can be started");
        let output = BufReader::new(front.stdout.take().expect("standard output is a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        (front, lines)
    }

    fn command(&self, place: &Place) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = match self.open_files {
            None => Command::new(&self.front),
            Some(limit) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {limit} && exec \"$0\" \"$@\"")]).arg(&self.front);
                shell
            }
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVS_")) {
            command.env_remove(name);
        }
        self.add_options(&mut command, place);
        let log = File::options().create(true).append(true).open(place.directory().join("log"));
        command
            .env(MARK, place.name())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(if self.has_input { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(log.expect("the log can be made"))
            .process_group(0);
        command
    }

    fn add_options(&self, command: &mut Command, place: &Place) {
        let unix = place.unix().into_os_string();
        let backup = place.backup().into_os_string();
        let own: [(&str, OsString); 6] = [
            ("--name", place.name().into()),
            ("--listen", "127.0.0.1:0".into()),
            ("--unix", unix),
            ("--backup", backup),
            ("--capacity", self.capacity.clone().into()),
            ("--console", "off".into()),
        ];
        let given = |name: &str| {
            self.arguments
                .iter()
                .any(|argument| argument.split('=').next().is_some_and(|given| given == name))
        };
        for (name, value) in own.into_iter().filter(|(name, _)| !given(name)) {
            command.arg(name).arg(value);
        }
        command.args(&self.arguments);
    }
}

impl Default for Launch {
    fn default() -> Self {
        Self::new()
    }
}

/// A front server that ended instead of getting ready.
pub struct Refused {
    /// Where that was; dropping it cleans up.
    pub place: Place,
    /// How the front server ended.
    pub status: ExitStatus,
    /// What it said on standard error.
    pub message: String,
}

impl Refused {
    /// Checks that the start failed with a message that has every one of `words` in it.
    ///
    /// # Panics
    /// When it did not.
    pub fn assert_says(&self, words: &[&str]) {
        assert!(
            self.status.code().is_some_and(|code| code > 0),
            "ended by {}: {}",
            self.status,
            self.message
        );
        for word in words {
            assert!(self.message.contains(word), "no {word:?} in: {}", self.message);
        }
        assert!(!self.message.contains("panicked"), "{}", self.message);
    }
}

/// What the ready line says.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Where the store listens.
    pub tcp: SocketAddr,
    /// The unix socket.
    pub unix: PathBuf,
    /// The front server.
    pub front: Pid,
    /// The data server.
    pub data: Pid,
    /// The segment.
    pub segment: PathBuf,
    /// Entries found at start.
    pub entries: u64,
    /// `attached`, `loaded` or `new`.
    pub start: String,
    /// Time from start to ready, in microseconds.
    pub took_us: u64,
}

impl Ready {
    fn parse(line: &str) -> Self {
        let fields = line.strip_prefix("ready name=").unwrap_or_else(|| panic!("not a ready line: {line}"));
        let field = |name: &str| {
            let wanted = format!(" {name}=");
            let (_, rest) = fields.split_once(&wanted).unwrap_or_else(|| panic!("no{wanted} in: {line}"));
            rest.split(' ').next().unwrap_or_default().to_owned()
        };
        let pid = |name: &str| field(name).parse().ok().and_then(Pid::from_raw).expect("a process id");
        Self {
            tcp: field("tcp").parse().expect("an address"),
            unix: field("unix").into(),
            front: pid("front"),
            data: pid("data"),
            segment: field("segment").into(),
            entries: field("entries").parse().expect("a number of entries"),
            start: field("start"),
            took_us: field("took").strip_suffix("_us").and_then(|us| us.parse().ok()).expect("microseconds"),
        }
    }
}

/// A running store. When dropped it is ended in order, or killed when it does not end.
pub struct Store {
    // Dropped first: the server ends before its place is cleared.
    front: Front,
    place: Place,
    launch: Launch,
    ready: Ready,
    lines: Receiver<String>,
    input: Option<ChildStdin>,
}

impl Store {
    /// Starts a store with the harness's defaults.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start() -> Self {
        Launch::new().start()
    }

    /// Where the store lives.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What the last ready line said.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// The address of the front server, as text.
    pub fn address(&self) -> String {
        self.ready.tcp.to_string()
    }

    /// The address of the unix socket, as text.
    pub fn unix_address(&self) -> String {
        format!("unix:{}", self.ready.unix.display())
    }

    /// A new TCP connection that has been welcomed.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn connect(&self) -> Connection {
        Connection::welcomed_tcp(self.ready.tcp).expect("the store takes a connection")
    }

    /// A new unix connection that has been welcomed.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn connect_unix(&self) -> Connection {
        Connection::welcomed_unix(&self.ready.unix).expect("the store takes a connection")
    }

    /// The front server that was started first.
    pub fn front_pid(&self) -> Pid {
        self.ready.front
    }

    /// The front server of this moment; waits for the next one when there is none.
    pub fn present_front_pid(&self) -> Pid {
        eventually_some("a front server runs", SOON, || self.find("kvs-front"))
    }

    /// Kills the front server with SIGKILL and returns which one that was, when it is dead.
    pub fn kill_front(&self) -> Pid {
        let pid = self.present_front_pid();
        processes::send(pid, Signal::KILL);
        eventually("the front server is dead", SOON, || {
            !processes::of_store(self.place.name()).contains(&pid)
        });
        pid
    }

    /// Types a line on the console.
    ///
    /// # Panics
    /// When the store was not launched with one.
    pub fn type_line(&mut self, line: &str) {
        use std::io::Write;
        let input = self.input.as_mut().expect("a console on standard input");
        writeln!(input, "{line}").expect("somebody holds the other end");
    }

    /// The data server of this moment; waits for the next one when there is none.
    pub fn data_pid(&self) -> Pid {
        eventually_some("a data server runs", SOON, || self.find("kvs-data"))
    }

    /// The process of this store that runs `program`, if one does and is not just dying.
    pub fn find(&self, program: &str) -> Option<Pid> {
        let runs = |pid: &Pid| {
            // In this order: one that is gone is no program.
            !is_ending(pid.as_raw_nonzero().get().unsigned_abs())
                && processes::program_of(*pid).is_some_and(|found| found == program)
        };
        processes::of_store(self.place.name()).into_iter().find(runs)
    }

    /// Kills the data server with SIGKILL and returns which one that was.
    pub fn kill_data(&self) -> Pid {
        let pid = self.data_pid();
        processes::send(pid, Signal::KILL);
        pid
    }

    /// Bytes of memory the segment takes.
    ///
    /// # Panics
    /// When there is no segment.
    pub fn segment_memory(&self) -> u64 {
        let file = fs::metadata(&self.ready.segment).expect("a running store has a segment");
        std::os::unix::fs::MetadataExt::blocks(&file) * 512
    }

    /// Lines on standard output after the ready line.
    pub fn further_output(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Ends the store with `signal` and returns how the front server ended.
    ///
    /// # Panics
    /// When it does not end.
    pub fn end(mut self, signal: Signal) -> (Place, Launch, ExitStatus) {
        processes::send(self.ready.front, signal);
        let status = wait_for_end(&mut self.front.0, END_PATIENCE)
            .unwrap_or_else(|| panic!("the front server did not end within {END_PATIENCE:?}"));
        (self.place, self.launch, status)
    }

    /// Waits for the end of all processes of the store, and returns how the front server that was started first ended.
    ///
    /// # Panics
    /// When they don't end.
    pub fn await_end(mut self) -> (Place, Launch, ExitStatus) {
        eventually("every process of the store has ended", END_PATIENCE, || {
            processes::of_store(self.place.name()).is_empty()
        });
        let status = wait_for_end(&mut self.front.0, END_PATIENCE).expect("it has ended");
        (self.place, self.launch, status)
    }

    /// Ends the store in order and starts it again in the same place.
    ///
    /// # Panics
    /// When it does not end with status 0, or does not start.
    pub fn restart(self) -> Self {
        let (place, launch, status) = self.end(Signal::TERM);
        assert!(status.success(), "the store ended with {status}\n{}", place.log());
        launch.start_at(place)
    }
}

/// The front server's process; its parent, this program, has to wait for it.
struct Front(Child);

impl Drop for Front {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("KVS_HOLD").is_some() {
            eprintln!("front server {} is held for a look at it: KVS_HOLD is set", self.0.id());
            std::thread::sleep(Duration::from_secs(3600));
        }
        if self.0.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        processes::send(Pid::from_child(&self.0), Signal::TERM);
        if wait_for_end(&mut self.0, END_PATIENCE).is_none() {
            eprintln!("process {} did not end within {END_PATIENCE:?} and is killed", self.0.id());
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn wait_for_end(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + deadline;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            Ok(ended) => return ended,
            Err(_) => return None,
        }
    }
}
