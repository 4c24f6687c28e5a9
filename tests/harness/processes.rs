//! The processes of a store: found by a mark in their environment, which every descendant inherits.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use crate::wait::{SOON, eventually};

/// The environment variable with the name of the store that a process belongs to.
pub const MARK: &str = "KVS_TEST_STORE";

/// Kills whatever this test program leaves behind. It notices the program's end, even by SIGKILL, because its
/// standard input ends then, and it lives in a process group of its own, so Ctrl-C does not reach it. To look through all processes
/// takes longer than the servers take to replace one another: so it stops each that it finds, which launches nobody any more,
/// and kills all of them when there is no other.
const GUARD: &str = r#"
read -r _
while
    found=
    while
        new=
        for process in /proc/[0-9]*; do
            case "$found " in *" ${process#/proc/} "*) continue ;; esac
            if tr '\0' '\n' <"$process/environ" 2>/dev/null | grep -q "^KVS_TEST_STORE=$1-"; then
                kill -STOP ${process#/proc/}
                new=1 found="$found ${process#/proc/}"
            fi
        done
        [ -n "$new" ]
    do
        :
    done
    [ -n "$found" ]
do
    kill -9 $found
done
rm -rf /dev/shm/kvs-"$1"-* "$2"
"#;

/// The start of the names of all stores of this test program.
pub fn run_name() -> String {
    format!("t-{}", std::process::id())
}

/// The directory for everything this test program makes, with the guard that removes it. Short, because the paths of unix
/// sockets must be.
pub fn run_directory() -> PathBuf {
    static GUARDED: OnceLock<(PathBuf, Child)> = OnceLock::new();
    GUARDED.get_or_init(start_guard).0.clone()
}

fn start_guard() -> (PathBuf, Child) {
    use std::os::unix::process::CommandExt;
    raise_open_files();
    let directory = std::env::temp_dir().join(format!("kvs-{}", run_name()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("the temporary directory can be written");
    let guard = Command::new("sh")
        .args(["-c", GUARD, "guard", &run_name()])
        .arg(&directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("sh can be started");
    (directory, guard)
}

/// Lets this program hold thousands of sockets.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// The living processes of the store `name`.
pub fn of_store(name: &str) -> Vec<Pid> {
    let mark = format!("{MARK}={name}");
    let is_marked = |pid: &Pid| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|one| one == mark.as_bytes()))
    };
    all().into_iter().filter(is_marked).collect()
}

fn all() -> Vec<Pid> {
    let numbers = fs::read_dir("/proc").expect("/proc is there").flatten();
    numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)).collect()
}

/// The name of the program that a process runs.
pub fn program_of(pid: Pid) -> Option<String> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(path.file_name()?.to_str()?.trim_end_matches(" (deleted)").to_owned())
}

/// Sends `signal`; a process that is no more is no error.
pub fn send(pid: Pid, signal: Signal) {
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => panic!("signal to {pid}: {error}"),
    }
}

/// Kills every process of the store `name` at one instant, as far as they can tell, and waits until all are dead.
pub fn kill_store(name: &str) {
    // Who stands still doesn't launch another in the place of one that died. One that was just being launched is not to be
    // recognised for a moment.
    let (mut stopped, mut quiet) = (Vec::new(), 0);
    while quiet < 3 {
        let living = of_store(name);
        let running: Vec<Pid> = living.into_iter().filter(|pid| !stopped.contains(pid)).collect();
        quiet = if running.is_empty() { quiet + 1 } else { 0 };
        running.iter().for_each(|pid| send(*pid, Signal::STOP));
        stopped.extend(running);
        std::thread::sleep(Duration::from_millis(1));
    }
    // The death of its launcher lets one go on, which may then launch another before it is killed, too.
    let mut quiet = 0;
    eventually("every process of the store is dead", SOON, || {
        let living = of_store(name);
        living.iter().for_each(|pid| send(*pid, Signal::KILL));
        quiet = if living.is_empty() { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(2));
        quiet == 4
    });
}

/// How many descriptors a process has open.
///
/// # Errors
/// The process is no more, or of another user.
pub fn open_descriptors(pid: Pid) -> io::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A process that stands still until this is dropped.
pub struct Paused(Pid);

impl Paused {
    /// Stops `pid` and waits until every thread of it stands.
    pub fn new(pid: Pid) -> Self {
        send(pid, Signal::STOP);
        let paused = Self(pid);
        eventually("the process is stopped", SOON, || state_of(pid) == Some('T'));
        paused
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        send(self.0, Signal::CONT);
    }
}

/// The state letter of `/proc/PID/stat`, behind the program's name, which may hold anything.
fn state_of(pid: Pid) -> Option<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}
