#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let path = std::path::PathBuf::from(format!("/dev/shm/kvs-fuzz-{}", std::process::id()));
    kvs_fuzz::attach(&path, input);
    let _ = std::fs::remove_file(&path);
});
