//! `purge`: removes the segment of an instance that is not running, one that was kept aside, and the socket files it left. The
//! backup file stays.
//!
//! Nothing that somebody uses is touched: the segment is removed under its lock only, a socket file only when it is this user's,
//! nobody listens on it, and no server looks at its directory meanwhile.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};
use kvs_core::instance::{InstanceName, console_path};
use kvs_core::segment::{self, SegmentError, SegmentView, text_of};
use rustix::fs::FlockOperation;
use serde_json::json;

use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// Removes what the instance left.
pub fn run(target: &Target, format: Format) -> anyhow::Result<Outcome> {
    let name = target.name_for("purge")?;
    let path = name.segment_path();
    let sockets = sockets_of(&path);
    segment::remove(&path).map_err(|error| explain(name, error))?;
    let kept = segment::kept_aside_path(&path);
    let kept = std::fs::remove_file(&kept).is_ok().then_some(kept);
    let removed: Vec<PathBuf> = sockets.into_iter().filter(|socket| remove_stale(socket)).collect();
    match format {
        Format::Text => {
            for path in std::iter::once(&path).chain(&kept).chain(&removed) {
                output::print_line(format_args!("removed {}", path.display()))?;
            }
        }
        Format::Json => {
            let sockets: Vec<_> = removed.iter().map(|path| path.to_string_lossy()).collect();
            output::print_json(&json!({
                "segment": path.to_string_lossy(),
                "removed": true,
                "kept_aside": kept.map(|path| path.to_string_lossy().into_owned()),
                "sockets": sockets,
            }))?;
        }
    }
    Ok(Outcome::Done)
}

fn explain(name: &InstanceName, error: SegmentError) -> anyhow::Error {
    match error {
        SegmentError::Missing { path } => {
            anyhow!("there is nothing to remove: instance `{name}` has no segment {}", path.display())
        }
        SegmentError::InUse { pid, .. } => {
            let holder = if pid == 0 { String::new() } else { format!(" (data server {pid})") };
            anyhow!("instance `{name}` is running{holder}; end it first with `kvs-tools --name {name} quit`")
        }
        error => error.into(),
    }
}

/// The socket files that the segment names; none when it can't be read.
fn sockets_of(segment: &Path) -> Vec<PathBuf> {
    let text = SegmentView::open(segment).and_then(|view| Ok(text_of(&view.header()?.unix_path)));
    let path = text.ok().filter(|text| !text.is_empty()).map(PathBuf::from);
    path.map_or_else(Vec::new, |path| vec![console_path(&path), path])
}

/// Removes a socket file that nobody listens on; whether it did. What is in doubt stays: the next start sorts it out.
fn remove_stale(path: &Path) -> bool {
    let attempt = || -> anyhow::Result<()> {
        let directory = std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
        // Servers hold this lock while they replace a socket file.
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        let file = std::fs::symlink_metadata(path)?;
        let own = file.uid() == rustix::process::geteuid().as_raw();
        match UnixStream::connect(path) {
            Err(error)
                if own && file.file_type().is_socket() && error.kind() == ErrorKind::ConnectionRefused =>
            {
                Ok(std::fs::remove_file(path)?)
            }
            _ => bail!("somebody may use it"),
        }
    };
    attempt().is_ok()
}
