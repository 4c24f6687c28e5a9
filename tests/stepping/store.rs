//! What is in the store before a mutation, what the client asks for, and what must come of it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use kvs_core::segment::Segment;
use kvs_core::segment::layout::{Shard, WorkerSlot};
use kvs_core::sys::memory::Damaged;
use kvs_core::table::Table;
use kvs_core::table::geometry::Geometry;
use kvs_core::transaction::Transaction;
use kvs_core::wire::{
    Request, RequestBody, Response, ResponseBody, SetCondition, encode_request, encode_response,
};

use crate::client::{HELLO, WELCOME};
use crate::pages::Pages;

/// Keys and values.
pub type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Longest value that is read back; more would be damage.
const VALUE_BYTES_MAX: u64 = 1 << 20;

/// `length` bytes that are no text.
pub fn value(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251 + length) as u8).collect()
}

/// A value that is text.
pub fn text(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

/// What a client asks for.
#[derive(Debug, Clone)]
pub enum Ask {
    /// A value, perhaps only if there is none.
    Set { key: Vec<u8>, value: Vec<u8>, condition: SetCondition },
    /// Its end.
    Delete { key: Vec<u8> },
    /// Another number.
    Increment { key: Vec<u8>, by: i64 },
    /// What there is.
    Get { key: Vec<u8> },
}

impl Ask {
    /// A set.
    pub fn set(key: &str, value: Vec<u8>) -> Self {
        Self::Set { key: text(key), value, condition: SetCondition::Always }
    }

    /// A set that replaces nothing.
    pub fn set_if_absent(key: &str, value: Vec<u8>) -> Self {
        Self::Set { key: text(key), value, condition: SetCondition::IfAbsent }
    }

    /// A delete.
    pub fn delete(key: &str) -> Self {
        Self::Delete { key: text(key) }
    }

    /// An increment.
    pub fn increment(key: &str, by: i64) -> Self {
        Self::Increment { key: text(key), by }
    }

    /// A read.
    pub fn get(key: &str) -> Self {
        Self::Get { key: text(key) }
    }

    fn key(&self) -> &Vec<u8> {
        match self {
            Self::Set { key, .. }
            | Self::Delete { key }
            | Self::Increment { key, .. }
            | Self::Get { key } => key,
        }
    }

    fn request(&self) -> RequestBody<'_> {
        match self {
            Self::Set { key, value, condition } => RequestBody::Set { condition: *condition, key, value },
            Self::Delete { key } => RequestBody::Delete { key },
            Self::Increment { key, by } => RequestBody::Increment { key, by: *by },
            Self::Get { key } => RequestBody::Get { key },
        }
    }

    /// Does it to the model; the answer.
    fn apply<'m>(&self, model: &'m mut Model) -> ResponseBody<'m> {
        match self {
            Self::Set { key, condition: SetCondition::IfAbsent, .. } if model.contains_key(key) => {
                ResponseBody::Exists
            }
            Self::Set { key, value, .. } => {
                model.insert(key.clone(), value.clone());
                ResponseBody::Stored
            }
            Self::Delete { key } if model.remove(key).is_some() => ResponseBody::Deleted,
            Self::Delete { .. } => ResponseBody::Missing,
            Self::Increment { key, by } => {
                let old =
                    model.get(key).map_or(0, |old| String::from_utf8_lossy(old).parse::<i64>().unwrap_or(0));
                model.insert(key.clone(), (old + by).to_string().into_bytes());
                ResponseBody::Number { value: old + by }
            }
            Self::Get { key } => {
                model.get(key).map_or(ResponseBody::Missing, |value| ResponseBody::Value { value })
            }
        }
    }
}

/// What must come of the requests, one after the other.
pub struct Expected {
    /// The bytes of all requests.
    pub requests: Vec<u8>,
    /// The bytes of all answers.
    pub answers: Vec<u8>,
    /// What is in the store after none, one, … of them.
    pub models: Vec<Model>,
    /// Bytes executed and produced by then.
    pub marks: Vec<(u64, u64)>,
    /// What the backup file is told by all of them: keys with their new values, or none.
    pub records: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// How many of those are told by none, one, … of the requests.
    pub record_counts: Vec<usize>,
    /// All keys that are ever there or asked for.
    pub keys: BTreeSet<Vec<u8>>,
}

impl Expected {
    /// What comes of `asks` when `model` is there.
    pub fn new(mut model: Model, asks: &[Ask]) -> Self {
        let mut expected = Self {
            requests: Vec::new(),
            answers: Vec::new(),
            keys: model.keys().chain(asks.iter().map(Ask::key)).cloned().collect(),
            models: vec![model.clone()],
            marks: vec![(0, 0)],
            records: Vec::new(),
            record_counts: vec![0],
        };
        for (number, ask) in (1..).zip(asks) {
            let body = ask.apply(&mut model);
            let changes =
                !matches!(body, ResponseBody::Exists | ResponseBody::Missing | ResponseBody::Value { .. });
            encode_request(&mut expected.requests, &Request { number, body: ask.request() });
            encode_response(&mut expected.answers, &Response { number, body });
            if changes {
                expected.records.push((ask.key().clone(), model.get(ask.key()).cloned()));
            }
            expected.record_counts.push(expected.records.len());
            expected.models.push(model.clone());
            expected.marks.push((expected.requests.len() as u64, expected.answers.len() as u64));
        }
        expected
    }
}

