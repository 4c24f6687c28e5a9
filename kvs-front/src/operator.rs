//! What the operator's commands do, and how the answers look.
//!
//! Names of clients come from clients: nothing in them may move the operator's cursor.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use kvs_core::control::{ClientInfo, StatisticOwned};
use kvs_core::instance::ByteSize;
use rustix::process::Signal;

use crate::clients::Number;
use crate::front::{Event, Front};
use crate::upgrade::{self, Fit};

const HELP: &str = "\
status          where the store listens, who serves it, how full it is
stats [--json]  all counters
clients         who is connected
help            this
restart front   exchanges the front server for the program on disk; clients notice nothing
restart data    exchanges the data server for the program on disk
quit            ends both servers in order; the segment stays for an instant restart
";

/// How long the supervisor may take to exchange the data server; it gives up before.
const EXCHANGE_PATIENCE: Duration = Duration::from_secs(25);

const SILENT: &str = "the data server does not answer; it may be starting, try again in a moment\n";

/// Words that other programs use for a command of this one.
const OTHER_WORDS: [(&str, &str); 9] = [
    ("exit", "quit"),
    ("stop", "quit"),
    ("shutdown", "quit"),
    ("end", "quit"),
    ("q", "quit"),
    ("info", "status"),
    ("stat", "stats"),
    ("list", "clients"),
    ("?", "help"),
];

/// The answer to a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether the command was done.
    pub done: bool,
    /// What the operator is told.
    pub text: String,
    /// What is done once the operator was told.
    pub then: Then,
}

/// What is still to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Nothing,
    /// The store ends.
    Quit,
    /// This process ends as if it was killed: the data server launches the next.
    EndFront,
    /// Both servers are exchanged at once, and the next ones attach to the segment.
    ExchangeBoth,
    /// Both servers are exchanged at once, and the next ones load the backup file.
    Reload,
}

impl Then {
    /// Does it.
    pub fn act(self, front: &Front) {
        let event = match self {
            Self::Nothing => return,
            Self::EndFront => {
                // As the world may do at any moment, only that the operator has been told.
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
                return;
            }
            Self::Quit => Event::Quit,
            Self::ExchangeBoth => Event::Reload { attach: true },
            Self::Reload => Event::Reload { attach: false },
        };
        // The supervisor listens for as long as it runs.
        let _ = front.events.send(event);
    }
}

/// Does what a line says, but for what the operator has to be told before.
pub fn obey(front: &Front, line: &str) -> Answer {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut then = Then::Nothing;
    let text = match words[..] {
        [] => Ok(String::new()),
        ["help"] => Ok(HELP.to_owned()),
        ["status"] => Ok(status(front)),
        ["stats"] => statistics(front).map(|all| table(&all)),
        ["stats", "--json"] => statistics(front).map(|all| json(&all)),
        ["clients"] => clients(front),
        ["restart", "front"] => restart_front(front, &mut then),
        ["restart", "data"] => restart_data(front, &mut then),
        ["quit"] => {
            then = Then::Quit;
            Ok("ending\n".to_owned())
        }
        _ => Err(unknown(line, &words)),
    };
    match text {
        Ok(text) => Answer { done: true, text, then },
        Err(text) => Answer { done: false, text, then: Then::Nothing },
    }
}

/// Only if the next front server can be launched, and there is a data server to do so.
fn restart_front(front: &Front, then: &mut Then) -> Result<String, String> {
    let tried = upgrade::try_front().map_err(refused)?;
    if tried.fit != Fit::Whole {
        return Err(format!("{}; `restart data` exchanges both at once\n", tried.words));
    }
    front.link.statistics().ok_or_else(|| SILENT.to_owned())?;
    log::info!("front server {} gives way to {}", std::process::id(), tried.path.display());
    *then = Then::EndFront;
    Ok(format!("front server {} gives way to {}\n", std::process::id(), tried.words))
}

