//! Bytes of a backup file: a header, then records.
//!
//! ```text
//! header, 64 B                                  record, 40 B, the key, the value, zeros up to a multiple of 8
//! 0   magic         kvs-bak\0                   0   checksum      CRC32C of all that follows in the record
//! 8   version (32)  header bytes (32)           4   length        of the whole record, in bytes
//! 16  id            16 B, random                8   sequence      one more than the record before
//! 32  generation    one more at every rewrite   16  previous      checksum of the record before
//! 40  created_ns    since the epoch             20  key length (16) │ kind (8) │ 0 (8)
//! 48  0                                         24  version       of the key's shard; of one key's records the
//! 56  checksum (32) of all before │ 0 (32)                        highest counts
//!                                               32  value length (32) │ 0 (32)
//! ```
//!
//! All numbers are little-endian. Kinds: 1 the key has this value; 2 the key is gone; 3 a mark: the file was synced up to the
//! position that the version field holds, when the table had as many entries as its value says, 8 bytes.
//!
//! Checksums begin with one over id, generation and time, which no client can know: bytes that a client made up, stored as a value,
//! are not taken for a record, and neither is what another file left in the same sectors, even one of the same generation that was
//! given up.

use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_LIMIT};

/// First eight bytes of a backup file.
pub const MAGIC: [u8; 8] = *b"kvs-bak\0";
/// Version of the format; raised with every change that an older release can't read.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes of the file's header.
pub const FILE_HEADER_BYTES: usize = 64;
/// Bytes of a record before its key.
pub const RECORD_HEADER_BYTES: usize = 40;
/// No version and no position reaches this: an entry has 48 bits for its version, and some must be left to go on with.
const VERSION_LIMIT: u64 = 1 << 47;
/// Longest record, in bytes.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX_LIMIT as usize + 8;

/// Bytes of the value of a mark.
pub const ENTRIES_BYTES: usize = 8;

/// Who a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHeader {
    /// Identity of the data set: that of the segment it belongs to, and of all files that came before.
    pub id: [u64; 2],
    /// Which of those files it is; from 1 up.
    pub generation: u64,
    /// Nanoseconds since the epoch at which it was begun.
    pub created_ns: u64,
}

/// Why bytes are not the header of a backup file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Something else.
    #[error("it does not begin with the mark of a kvs backup file")]
    Foreign,
    /// A later release's.
    #[error(
        "it has format {0}, this release reads up to format {FORMAT_VERSION}; use the release that wrote it, or a later one"
    )]
    Newer(u32),
    /// Its checksum does not fit.
    #[error("its first {FILE_HEADER_BYTES} bytes are damaged: the checksum does not fit")]
    Damaged,
}

impl FileHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; FILE_HEADER_BYTES] {
        let mut bytes = [0; FILE_HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        put_u32(&mut bytes, 8, FORMAT_VERSION);
        put_u32(&mut bytes, 12, FILE_HEADER_BYTES as u32);
        put_u64(&mut bytes, 16, self.id[0]);
        put_u64(&mut bytes, 24, self.id[1]);
        put_u64(&mut bytes, 32, self.generation);
        put_u64(&mut bytes, 40, self.created_ns);
        let checksum = crc32c::crc32c(&bytes[..56]);
        put_u32(&mut bytes, 56, checksum);
        bytes
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(HeaderError::Foreign);
        }
        let bytes = bytes.get(..FILE_HEADER_BYTES).ok_or(HeaderError::Damaged)?;
        // A newer format may have its checksum elsewhere.
        let version = get_u32(bytes, 8);
        if version > FORMAT_VERSION {
            return Err(HeaderError::Newer(version));
        }
        if get_u32(bytes, 56) != crc32c::crc32c(&bytes[..56]) || get_u32(bytes, 60) != 0 {
            return Err(HeaderError::Damaged);
        }
        Ok(Self::fields(bytes))
    }

    /// Reads them, whatever the checksum says. For saving what can be saved.
    pub(super) fn decode_unchecked(bytes: &[u8; FILE_HEADER_BYTES]) -> Self {
        Self::fields(bytes)
    }

    fn fields(bytes: &[u8]) -> Self {
        let id = [get_u64(bytes, 16), get_u64(bytes, 24)];
        Self { id, generation: get_u64(bytes, 32), created_ns: get_u64(bytes, 40) }
    }

    /// What the checksums of its records begin with.
    pub fn checksum_seed(&self) -> u32 {
        crc32c::crc32c(&self.encode()[16..48])
    }
}

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The key has this value.
    Set,
    /// The key is gone.
    Delete,
    /// The file was synced up to the position in the version field.
    Synced,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Self::Set => 1,
            Self::Delete => 2,
            Self::Synced => 3,
        }
    }

    const fn decode(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Set),
            2 => Some(Self::Delete),
            3 => Some(Self::Synced),
            _ => None,
        }
    }
}

