//! The promise: `report/data-structure.md` says where everything in the segment is. A change of the layout that is not a change of
//! the page fails here; with it goes a new layout version.
//!
//! Method: every field's offset, as the compiler has it, must stand in the page's table of that structure.

use std::fs;
use std::mem::offset_of;

use kvs_core::segment::layout::{
    BUCKET_BYTES, BUCKET_SLOTS, BackupMark, ConnectionSlot, EXTENT_BYTES, Extent, Header, LAYOUT_VERSION,
    LOG_WORDS, LogEntry, MAGIC, REACH_MAX, RingPlace, SIZE_CLASSES, SessionHead, SessionResult,
    SessionWindow, Shard, WorkerSlot,
};
use kvs_harness::binaries;

macro_rules! fields {
    ($structure:ident: $($field:ident)*) => {
        (stringify!($structure), size_of::<$structure>(), vec![$((stringify!($field), offset_of!($structure, $field))),*])
    };
}

#[test]
fn layout_page_has_every_field_where_it_is() {
    let page = fs::read_to_string(binaries::workspace().join("report/data-structure.md")).expect("the page");
    let structures = [
        fields!(Header: magic layout_version layout_hash capacity_bytes shard_count boot_id backup_id hash_seed
            identity_checksum clean data_process front_process data_restarts front_restarts created_ns value_bytes_max
            connection_slots_reserved extents_reserved reserved_bytes arena_lock tcp_address unix_path
            worker_slots_reserved backup_rings_reserved loading backup backup_next data_heartbeat front_heartbeat
            standby_process standby_stands sessions_reserved spare),
        fields!(BackupMark: generation position sequence chain),
        fields!(Shard: lock geometry reserved_bytes quarantined reserved next_version entries content_bytes
            reserved_counters partial slabs spare),
        fields!(WorkerSlot: unix_sent unix_sent_from serving intent garbage counters ring_head ring_tail turn loading
            wave reserved log tail),
        fields!(RingPlace: block base),
        fields!(ConnectionSlot: state id committed received sent input output assembly outgoing outgoing_start
            discard_until client client_name assembly_end assembly_request assembly_key_bytes input_ended
            uncertain peek_base session direct_until spare),
        fields!(SessionHead: state token owner attempt since_ms spare),
        fields!(SessionWindow: results),
        fields!(SessionResult: outcome value),
    ];
    let mut missing = Vec::new();
    for (structure, size, fields) in structures {
        let title = format!("### `{structure}`, {size} B");
        let table = page.split(&title).nth(1).and_then(|rest| rest.split("\n#").next());
        let Some(table) = table else {
            missing.push(title);
            continue;
        };
        let rows = fields.iter().map(|(field, offset)| format!("| {offset} | `{field}` |"));
        missing.extend(rows.filter(|row| !table.contains(row)).map(|row| format!("{title}: {row}")));
    }
    assert!(missing.is_empty(), "report/data-structure.md lacks:\n{}", missing.join("\n"));
}

#[test]
fn layout_page_has_the_sizes() {
    let page = fs::read_to_string(binaries::workspace().join("report/data-structure.md")).expect("the page");
    let facts = [
        format!("layout version {LAYOUT_VERSION}"),
        format!("`{}`", String::from_utf8_lossy(&MAGIC.to_le_bytes()).replace('\0', "\\0")),
        format!("bucket, {BUCKET_BYTES} B"),
        format!("(48)   × {BUCKET_SLOTS}"),
        format!("extent, {} MiB", EXTENT_BYTES >> 20),
        format!("one of {SIZE_CLASSES} sizes"),
        format!("of {REACH_MAX} there may be"),
        format!("{LOG_WORDS} (offset, value) pairs"),
        format!("{} B each", size_of::<LogEntry>()),
        format!("{} B an extent", size_of::<Extent>()),
    ];
    let missing: Vec<&String> = facts.iter().filter(|fact| !page.contains(*fact)).collect();
    assert!(missing.is_empty(), "report/data-structure.md lacks: {missing:?}");
}
