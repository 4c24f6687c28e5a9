//! The promise: killed at any instruction, the store loses nothing and does nothing twice.
//!
//! Method: `stepping` executes mutations one instruction at a time and holds every promise against what a process killed there
//! would leave; see `report/kill-at-every-instruction.md`. Here for 20 seconds, a random part of it each time; `KVS_SEED` repeats one.
//! `cargo run --release -p kvs-harness --bin stepping -- --all` tries everything. The same for the worker's loop of real servers, whose
//! clients stay connected: for 15 seconds, `--live --all` is everything.

use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvs_harness::binaries::{self, workspace};

/// How long the sample is.
const SECONDS: &str = "20";
/// How long that of the servers is.
const LIVE_SECONDS: &str = "15";

#[test]
fn stepping_a_random_part_of_all_points_breaks_no_promise() {
    step(&["--seconds", SECONDS]);
}

#[test]
fn stepping_servers_whose_clients_stay_connected_breaks_no_promise() {
    step(&["--live", "--seconds", LIVE_SECONDS]);
}

fn step(arguments: &[&str]) {
    if let Err(why) = tracing_works() {
        // Nothing can be shown here, and nobody should think that it was.
        let told = format!("SKIPPED, NOTHING WAS TESTED: this machine forbids ptrace ({})\n", why.trim());
        // Past the test runner, which keeps what passing tests print to itself.
        std::io::stderr().write_all(told.as_bytes()).expect("standard error");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_stepping"))
        .args(arguments)
        .env("KVS_BIN_DIR", binaries::directory())
        .output()
        .expect("the program was built");
    let (told, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{told}");
    assert!(output.status.success(), "{failed}");
    assert!(told.contains("| all |"), "{told}");
}

/// Whether a child can be traced at all; else why not.
fn tracing_works() -> Result<(), String> {
    let output = Command::new(env!("CARGO_BIN_EXE_stepping"))
        .arg("try")
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Deliberate faults that there are at least.
const MUTANTS_MIN: usize = 10;

#[test]
fn mutants_of_the_sources_as_they_are_all_apply() {
    let directory = workspace().join("tests/mutants");
    let entries = std::fs::read_dir(&directory).expect("the mutants");
    let patches: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    assert!(patches.len() >= MUTANTS_MIN, "{} mutants", patches.len());
    let failed: Vec<String> = patches.iter().filter_map(|patch| refused(patch)).collect();
    assert!(failed.is_empty(), "write them anew for what the sources are now:\n{}", failed.join("\n"));
}

/// Why a patch does not apply, if it doesn't.
fn refused(patch: &Path) -> Option<String> {
    let tries = [
        Command::new("git").args(["apply", "--check"]).arg(patch).current_dir(workspace()).output(),
        Command::new("patch").args(["-p1", "--dry-run", "-i"]).arg(patch).current_dir(workspace()).output(),
    ];
    let mut ran = tries.into_iter().filter(|tried| !is_missing(tried));
    let Some(tried) = ran.next() else { return Some("neither git nor patch is installed".to_owned()) };
    let output = tried.expect("it can be run");
    let told = [output.stdout, output.stderr].concat();
    (!output.status.success()).then(|| format!("{}: {}", patch.display(), String::from_utf8_lossy(&told)))
}

fn is_missing(tried: &std::io::Result<Output>) -> bool {
    tried.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}
