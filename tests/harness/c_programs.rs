//! C programs against the C library, compiled as strictly as a careful author would.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binaries;

/// How the C library is linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// As `libpsiskv.so`.
    Shared,
    /// As `libpsiskv.a`.
    Static,
}

/// A source file of `tests/c`.
pub fn source(name: &str) -> PathBuf {
    binaries::workspace().join("tests/c").join(name)
}

/// Compiles `source` into a program in `directory`.
///
/// # Panics
/// When there is no C compiler, or it has something to say.
pub fn compile(source: &Path, directory: &Path, library: Library) -> PathBuf {
    let libraries = binaries::directory();
    let stem = source.file_stem().expect("a file").to_string_lossy();
    let suffix = if library == Library::Shared { "shared" } else { "static" };
    let program = directory.join(format!("{stem}-{suffix}"));
    let mut command = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    command
        .args(["-std=gnu99", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg("-I")
        .arg(binaries::workspace().join("kvs-client/include"))
        .arg(source);
    match library {
        Library::Shared => {
            command.arg("-L").arg(libraries).arg("-lpsiskv");
            command.arg(format!("-Wl,-rpath,{}", libraries.display()));
        }
        Library::Static => {
            command.arg(libraries.join("libpsiskv.a")).args(["-ldl", "-lm"]);
        }
    }
    let made = command.output().expect("a C compiler is there");
    assert!(made.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&made.stderr));
    program
}
