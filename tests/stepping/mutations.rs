//! The mutations that are stepped through. A further one is a line in [`MUTATIONS`].

use kvs_core::arena::size_class;
use kvs_core::segment::layout::BUCKET_SLOTS;
use kvs_core::table::geometry::Geometry;

use crate::backup::Backup;
use crate::store::{Ask, Setup, text, value};
use crate::work::Work;

/// Something a client asks for, and what is in the store before.
pub struct Mutation {
    /// What it is called.
    pub name: &'static str,
    /// Fills the store.
    pub before: fn(&mut Setup) -> anyhow::Result<()>,
    /// What the client asks for, in one go.
    pub asks: fn(&Setup) -> Vec<Ask>,
    /// What is stepped through: a worker executing that, or what is done when it is.
    pub work: Work,
}

const fn worker(
    name: &'static str,
    before: fn(&mut Setup) -> anyhow::Result<()>,
    asks: fn(&Setup) -> Vec<Ask>,
) -> Mutation {
    Mutation { name, before, asks, work: Work::Requests }
}

const fn other(name: &'static str, asks: fn(&Setup) -> Vec<Ask>, work: Work) -> Mutation {
    Mutation { name, before: a_few, asks, work }
}

/// All of them.
pub const MUTATIONS: &[Mutation] = &[
    worker("insert", a_few, |_| vec![Ask::set("new", value(32))]),
    worker("insert, first of its size class", a_few, |_| vec![Ask::set("new", value(700))]),
    worker("insert if absent", a_few, |_| vec![Ask::set_if_absent("new", value(32))]),
    worker("update, same size class", a_few, |_| vec![Ask::set("hundred", value(101))]),
    worker("update to a smaller class", a_few, |_| vec![Ask::set("thousand", value(8))]),
    worker("update to a larger class", a_few, |_| vec![Ask::set("hundred", value(1000))]),
    worker("update, nothing changed", a_few, |_| vec![Ask::set_if_absent("hundred", value(9))]),
    worker("update, small to large value", a_few, |_| vec![Ask::set("hundred", value(5000))]),
    worker("update, large to small value", a_few, |_| vec![Ask::set("large", value(50))]),
    worker("update, large to large value", a_few, |_| vec![Ask::set("large", value(9100))]),
    worker("insert of a value in pieces", a_few, |_| vec![Ask::set("new", value(33_000))]),
    worker("delete", a_few, |_| vec![Ask::delete("hundred")]),
    worker("delete of a large value", a_few, |_| vec![Ask::delete("large")]),
    worker("delete that empties a slab", two_slabs, |setup| vec![Ask::delete(&setup.marked)]),
    worker("delete that shortens a reach", a_full_bucket, |setup| vec![Ask::delete(&setup.marked)]),
    worker("delete of nothing", a_few, |_| vec![Ask::delete("none")]),
    worker("increment", a_few, |_| vec![Ask::increment("number", 58)]),
    worker("increment from nothing", a_few, |_| vec![Ask::increment("none", -7)]),
    worker("three changes in one pipeline", a_few, |_| three_changes()),
    worker("read", a_few, |_| vec![Ask::get("hundred")]),
    worker("read of a large value", a_few, |_| vec![Ask::get("larger")]),
    worker("insert that reserves buckets", about_to_reserve, the_next),
    worker("insert that begins to grow", about_to_grow, the_next),
    worker("insert while growing", growing, the_next),
    other("connection begun", nothing, Work::Connect),
    other("connection ended", nothing, Work::Close),
    other("extent reserved ahead", nothing, Work::Reserve),
    other("ring drained into the backup file", |_| three_changes(), Work::Backup(Backup::Drain)),
    other("large value drained", |_| vec![Ask::set("large", value(7000))], Work::Backup(Backup::Drain)),
    other("backup file replaced by a new one", |_| three_changes(), Work::Backup(Backup::HandOver)),
];

fn nothing(_: &Setup) -> Vec<Ask> {
    Vec::new()
}

fn three_changes() -> Vec<Ask> {
    vec![Ask::set("hundred", value(102)), Ask::increment("number", 1), Ask::delete("thousand")]
}

fn a_few(setup: &mut Setup) -> anyhow::Result<()> {
    for index in 0..20 {
        setup.set(&format!("some {index}"), value(20 + index * 7))?;
    }
    setup.set("hundred", value(100))?;
    setup.set("thousand", value(1001))?;
    setup.set("large", value(6000))?;
    setup.set("larger", value(33_100))?;
    setup.set("number", text("41"))
}

/// Two slabs of one shard and class: one that was full, and one with a single block in use, of the marked key.
fn two_slabs(setup: &mut Setup) -> anyhow::Result<()> {
    a_few(setup)?;
    let class = size_class::SIZES.len() - 1;
    let blocks = size_class::blocks(class) as usize;
    let keys = setup.keys_of_shard(0, blocks + 1);
    for key in &keys {
        setup.set(key, value(4000))?;
    }
    setup.delete(&keys[0])?;
    setup.marked = keys[blocks].clone();
    Ok(())
}

/// More entries of one home than a bucket has slots; the marked key is the one in the next bucket.
fn a_full_bucket(setup: &mut Setup) -> anyhow::Result<()> {
    a_few(setup)?;
    let keys = setup.keys_of_home(1, 20, BUCKET_SLOTS + 1);
    for key in &keys {
        setup.set(key, value(10))?;
    }
    setup.marked = keys[BUCKET_SLOTS].clone();
    Ok(())
}

fn about_to_reserve(setup: &mut Setup) -> anyhow::Result<()> {
    let reserved = |setup: &Setup| setup.shard(0).map(|shard| shard.reserved_bytes.load());
    fill_until(setup, reserved)
}

fn about_to_grow(setup: &mut Setup) -> anyhow::Result<()> {
    fill_until(setup, |setup| setup.shard(0).map(|shard| shard.geometry.load()))
}

fn growing(setup: &mut Setup) -> anyhow::Result<()> {
    about_to_grow(setup)?;
    let key = setup.marked.clone();
    setup.set(&key, value(4))?;
    anyhow::ensure!(Geometry::decode(setup.shard(0)?.geometry.load()).is_some_and(Geometry::is_growing));
    setup.marked = setup.keys_of_shard(0, 1).remove(0);
    Ok(())
}

/// Puts small entries into shard 0 until the next one, whose key is marked then, would change `word`.
fn fill_until(setup: &mut Setup, word: impl Fn(&Setup) -> anyhow::Result<u64>) -> anyhow::Result<()> {
    /// More than a shard begins with; the search ends long before.
    const KEYS: usize = 2000;
    let before = word(setup)?;
    for key in setup.keys_of_shard(0, KEYS) {
        let undone = setup.try_set(&key, value(4), |setup| Ok(word(setup)? != before))?;
        if undone {
            setup.marked = key;
            return Ok(());
        }
    }
    anyhow::bail!("{KEYS} entries change nothing");
}

fn the_next(setup: &Setup) -> Vec<Ask> {
    vec![Ask::set(&setup.marked, value(4))]
}
