//! The promise: every command in README.md works as it stands there, and its output is what the reader will see.
//!
//! Method: the shell blocks are run in order, in a directory that looks like the workspace after `cargo build --release`, as an
//! instance with a name of its own.
//!
//! Convention
//! - A `sh` block holds commands only, one a line (`\` continues it), so that it can be pasted. A `text` block right behind it shows
//!   their output together.
//! - A `console` block has commands behind `$ `, each followed by its output.
//! - Without a shown output any output will do. Every command ends with status 0; where the README shows another one, it
//!   says so with `; echo $?`.
//! - A line with `…` alone stands for any number of lines.
//! - Runs of digits, absolute paths and spacing may differ from what is shown. `9999` in a command becomes the real port.
//! - `cargo` does nothing here: building is done before, and testing is what runs. A command that starts `kvs-front` goes on
//!   in the background until its block's output is there.
//! - A block with `<!-- not run: REASON -->` on the line before it is not run.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvs_harness::binaries;
use kvs_harness::processes::MARK;
use kvs_harness::store::Place;
use kvs_harness::wait::{SOON, eventually_some};

#[test]
fn readme_commands_run_and_print_what_is_shown() {
    let readme = fs::read_to_string(binaries::workspace().join("README.md")).expect("README.md is there");
    let steps = steps(&readme);
    assert!(steps.len() > 3, "the README shows how to start and use the store: {} commands", steps.len());
    let scene = Scene::new();
    for step in &steps {
        scene.run(step);
    }
}

#[test]
fn readme_is_short_and_its_links_lead_somewhere() {
    let readme = fs::read_to_string(binaries::workspace().join("README.md")).expect("README.md is there");
    assert!(readme.lines().count() < 200, "{} lines", readme.lines().count());
    let missing: BTreeSet<&str> = links(&readme)
        .filter(|link| !link.contains("://") && !link.starts_with('#'))
        .filter(|link| !binaries::workspace().join(link.split('#').next().unwrap_or_default()).exists())
        .collect();
    assert!(missing.is_empty(), "links to what is not there: {missing:?}");
}

fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// A command and, when it is shown, its output.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    command: String,
    output: Option<Vec<String>>,
}

struct Block<'a> {
    language: &'a str,
    lines: Vec<&'a str>,
    run: bool,
    follows_directly: bool,
}

fn steps(readme: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut shell_before = false;
    for block in blocks(readme) {
        match block.language {
            "sh" if block.run => {
                let command = block.lines.join("\n");
                steps.push(Step { command, output: None });
            }
            "text" if shell_before && block.follows_directly => {
                let last = steps.last_mut().expect("a shell block came before");
                last.output = Some(owned(&block.lines));
            }
            "console" if block.run => steps.extend(console_steps(&block.lines)),
            _ => {}
        }
        shell_before = block.language == "sh" && block.run;
    }
    steps
}

fn owned(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| (*line).to_owned()).collect()
}

fn console_steps(lines: &[&str]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in lines {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => steps.push(Step { command: command.to_owned(), output: None }),
            (None, Some(step)) if step.command.ends_with('\\') => {
                step.command.push('\n');
                step.command.push_str(line);
            }
            (None, Some(step)) => step.output.get_or_insert_default().push((*line).to_owned()),
            (None, None) => panic!("a console block begins with a command: {line}"),
        }
    }
    steps
}

fn blocks(readme: &str) -> Vec<Block<'_>> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let (mut inside, mut before, mut gap) = (false, "", true);
    for line in readme.lines() {
        match (inside, line.strip_prefix("```")) {
            (false, Some(language)) => {
                let run = !before.starts_with("<!-- not run:");
                blocks.push(Block { language, lines: Vec::new(), run, follows_directly: !gap });
                inside = true;
            }
            (true, Some(_)) => (inside, gap) = (false, false),
            (true, None) => blocks.last_mut().expect("inside of a block").lines.push(line),
            (false, None) if !line.trim().is_empty() => (before, gap) = (line, true),
            (false, None) => {}
        }
    }
    assert!(!inside, "a block does not end");
    blocks
}

