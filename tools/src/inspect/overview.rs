//! The whole segment at a glance.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use kvs_core::arena::extents::block_bytes;
use kvs_core::control::Transport;
use kvs_core::inspect::memory::{self, MemoryFigures};
use kvs_core::inspect::shards::{self, ShardFigures};
use kvs_core::inspect::slots::{self, ConnectionFigures, SessionFigures, WorkerFigures};
use kvs_core::inspect::{self, HeaderFacts};
use kvs_core::segment::SegmentView;
use kvs_core::sys::memory::Damaged;
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::transaction::Recovered;
use serde_json::{Value, json};

use super::shard;
use crate::columns::Columns;
use crate::figures::{counted, duration, grouped, percent, rounded};
use crate::output::for_people;

/// Connections that are listed one by one in text.
const CONNECTIONS_SHOWN_MAX: usize = 20;

/// All that is shown.
pub struct Overview {
    header: HeaderFacts,
    memory: MemoryFigures,
    shards: Vec<Result<ShardFigures, Damaged>>,
    workers: Vec<WorkerFigures>,
    connections: Vec<ConnectionFigures>,
    sessions: SessionFigures,
}

impl Overview {
    /// Looks at all of it.
    pub fn of(view: &SegmentView) -> Result<Self, Damaged> {
        Ok(Self {
            header: inspect::header(view)?,
            memory: memory::figures(view)?,
            shards: (0..view.regions().shard_count).map(|index| shards::figures(view, index)).collect(),
            workers: slots::workers(view)?,
            connections: slots::connections(view)?,
            sessions: slots::sessions(view)?,
        })
    }

    fn sound_shards(&self) -> impl Iterator<Item = &ShardFigures> {
        self.shards.iter().flatten()
    }

    fn entries(&self) -> u64 {
        self.sound_shards().fold(0, |sum, shard| sum.saturating_add(shard.entries))
    }

    fn content_bytes(&self) -> u64 {
        self.sound_shards().fold(0, |sum, shard| sum.saturating_add(shard.content_bytes))
    }

    fn intents(&self) -> usize {
        self.workers.iter().filter(|worker| worker.intent != Recovered::Nothing).count()
    }

    /// For people.
    pub fn text(&self, path: &Path) -> String {
        [
            self.header_text(path),
            self.memory_text(),
            shard::classes_table(&self.memory.classes),
            self.shards_text(),
            self.workers_text(),
            self.connections_text(),
        ]
        .join("\n")
    }

    fn header_text(&self, path: &Path) -> String {
        let header = &self.header;
        let mut rows = Columns::list();
        let entries = counted(self.entries(), "entry", "entries");
        rows.named("contents", format!("{entries}, {} of keys and values", rounded(self.content_bytes())));
        rows.named("made", format!("{} ago, layout {}", age(header.created_ns), header.layout_version));
        let restarts = |count| format!(", {} after a death", counted(count, "restart", "restarts"));
        for (name, process, count) in [
            ("data server", &header.data_process, header.data_restarts),
            ("front server", &header.front_process, header.front_restarts),
        ] {
            rows.named(name, process_text(process.as_ref(), header.clean) + &restarts(count));
        }
        rows.named(
            "addresses",
            format!(
                "{}, {}",
                for_people(header.tcp_address.as_bytes()),
                for_people(header.unix_path.as_bytes())
            ),
        );
        rows.named("largest value", rounded(header.value_bytes_max));
        let waiting = rounded(header.backup_waiting_bytes);
        let file = match (header.backup_generation, header.backup_bytes) {
            (_, 0) => "none to go on with; the next start writes one".into(),
            (generation, bytes) => format!("file {generation} of its line, {} written", rounded(bytes)),
        };
        rows.named("backup", format!("{file}, {waiting} on the way"));
        let SessionFigures { connected, resting, .. } = self.sessions;
        rows.named(
            "sessions",
            format!("{} of connected clients, {} of others", grouped(connected), grouped(resting)),
        );
        format!("{}\n{}", path.display(), rows.lines())
    }

