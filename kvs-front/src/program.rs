//! Finding the other server's program, beside this one, then on `PATH`; and launching it.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kvs_core::sys::launch::{self, Child, Urgency};

use crate::options::ServerOptions;

/// Why a program isn't there.
#[derive(Debug)]
pub struct NotFound {
    /// Its name.
    pub program: String,
    /// Directory of this program, where it was looked for first.
    pub beside: PathBuf,
}

impl std::fmt::Display for NotFound {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{} is neither in {} nor on PATH; put the two servers side by side",
            self.program,
            self.beside.display()
        )
    }
}

impl std::error::Error for NotFound {}

/// The path of `program`.
///
/// # Errors
/// [`NotFound`].
pub fn find(program: &str) -> Result<PathBuf, NotFound> {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.parent().map(Path::to_path_buf).unwrap_or_default();
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(beside.clone())
        .chain(std::env::split_paths(&on_path).filter(|directory| directory.is_absolute()))
        .map(|directory| directory.join(program))
        .find(|path| is_executable(path));
    found.ok_or(NotFound { program: program.to_owned(), beside })
}

/// Launches `program` as the other server, in a process group of its own: a Ctrl-C on the terminal is the front server's to obey. `mark` tells it that `input` is a socket to this one.
///
/// # Errors
/// It isn't there, or what the kernel says.
pub fn launch(
    program: &str,
    mark: &str,
    options: &ServerOptions,
    input: OwnedFd,
    urgency: Urgency,
) -> anyhow::Result<(Child, OwnedFd)> {
    let path = find(program)?;
    let arguments = std::iter::once(OsString::from(mark)).chain(options.to_arguments());
    launch::launch(&path, arguments, input, urgency)
        .with_context(|| format!("can't start {}", path.display()))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
