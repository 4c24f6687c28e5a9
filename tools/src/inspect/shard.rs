//! One shard in detail.

use kvs_core::inspect::memory::ClassFigures;
use kvs_core::inspect::shards::{self, ShardFigures};
use kvs_core::segment::SegmentView;
use serde_json::{Value, json};

use crate::columns::Columns;
use crate::figures::{counted, grouped, percent, rounded};
use crate::output::{self, Format, Outcome};

/// Shows shard `index`.
pub fn show(view: &SegmentView, format: Format, index: u64) -> anyhow::Result<Outcome> {
    let shard = shards::figures(view, index)?;
    let classes = shards::classes(view, index)?;
    match format {
        Format::Text => output::print(text(&shard, &classes).as_bytes())?,
        Format::Json => {
            let mut value = object(&shard);
            value["classes"] = classes_object(&classes);
            output::print_json(&value)?;
        }
    }
    Ok(Outcome::Done)
}

fn text(shard: &ShardFigures, classes: &[ClassFigures]) -> String {
    let mut rows = Columns::list();
    rows.named("entries", format!("{}, {} of content", grouped(shard.entries), rounded(shard.content_bytes)));
    let growing = shard.growing_percent.map_or_else(String::new, |done| format!(", growing: {done} % done"));
    let buckets = format!("{} homes, {}{growing}", grouped(shard.homes), rounded(shard.bucket_bytes));
    rows.named("buckets", buckets);
    rows.named("fill", format!("{:.1} % of the slots of its homes", shard.fill_percent()));
    rows.named("longest probe", counted(shard.longest_probe(), "bucket", "buckets"));
    rows.named("next version", grouped(shard.next_version));
    if shard.quarantined {
        rows.named("set aside", "it was found damaged; `kvs-tools check` tells more".into());
    }
    let mut slots = Columns::new(["Slots in use", "buckets", ""]);
    let buckets: u64 = shard.occupancy.iter().sum();
    for (used, &count) in shard.occupancy.iter().enumerate() {
        slots.row([used.to_string(), grouped(count), percent(count, buckets)]);
    }
    format!("Shard {}\n{}\n{}\n{}", shard.index, rows.lines(), slots.lines(), classes_table(classes))
}

/// Size classes, aligned.
pub fn classes_table(classes: &[ClassFigures]) -> String {
    let mut table = Columns::new(["Size class", "slabs", "memory", "blocks used", "free", "used"]);
    for class in classes {
        let memory = class.slabs.saturating_mul(kvs_core::arena::slab::SLAB_BYTES);
        table.row([
            format!("{} B", class.block_bytes),
            grouped(class.slabs),
            rounded(memory),
            grouped(class.used),
            grouped(class.free),
            percent(class.used, class.used.saturating_add(class.free)),
        ]);
    }
    table.lines()
}

/// Size classes as JSON.
pub fn classes_object(classes: &[ClassFigures]) -> Value {
    let object = |class: &ClassFigures| json!({"block_bytes": class.block_bytes, "slabs": class.slabs, "used": class.used, "free": class.free});
    classes.iter().map(object).collect()
}

/// A shard as JSON.
pub fn object(shard: &ShardFigures) -> Value {
    json!({
        "shard": shard.index,
        "entries": shard.entries,
        "content_bytes": shard.content_bytes,
        "homes": shard.homes,
        "growing_percent": shard.growing_percent,
        "bucket_bytes": shard.bucket_bytes,
        "fill_percent": shard.fill_percent(),
        "longest_probe": shard.longest_probe(),
        "occupancy": shard.occupancy,
        "next_version": shard.next_version,
        "quarantined": shard.quarantined,
    })
}