/// Only if the next data server can be launched.
fn restart_data(front: &Front, then: &mut Then) -> Result<String, String> {
    let tried = upgrade::try_data(&front.options.name.to_string()).map_err(refused)?;
    let all = front.link.statistics().ok_or_else(|| SILENT.to_owned())?;
    let pid = Numbers(&all).get("data_pid");
    log::info!("data server {pid} gives way to {}", tried.path.display());
    if tried.fit == Fit::Whole {
        let next = exchange_data(front)?;
        return Ok(format!("data server {pid} gives way to {next}: {}\n", tried.words));
    }
    upgrade::try_front().map_err(refused)?;
    if tried.fit == Fit::OtherControl {
        *then = Then::ExchangeBoth;
        return Ok(format!("{}: the store ends in order and starts again; connections end\n", tried.words));
    }
    // Another layout: what is not in the backup file would be lost.
    if let Some((_, StatisticOwned::Text(error))) = all.iter().find(|(name, _)| name == "backup_error") {
        return Err(format!("{}, and the backup file is not complete: {error}\n", tried.words));
    }
    *then = Then::Reload;
    Ok(format!(
        "{}: the store ends in order, starts again and loads its backup file; connections end\n",
        tried.words
    ))
}

/// Has the supervisor exchange the data server; the process id of the one that takes over, which is ready to do so.
fn exchange_data(front: &Front) -> Result<u32, String> {
    let (reply, answer) = bounded(1);
    // The supervisor listens for as long as it runs.
    let _ = front.events.send(Event::RestartData(reply));
    match answer.recv_timeout(EXCHANGE_PATIENCE) {
        Ok(exchanged) => exchanged.map_err(|why| format!("{why}; the server that runs serves on\n")),
        Err(RecvTimeoutError::Disconnected) => {
            Err("the data server died meanwhile, or the store ends; look at the log\n".to_owned())
        }
        Err(RecvTimeoutError::Timeout) => Err("the store is busy; look at the log\n".to_owned()),
    }
}

fn refused(error: anyhow::Error) -> String {
    format!("{error:#}; the server that runs serves on\n")
}

fn unknown(line: &str, words: &[&str]) -> String {
    let first = words.first().copied().unwrap_or_default().to_lowercase();
    let commands = ["status", "stats", "clients", "restart", "help", "quit"];
    let meant = commands
        .into_iter()
        .find(|command| *command == first)
        .or_else(|| OTHER_WORDS.into_iter().find(|(other, _)| *other == first).map(|(_, meant)| meant))
        .or_else(|| commands.into_iter().find(|command| command.starts_with(&first)));
    match meant {
        Some("restart") => "what is to be restarted? `restart front` or `restart data`\n".to_owned(),
        Some(meant) => format!("{line:?} is no command; did you mean `{meant}`? `help` lists all\n"),
        None => format!("{line:?} is no command; `help` lists all\n"),
    }
}

/// The counters of both servers.
fn statistics(front: &Front) -> Result<Vec<(String, StatisticOwned)>, String> {
    let mut all = front.link.statistics().ok_or_else(|| SILENT.to_owned())?;
    let count = front.clients.count();
    let own = [
        ("connections_max", u64::from(front.limit.most)),
        ("connections_waiting", count.waiting as u64),
        ("connections_accepted", count.ever),
        ("connections_refused", front.refused.load(Ordering::Relaxed)),
    ];
    all.extend(own.map(|(name, value)| (name.to_owned(), StatisticOwned::Number(value))));
    Ok(all)
}

/// Aligned lines of a name and what belongs to it.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        // Writing to a String can't fail.
        let _ = writeln!(self.0, "{name:<14}{value}");
    }
}

