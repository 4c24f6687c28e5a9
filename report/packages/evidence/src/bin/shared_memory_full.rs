//! What a full `/dev/shm` does to a `shared_memory` segment: SIGBUS, where `fallocate` would have said ENOSPC.
//!
//! Method: in a mount namespace of its own (needs root) a 4 MiB tmpfs is put over `/dev/shm`; a segment of 16 MiB is made
//! there and its pages are touched one after the other. Needs `unshare` and `mount`; skipped where they are refused.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use kvs_package_evidence::role;
use rustix::fs::{FallocateFlags, Mode, fallocate};
use rustix::shm;
use shared_memory::ShmemConf;

const SEGMENT_BYTES: usize = 16 << 20;
const SMALL_TMPFS: &str = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec \"$0\" \"$1\"";

fn main() {
    match role().as_ref().map(|(role, _)| role.as_str()) {
        Some("try") => println!("namespace works"),
        Some("touch") => touch_every_page(),
        Some("reserve") => reserve(),
        _ => report(),
    }
}

fn report() {
    if !in_small_tmpfs("try").success() {
        println!("skipped: no mount namespace allowed here");
        return;
    }
    let touched = in_small_tmpfs("touch");
    println!(
        "shared_memory, touching 16 MiB in a 4 MiB /dev/shm: signal {:?} (SIGBUS is 7)",
        touched.signal()
    );
    let reserved = in_small_tmpfs("reserve");
    println!("rustix fallocate, same place: exit {:?}, no signal", reserved.code());
}

fn in_small_tmpfs(role: &str) -> std::process::ExitStatus {
    let program = env::current_exe().expect("own path");
    Command::new("unshare")
        .args(["--mount", "sh", "-c", SMALL_TMPFS])
        .arg(program)
        .arg(role)
        .status()
        .expect("start unshare")
}

fn touch_every_page() {
    let name = "kvs-evidence-full";
    let segment = ShmemConf::new().os_id(name).size(SEGMENT_BYTES).create().expect("create segment");
    println!("shared_memory created {} MiB without complaint", segment.len() >> 20);
    for page in (0..segment.len()).step_by(4096) {
        // SAFETY: the segment is mapped for `len` bytes and nobody else uses it.
        unsafe { segment.as_ptr().add(page).write_volatile(1) };
    }
    println!("all pages touched");
}

fn reserve() {
    let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
    let segment = shm::open("kvs-evidence-full", flags, Mode::RUSR | Mode::WUSR).expect("create segment");
    let answer = fallocate(&segment, FallocateFlags::empty(), 0, SEGMENT_BYTES as u64);
    println!("fallocate of 16 MiB says: {answer:?}");
}
