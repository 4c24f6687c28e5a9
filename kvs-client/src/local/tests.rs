//! Goal: a local reader gives what is stored, and follows the store when its segment is replaced. Method: a real segment, written
//! by this process as the data server writes it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use kvs_core::arena::block_list::BlockList;
use kvs_core::limits::CAPACITY_BYTES_MIN;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{self, Purpose, Segment};
use kvs_core::table::Table;
use kvs_core::transaction::Transaction;
use kvs_core::wire::SetCondition;
use tempfile::TempDir;

use super::*;

/// A store without a server.
struct Store {
    directory: TempDir,
    table: Table,
}

impl Store {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let table = make(&directory.path().join("segment"), false);
        Self { directory, table }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("segment")
    }

    fn reader(&self) -> LocalReader {
        LocalReader::open_path(self.path()).expect("readable")
    }

    /// Lets go of the segment, as a server that has ended.
    fn end(self) -> TempDir {
        self.directory
    }

    fn slot(&self) -> &WorkerSlot {
        let segment = self.table.segment();
        segment.memory().object(segment.regions().worker(0)).expect("claimed")
    }

    fn set(&self, key: &[u8], value: &[u8]) {
        if !Table::fits_inline(key.len(), value.len()) {
            return self.set_large(key, value);
        }
        let mut transaction = Transaction::begin(self.table.segment(), self.slot());
        let hash = self.table.hash_of(key);
        self.table.set(&mut transaction, hash, key, value, SetCondition::Always).expect("room");
        transaction.commit().expect("small");
        self.table.collect_garbage(self.slot()).expect("sound");
    }

    fn set_large(&self, key: &[u8], value: &[u8]) {
        let segment = self.table.segment();
        let owner = &self.slot().loading;
        let mut content = key.to_vec();
        content.resize(key.len().next_multiple_of(8), 0);
        content.extend_from_slice(value);
        let list = BlockList::create(segment, self.slot(), owner, content.len() as u64).expect("room");
        list.append(self.slot(), &content).expect("room");
        let mut transaction = Transaction::begin(segment, self.slot());
        let hash = self.table.hash_of(key);
        self.table
            .set_assembled(&mut transaction, hash, key, &list, owner, SetCondition::Always)
            .expect("room");
        transaction.commit().expect("small");
        self.table.collect_garbage(self.slot()).expect("sound");
    }
}

fn make(path: &Path, loading: bool) -> Table {
    let purpose = Purpose { loading, ..Purpose::new().expect("random numbers") };
    let segment = Segment::create(path, CAPACITY_BYTES_MIN, purpose).expect("made");
    segment.claim_worker(0).expect("room");
    Table::new(&segment).expect("sound")
}

fn key_of(number: usize) -> String {
    format!("key:{number:012}")
}

#[test]
fn local_reads_give_what_is_stored_of_every_length() {
    let store = Store::new();
    let mut reader = store.reader();
    let mut value = Vec::new();
    for length in [0, 1, 7, 8, 31, 32, 63, 4_000, 5_000, 300_000, 1_000_001] {
        let stored: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        store.set(b"k", &stored);
        assert!(reader.get("k").expect("readable").as_deref() == Some(&stored[..]), "{length}");
        assert!(reader.get_into("k", &mut value).expect("readable"));
        assert!(value == stored, "{length}");
    }
    assert!(!reader.get_into("none", &mut value).expect("readable"));
    assert!(value.is_empty());
    assert_eq!(reader.get("none").expect("readable"), None);
}

#[test]
fn local_reads_of_many_keys_are_those_of_each() {
    let store = Store::new();
    let mut reader = store.reader();
    let keys: Vec<String> = (0..5_000).map(key_of).collect();
    for (number, key) in keys.iter().enumerate().filter(|(number, _)| number % 7 != 0) {
        store.set(key.as_bytes(), number.to_string().as_bytes());
    }
    for count in [0, 1, 2, 31, 32, 33, 5_000] {
        let mut next = 0;
        let take = |index: usize, value: Option<&[u8]>| {
            assert_eq!(index, next);
            next += 1;
            let expected = (!index.is_multiple_of(7)).then(|| index.to_string().into_bytes());
            assert_eq!(value.map(<[u8]>::to_vec), expected);
        };
        reader.get_many(&keys[..count], take).expect("readable");
        assert_eq!(next, count);
    }
}

#[test]
fn local_reads_of_impossible_keys_are_refused() {
    let store = Store::new();
    let mut reader = store.reader();
    let long = vec![b'x'; KEY_BYTES_MAX + 1];
    for key in [&b""[..], &long] {
        let mut value = b"before".to_vec();
        assert!(matches!(reader.get_into(key, &mut value), Err(Error::KeyLength { .. })));
        assert!(value.is_empty());
        assert!(matches!(reader.get_many(&[key], |_, _| {}), Err(Error::KeyLength { .. })));
    }
}

