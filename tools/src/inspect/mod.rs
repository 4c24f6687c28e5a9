//! `inspect`: looks into a segment itself, read-only, server or not.
//!
//! | module | what it shows |
//! |---|---|
//! | [`overview`] | the whole segment |
//! | [`shard`] | one shard |
//! | [`entries`] | one entry, or all of them |

mod entries;
mod overview;
mod shard;

use std::os::unix::ffi::OsStrExt as _;

use anyhow::anyhow;
use kvs_core::segment::SegmentView;

use crate::cli::InspectOptions;
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Looks into the segment.
pub fn run(target: &Target, format: Format, what: &InspectOptions) -> anyhow::Result<Outcome> {
    let path = target.name_for("inspect")?.segment_path();
    let view = SegmentView::open(&path)?;
    if what.entries {
        return entries::all(&view, format);
    }
    if let Some(key) = &what.key {
        return entries::one(&view, format, key.as_bytes());
    }
    if let Some(index) = what.shard {
        let count = view.regions().shard_count;
        if index >= count {
            return Err(anyhow!("there is no shard {index}: this segment has {count}, 0 to {}", count - 1));
        }
        return shard::show(&view, format, index);
    }
    let overview = overview::Overview::of(&view)?;
    match format {
        Format::Text => output::print(overview.text(&path).as_bytes())?,
        Format::Json => output::print_json(&overview.object(&path))?,
    }
    Ok(Outcome::Done)
}
