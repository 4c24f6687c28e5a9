//! Unsafe code stays where it is fenced.
//!
//! Method: every Rust file of the workspace is searched for the keyword outside comments; the files that have it must be the ones
//! listed here, which are small and say for each block why it is sound. A file that no longer needs it leaves the list.

use std::fs;
use std::path::{Path, PathBuf};

use kvs_harness::binaries::workspace;

/// The files that may hold unsafe code, and why they must.
const ALLOWED: [(&str, &str); 14] = [
    ("kvs-core/src/sys/memory.rs", "maps shared memory and gives it out as words"),
    ("kvs-core/src/sys/counted_send.rs", "has the kernel write into the segment how much was sent"),
    ("kvs-core/src/sys/launch.rs", "has a child share this process's memory until it is another program"),
    ("kvs-core/src/sys/priority.rs", "makes threads of a dying process give way"),
    ("kvs-core/src/sys/stream_position.rs", "asks the kernel how far a stream got"),
    ("kvs-core/src/sys/activation.rs", "owns descriptors that came with the process"),
    ("kvs-core/src/sys/robust_mutex.rs", "a pthread mutex in shared memory"),
    ("kvs-core/src/sys/liveness_map.rs", "a mapping for the liveness mutexes"),
    ("kvs-core/src/connection/ring.rs", "gives the kernel the bytes of a connection's own buffers"),
    ("tests/allocations.rs", "counts what the allocator is asked for"),
    ("kvs-client/psiskv/src/lib.rs", "takes pointers from C"),
    ("tools/src/bench/in_process/lmdb_environment.rs", "opens an LMDB environment that nobody else has"),
    ("kvs-client/psiskv/src/local.rs", "takes pointers from C"),
    ("kvs-core/src/segment/open.rs", "makes the locks of a segment anew that nobody else has"),
];

#[test]
fn unsafe_code_anywhere_is_in_a_listed_file() {
    let found: Vec<String> =
        rust_files().into_iter().filter(|path| has_unsafe_code(path)).map(name).collect();
    let allowed = |file: &String| ALLOWED.iter().any(|(path, _)| path == file);
    let unlisted: Vec<_> = found.iter().filter(|file| !allowed(file)).collect();
    assert!(unlisted.is_empty(), "unsafe code outside the listed files: {unlisted:?}");
    let idle: Vec<_> = ALLOWED.iter().filter(|(path, _)| !found.iter().any(|file| file == path)).collect();
    assert!(idle.is_empty(), "listed, but without unsafe code: {idle:?}");
}

#[test]
fn unsafe_code_in_the_workspace_is_denied_at_every_crate_root() {
    let roots = rust_files().into_iter().filter(|path| is_crate_root(path));
    let open: Vec<String> = roots.filter(|path| !read(path).contains("(unsafe_code)]")).map(name).collect();
    assert!(open.is_empty(), "crate roots without deny(unsafe_code) or forbid(unsafe_code): {open:?}");
}

fn is_crate_root(path: &Path) -> bool {
    let file = path.file_name().is_some_and(|name| name == "lib.rs" || name == "main.rs");
    file && path.parent().is_some_and(|parent| parent.file_name().is_some_and(|name| name == "src"))
}

fn rust_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    collect(workspace(), &mut files);
    assert!(files.len() > 20, "the workspace is not at {}", workspace().display());
    files
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("the workspace can be read").flatten() {
        let path = entry.path();
        let skipped = ["target", ".git", "evidence"].iter().any(|name| entry.file_name() == *name);
        if path.is_dir() && !skipped {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn has_unsafe_code(path: &Path) -> bool {
    read(path).lines().any(is_unsafe_line)
}

/// Whether a line has the keyword in code: not in a comment, not in text, not as part of a name such as a lint's.
fn is_unsafe_line(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let words =
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern", "[unsafe(no_mangle"];
    words.iter().any(|word| code.find(word).is_some_and(|at| !code[..at].contains('"')))
}

#[test]
fn unsafe_search_on_samples_finds_code_only() {
    assert!(is_unsafe_line("        let value = unsafe { *pointer };"));
    assert!(is_unsafe_line("unsafe impl Send for Memory {}"));
    assert!(!is_unsafe_line("// unsafe { in a comment }"));
    assert!(!is_unsafe_line("#![deny(unsafe_code)]"));
    assert!(!is_unsafe_line("let text = \"unsafe { in a text }\";"));
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn name(path: PathBuf) -> String {
    path.strip_prefix(workspace()).unwrap_or(&path).display().to_string()
}
