//! The operator's commands, on the terminal and on the console socket.
//!
//! On the socket: a command is a line; the answer is `ok N` or `error N` on a line, and N bytes of text.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use kvs_core::control::{ClientInfo, StatisticOwned};
use kvs_core::instance::ByteSize;
use kvs_front::options::ConsoleMode;

use crate::Front;
use crate::supervise::Event;

/// Longest command, in bytes.
const COMMAND_BYTES_MAX: u64 = 1024;
/// Operators at a time.
const OPERATORS_MAX: usize = 16;
/// How long an operator may be silent.
const PATIENCE: Duration = Duration::from_secs(600);

const HELP: &str = "\
status          where the store listens, who serves, how full it is
stats [--json]  all counters
clients         who is connected
help            this
quit            ends both servers in order; the segment stays for an instant restart
";

/// Starts the console on the terminal, if there is to be one, and on its socket.
///
/// # Errors
/// When no thread is to be had.
pub fn start(front: &Arc<Front>) -> anyhow::Result<()> {
    let on_terminal = match front.options.console {
        ConsoleMode::On => true,
        ConsoleMode::Off => false,
        ConsoleMode::Auto => std::io::stdin().is_terminal(),
    };
    if on_terminal {
        let front = Arc::clone(front);
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || serve_terminal(&front))
            .context("can't start the console")?;
    }
    let front = Arc::clone(front);
    std::thread::Builder::new()
        .name("console-socket".into())
        .spawn(move || serve_socket(&front))
        .context("can't start the console socket")?;
    Ok(())
}

fn serve_terminal(front: &Front) {
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let (Ok(text) | Err(text)) = obey(front, line.trim());
        // Standard output belongs to the ready line; the operator reads the terminal, whichever stream it is.
        eprint!("{text}");
    }
}

fn serve_socket(front: &Arc<Front>) {
    let operators = Arc::new(AtomicUsize::new(0));
    for operator in front.listening.console.incoming() {
        let Ok(operator) = operator else { continue };
        if operators.fetch_add(1, Ordering::Relaxed) >= OPERATORS_MAX || !is_ours(&operator) {
            operators.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (front, operators) = (Arc::clone(front), Arc::clone(&operators));
        std::thread::spawn(move || {
            if let Err(error) = serve_operator(&front, &operator) {
                log::debug!("console: {error}");
            }
            operators.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn is_ours(operator: &UnixStream) -> bool {
    let own = rustix::process::geteuid();
    rustix::net::sockopt::socket_peercred(operator).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}

fn serve_operator(front: &Front, operator: &UnixStream) -> std::io::Result<()> {
    operator.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(operator);
    loop {
        let mut line = String::new();
        if std::io::Read::take(&mut reader, COMMAND_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let (word, text) = match obey(front, line.trim()) {
            Ok(text) => ("ok", text),
            Err(text) => ("error", text),
        };
        let mut writer = operator;
        writer.write_all(format!("{word} {}\n{text}", text.len()).as_bytes())?;
    }
}

/// Does what a line says; the text for the operator, whether it worked or not.
fn obey(front: &Front, line: &str) -> Result<String, String> {
    const SILENT: &str = "the data server does not answer; it may be starting, try again\n";
    match line {
        "" => Ok(String::new()),
        "help" => Ok(HELP.to_owned()),
        "status" => Ok(status(front)),
        "stats" => front.link.statistics().map(|all| table(&all)).ok_or_else(|| SILENT.to_owned()),
        "stats --json" => front.link.statistics().map(|all| json(&all)).ok_or_else(|| SILENT.to_owned()),
        "clients" => front.link.clients().map(|all| clients(&all)).ok_or_else(|| SILENT.to_owned()),
        "quit" => {
            // The supervisor listens for as long as the process runs.
            let _ = front.events.send(Event::Quit);
            Ok("ending\n".to_owned())
        }
        other => Err(format!("{other:?} is no command; `help` lists them\n")),
    }
}

fn status(front: &Front) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("name", front.options.name.to_string());
    line("tcp", front.listening.tcp_address.to_string());
    line("unix", front.listening.unix_path.display().to_string());
    line("front", format!("pid {}, up {} s", std::process::id(), front.begun.elapsed().as_secs()));
    line("connections", format!("{} of {}", front.clients.count(), front.options.max_connections));
    let Some(all) = front.link.statistics() else {
        line("data", "not serving now".to_owned());
        return text;
    };
    let number = |name: &str| {
        let found = all.iter().find(|(known, _)| known == name);
        found
            .and_then(
                |(_, value)| if let StatisticOwned::Number(number) = value { Some(*number) } else { None },
            )
            .unwrap_or(0)
    };
    line(
        "data",
        format!(
            "pid {}, up {} s, restarted {} times",
            number("data_pid"),
            number("uptime_seconds"),
            number("data_restarts")
        ),
    );
    line("entries", number("entries").to_string());
    let (taken, most) =
        (ByteSize(number("segment_bytes")).rounded(), ByteSize(number("capacity_bytes")).rounded());
    line("memory", format!("{taken} of {most}"));
    text
}

fn show(value: &StatisticOwned) -> String {
    match value {
        StatisticOwned::Number(number) => number.to_string(),
        StatisticOwned::Text(text) => text.clone(),
        StatisticOwned::Absent => "-".to_owned(),
    }
}

fn table(all: &[(String, StatisticOwned)]) -> String {
    let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    all.iter().map(|(name, value)| format!("{name:<width$}  {}\n", show(value))).collect()
}

fn json(all: &[(String, StatisticOwned)]) -> String {
    let object: serde_json::Map<String, serde_json::Value> = all
        .iter()
        .map(|(name, value)| {
            let value = match value {
                StatisticOwned::Number(number) => (*number).into(),
                StatisticOwned::Text(text) => text.clone().into(),
                StatisticOwned::Absent => serde_json::Value::Null,
            };
            (name.clone(), value)
        })
        .collect();
    format!("{}\n", serde_json::Value::Object(object))
}

fn clients(all: &[ClientInfo]) -> String {
    let mut text = format!(
        "{:>18}  {:<4}  {:>8}  {:>12}  {:>12}  NAME\n",
        "CONNECTION", "VIA", "PID", "RECEIVED", "SENT"
    );
    for client in all {
        // Names come from clients: nothing in them may move the operator's cursor.
        let name: String =
            client.name.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect();
        let (received, sent) = (ByteSize(client.received).rounded(), ByteSize(client.sent).rounded());
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:>18}  {:<4}  {:>8}  {received:>12}  {sent:>12}  {name}",
            client.connection,
            client.transport.to_string(),
            client.pid
        );
    }
    text
}