impl Expected {
    /// What comes of a client's first words.
    pub fn hello(model: Model) -> Self {
        let mut expected = Self::new(model.clone(), &[]);
        encode_request(&mut expected.requests, &HELLO);
        encode_response(&mut expected.answers, &WELCOME);
        expected.models.push(model);
        expected.marks.push((expected.requests.len() as u64, expected.answers.len() as u64));
        expected.record_counts.push(0);
        expected
    }

    /// The same when all requests were made before, and none is now.
    pub fn all_done(mut self) -> Self {
        let last = self.models.pop();
        let done = Self::new(last.unwrap_or_default(), &[]);
        Self { keys: self.keys, ..done }
    }
}

/// The value of `key` as a lock-free reader sees it.
///
/// # Errors
/// What the reader is told.
pub fn look_up(table: &Table, key: &[u8]) -> Result<Option<Vec<u8>>, kvs_core::table::view::ReadError> {
    table.view().read(table.hash_of(key), key, |value| {
        if value.length() > VALUE_BYTES_MAX {
            return Err(Damaged { offset: 0 });
        }
        let mut bytes = vec![0; value.length() as usize];
        value.copy_to(0, &mut bytes)?;
        Ok(bytes)
    })
}

/// A store being filled for a mutation.
pub struct Setup<'s> {
    table: &'s Table,
    /// What is in it.
    pub model: Model,
    /// A key that the mutation is about.
    pub marked: String,
}

impl<'s> Setup<'s> {
    /// Of an empty store.
    pub fn new(table: &'s Table) -> Self {
        Self { table, model: Model::new(), marked: String::new() }
    }

    fn segment(&self) -> &'s Segment {
        self.table.segment()
    }

    /// Shard `index`.
    ///
    /// # Errors
    /// When there is none.
    pub fn shard(&self, index: u64) -> anyhow::Result<&'s Shard> {
        Ok(self.segment().shard(index)?)
    }

    fn commit(
        &self,
        note: impl FnOnce(&mut Transaction<'s>, &Table) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let worker: &WorkerSlot = self.segment().memory().object(self.segment().regions().worker(0))?;
        let mut transaction = Transaction::begin(self.segment(), worker);
        note(&mut transaction, self.table)?;
        transaction.commit()?;
        Ok(self.table.collect_garbage(worker)?)
    }

    /// Puts `value` under `key`.
    ///
    /// # Errors
    /// When there is no room.
    pub fn set(&mut self, key: &str, value: Vec<u8>) -> anyhow::Result<()> {
        if Table::fits_inline(key.len(), value.len()) {
            self.commit(|transaction, table| {
                let hash = table.hash_of(key.as_bytes());
                table.set(transaction, hash, key.as_bytes(), &value, SetCondition::Always)?;
                Ok(())
            })?;
        } else {
            let mut requests = Vec::new();
            encode_request(
                &mut requests,
                &Request { number: 1, body: Ask::set(key, value.clone()).request() },
            );
            let mut client = crate::client::Client::greeted(self.table)?;
            client.exchange(&requests, &mut Vec::new())?;
            client.close()?;
        }
        self.model.insert(text(key), value);
        Ok(())
    }

    /// Puts `value` under `key` and undoes it when that made `happened` true; whether it was undone.
    ///
    /// # Errors
    /// When there is no room.
    pub fn try_set(
        &mut self,
        key: &str,
        value: Vec<u8>,
        happened: impl Fn(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let near = self.shard(0)?.entries.load() >= 800;
        let pages = Pages::reserved(self.segment())?;
        let saved = near.then(|| Segment::on_heap(self.segment().regions().capacity_bytes)).transpose()?;
        if let Some(saved) = &saved {
            pages.copy(self.segment().memory(), saved.memory())?;
        }
        self.set(key, value)?;
        if !happened(self)? {
            return Ok(false);
        }
        let saved = saved.context("that came sooner than thought")?;
        pages.copy(saved.memory(), self.segment().memory())?;
        self.model.remove(key.as_bytes());
        Ok(true)
    }

    /// Removes `key`.
    ///
    /// # Errors
    /// When it can't be.
    pub fn delete(&mut self, key: &str) -> anyhow::Result<()> {
        self.commit(|transaction, table| {
            table.delete(transaction, table.hash_of(key.as_bytes()), key.as_bytes())?;
            Ok(())
        })?;
        self.model.remove(key.as_bytes());
        Ok(())
    }

    fn new_keys(&self) -> impl Iterator<Item = String> {
        (0u64..).map(|index| format!("key {index}")).filter(|key| !self.model.contains_key(key.as_bytes()))
    }

    /// `count` keys that aren't there and belong to shard `index`.
    pub fn keys_of_shard(&self, index: u64, count: usize) -> Vec<String> {
        let shards = self.segment().regions().shard_count;
        let belongs = |key: &String| self.table.hash_of(key.as_bytes()).shard(shards) == index;
        self.new_keys().filter(belongs).take(count).collect()
    }

    /// `count` keys that aren't there and are at home in bucket `home` of shard `index`.
    pub fn keys_of_home(&self, index: u64, home: u64, count: usize) -> Vec<String> {
        let shards = self.segment().regions().shard_count;
        let geometry = self.shard(index).ok().and_then(|shard| Geometry::decode(shard.geometry.load()));
        let belongs = |key: &String| {
            let hash = self.table.hash_of(key.as_bytes());
            hash.shard(shards) == index && geometry.is_some_and(|geometry| geometry.home(hash.0) == home)
        };
        self.new_keys().filter(belongs).take(count).collect()
    }
}
