//! Clients that are programs of their own: in C through `libpsiskv`, and in Python with a plain socket.
//!
//! They check every answer themselves. They say `connected` when all their connections are there, go on until their standard input
//! ends, and end with 0. That their sockets are the same ones all the time is seen from outside.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Result, ensure};
use kvs_harness::binaries;
use kvs_harness::c_programs::{Library, compile, source};
use kvs_harness::processes::{MARK, program_of};
use kvs_harness::store::Store;
use rustix::process::Pid;

/// A client program at work.
pub struct Program {
    name: String,
    process: Child,
    input: Option<ChildStdin>,
    output: std::io::Lines<BufReader<std::process::ChildStdout>>,
    sockets: BTreeSet<String>,
}

impl Program {
    /// Compiles and starts the client in C, with `threads` connections.
    ///
    /// # Panics
    /// When there is no C compiler, or it does not start.
    pub fn in_c(store: &Store, number: usize, threads: usize) -> Self {
        let program = compile(&source("storm.c"), store.place().directory(), Library::Shared);
        let address = store.ready().tcp;
        let mut command = Command::new(program);
        command.arg(address.ip().to_string()).arg(address.port().to_string());
        command.args([number, threads].map(|number| number.to_string()));
        Self::start(format!("C program {number}"), command, store, threads)
    }

    /// Starts the client in Python, if there is one, with `connections` over each transport.
    ///
    /// # Panics
    /// When it does not start.
    pub fn in_python(store: &Store, connections: usize) -> Option<Self> {
        let python = Command::new("python3").arg("--version").output();
        if !python.is_ok_and(|version| version.status.success()) {
            eprintln!("SKIPPED: THERE IS NO PYTHON3 HERE, SO THE CLIENT IN ANOTHER LANGUAGE TAKES NO PART");
            return None;
        }
        let mut command = Command::new("python3");
        command.arg(binaries::workspace().join("tests/storm_client.py"));
        command.arg(store.address()).arg(&store.ready().unix).arg(connections.to_string());
        Some(Self::start("Python program".into(), command, store, 2 * connections))
    }

    fn start(name: String, mut command: Command, store: &Store, connections: usize) -> Self {
        command.env(MARK, store.place().name());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("it can be started");
        let input = process.stdin.take();
        let mut output = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let said = output.next().and_then(Result::ok).unwrap_or_default();
        let mut program = Self { name, process, input, output, sockets: BTreeSet::new() };
        program.sockets = program.sockets_now();
        let all = said == "connected" && program.sockets.len() >= connections;
        assert!(all, "{} says {said:?} and has {} sockets", program.name, program.sockets.len());
        program
    }

    fn sockets_now(&self) -> BTreeSet<String> {
        let directory = fs::read_dir(format!("/proc/{}/fd", self.process.id()));
        let links =
            directory.into_iter().flatten().flatten().filter_map(|one| fs::read_link(one.path()).ok());
        links
            .filter_map(|link| Some(link.to_str()?.to_owned()))
            .filter(|link| link.starts_with("socket:"))
            .collect()
    }

    /// Whether it has ended by itself, which is a fault.
    pub fn has_ended(&self) -> bool {
        // A dead child that was not waited for has no program any more.
        program_of(Pid::from_child(&self.process)).is_none()
    }

    /// Lets it finish; returns what it says it did.
    ///
    /// # Errors
    /// It found something wrong, or opened another connection.
    pub fn finish(mut self) -> Result<String> {
        let sockets = self.sockets_now();
        let ended = self.has_ended();
        drop(self.input.take());
        let said = self.output.next().and_then(Result::ok).unwrap_or_default();
        let output = self.process.wait_with_output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && !ended, "{}: {}: {said} {errors}", self.name, output.status);
        ensure!(sockets == self.sockets, "{}: sockets {:?}, now {sockets:?}", self.name, self.sockets);
        Ok(format!("{}: {said}", self.name))
    }
}
