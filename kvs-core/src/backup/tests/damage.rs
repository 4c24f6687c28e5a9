//! Goal: a bit that flips in what was synced is reported with the place of its record, whichever bit of whichever field it is; one that
//! flips in the un-synced end cuts off that end, which is kept. Method: the file of a random life, one flip at a time.

use std::path::{Path, PathBuf};

use super::super::disk::Disk;
use super::super::record::{FILE_HEADER_BYTES, HeaderError, Kind, RECORD_HEADER_BYTES};
use super::super::scan::for_each_sound;
use super::super::simulate::{Random, SimulatedDisk};
use super::super::survey::{Gap, identify, survey};
use super::super::{BackupError, log, torn_path};
use super::history::{Store, Trouble};
use super::{PATH, contents, load_or_empty};
use crate::table::Table;

/// A record of a file: where it begins and ends, and the bytes of its fields.
struct Place {
    kind: Kind,
    start: usize,
    end: usize,
    fields: Vec<std::ops::Range<usize>>,
    /// For a mark: what it says is synced.
    synced: u64,
}

fn disk_with(bytes: &[u8]) -> SimulatedDisk {
    SimulatedDisk::with([(PathBuf::from(PATH), bytes.to_vec())].into())
}

/// The file of a life that ended in order, or without an end.
fn file_of(seed: u64) -> Vec<u8> {
    let (mut random, disk) = (Random::new(seed), SimulatedDisk::default());
    let mut store = Store::new(2);
    store.live(&disk, &mut random, 120, Trouble::default());
    store.end(&disk);
    disk.content(Path::new(PATH)).expect("it was written")
}

fn places(bytes: &[u8]) -> Vec<Place> {
    let disk = disk_with(bytes);
    let found = log::open(&disk, Path::new(PATH)).expect("sound").expect("there");
    let mut places = Vec::new();
    let all = (FILE_HEADER_BYTES as u64, found.length);
    for_each_sound(&*found.file, &found.header, all, &mut |at, record| {
        let (start, header) = (at as usize, record.header);
        let (key, end) = (start + RECORD_HEADER_BYTES, start + header.length);
        let value = key + header.key_length;
        let mut fields: Vec<_> = [0..4, 4..8, 8..16, 16..20, 20..22, 22..23, 23..24, 24..32, 32..36, 36..40]
            .into_iter()
            .map(|field| start + field.start..start + field.end)
            .collect();
        fields.extend([key..value, value..value + header.value_length, value + header.value_length..end]);
        fields.retain(|field| !field.is_empty());
        let synced = if header.kind == Kind::Synced { header.version } else { 0 };
        places.push(Place { kind: header.kind, start, end, fields, synced });
    })
    .expect("readable");
    places
}

fn flip(bytes: &[u8], field: &std::ops::Range<usize>, random: &mut Random) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    let at = field.start + random.below(field.len() as u64) as usize;
    damaged[at] ^= 1 << random.below(8);
    damaged
}

#[test]
fn damage_of_any_field_of_a_synced_record_is_reported_with_its_offset() {
    let mut random = Random::new(5);
    let bytes = file_of(5);
    let places = places(&bytes);
    assert_eq!(places.last().expect("records").end, bytes.len(), "all of it are records");
    let synced = places.iter().map(|place| place.synced).max().expect("records");
    for place in places.iter().filter(|place| (place.start as u64) < synced) {
        for field in &place.fields {
            let disk = disk_with(&flip(&bytes, field, &mut random));
            let error = load_or_empty(&disk, 1).err().expect("it is damaged");
            let BackupError::Damage { offset, later, .. } = &error else { panic!("{error}") };
            assert_eq!(*offset, place.start as u64, "{field:?} of {:?}", place.kind);
            assert_eq!(*later, place.end as u64, "{field:?} of {:?}", place.kind);
            assert!(error.to_string().contains(&format!("is damaged at byte {offset}: ")), "{error}");
            assert!(error.to_string().contains("--salvage"), "{error}");
            assert_eq!(disk.operations(), 0, "the file is left as it is");
        }
    }
}

