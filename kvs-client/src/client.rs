//! A client: one call, one answer. When the connection breaks it connects again, joins its session again, and repeats what was
//! not answered. What the server has executed by then it answers from the session, so everything happens once.

use std::io;
use std::time::{Duration, Instant};

use kvs_core::wire::{Request, RequestBody, Response, ResponseBody, StatisticValue, encode_request};

use crate::Error;
use crate::address::Address;
use crate::connection::{Broken, Connection, Membership, OpenError, Outgoing};
use crate::local::LocalReads;
use crate::pipeline::{Answer, Pipeline};
use crate::session::Session;

/// How long a lost connection is sought again unless told otherwise.
const RETRY_FOR_DEFAULT: Duration = Duration::from_secs(10);
/// First pause between two attempts to connect.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// Longest pause between two attempts to connect.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How long a client that reads without the server waits for another connection, now and then.
const RECONNECT_PATIENCE: Duration = Duration::from_millis(20);
/// Most bytes of the name a client gives itself that the server keeps.
const NAME_BYTES_MAX: usize = 32;
/// Keys asked for in one page by [`Client::list`].
const LIST_PAGE_KEYS: u32 = 1000;

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    name: String,
    retry_for: Duration,
    local_reads: bool,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        let program = std::env::args_os().next().unwrap_or_default();
        let name = std::path::Path::new(&program).file_name().map(|name| name.to_string_lossy().into_owned());
        Self { name: name.unwrap_or_default(), retry_for: RETRY_FOR_DEFAULT, local_reads: false }
    }
}

impl ConnectOptions {
    /// The name of the program, and 10 seconds of patience.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the client calls itself, for the operator; up to 32 bytes are kept.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// How long a connection that broke is sought again, before a call fails; 10 seconds unless told otherwise.
    #[must_use]
    pub fn retry_for(mut self, patience: Duration) -> Self {
        self.retry_for = patience;
        self
    }

    /// Whether reads are served from the server's shared memory when it is on this machine and belongs to the same user: without
    /// a system call, and also while no server runs. A read sees at least all that was answered before it. What can't be read there is
    /// asked of the server, as everything is unless told otherwise.
    #[must_use]
    pub fn local_reads(mut self, wanted: bool) -> Self {
        self.local_reads = wanted;
        self
    }

    /// Connects; see [`Client::connect`].
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect(mut self, address: impl AsRef<str>) -> Result<Client, Error> {
        let end =
            (0..=NAME_BYTES_MAX.min(self.name.len())).rev().find(|&end| self.name.is_char_boundary(end));
        self.name.truncate(end.unwrap_or(0));
        let address = Address::parse(address.as_ref())?;
        let failed = |source| Error::Connect { address: address.to_string(), source };
        let session = Session::new().map_err(failed)?;
        match Connection::open(&address, &self.name, None) {
            Ok(connection) => {
                let value_bytes_max = connection.value_bytes_max;
                Ok(Client {
                    address,
                    local: self.local_reads.then(LocalReads::default),
                    options: self,
                    connection: Some(connection),
                    value_bytes_max,
                    troubled_since: None,
                    session,
                })
            }
            Err(OpenError::Later(source)) => Err(failed(source)),
            Err(OpenError::Full(error) | OpenError::Never(error)) => Err(error),
        }
    }
}

/// One page of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPage {
    /// The keys, in no order. There may be none although more pages follow.
    pub keys: Vec<Vec<u8>>,
    /// Cursor of the next page; None when this is the last.
    pub next: Option<u64>,
}

/// The value of a counter of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Statistic {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// Nothing now.
    Absent,
}

/// A client of one server.
pub struct Client {
    address: Address,
    options: ConnectOptions,
    connection: Option<Connection>,
    value_bytes_max: u64,
    /// Since when there was no answer, while a call tries to get one.
    troubled_since: Option<Instant>,
    /// None when all is asked of the server.
    local: Option<LocalReads>,
    pub(crate) session: Session,
}

/// Whether the connection is as a batch needs it.
pub(crate) enum Readiness {
    /// It is.
    Ready,
    /// The server remembers nothing of what this client asked before.
    Forgotten,
}

impl Client {
    /// Connects to `HOST:PORT`, to `unix:PATH` or to a path with a slash.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Connect`], [`Error::NotKvs`], [`Error::Refused`]. Nothing is tried twice here: a
    /// program that starts wants to know at once.
    pub fn connect(address: impl AsRef<str>) -> Result<Self, Error> {
        ConnectOptions::new().connect(address)
    }

    /// Longest value the server takes, in bytes.
    pub fn value_bytes_max(&self) -> u64 {
        self.value_bytes_max
    }

