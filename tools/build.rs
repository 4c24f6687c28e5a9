//! Notes which compiler and which commit the program is built from, for benchmark runs.

use std::path::Path;
use std::process::Command;

fn main() {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let rustc = said_by(Command::new(compiler).arg("--version"));
    let commit = said_by(Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]));
    println!("cargo::rustc-env=KVS_BUILD_RUSTC={rustc}");
    println!("cargo::rustc-env=KVS_BUILD_COMMIT={commit}");
    println!("cargo::rerun-if-changed=build.rs");
    // It gets a line whenever another commit is the current one.
    let log = "../.git/logs/HEAD";
    if Path::new(log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
}

/// The first line a command prints.
fn said_by(command: &mut Command) -> String {
    let output = command.output().ok().filter(|output| output.status.success());
    let text = output.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
