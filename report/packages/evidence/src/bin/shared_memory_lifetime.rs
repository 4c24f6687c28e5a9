//! What becomes of a `shared_memory` segment when the process that made it ends.
//!
//! Method: a second process creates a segment, writes to it, and ends in one of four ways; then the name is looked up
//! in `/dev/shm`. The same with `rustix::shm::open` beside it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kvs_package_evidence::{kill_self, play, role, wait_or_kill};
use rustix::fs::Mode;
use rustix::shm;
use shared_memory::ShmemConf;

const ENDINGS: [&str; 4] = ["return", "panic", "exit", "kill"];

fn main() {
    match role() {
        Some((role, name)) => create_and_end(&role, &name),
        None => report(),
    }
}

fn report() {
    println!("creator ends by     shared_memory 0.12.4   rustix::shm");
    for ending in ENDINGS {
        let ours = survives("rustix", ending);
        println!("{ending:<20}{:<23}{ours}", survives("crate", ending));
    }
}

fn survives(maker: &str, ending: &str) -> &'static str {
    let name = format!("kvs-evidence-{}-{maker}-{ending}", std::process::id());
    let path = PathBuf::from("/dev/shm").join(&name);
    let mut child = play(&format!("{maker}-{ending}"), &name).expect("start second process");
    wait_or_kill(&mut child, Duration::from_secs(10)).expect("wait").expect("second process hangs");
    let there = path.exists();
    let _ = fs::remove_file(path);
    if there { "still there" } else { "deleted" }
}

fn create_and_end(role: &str, name: &str) {
    std::panic::set_hook(Box::new(|_| ()));
    let (maker, ending) = role.split_once('-').expect("role is maker-ending");
    match maker {
        "crate" => {
            let segment = ShmemConf::new().os_id(name).size(4096).create().expect("create segment");
            end(ending);
            drop(segment);
        }
        _ => {
            let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
            let segment = shm::open(name, flags, Mode::RUSR | Mode::WUSR).expect("create segment");
            rustix::fs::fallocate(&segment, rustix::fs::FallocateFlags::empty(), 0, 4096).expect("reserve");
            end(ending);
            drop(segment);
        }
    }
}

fn end(ending: &str) {
    match ending {
        "panic" => panic!("as asked"),
        "exit" => std::process::exit(0),
        "kill" => kill_self(),
        _ => (),
    }
}