#[test]
fn local_reads_see_growth() {
    let store = Store::new();
    let mut reader = store.reader();
    for number in 0..50_000 {
        store.set(key_of(number).as_bytes(), number.to_string().as_bytes());
        let earlier = number / 2;
        for number in [number, earlier] {
            let value = reader.get(key_of(number)).expect("readable");
            assert_eq!(value, Some(number.to_string().into_bytes()));
        }
    }
}

#[test]
fn local_reader_without_a_store_says_so() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = directory.path().join("segment");
    assert!(matches!(LocalReader::open_path(&path), Err(Error::NoStore { .. })));
    std::fs::write(&path, "").expect("room");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mine");
    assert!(matches!(LocalReader::open_path(&path), Err(Error::NoStore { .. })), "one that is being made");
    assert!(matches!(LocalReader::open("a/b"), Err(Error::InstanceName { .. })));
}

#[test]
fn local_reader_follows_a_purge_and_a_new_start_at_once() {
    let store = Store::new();
    store.set(b"k", b"old");
    let mut reader = store.reader();
    assert_eq!(reader.get("k").expect("readable"), Some(b"old".to_vec()));
    let path = store.path();
    let directory = store.end();
    assert_eq!(reader.get("k").expect("without a server"), Some(b"old".to_vec()));
    segment::remove(&path).expect("nobody serves it");
    assert!(matches!(reader.get("k"), Err(Error::NoStore { .. })));
    let store = Store { directory, table: make(&path, true) };
    assert!(matches!(reader.get("k"), Err(Error::Loading { .. })));
    assert!(matches!(LocalReader::open_path(&path), Err(Error::Loading { .. })));
    store.set(b"k", b"new");
    let segment = store.table.segment();
    segment.memory().store(&segment.header().expect("sound").loading, 0);
    assert_eq!(reader.get("k").expect("readable"), Some(b"new".to_vec()));
}

#[test]
fn local_reader_follows_a_segment_that_a_user_replaced_by_hand() {
    let store = Store::new();
    store.set(b"k", b"old");
    let mut reader = store.reader();
    let path = store.path();
    std::fs::remove_file(&path).expect("mine");
    let look_again = |reader: &mut LocalReader| {
        reader.mapped.as_mut().expect("mapped").look_again();
        reader.get("k").expect("readable")
    };
    assert_eq!(look_again(&mut reader), Some(b"old".to_vec()), "it may still be served");
    let directory = store.end();
    let store = Store { directory, table: make(&path, true) };
    assert_eq!(look_again(&mut reader), Some(b"old".to_vec()), "the new one has no data yet");
    let segment = store.table.segment();
    segment.memory().store(&segment.header().expect("sound").loading, 0);
    assert_eq!(look_again(&mut reader), None);
    store.set(b"k", b"new");
    assert_eq!(reader.get("k").expect("readable"), Some(b"new".to_vec()));
}

#[test]
fn local_reader_finds_a_replacement_within_its_time() {
    let store = Store::new();
    let mut reader = store.reader();
    let path = store.path();
    std::fs::remove_file(&path).expect("mine");
    let directory = store.end();
    let store = Store { directory, table: make(&path, false) };
    store.set(b"k", b"new");
    let since = Instant::now();
    while reader.get("k").expect("readable").is_none() {
        assert!(since.elapsed() < Duration::from_secs(10), "it looks about every 100 ms");
    }
}

#[test]
fn local_reader_refuses_what_is_not_its_users_alone() {
    let store = Store::new();
    let path = store.path();
    let refused = |what: &str| match LocalReader::open_path(&path) {
        Err(Error::Segment { reason }) => assert!(reason.contains(what), "{reason}"),
        other => panic!("{:?}", other.err()),
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("mine");
    refused("its mode is 0640");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mine");
    let other = path.with_extension("other");
    std::fs::hard_link(&path, &other).expect("the same directory");
    refused("2 hard links");
    std::fs::rename(&path, path.with_extension("moved")).expect("mine");
    std::os::unix::fs::symlink(&other, &path).expect("the same directory");
    refused("symbolic link");
    std::fs::remove_file(&path).expect("mine");
    std::fs::create_dir(&path).expect("the same directory");
    refused("not a plain file");
}

#[test]
fn local_reads_of_a_quarantined_shard_are_refused() {
    let store = Store::new();
    store.set(b"k", b"v");
    let mut reader = store.reader();
    let index = store.table.hash_of(b"k").shard(store.table.segment().regions().shard_count);
    let shard = store.table.segment().shard(index).expect("exists");
    store.table.segment().memory().store(&shard.quarantined, 1);
    assert!(matches!(reader.get("k"), Err(Error::Quarantined { shard }) if shard == index));
    assert!(matches!(reader.get_many(&["k"], |_, _| {}), Err(Error::Quarantined { .. })));
}