    fn memory_text(&self) -> String {
        let memory = &self.memory;
        let mut table = Columns::new(["Memory", "", "of what is taken"]);
        let mut row = |name: &str, bytes: u64| {
            table.row([name.into(), rounded(bytes), percent(bytes, memory.reserved_bytes)]);
        };
        row("header, shards, slots, rings", memory.fixed_bytes);
        row("buckets", memory.bucket_bytes);
        row("slabs of entries", memory.slab_bytes);
        row("large values and buffers", memory.block_bytes);
        row("free", memory.free_bytes);
        row("taken from the kernel", memory.reserved_bytes);
        table.row([
            "capacity".into(),
            rounded(self.header.capacity_bytes),
            format!("{} taken", percent(memory.reserved_bytes, self.header.capacity_bytes)),
        ]);
        let free: Vec<String> = (0..)
            .zip(memory.free_blocks)
            .filter(|(_, count)| *count > 0)
            .map(|(order, count)| format!("{} × {}", grouped(count), rounded(block_bytes(order))))
            .collect();
        let free = if free.is_empty() { "none".into() } else { free.join(", ") };
        format!("{}  free blocks: {free}\n", table.lines())
    }

    fn shards_text(&self) -> String {
        let mut table = Columns::new(["Shards", "least", "median", "most"]);
        let mut row = |name: &str, figure: &dyn Fn(&ShardFigures) -> f64, shown: &dyn Fn(f64) -> String| {
            let mut figures: Vec<f64> = self.sound_shards().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            if let (Some(least), Some(most)) = (figures.first(), figures.last()) {
                let median = figures[figures.len() / 2];
                table.row([name.into(), shown(*least), shown(median), shown(*most)]);
            }
        };
        row("entries", &|shard| shard.entries as f64, &|count| grouped(count as u64));
        row("fill", &ShardFigures::fill_percent, &|fill| format!("{fill:.1} %"));
        row("longest probe, in buckets", &|shard| shard.longest_probe() as f64, &|count| {
            grouped(count as u64)
        });
        row("memory of buckets", &|shard| shard.bucket_bytes as f64, &|bytes| rounded(bytes as u64));
        let growing = self.sound_shards().filter(|shard| shard.growing_percent.is_some()).count();
        let aside: Vec<String> = self
            .shards
            .iter()
            .enumerate()
            .filter(|(_, shard)| shard.as_ref().map_or(true, |shard| shard.quarantined))
            .map(|(index, _)| index.to_string())
            .collect();
        let mut text = format!("{}  {} shards, {growing} growing\n", table.lines(), self.shards.len());
        if !aside.is_empty() {
            text.push_str(&format!(
                "  damaged and set aside: {}; `kvs-tools check` tells more\n",
                aside.join(", ")
            ));
        }
        text
    }

    fn workers_text(&self) -> String {
        let mut table =
            Columns::new(["Worker", "gets", "sets", "deletes", "incrs", "lists", "to be freed", "intent"]);
        for worker in &self.workers {
            let [get, set, delete, increment, list] = worker.requests.map(|(_, count)| grouped(count));
            let intent = intent_text(&worker.intent);
            let freed = grouped(worker.garbage);
            table.row([worker.index.to_string(), get, set, delete, increment, list, freed, intent]);
        }
        format!(
            "{}  {}\n",
            table.lines(),
            counted(self.intents() as u64, "pending intent", "pending intents")
        )
    }

    fn connections_text(&self) -> String {
        let total = counted(self.connections.len() as u64, "connection", "connections");
        if self.connections.is_empty() {
            return format!("{total}\n");
        }
        let mut table = Columns::new([
            "Connection",
            "from",
            "name",
            "pid",
            "received",
            "sent",
            "waiting in",
            "waiting out",
            "",
        ]);
        for connection in self.connections.iter().take(CONNECTIONS_SHOWN_MAX) {
            table.row([
                connection.slot.to_string(),
                transport(connection.transport).into(),
                for_people(connection.name.as_bytes()),
                connection.pid.to_string(),
                rounded(connection.received),
                rounded(connection.sent),
                rounded(connection.input_waiting),
                rounded(connection.output_waiting),
                connection.phase.into(),
            ]);
        }
        let untold = self.connections.len().saturating_sub(CONNECTIONS_SHOWN_MAX);
        let more = if untold > 0 { format!(", {} not shown", grouped(untold as u64)) } else { String::new() };
        format!("{}  {total}{more}\n", table.lines())
    }