/// A record as its first bytes have it; nothing of it is trusted until the checksum fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// CRC32C of the rest.
    pub checksum: u32,
    /// Bytes of the whole record.
    pub length: usize,
    /// Number of the record in its file.
    pub sequence: u64,
    /// Checksum of the record before.
    pub previous: u32,
    /// What it says.
    pub kind: Kind,
    /// Bytes of the key.
    pub key_length: usize,
    /// Version of the key; a position for [`Kind::Synced`].
    pub version: u64,
    /// Bytes of the value.
    pub value_length: usize,
}

/// Bytes a record of these lengths takes.
pub const fn record_bytes(key_length: usize, value_length: usize) -> usize {
    (RECORD_HEADER_BYTES + key_length + value_length).next_multiple_of(8)
}

impl RecordHeader {
    /// Reads the first [`RECORD_HEADER_BYTES`] of `bytes`; None when they can't be a record's.
    #[inline]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..RECORD_HEADER_BYTES)?;
        let kind = Kind::decode(bytes[22])?;
        let header = Self {
            checksum: get_u32(bytes, 0),
            length: get_u32(bytes, 4) as usize,
            sequence: get_u64(bytes, 8),
            previous: get_u32(bytes, 16),
            kind,
            key_length: usize::from(u16::from_le_bytes([bytes[20], bytes[21]])),
            version: get_u64(bytes, 24),
            value_length: get_u32(bytes, 32) as usize,
        };
        let sound = header.value_length <= VALUE_BYTES_MAX_LIMIT as usize
            && header.length == record_bytes(header.key_length, header.value_length)
            && header.version < VERSION_LIMIT
            && bytes[23] == 0
            && get_u32(bytes, 36) == 0
            && (header.key_length == 0) == (kind == Kind::Synced)
            && (header.value_length == 0
                || kind == Kind::Set
                || (kind == Kind::Synced && header.value_length == ENTRIES_BYTES));
        sound.then_some(header)
    }

    /// Whether the checksum fits `record`, which is [`RecordHeader::length`] bytes.
    #[inline]
    pub fn checksum_fits(&self, seed: u32, record: &[u8]) -> bool {
        record.len() == self.length && crc32c::crc32c_append(seed, &record[4..]) == self.checksum
    }

    /// The key in `record`.
    #[inline]
    pub fn key<'r>(&self, record: &'r [u8]) -> &'r [u8] {
        &record[RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + self.key_length]
    }

    /// The value in `record`.
    #[inline]
    pub fn value<'r>(&self, record: &'r [u8]) -> &'r [u8] {
        let start = RECORD_HEADER_BYTES + self.key_length;
        &record[start..start + self.value_length]
    }
}

