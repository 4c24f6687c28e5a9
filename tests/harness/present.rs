//! A store whose servers come and go: what a client or an operator meets who doesn't give up at once.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use kvs_core::wire::RequestBody;
use rustix::process::Pid;
use serde_json::Value;

use crate::binaries;
use crate::connection::{Answer, Connection, get};
use crate::processes::{of_store, program_of};
use crate::store::{Launch, Place, Store};
use crate::wait::{SOON, eventually, eventually_some};

/// The servers of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Servers {
    /// The front server.
    pub front: Pid,
    /// The data server that serves.
    pub data: Pid,
    /// The one that waits, when it has everything it needs.
    pub standby: Option<Pid>,
}

impl Servers {
    /// The servers as the store counts them; none while one of them is missing. One that was killed a moment ago may still seem to
    /// live.
    ///
    /// # Errors
    /// The connection is lost, or the answer is another one.
    pub fn told_to(client: &mut Connection) -> io::Result<Option<Self>> {
        let statistics = match client.ask(&RequestBody::Stats)? {
            Answer::Stats(statistics) => statistics,
            other => return Err(io::Error::other(format!("no counters but {other:?}"))),
        };
        let pid = |name: &str| {
            let (_, number) = statistics.iter().find(|(found, _)| found == name)?;
            let pid = Pid::from_raw((*number)? as i32)?;
            program_of(pid).map(|_| pid)
        };
        let pair = pid("front_pid").zip(pid("data_pid"));
        Ok(pair.map(|(front, data)| Self { front, data, standby: pid("standby_pid") }))
    }

    /// Whether any of `dead` is among them.
    pub fn any_of(&self, dead: &[Pid]) -> bool {
        [Some(self.front), Some(self.data), self.standby].into_iter().flatten().any(|pid| dead.contains(&pid))
    }
}

impl Store {
    /// A new connection that is served. One that reached a server just before its death may be lost; the next one counts.
    pub fn new_client(&self) -> Connection {
        eventually_some("a new client is served", SOON, || {
            let mut client = Connection::welcomed_tcp(self.ready().tcp).ok()?;
            client.ask(&get(b"any")).ok()?;
            Some(client)
        })
    }

    /// Waits until the standby has everything it needs to take over.
    pub fn await_standby(&self) {
        eventually("the standby stands", SOON, || self.place().statistics()["standby_pid"].is_u64());
    }
}

impl Place {
    /// The counters, as `kvs-tools stats --json` tells them.
    pub fn statistics(&self) -> Value {
        eventually_some("the store tells its counters", SOON, || {
            let told = self.tools(&["stats", "--json"]);
            told.status.success().then(|| serde_json::from_slice(&told.stdout).expect("JSON"))
        })
    }

    /// The answer to a command on `kvs-tools console`.
    ///
    /// # Panics
    /// When the console can't be had.
    pub fn console(&self, command: &str) -> String {
        let mut tool = self.tools_command();
        let tool = tool.arg("console").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut tool = tool.spawn().expect("started");
        writeln!(tool.stdin.take().expect("a pipe"), "{command}").expect("it reads");
        let output = tool.wait_with_output().expect("ended");
        assert!(output.status.success(), "console: {}", output.status);
        String::from_utf8(output.stdout).expect("text")
    }

    /// A launch from copies of the servers in the place's directory, where they can be taken away.
    pub fn launch_of_copies(&self) -> Launch {
        for program in ["kvs-front", "kvs-data"] {
            self.put_back(program);
        }
        Launch::new().front(self.directory().join("kvs-front"))
    }

    /// Puts the copy of a program in its place.
    ///
    /// # Panics
    /// When the disk is full.
    pub fn put_back(&self, program: &str) {
        let beside = self.directory().join(program).with_extension("new");
        fs::copy(binaries::program(program), &beside).expect("copied");
        // At once, so that nobody runs half a program.
        fs::rename(&beside, beside.with_extension("")).expect("put in place");
    }

    /// Puts a script in the place of a program's copy.
    ///
    /// # Panics
    /// When the disk is full.
    pub fn replace_by_script(&self, program: &str, script: &str) {
        let beside = self.directory().join(program).with_extension("new");
        fs::write(&beside, script).expect("written");
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).expect("mode");
        fs::rename(&beside, beside.with_extension("")).expect("put in place");
    }

    /// Checks that an orderly end left the segment and nothing else.
    ///
    /// # Panics
    /// When it did not.
    pub fn assert_ended_in_order(&self) {
        assert_eq!(of_store(self.name()), [], "no process is left");
        assert!(!self.unix().exists(), "the socket's file is removed");
        assert!(!self.unix().with_extension("console").exists(), "the console's file is removed");
        assert!(self.segment().exists(), "the segment stays");
    }
}