    /// As JSON.
    pub fn object(&self, path: &Path) -> Value {
        let (header, memory) = (&self.header, &self.memory);
        let process = |process: &Option<ProcessIdentity>| {
            process.as_ref().map(|process| json!({"pid": process.pid, "alive": process.is_alive()}))
        };
        json!({
            "segment": path.to_string_lossy(),
            "layout_version": header.layout_version,
            "capacity_bytes": header.capacity_bytes,
            "created_ns": header.created_ns,
            "clean": header.clean,
            "data_server": process(&header.data_process),
            "front_server": process(&header.front_process),
            "data_restarts": header.data_restarts,
            "front_restarts": header.front_restarts,
            "value_bytes_max": header.value_bytes_max,
            "backup_generation": header.backup_generation,
            "backup_bytes": header.backup_bytes,
            "backup_waiting_bytes": header.backup_waiting_bytes,
            "tcp_address": header.tcp_address,
            "unix_path": header.unix_path,
            "entries": self.entries(),
            "content_bytes": self.content_bytes(),
            "pending_intents": self.intents(),
            "memory": {
                "reserved_bytes": memory.reserved_bytes,
                "fixed_bytes": memory.fixed_bytes,
                "bucket_bytes": memory.bucket_bytes,
                "extent_bytes": memory.extent_bytes,
                "slab_bytes": memory.slab_bytes,
                "block_bytes": memory.block_bytes,
                "free_bytes": memory.free_bytes,
                "free_blocks": memory.free_blocks,
                "classes": shard::classes_object(&memory.classes),
            },
            "shards": self.shards.iter().map(|shard| shard.as_ref().map_or(Value::Null, shard::object)).collect::<Value>(),
            "workers": self.workers.iter().map(worker_object).collect::<Value>(),
            "sessions": {
                "connected": self.sessions.connected,
                "resting": self.sessions.resting,
                "reserved": self.sessions.reserved,
            },
            "connections": self.connections.iter().map(connection_object).collect::<Value>(),
        })
    }
}

fn worker_object(worker: &WorkerFigures) -> Value {
    let mut object = json!({
        "worker": worker.index,
        "intent": intent_text(&worker.intent),
        "garbage": worker.garbage,
    });
    for (name, count) in worker.requests {
        object[name] = count.into();
    }
    object
}

fn connection_object(connection: &ConnectionFigures) -> Value {
    json!({
        "slot": connection.slot,
        "connection": connection.id,
        "transport": transport(connection.transport),
        "name": connection.name,
        "pid": connection.pid,
        "phase": connection.phase,
        "received_bytes": connection.received,
        "sent_bytes": connection.sent,
        "input_waiting_bytes": connection.input_waiting,
        "output_waiting_bytes": connection.output_waiting,
    })
}

fn intent_text(intent: &Recovered) -> String {
    match intent {
        Recovered::Nothing => "none".into(),
        Recovered::Completed(words) => counted(*words as u64, "word", "words"),
        Recovered::Damaged => "contradicts itself".into(),
    }
}

fn transport(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Unix => "unix",
    }
}

fn process_text(process: Option<&ProcessIdentity>, clean: bool) -> String {
    match process {
        None => "none yet".into(),
        Some(process) if process.is_alive() => format!("pid {}, running", process.pid),
        Some(process) if clean => format!("pid {}, ended in order", process.pid),
        Some(process) => format!("pid {}, dead", process.pid),
    }
}

fn age(created_ns: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    duration(now.as_secs().saturating_sub(created_ns / 1_000_000_000))
}