/// Begins a record at the end of `bytes`: its first bytes, without the checksum. The key and the value are appended next, and
/// then [`finish`] is called.
#[inline]
pub fn begin(
    bytes: &mut Vec<u8>,
    (sequence, previous): (u64, u32),
    kind: Kind,
    version: u64,
    (key_length, value_length): (usize, usize),
) {
    let mut header = [0; RECORD_HEADER_BYTES];
    put_u32(&mut header, 4, record_bytes(key_length, value_length) as u32);
    put_u64(&mut header, 8, sequence);
    put_u32(&mut header, 16, previous);
    header[20..22].copy_from_slice(&(key_length as u16).to_le_bytes());
    header[22] = kind.byte();
    put_u64(&mut header, 24, version);
    put_u32(&mut header, 32, value_length as u32);
    bytes.extend_from_slice(&header);
}

/// Ends the record that begins at `start`: fills it up and puts its checksum in; returns that.
#[inline]
pub fn finish(bytes: &mut Vec<u8>, start: usize, seed: u32) -> u32 {
    let length = (bytes.len() - start).next_multiple_of(8);
    bytes.resize(start + length, 0);
    let checksum = crc32c::crc32c_append(seed, &bytes[start + 4..]);
    put_u32(&mut bytes[start..], 0, checksum);
    checksum
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[inline]
fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(get_u32(bytes, at)) | u64::from(get_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: FileHeader = FileHeader { id: [1, 2], generation: 3, created_ns: 4 };

    fn record(kind: Kind, key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        begin(&mut bytes, (7, 8), kind, 9, (key.len(), value.len()));
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        finish(&mut bytes, 0, HEADER.checksum_seed());
        bytes
    }

    #[test]
    fn record_header_of_the_file_is_read_back_and_damage_is_seen() {
        let bytes = HEADER.encode();
        assert_eq!(FileHeader::decode(&bytes), Ok(HEADER));
        for at in 0..FILE_HEADER_BYTES {
            let mut damaged = bytes;
            damaged[at] ^= 0x40;
            assert!(FileHeader::decode(&damaged).is_err(), "byte {at}");
        }
        assert_eq!(FileHeader::decode(b"kvs"), Err(HeaderError::Foreign));
        assert_eq!(FileHeader::decode(&bytes[..40]), Err(HeaderError::Damaged));
        let mut newer = bytes;
        newer[8] = 2;
        assert_eq!(FileHeader::decode(&newer), Err(HeaderError::Newer(2)));
    }

    #[test]
    fn record_of_another_file_does_not_fit() {
        let bytes = record(Kind::Set, b"key", b"value");
        let header = RecordHeader::decode(&bytes).expect("a record");
        assert!(header.checksum_fits(HEADER.checksum_seed(), &bytes));
        for other in [FileHeader { generation: 4, ..HEADER }, FileHeader { created_ns: 5, ..HEADER }] {
            assert!(!header.checksum_fits(other.checksum_seed(), &bytes));
        }
    }

    proptest! {
        #[test]
        fn record_is_read_back(key in prop::collection::vec(any::<u8>(), 1..300), value in prop::collection::vec(any::<u8>(), 0..300)) {
            let bytes = record(Kind::Set, &key, &value);
            let header = RecordHeader::decode(&bytes).expect("a record");
            prop_assert_eq!((header.length, header.sequence, header.previous, header.version), (bytes.len(), 7, 8, 9));
            prop_assert_eq!((header.key(&bytes), header.value(&bytes)), (&key[..], &value[..]));
            prop_assert!(header.checksum_fits(HEADER.checksum_seed(), &bytes));
        }

        #[test]
        fn record_with_a_flipped_bit_is_none(key in prop::collection::vec(any::<u8>(), 1..50), at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = record(Kind::Delete, &key, b"");
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let header = RecordHeader::decode(&bytes);
            prop_assert!(header.is_none_or(|header| !header.checksum_fits(HEADER.checksum_seed(), &bytes)));
        }

        #[test]
        fn record_of_random_bytes_is_none_or_sound(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(header) = RecordHeader::decode(&bytes) {
                let _ = header.checksum_fits(0, &bytes);
            }
            let _ = FileHeader::decode(&bytes);
        }
    }
}
