//! The promise: killed at any instruction, the store loses nothing and does nothing twice.
//!
//! Method: `stepping` executes mutations one instruction at a time and holds every promise against what a process killed there
//! would leave; see `report/kill-at-every-instruction.md`. Here for 20 seconds, a random part of it each time; `KVS_SEED` repeats one.
//! `cargo run --release -p kvs-harness --bin stepping -- --all` tries everything.

use std::process::Command;

/// How long the sample is.
const SECONDS: &str = "20";

#[test]
fn stepping_a_random_part_of_all_points_breaks_no_promise() {
    if let Err(why) = tracing_works() {
        // Nothing can be shown here, and nobody should think that it was.
        eprintln!("SKIPPED, NOTHING WAS TESTED: this machine forbids ptrace ({why})");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_stepping"))
        .args(["--seconds", SECONDS])
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
