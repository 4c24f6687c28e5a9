//! The promise: the systemd unit in the repository is one that systemd takes as it is.
//!
//! Method: `systemd-analyze verify`, where there is one, on a copy that names the programs under test instead of the installed ones.

use std::fs;
use std::process::{Command, Output};

use kvs_harness::binaries;
use kvs_harness::store::Place;

const UNIT: &str = "kvs@.service";

/// What systemd says to a unit; None where there is no systemd.
fn verify(place: &Place, text: &str) -> Option<Output> {
    let path = place.directory().join(UNIT);
    fs::write(&path, text).expect("written");
    Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().ok()
}

#[test]
fn systemd_unit_is_taken_as_it_is() {
    let unit = binaries::workspace().join("kvs-front/systemd").join(UNIT);
    let installed = fs::read_to_string(unit).expect("the unit is there");
    let programs = binaries::directory().display().to_string();
    let text = installed.replace("/usr/local/bin", &programs);
    assert_ne!(text, installed, "the unit names the installed program");
    let place = Place::new();
    let Some(verified) = verify(&place, &text) else {
        println!("skipped: there is no systemd-analyze");
        return;
    };
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && said.is_empty(), "{}: {said}", verified.status);
    let wrong = verify(&place, &text.replace("ExitType=cgroup", "ExitType=bogus")).expect("it ran before");
    assert!(!wrong.stderr.is_empty(), "a wrong unit is noticed");
}

#[test]
fn systemd_unit_keeps_the_service_alive_with_the_data_server_alone() {
    let unit = binaries::workspace().join("kvs-front/systemd").join(UNIT);
    let text = fs::read_to_string(unit).expect("the unit is there");
    // Without the first the death of the front server ends the service; without the second the next one is not heard.
    let store = "FileDescriptorStoreMax=10003";
    for line in ["ExitType=cgroup", "NotifyAccess=all", "Type=notify", "RemoveIPC=no", store] {
        assert!(text.lines().any(|found| found == line), "{line}");
    }
}