fn status(front: &Front) -> String {
    let mut page = Page::default();
    let count = front.clients.count();
    page.line("kvs", &front.options.name);
    page.line("tcp", front.tcp_address);
    page.line("unix", front.unix_path.display());
    page.line("segment", front.options.name.segment_path().display());
    let data = front.link.statistics();
    let front_restarts = data.as_ref().map_or(0, |all| Numbers(all).get("front_restarts"));
    page.line(
        "front server",
        format_args!(
            "pid {}, up {}{}",
            std::process::id(),
            for_people(front.begun.elapsed()),
            relaunched(front_restarts)
        ),
    );
    match &data {
        Some(all) => page.line("data server", data_server(&Numbers(all))),
        None => page.line("data server", "not serving; the next one is starting"),
    }
    match data.as_ref().map_or(0, |all| Numbers(all).get("standby_pid")) {
        0 => page.line("standby", "none"),
        pid => page.line("standby", format_args!("pid {pid}")),
    }
    let refused = front.refused.load(Ordering::Relaxed);
    page.line(
        "connections",
        format_args!(
            "{} of {}, {} waiting; {} accepted, {} refused since the start",
            grouped(count.all as u64),
            grouped(front.limit.most.into()),
            grouped(count.waiting as u64),
            grouped(count.ever),
            grouped(refused)
        ),
    );
    if let Some(all) = &data {
        contents(&mut page, &Numbers(all));
    }
    page.0
}

/// The numbers among the counters, by name.
struct Numbers<'a>(&'a [(String, StatisticOwned)]);

impl Numbers<'_> {
    fn get(&self, name: &str) -> u64 {
        let found = self.0.iter().find(|(known, _)| known == name);
        match found {
            Some((_, StatisticOwned::Number(number))) => *number,
            _ => 0,
        }
    }
}

fn data_server(numbers: &Numbers<'_>) -> String {
    let restarts = relaunched(numbers.get("data_restarts"));
    let up = for_people(Duration::from_secs(numbers.get("uptime_seconds")));
    format!("pid {}, up {up}, {} workers{restarts}", numbers.get("data_pid"), numbers.get("workers"))
}

fn relaunched(restarts: u64) -> String {
    match restarts {
        0 => String::new(),
        1 => ", relaunched once".to_owned(),
        count => format!(", relaunched {} times", grouped(count)),
    }
}