    /// The server's number for the connection, as the operator sees it; None while there is none.
    pub fn connection(&self) -> Option<u64> {
        self.connection.as_ref().map(|connection| connection.number)
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`Error`].
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
        if let Some(value) = self.local().and_then(|local| local.get(key.as_ref())) {
            return Ok(value);
        }
        match self.one(|pipeline| pipeline.get(key))? {
            Answer::Value(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// The way to read without the server, if there is one.
    pub(crate) fn local(&mut self) -> Option<&mut LocalReads> {
        let local = self.local.as_mut()?;
        if local.is_due() {
            self.look_at_connection();
        }
        // While there is no connection, the server met last may come back.
        if let Some(number) =
            self.connection().filter(|_| self.local.as_ref().is_some_and(|local| !local.has_met()))
        {
            let told = self.stats().unwrap_or_default();
            self.local.as_mut()?.meet(number, &told);
        }
        self.local.as_mut()
    }

    /// Makes another connection if the one before is lost and somebody is there.
    fn look_at_connection(&mut self) {
        if self.connection.as_ref().is_some_and(|connection| !connection.is_lost()) {
            return;
        }
        self.connection = None;
        let deadline = Instant::now() + RECONNECT_PATIENCE;
        if let Ok(connection) = Connection::open(&self.address, &self.options.name, Some(deadline)) {
            self.take_connection(connection);
        }
    }

    fn take_connection(&mut self, connection: Connection) {
        self.value_bytes_max = connection.value_bytes_max;
        self.connection = Some(connection);
        if let Some(local) = &mut self.local {
            local.forget();
        }
    }

    /// Stores a value.
    ///
    /// # Errors
    /// [`Error`].
    pub fn set(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        match self.one(|pipeline| pipeline.set(key, value))? {
            Answer::Stored => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Stores a value unless the key exists; whether it did.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Interrupted`] when the server has lost its memory and it may have happened or not.
    pub fn set_if_absent(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<bool, Error> {
        match self.one(|pipeline| pipeline.set_if_absent(key, value))? {
            Answer::Stored => Ok(true),
            Answer::Exists => Ok(false),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a key; whether it was there.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Interrupted`] when the server has lost its memory and it may have happened or not.
    pub fn delete(&mut self, key: impl AsRef<[u8]>) -> Result<bool, Error> {
        match self.one(|pipeline| pipeline.delete(key))? {
            Answer::Deleted(deleted) => Ok(deleted),
            other => Err(unexpected(&other)),
        }
    }

    /// Adds to a decimal value and returns the sum; a missing key counts as 0.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Interrupted`] when the server has lost its memory and it may have happened or not.
    pub fn increment(&mut self, key: impl AsRef<[u8]>, by: i64) -> Result<i64, Error> {
        match self.one(|pipeline| pipeline.increment(key, by))? {
            Answer::Number(sum) => Ok(sum),
            other => Err(unexpected(&other)),
        }
    }

    /// Requests to be sent together.
    pub fn pipeline(&mut self) -> Pipeline<'_> {
        Pipeline::new(self)
    }

    fn one<'c>(
        &'c mut self,
        add: impl for<'p> FnOnce(&'p mut Pipeline<'c>) -> &'p mut Pipeline<'c>,
    ) -> Result<Answer, Error> {
        let mut pipeline = Pipeline::new(self);
        add(&mut pipeline);
        match pipeline.run()?.pop() {
            Some(Answer::Failed(error)) => Err(error),
            Some(answer) => Ok(answer),
            None => Err(Error::Protocol("no answer".into())),
        }
    }

    /// Keys that start with `prefix`, in no order; asked for page by page. A key that is there all the while is given
    /// exactly once.
    pub fn list(&mut self, prefix: impl AsRef<[u8]>) -> Keys<'_> {
        let prefix = prefix.as_ref().to_vec();
        Keys { client: self, prefix, page: Vec::new().into_iter(), next: Some(0) }
    }

    /// One page of keys that start with `prefix`, about `limit` of them; `cursor` is 0 for the first page, then what the
    /// page before gave.
    ///
    /// # Errors
    /// [`Error`].
    pub fn list_page(
        &mut self,
        prefix: impl AsRef<[u8]>,
        cursor: u64,
        limit: u32,
    ) -> Result<ListPage, Error> {
        let body = RequestBody::List { prefix: prefix.as_ref(), cursor, limit };
        self.repeat(body, |body| match body {
            ResponseBody::Keys { keys, next } => {
                Ok(ListPage { keys: keys.iter().map(|key| key.0.to_vec()).collect(), next: *next })
            }
            _ => Err(Error::Protocol("no page of keys".into())),
        })
    }

    /// The counters of the store, in the server's order.
    ///
    /// # Errors
    /// [`Error`].
    pub fn stats(&mut self) -> Result<Vec<(String, Statistic)>, Error> {
        self.repeat(RequestBody::Stats, |body| match body {
            ResponseBody::Stats { statistics } => Ok(statistics
                .iter()
                .map(|statistic| {
                    let value = match statistic.value {
                        StatisticValue::Number(number) => Statistic::Number(number),
                        StatisticValue::Text(text) => Statistic::Text(text.to_owned()),
                        StatisticValue::Absent => Statistic::Absent,
                    };
                    (statistic.name.to_owned(), value)
                })
                .collect()),
            _ => Err(Error::Protocol("no counters".into())),
        })
    }

