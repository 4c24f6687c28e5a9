//! The programs under test.
//!
//! `cargo test` builds the binaries of a package for that package's own tests only. So the first use in a test program
//! runs `cargo build --workspace` in the same profile and target directory, which is what the README's first command
//! does: what is already built is not built again, and cargo's own lock keeps test programs apart. `KVS_BIN_DIR` names a
//! directory with ready-made programs instead.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The directory of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the workspace")
}

/// The directory with the programs and the C library, all of them built.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| match std::env::var_os("KVS_BIN_DIR") {
        Some(given) => PathBuf::from(given),
        None => build(),
    })
}

/// One program of the store, built.
pub fn program(name: &str) -> PathBuf {
    directory().join(name)
}

/// An example of the client library, built.
pub fn example(name: &str) -> PathBuf {
    let directory = directory();
    if std::env::var_os("KVS_BIN_DIR").is_none() {
        cargo_build(directory, &["-p", "kvs-client", "--example", name]);
    }
    directory.join("examples").join(name)
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a test program knows where it is");
    // Test programs lie in TARGET/PROFILE/deps, others in TARGET/PROFILE.
    let beside = test.parent().expect("a program lies in a directory");
    let directory = if name_of(beside) == "deps" { beside.parent() } else { Some(beside) };
    let directory = directory.expect("a profile has a directory");
    cargo_build(directory, &["--workspace"]);
    directory.to_path_buf()
}

/// Builds into `directory`, which is TARGET/PROFILE or, for another machine, TARGET/TRIPLE/PROFILE.
fn cargo_build(directory: &Path, what: &[&str]) {
    let profile = match name_of(directory) {
        "debug" => "dev",
        other => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--locked", "--profile", profile]).args(what);
    command.current_dir(workspace());
    let parent = directory.parent().expect("a profile's directory lies in the target directory");
    // cargo keeps what it knows of the compiler in the target directory itself.
    if parent.join(".rustc_info.json").exists() {
        command.arg("--target-dir").arg(parent);
    } else {
        command.args(["--target", name_of(parent)]);
        command.arg("--target-dir").arg(parent.parent().expect("a triple lies in the target directory"));
    }
    let status = command.status().expect("cargo can be started");
    assert!(status.success(), "{command:?} failed: {status}");
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).expect("cargo's directories have plain names")
}