#[test]
fn damage_at_the_unsynced_end_is_cut_off_and_kept() {
    let mut random = Random::new(6);
    let bytes = file_of(6);
    let places = places(&bytes);
    let synced = places.iter().map(|place| place.synced).max().expect("records");
    // Without the marks that speak of it, the last quarter of the records is as good as un-synced.
    let from = places.len() * 3 / 4;
    let shortened = places[from..].iter().find(|place| place.kind == Kind::Synced).expect("a mark").start;
    assert!((shortened as u64) < synced);
    let bytes = &bytes[..shortened];
    let synced =
        places.iter().filter(|place| place.end <= shortened).map(|place| place.synced).max().expect("a mark");
    let unsynced: Vec<_> =
        places.iter().filter(|place| place.start as u64 >= synced && place.end <= shortened).collect();
    assert!(!unsynced.is_empty());
    for place in unsynced {
        for field in &place.fields {
            let damaged = flip(bytes, field, &mut random);
            let disk = disk_with(&damaged);
            let loaded = load_or_empty(&disk, 1).expect("a torn end");
            assert!(loaded.torn);
            assert_eq!(disk.content(Path::new(PATH)).as_deref(), Some(&bytes[..place.start]));
            let kept = torn_path(Path::new(PATH), place.start as u64);
            assert_eq!(disk.content(&kept).as_deref(), Some(&damaged[place.start..]));
            let again = load_or_empty(&disk, 1).expect("sound");
            assert!(!again.torn);
            let all = |loaded: &super::LoadedStore| contents(&Table::new(&loaded.segment).expect("sound"));
            assert_eq!(all(&again), all(&loaded));
        }
    }
}

#[test]
fn damage_of_any_byte_of_the_file_header_is_reported() {
    let bytes = file_of(7);
    for at in 0..FILE_HEADER_BYTES {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let disk = disk_with(&damaged);
            let error = load_or_empty(&disk, 1).err().expect("it is damaged");
            assert!(matches!(error, BackupError::Header { .. }), "{error}");
            assert_eq!(disk.operations(), 0, "the file is left as it is");
        }
    }
}

#[test]
fn damage_survey_lists_every_gap_and_what_is_left() {
    let bytes = file_of(8);
    let places = places(&bytes);
    let look = |bytes: &[u8]| {
        let disk = disk_with(bytes);
        let file = disk.open(Path::new(PATH)).expect("sound").expect("there");
        let (header, fault) = identify(&*file).expect("readable").expect("a backup file");
        let mut seen = 0;
        let found = survey(&*file, &header, bytes.len() as u64, &mut |_, _| seen += 1).expect("readable");
        assert_eq!(seen, found.sets + found.deletes + found.marks);
        (found, fault)
    };
    let (sound, fault) = look(&bytes);
    assert_eq!((sound.gap_count, sound.torn, fault), (0, None, None));
    assert_eq!(sound.sets + sound.deletes + sound.marks, places.len() as u64);

    let (first, second) = (&places[3], &places[10]);
    let mut damaged = bytes.clone();
    damaged[first.start + 9] ^= 1;
    damaged[second.end - 1] ^= 0x80;
    let (found, _) = look(&damaged);
    let gap = |place: &Place| Gap { from: place.start as u64, to: place.end as u64, records_lost: Some(1) };
    assert_eq!(found.damage().copied().collect::<Vec<_>>(), [gap(first), gap(second)]);
    assert_eq!((found.gap_count, found.torn), (2, None));

    // Without some records, whole ones.
    let missing = [&bytes[..first.start], &bytes[second.start..]].concat();
    let (found, _) = look(&missing);
    let gap = Gap { from: first.start as u64, to: first.start as u64, records_lost: Some(7) };
    assert_eq!(found.gaps, [gap]);

    // What is behind the last mark's word is a torn end.
    let last = places.last().expect("records");
    let (found, _) = look(&bytes[..last.end - 1]);
    assert_eq!(found.torn, Some((last.start as u64, 0)));
    assert_eq!((found.damage().count(), found.gap_count), (0, 1));

    // The header's other fields can be damaged.
    let mut damaged = bytes.clone();
    damaged[57] ^= 1;
    let (found, fault) = look(&damaged);
    assert_eq!((found.gap_count, fault), (0, Some(HeaderError::Damaged)));
}
