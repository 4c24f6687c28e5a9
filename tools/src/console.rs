//! `console`: the operator's commands, one from the command line or many from standard input.

use std::io::{BufRead as _, IsTerminal as _, Read as _};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::operator::Operator;
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// What a person is asked with.
const PROMPT: &str = "kvs> ";
/// Longest line that is read, in bytes; no command is nearly as long.
const LINE_BYTES_MAX: u64 = 4096;
/// Ends the console, not the store.
const EXIT: &str = "exit";
/// What `help` says about it.
const EXIT_HELP: &str = "exit            leaves this console; the store goes on\n";

/// Does one command, or all that standard input has.
pub fn run(target: &Target, format: Format, command: &[String]) -> anyhow::Result<Outcome> {
    let mut console = Console { operator: Some(Operator::connect(target)?), target };
    if !command.is_empty() {
        let command = command.join(" ");
        let text = console.must(&command)?;
        match format {
            Format::Text => output::print(text.as_bytes())?,
            Format::Json => output::print_json(&as_json(&command, &text))?,
        }
        return Ok(Outcome::Done);
    }
    if std::io::stdin().is_terminal() && format == Format::Text {
        console.converse()?;
    } else {
        console.read_all(format)?;
    }
    Ok(Outcome::Done)
}

fn as_json(command: &str, text: &str) -> Value {
    json!({"command": command, "output": text})
}

struct Console<'t> {
    /// None after the store was told to quit.
    operator: Option<Operator>,
    target: &'t Target,
}

impl Console<'_> {
    /// Does a command: what it says, or as an error what the store refuses with.
    fn obey(&mut self, command: &str) -> anyhow::Result<Result<String, String>> {
        let Some(operator) = &mut self.operator else { bail!("{} has ended", self.target) };
        if command == "quit" {
            if let Some(operator) = self.operator.take() {
                operator.quit()?;
            }
            return Ok(Ok(format!("{} has ended; its segment stays\n", self.target)));
        }
        let reply = operator.ask(command)?;
        Ok(if reply.done { Ok(reply.text) } else { Err(reply.text) })
    }

    /// Does a command that has to succeed.
    fn must(&mut self, command: &str) -> anyhow::Result<String> {
        match self.obey(command)? {
            Ok(text) => Ok(text),
            Err(text) => bail!("{}", text.trim_end()),
        }
    }

    /// Talks with a person: errors are told, and the next command is awaited.
    fn converse(&mut self) -> anyhow::Result<()> {
        while self.operator.is_some() {
            eprint(PROMPT);
            let Some(line) = read_line()? else {
                eprint("\n");
                break;
            };
            match line.as_str() {
                "" => {}
                EXIT => break,
                command => match self.obey(command)? {
                    Ok(text) => output::print(text.as_bytes())?,
                    Err(text) => eprint(&text),
                },
            }
            if line == "help" {
                output::print(EXIT_HELP.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Does what a script says; the first error ends it.
    fn read_all(&mut self, format: Format) -> anyhow::Result<()> {
        let mut all = Vec::new();
        while let Some(command) = read_line()?.filter(|line| line != EXIT) {
            if command.is_empty() {
                continue;
            }
            let text = self.must(&command)?;
            match format {
                Format::Text => output::print(text.as_bytes())?,
                Format::Json => all.push(as_json(&command, &text)),
            }
        }
        match format {
            Format::Text => Ok(()),
            Format::Json => output::print_json(&all.into()),
        }
    }
}

fn eprint(text: &str) {
    // Nobody may be left to read it.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
}

/// The next line without its end; None at the end of input.
fn read_line() -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let mut input = std::io::stdin().lock().take(LINE_BYTES_MAX);
    input.read_until(b'\n', &mut line).context("can't read standard input")?;
    if line.len() as u64 == LINE_BYTES_MAX {
        bail!("a line of standard input has {LINE_BYTES_MAX} bytes or more; no command is that long");
    }
    Ok(if line.is_empty() { None } else { Some(String::from_utf8_lossy(&line).trim().to_owned()) })
}
