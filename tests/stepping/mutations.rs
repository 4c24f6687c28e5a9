//! The mutations that are stepped through. A further one is a line in [`MUTATIONS`].

use kvs_core::arena::size_class;
use kvs_core::segment::layout::BUCKET_SLOTS;
use kvs_core::table::geometry::Geometry;

use crate::store::{Ask, Setup, text, value};

/// Something a client asks for, and what is in the store before.
pub struct Mutation {
    /// What it is called.
    pub name: &'static str,
    /// Fills the store.
    pub before: fn(&mut Setup) -> anyhow::Result<()>,
    /// What the client asks for, in one go.
    pub asks: fn(&Setup) -> Vec<Ask>,
}

/// All of them.
pub const MUTATIONS: &[Mutation] = &[
    Mutation { name: "insert", before: a_few, asks: |_| vec![Ask::set("new", value(32))] },
    Mutation {
        name: "insert, first of its size class",
        before: a_few,
        asks: |_| vec![Ask::set("new", value(700))],
    },
    Mutation {
        name: "insert if absent",
        before: a_few,
        asks: |_| vec![Ask::set_if_absent("new", value(32))],
    },
    Mutation {
        name: "update, same size class",
        before: a_few,
        asks: |_| vec![Ask::set("hundred", value(101))],
    },
    Mutation {
        name: "update to a smaller class",
        before: a_few,
        asks: |_| vec![Ask::set("thousand", value(8))],
    },
    Mutation {
        name: "update to a larger class",
        before: a_few,
        asks: |_| vec![Ask::set("hundred", value(1000))],
    },
    Mutation {
        name: "update, nothing changed",
        before: a_few,
        asks: |_| vec![Ask::set_if_absent("hundred", value(9))],
    },
    Mutation {
        name: "update, small to large value",
        before: a_few,
        asks: |_| vec![Ask::set("hundred", value(5000))],
    },
    Mutation {
        name: "update, large to small value",
        before: a_few,
        asks: |_| vec![Ask::set("large", value(50))],
    },
    Mutation {
        name: "update, large to large value",
        before: a_few,
        asks: |_| vec![Ask::set("large", value(9100))],
    },
    Mutation {
        name: "insert of a value in pieces",
        before: a_few,
        asks: |_| vec![Ask::set("new", value(33_000))],
    },
    Mutation { name: "delete", before: a_few, asks: |_| vec![Ask::delete("hundred")] },
    Mutation { name: "delete of a large value", before: a_few, asks: |_| vec![Ask::delete("large")] },
    Mutation {
        name: "delete that empties a slab",
        before: two_slabs,
        asks: |setup| vec![Ask::delete(&setup.marked)],
    },
    Mutation {
        name: "delete that shortens a reach",
        before: a_full_bucket,
        asks: |setup| vec![Ask::delete(&setup.marked)],
    },
    Mutation { name: "delete of nothing", before: a_few, asks: |_| vec![Ask::delete("none")] },
    Mutation { name: "increment", before: a_few, asks: |_| vec![Ask::increment("number", 58)] },
    Mutation { name: "increment from nothing", before: a_few, asks: |_| vec![Ask::increment("none", -7)] },
    Mutation {
        name: "three changes in one pipeline",
        before: a_few,
        asks: |_| vec![Ask::set("hundred", value(102)), Ask::increment("number", 1), Ask::delete("thousand")],
    },
    Mutation { name: "insert that reserves buckets", before: about_to_reserve, asks: the_next },
    Mutation { name: "insert that begins to grow", before: about_to_grow, asks: the_next },
    Mutation { name: "insert while growing", before: growing, asks: the_next },
];

fn a_few(setup: &mut Setup) -> anyhow::Result<()> {
    for index in 0..20 {
        setup.set(&format!("some {index}"), value(20 + index * 7))?;
    }
    setup.set("hundred", value(100))?;
    setup.set("thousand", value(1001))?;
    setup.set("large", value(6000))?;
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
