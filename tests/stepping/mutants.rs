//! Deliberate faults: each patch in `tests/mutants` puts one into a copy of the sources, and stepping through that copy must
//! find a violation. A check that has never failed is not trusted.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kvs_harness::binaries::workspace;
use tempfile::TempDir;

use crate::VIOLATION;

/// What is tried, one after the other, until something is found: every image, then everything, for so long at most.
const ROUNDS: [(&[&str], Duration); 2] =
    [(&["--images"], Duration::from_secs(300)), (&["--all"], Duration::from_secs(300))];
/// The same for faults that only a connected client can notice: their names begin with [`LIVE`].
const LIVE_ROUNDS: [(&[&str], Duration); 2] = [
    (&["--live", "--seconds", "60"], Duration::from_secs(300)),
    (&["--live", "--seconds", "300"], Duration::from_secs(900)),
];
/// How their names begin.
const LIVE: &str = "live-";
/// What is stepped, and, for those, what is killed.
const PROGRAMS: [&str; 8] = ["-p", "kvs-harness", "-p", "kvs-front", "-p", "kvs-data", "-p", "kvs-tools"];
/// Pause between two looks whether a run has ended.
const PAUSE: Duration = Duration::from_millis(20);
/// What isn't copied.
const NOT_SOURCES: [&str; 2] = ["target", ".git"];

/// The patches, in order.
///
/// # Errors
/// When there are none.
pub fn patches() -> anyhow::Result<Vec<PathBuf>> {
    let directory = workspace().join("tests/mutants");
    let entries = std::fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut patches = entries.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    patches.retain(|path| path.extension() == Some(OsStr::new("patch")));
    patches.sort();
    ensure!(!patches.is_empty(), "there are no patches in {}", directory.display());
    Ok(patches)
}

/// Tries the patches whose name contains `only`.
///
/// # Errors
/// When one isn't caught.
pub fn try_all(only: &str) -> anyhow::Result<()> {
    let copy = Copy::make()?;
    let mut free = Vec::new();
    println!("| mutant | what it does | caught by | seconds |\n|---|---|---|---:|");
    for patch in patches()?.iter().filter(|patch| name(patch).contains(only)) {
        let start = Instant::now();
        copy.apply(patch, &[])?;
        let caught = copy.build().and_then(|()| copy.catch(rounds_of(patch))).with_context(|| name(patch))?;
        copy.apply(patch, &["--reverse"])?;
        let text = std::fs::read_to_string(patch)?;
        let what = text.lines().next().unwrap_or_default();
        let by = caught.as_deref().unwrap_or("NOT CAUGHT");
        println!("| {} | {what} | {by} | {:.0} |", name(patch), start.elapsed().as_secs_f64());
        if caught.is_none() {
            free.push(name(patch));
        }
    }
    ensure!(free.is_empty(), "not caught: {free:?}");
    Ok(())
}

fn name(patch: &Path) -> String {
    patch.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// What is tried to catch that fault.
fn rounds_of(patch: &Path) -> &'static [(&'static [&'static str], Duration)] {
    if name(patch).starts_with(LIVE) { &LIVE_ROUNDS } else { &ROUNDS }
}

/// A copy of the sources, gone when this is dropped.
struct Copy {
    directory: TempDir,
}

impl Copy {
    fn make() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("kvs-mutants-").tempdir()?;
        copy_tree(workspace(), &directory.path().join("sources"))?;
        Ok(Self { directory })
    }

    fn sources(&self) -> PathBuf {
        self.directory.path().join("sources")
    }

    fn apply(&self, patch: &Path, options: &[&str]) -> anyhow::Result<()> {
        let mut git = Command::new("git");
        git.args(["apply", "--whitespace=nowarn"]).args(options).arg(patch).current_dir(self.sources());
        // Whatever repository the directory for temporary files may lie in.
        git.env("GIT_CEILING_DIRECTORIES", self.directory.path());
        run(&mut git)
    }

    fn build(&self) -> anyhow::Result<()> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--release", "--locked", "--bins"]).args(PROGRAMS);
        cargo.arg("--target-dir").arg(self.directory.path().join("target"));
        cargo.env("RUSTFLAGS", "--cap-lints=warn").current_dir(self.sources()).stderr(Stdio::null());
        run(&mut cargo)
    }

    /// What the fault is caught by, if it is.
    fn catch(&self, rounds: &[(&[&str], Duration)]) -> anyhow::Result<Option<String>> {
        let programs = self.directory.path().join("target/release");
        for &(options, patience) in rounds {
            let log = self.directory.path().join("told");
            let mut command = Command::new(programs.join("stepping"));
            command.env("KVS_BIN_DIR", &programs);
            command.args(options).stdin(Stdio::null()).stdout(Stdio::null());
            // What a run leaves that is killed goes with the copy.
            command.env("TMPDIR", self.directory.path());
            command.stderr(std::fs::File::create(&log)?);
            let Some(status) = wait(command.spawn()?, patience)? else { continue };
            let told = std::fs::read_to_string(&log)?;
            match status.code() {
                Some(code) if code == i32::from(VIOLATION) => {
                    let what = told.trim().trim_start_matches("stepping: ");
                    return Ok(Some(what.chars().take(200).collect()));
                }
                Some(0) => {}
                _ => bail!("the run ended with {status}: {told}"),
            }
        }
        Ok(None)
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// How the child ended; None when it took longer than `patience`, and was killed.
fn wait(mut child: Child, patience: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let until = Instant::now() + patience;
    while Instant::now() < until {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(PAUSE);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if NOT_SOURCES.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            std::fs::copy(&path, &target)?;
        }
    }
    Ok(())
}