/// A directory that looks like the workspace, built, and an environment for an instance of its own.
struct Scene {
    place: Place,
    directory: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let place = Place::new();
        let directory = place.directory().join("w");
        fs::create_dir_all(directory.join("target")).expect("made");
        for entry in fs::read_dir(binaries::workspace()).expect("the workspace").flatten() {
            if entry.file_name() != "target" {
                symlink(entry.path(), directory.join(entry.file_name())).expect("linked");
            }
        }
        symlink(binaries::directory(), directory.join("target/release")).expect("linked");
        let programs = place.directory().join("bin");
        fs::create_dir(&programs).expect("made");
        fs::write(programs.join("cargo"), "#!/bin/sh\n").expect("written");
        fs::set_permissions(programs.join("cargo"), fs::Permissions::from_mode(0o755)).expect("mode");
        Self { place, directory }
    }

    fn command(&self, command: &str) -> Command {
        let mut shell = Command::new("bash");
        let programs = self.place.directory().join("bin").display().to_string();
        let path = std::env::var("PATH").unwrap_or_default();
        shell
            .args(["-euo", "pipefail", "-c", &command.replace("9999", &self.port())])
            .current_dir(&self.directory)
            .env("PATH", format!("{programs}:{path}"))
            .env("HOME", self.place.directory())
            .env("XDG_RUNTIME_DIR", self.place.directory())
            .env("XDG_STATE_HOME", self.place.directory())
            .env("LD_LIBRARY_PATH", binaries::directory())
            .env("KVS_NAME", self.place.name())
            .env("KVS_CONSOLE", "off")
            .env("KVS_LOG", "warn")
            .env(MARK, self.place.name())
            .stdin(Stdio::null());
        shell
    }

    /// The port of the running instance, from its ready line.
    fn port(&self) -> String {
        let ready = fs::read_to_string(self.server_output()).unwrap_or_default();
        let (_, rest) = ready.split_once("tcp=127.0.0.1:").unwrap_or(("", "9999"));
        rest.chars().take_while(char::is_ascii_digit).collect()
    }

    fn server_output(&self) -> PathBuf {
        self.place.directory().join("server")
    }

    fn run(&self, step: &Step) {
        let output = if starts_server(&step.command) { self.start(step) } else { self.finish(step) };
        if let Some(expected) = &step.output {
            let expected: Vec<String> = expected.iter().map(|line| self.comparable(line)).collect();
            let found: Vec<String> = output.lines().map(|line| self.comparable(line)).collect();
            assert!(
                agree(&expected, &found),
                "{}\nshown:\n{}\nfound:\n{output}",
                step.command,
                expected.join("\n")
            );
        }
    }

    /// Runs a command to its end and returns what it printed, both streams as a reader would see them.
    fn finish(&self, step: &Step) -> String {
        let together = format!("{{ {}\n}} 2>&1", step.command);
        let run = self.command(&together).output().expect("bash is there");
        let output = String::from_utf8_lossy(&run.stdout).into_owned();
        assert!(run.status.success(), "{}\nended with {}\n{output}", step.command, run.status);
        output
    }

    /// Starts a server and returns its first line.
    fn start(&self, step: &Step) -> String {
        let path = self.server_output();
        let file = fs::File::create(&path).expect("made");
        // Runs until the place is dropped, which kills it by its mark.
        let mut server = self.command(&step.command).stdout(file).spawn().expect("bash is there");
        std::thread::spawn(move || server.wait());
        eventually_some("the server prints its line", SOON, || {
            fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n'))
        })
    }

    fn comparable(&self, line: &str) -> String {
        let line = line.replace(self.place.name(), "kvs");
        line.split_whitespace().map(comparable_word).collect::<Vec<_>>().join(" ")
    }
}

fn starts_server(command: &str) -> bool {
    let program = Path::new(command.rsplit("&&").next().unwrap_or_default().trim());
    let first = program.to_str().and_then(|text| text.split(' ').next()).unwrap_or_default();
    first.ends_with("kvs-front") && !command.contains("--help")
}

/// Numbers become 0, absolute paths become a slash.
fn comparable_word(word: &str) -> String {
    let (name, value) = word.split_once('=').map_or(("", word), |(name, value)| (name, value));
    let value = if value.starts_with('/') { "/" } else { value };
    let (mut text, mut digits) = (format!("{name} "), false);
    for character in value.chars() {
        let digit = character.is_ascii_digit() || (digits && matches!(character, ',' | '.'));
        if !digit {
            text.push(character);
        } else if !digits {
            text.push('0');
        }
        digits = digit;
    }
    text
}

/// Whether the lines agree, where `…` stands for any number of lines.
fn agree(expected: &[String], found: &[String]) -> bool {
    match (expected.split_first(), found.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first.trim() == "…" => {
            (0..=found.len()).any(|skipped| agree(rest, &found[skipped..]))
        }
        (Some((first, rest)), Some((found_first, found_rest))) => {
            first == found_first && agree(rest, found_rest)
        }
        _ => false,
    }
}

#[test]
fn readme_convention_on_a_sample_is_understood() {
    let sample = "```sh\na\n```\n\n```text\nout\n```\ntext\n```console\n$ b \\\n  c\n1 x\n$ d\n```\n\
                  <!-- not run: needs root -->\n```sh\ne\n```\n";
    let step = |command: &str, output: Option<&str>| Step {
        command: command.into(),
        output: output.map(|line| vec![line.into()]),
    };
    assert_eq!(steps(sample), [step("a", Some("out")), step("b \\\n  c", Some("1 x")), step("d", None)]);
    let lines = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>();
    assert!(agree(&lines("a|…|d"), &lines("a|b|c|d")) && !agree(&lines("a|…"), &lines("b")));
    assert_eq!(comparable_word("took=1,234.5_us"), comparable_word("took=7_us"));
    assert_ne!(comparable_word("entries=1"), comparable_word("connections=1"));
    assert!(starts_server("cargo build --release && ./target/release/kvs-front --name x"));
    assert!(!starts_server("kvs-front --help"));
}
