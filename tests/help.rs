//! The promise: help texts change on purpose only, and every option and command has one.
//!
//! Method: what each program prints for `--help`, 100 columns wide, is held against `tests/help/*.txt`. After a change that is meant,
//! `KVS_RENEW_HELP=1 cargo test --release -p kvs-harness --test help` writes them anew; the difference shows in the commit.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use kvs_harness::binaries;

fn help_of(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(binaries::program(program));
    command.args(arguments).env_clear().env("COLUMNS", "100");
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{program} {arguments:?}: {}", output.status);
    assert!(output.stderr.is_empty(), "{program} {arguments:?} prints help on standard error");
    String::from_utf8(output.stdout).expect("help is text")
}

fn assert_as_written(name: &str, found: &str) {
    let path: PathBuf = binaries::workspace().join("tests/help").join(format!("{name}.txt"));
    if std::env::var_os("KVS_RENEW_HELP").is_some() {
        fs::write(&path, found).expect("written");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(found.lines()).position(|(written, found)| written != found);
    assert!(
        written == found,
        "the help of {name} is not what {} has, from line {:?} on; if that is meant, set KVS_RENEW_HELP=1\n{found}",
        path.display(),
        differs.map(|line| line + 1)
    );
}

#[test]
fn help_of_the_servers_is_as_written() {
    for program in ["kvs-front", "kvs-data"] {
        assert_as_written(program, &help_of(program, &["--help"]));
        assert_as_written(&format!("{program}-short"), &help_of(program, &["-h"]));
    }
}

#[test]
fn help_of_the_tools_is_as_written_and_each_command_has_one() {
    let all = help_of("kvs-tools", &["--help"]);
    assert_as_written("kvs-tools", &all);
    let commands = all.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() >= 14, "{commands:?}");
    for command in commands {
        assert_as_written(&format!("kvs-tools-{command}"), &help_of("kvs-tools", &[command, "--help"]));
    }
}