    /// Asks what changes nothing, until there is an answer.
    fn repeat<T>(
        &mut self,
        body: RequestBody<'_>,
        interpret: impl Fn(&ResponseBody<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut out = Vec::new();
        encode_request(&mut out, &Request { number: 0, body });
        let request = Outgoing { end: out.len(), is_change: false };
        self.begin_call();
        loop {
            let mut answer = None;
            self.connect_again()?;
            self.exchange(&out, &[request], &mut |response| {
                answer = Some(match &response.body {
                    ResponseBody::Error { code, message } => Err(Error::from_answer(*code, message)),
                    body => interpret(body),
                });
                Ok(())
            })?;
            if let Some(answer) = answer {
                return answer;
            }
        }
    }

    /// A call begins, with all of its patience.
    pub(crate) fn begin_call(&mut self) {
        self.troubled_since = None;
    }

    /// Makes sure of a connection, and for changes of one that the server remembers them by. `doubtful`: some of them may have
    /// been executed already.
    pub(crate) fn prepare(&mut self, has_changes: bool, doubtful: bool) -> Result<Readiness, Error> {
        loop {
            self.connect_again()?;
            let deadline = self.troubled_since.map(|since| since + self.options.retry_for);
            let Some(connection) = &mut self.connection else { continue };
            if !has_changes {
                return Ok(Readiness::Ready);
            }
            if connection.membership == Membership::Unasked {
                match connection.join(self.session.attempt(), deadline) {
                    Ok(true) => {}
                    Ok(false) if doubtful => return Ok(Readiness::Forgotten),
                    Ok(false) => {}
                    Err(broken) => {
                        self.lost(broken)?;
                        continue;
                    }
                }
            }
            return Ok(Readiness::Ready);
        }
    }

    /// Sends and receives on the connection that there is. None when all is answered; when the connection was lost, how many
    /// bytes the server may have seen.
    pub(crate) fn exchange(
        &mut self,
        bytes: &[u8],
        requests: &[Outgoing],
        take: &mut dyn FnMut(&Response<'_>) -> Result<(), Error>,
    ) -> Result<Option<usize>, Error> {
        let Some(connection) = &mut self.connection else { return Ok(Some(0)) };
        let mut answered = false;
        let exchanged = connection.exchange(bytes, requests, &mut |response| {
            answered = true;
            take(response)
        });
        if answered {
            self.troubled_since = None;
        }
        exchanged.map_or_else(|broken| self.lost(broken).map(Some), |()| Ok(None))
    }

    /// The connection is of no more use. How many bytes the server may have seen, if another may be tried.
    fn lost(&mut self, broken: Broken) -> Result<usize, Error> {
        self.connection = None;
        match broken {
            Broken::Nonsense(error) => Err(error),
            Broken::Lost { sent, source } => {
                // A server that welcomes and dies, again and again, is as good as none.
                let since = *self.troubled_since.get_or_insert_with(Instant::now);
                if since.elapsed() > self.options.retry_for {
                    return Err(Error::Disconnected { tried: since.elapsed(), source });
                }
                Ok(sent)
            }
        }
    }

    /// Connects if there is no connection, for as long as it may take.
    fn connect_again(&mut self) -> Result<(), Error> {
        if self.connection.is_some() {
            return Ok(());
        }
        let since = *self.troubled_since.get_or_insert_with(Instant::now);
        let deadline = since + self.options.retry_for;
        let mut pause = PAUSE_MIN;
        loop {
            let source = match Connection::open(&self.address, &self.options.name, Some(deadline)) {
                Ok(connection) => {
                    self.take_connection(connection);
                    return Ok(());
                }
                Err(OpenError::Never(error)) => return Err(error),
                // The server may not know yet that the connection before is lost.
                Err(OpenError::Full(error)) => io::Error::other(error),
                Err(OpenError::Later(error)) => error,
            };
            if Instant::now() + pause > deadline {
                return Err(Error::Disconnected { tried: since.elapsed(), source });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

impl Drop for Client {
    /// The server need not remember what nobody will repeat.
    fn drop(&mut self) {
        if let Some(connection) = &self.connection {
            connection.end_session();
        }
    }
}

fn unexpected(answer: &Answer) -> Error {
    Error::Protocol(format!("{answer:?} is no answer to this request"))
}

/// Keys, page by page; see [`Client::list`].
pub struct Keys<'c> {
    client: &'c mut Client,
    prefix: Vec<u8>,
    page: std::vec::IntoIter<Vec<u8>>,
    next: Option<u64>,
}

impl Iterator for Keys<'_> {
    type Item = Result<Vec<u8>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(key) = self.page.next() {
                return Some(Ok(key));
            }
            let cursor = self.next.take()?;
            match self.client.list_page(&self.prefix, cursor, LIST_PAGE_KEYS) {
                Ok(page) => {
                    self.page = page.keys.into_iter();
                    self.next = page.next;
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
