//! What has to be known about a machine and the programs on it to read figures from it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::bench::servers::find_program;

/// Facts, in the order in which they are shown.
pub struct Facts {
    /// About the machine.
    pub machine: Vec<(&'static str, String)>,
    /// About the programs.
    pub versions: Vec<(&'static str, String)>,
}

impl Facts {
    /// As they are now: before the run, which would show in the load.
    pub fn gather() -> Self {
        Self { machine: machine(), versions: versions() }
    }

    /// A line for each.
    pub fn lines(facts: &[(&'static str, String)]) -> String {
        facts.iter().map(|(name, text)| format!("{name}: {text}\n")).collect()
    }
}

fn machine() -> Vec<(&'static str, String)> {
    let system = rustix::system::uname();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let (kernel, architecture) = (system.release().to_string_lossy(), system.machine().to_string_lossy());
    let mut facts = vec![
        (
            "processor",
            labelled("/proc/cpuinfo", "model name").unwrap_or_else(|| architecture.clone().into_owned()),
        ),
        ("architecture", architecture.into_owned()),
        ("cores", cores.to_string()),
        ("kernel", kernel.into_owned()),
    ];
    let mut add = |name, text: Option<String>| facts.extend(text.map(|text| (name, text)));
    add("memory", labelled("/proc/meminfo", "MemTotal"));
    add("hypervisor", is_virtual().then(|| "yes".into()));
    add("governor", line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"));
    add("clock", line("/sys/devices/system/clocksource/clocksource0/current_clocksource"));
    add("huge pages", line("/sys/kernel/mm/transparent_hugepage/enabled"));
    add("huge pages of shared memory", line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"));
    add("temporary files", file_system(&std::env::temp_dir()));
    add("load before the run", line("/proc/loadavg"));
    facts
}

fn versions() -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("kvs-tools", env!("CARGO_PKG_VERSION").to_owned()),
        ("commit", env!("KVS_BUILD_COMMIT").to_owned()),
        ("rustc", env!("KVS_BUILD_RUSTC").to_owned()),
        ("lmdb", heed::lmdb_version().string.to_owned()),
    ];
    for program in ["kvs-front", "kvs-data", "redis-server", "memcached"] {
        facts.push((program, find_program(program).map_or_else(|| "not here".into(), |path| version(&path))));
    }
    facts
}

/// What a program says of its version.
fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.ok().filter(|text| !text.is_empty()).unwrap_or_else(|| "unknown".into())
}

fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// What follows a label in a file of lines such as `label : text`.
fn labelled(path: &str, label: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(label))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The kind of file system that a path is on: where backup and append-only files are written.
fn file_system(path: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let path = fs::canonicalize(path).ok()?;
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let around = fields.filter(|(place, _)| path.starts_with(place));
    // The last of equals lies above the others.
    let (_, kind) = around.max_by_key(|(place, _)| place.len())?;
    Some(kind.to_owned())
}

fn is_virtual() -> bool {
    labelled("/proc/cpuinfo", "flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"))
}