fn contents(page: &mut Page, numbers: &Numbers<'_>) {
    let size = |name| ByteSize(numbers.get(name)).rounded();
    page.line(
        "entries",
        format_args!("{}, {} of keys and values", grouped(numbers.get("entries")), size("content_bytes")),
    );
    let percent = numbers.get("segment_bytes") as f64 * 100.0 / (numbers.get("capacity_bytes").max(1)) as f64;
    page.line(
        "memory",
        format_args!("{} of {} taken ({percent:.0}%)", size("segment_bytes"), size("capacity_bytes")),
    );
    page.line(
        "held",
        format_args!(
            "{} connection slots of {}, {} buffers ({}), {} + {} + {} descriptors",
            grouped(numbers.get("connection_slots")),
            grouped(numbers.get("connection_slots_reserved")),
            grouped(numbers.get("connection_buffers")),
            size("connection_buffer_bytes"),
            grouped(numbers.get("descriptors_front")),
            grouped(numbers.get("descriptors_data")),
            grouped(numbers.get("descriptors_standby")),
        ),
    );
    let request = |name: &str| format!("{name} {}", grouped(numbers.get(&format!("requests_{name}"))));
    page.line("requests", ["get", "set", "delete", "increment", "list"].map(request).join(", "));
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A duration in its two largest units.
fn for_people(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

fn table(all: &[(String, StatisticOwned)]) -> String {
    let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let show = |value: &StatisticOwned| match value {
        StatisticOwned::Number(number) => number.to_string(),
        StatisticOwned::Text(text) => text.clone(),
        StatisticOwned::Absent => "-".to_owned(),
    };
    all.iter().map(|(name, value)| format!("{name:<width$}  {}\n", show(value))).collect()
}

fn json(all: &[(String, StatisticOwned)]) -> String {
    let value = |value: &StatisticOwned| match value {
        StatisticOwned::Number(number) => (*number).into(),
        StatisticOwned::Text(text) => text.clone().into(),
        StatisticOwned::Absent => serde_json::Value::Null,
    };
    let object: serde_json::Map<String, serde_json::Value> =
        all.iter().map(|(name, found)| (name.clone(), value(found))).collect();
    format!("{}\n", serde_json::Value::Object(object))
}

fn clients(front: &Front) -> Result<String, String> {
    let all = front.link.clients().ok_or_else(|| SILENT.to_owned())?;
    Ok(client_table(&all, &front.clients.addresses()))
}

fn client_table(all: &[ClientInfo], addresses: &HashMap<Number, SocketAddr>) -> String {
    let mut text = format!(
        "{:>16}  {:<4}  {:<21}  {:>7}  {:>10}  {:>10}  NAME\n",
        "CONNECTION", "VIA", "FROM", "PID", "RECEIVED", "SENT"
    );
    for client in all {
        let name: String =
            client.name.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect();
        let from = addresses.get(&client.connection).map_or_else(|| "-".to_owned(), SocketAddr::to_string);
        let (received, sent) = (ByteSize(client.received).rounded(), ByteSize(client.sent).rounded());
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:>16}  {:<4}  {from:<21}  {:>7}  {received:>10}  {sent:>10}  {name}",
            client.connection,
            client.transport.to_string(),
            client.pid
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use kvs_core::control::Transport;

    use super::*;

    #[test]
    fn operator_words_of_other_programs_are_understood_as_questions() {
        assert!(unknown("exit", &["exit"]).contains("did you mean `quit`?"));
        assert!(unknown("STATUS", &["STATUS"]).contains("did you mean `status`?"));
        assert!(unknown("stats --yaml", &["stats", "--yaml"]).contains("did you mean `stats`?"));
        assert!(unknown("cli", &["cli"]).contains("did you mean `clients`?"));
        assert_eq!(unknown("make tea", &["make", "tea"]), "\"make tea\" is no command; `help` lists all\n");
        assert!(!unknown("\x1b[2J", &["\x1b[2J"]).contains('\x1b'));
    }

    #[test]
    fn operator_numbers_and_durations_are_for_people() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let shown = [7, 61, 3_600, 90_000].map(|seconds| for_people(Duration::from_secs(seconds)));
        assert_eq!(shown, ["7 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]);
    }

    #[test]
    fn operator_sees_what_clients_are_called_but_not_what_it_does_to_a_terminal() {
        let client = ClientInfo {
            connection: 7,
            transport: Transport::Tcp,
            name: "bad\x1b[2J\nname".to_owned(),
            pid: 4711,
            received: 2048,
            sent: 0,
        };
        let addresses = HashMap::from([(7, SocketAddr::from(([127, 0, 0, 1], 5555)))]);
        let table = client_table(&[client], &addresses);
        let row = table.lines().nth(1).expect("a row");
        for part in ["7", "tcp", "127.0.0.1:5555", "4711", "2.00 KiB", "bad?[2J?name"] {
            assert!(row.contains(part), "{part:?} in {row:?}");
        }
        assert_eq!(table.lines().count(), 2);
    }

    #[test]
    fn operator_counters_are_aligned_for_people_and_json_for_programs() {
        let all = [
            ("entries".to_owned(), StatisticOwned::Number(7)),
            ("standby_pid".to_owned(), StatisticOwned::Absent),
            ("name".to_owned(), StatisticOwned::Text("a \"b\"".to_owned())),
        ];
        assert_eq!(table(&all), "entries      7\nstandby_pid  -\nname         a \"b\"\n");
        let value: serde_json::Value = serde_json::from_str(&json(&all)).expect("JSON");
        assert_eq!(value["standby_pid"], serde_json::Value::Null);
        assert_eq!((&value["entries"], &value["name"]), (&7.into(), &"a \"b\"".into()));
    }
}
