//! What one mutation needs: segments that two processes have, the store as it is before, backup files, children.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::Context as _;
use kvs_core::limits::CAPACITY_BYTES_MIN;
use kvs_core::segment::Segment;
use kvs_core::table::Table;

use crate::backup::{Files, State};
use crate::client::Client;
use crate::image::Image;
use crate::judge::{Judge, Judged};
use crate::mutations::Mutation;
use crate::pages::Pages;
use crate::store::{Expected, Setup};
use crate::tracee::Tracee;
use crate::work::Work;

/// A segment in `/dev/shm` that has lost its name already: nothing is left behind, whatever happens.
pub struct Nameless {
    /// The segment.
    pub segment: Segment,
    path: PathBuf,
    file: OwnedFd,
}

impl Nameless {
    fn make(what: &str) -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/kvs-stepping-{what}-{}", std::process::id()));
        let segment = Segment::open_or_create(&path, CAPACITY_BYTES_MIN)?.segment;
        std::fs::remove_file(&path)?;
        segment.claim_worker(1)?;
        segment.claim_connection(0)?;
        segment.claim_ring(0)?;
        let file = segment.file().context("it has a file")?.as_fd().try_clone_to_owned()?;
        Ok(Self { segment, path, file })
    }

    /// Memory it has from the kernel, in bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn memory_bytes(&self) -> anyhow::Result<u64> {
        const BLOCK_BYTES: u64 = 512;
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_blocks)? * BLOCK_BYTES)
    }
}

/// Everything one mutation needs.
pub struct Stage {
    /// What the child that is stepped has.
    pub shared: Nameless,
    /// The other child's, that recovers.
    pub recovering: Nameless,
    /// What the shared segment is before each run.
    start: Image,
    /// What images consist of.
    pub pages: Pages,
    requests: tempfile::NamedTempFile,
    work: Work,
    backup: Option<Files>,
}

impl Stage {
    /// What `mutation` needs, and what must come of it.
    ///
    /// # Errors
    /// When it can't be had.
    pub fn new(mutation: &Mutation) -> anyhow::Result<(Self, Expected)> {
        let (shared, recovering) = (Nameless::make("served")?, Nameless::make("recovered")?);
        let table = Table::new(&shared.segment)?;
        let mut setup = Setup::new(&table);
        (mutation.before)(&mut setup)
            .with_context(|| format!("filling the store for {:?}", mutation.name))?;
        let asks = (mutation.asks)(&setup);
        let mut expected = match mutation.work {
            Work::Connect => Expected::hello(setup.model),
            _ => Expected::new(setup.model, &asks),
        };
        let mut backup = None;
        if let Work::Backup(_) = mutation.work {
            backup = Some(Files::make(&table)?);
            let table = table.backed_up();
            let mut client = Client::greeted(&table)?;
            client.exchange(&expected.requests, &mut Vec::new())?;
            client.close()?;
            expected = expected.all_done();
        }
        let requests = tempfile::Builder::new().prefix("kvs-stepping-").tempfile()?;
        std::fs::write(requests.path(), &expected.requests)?;
        let pages = Pages::reserved(&shared.segment)?;
        let start = Image::of(&shared.segment, &pages)?;
        Ok((Self { shared, recovering, start, pages, requests, backup, work: mutation.work }, expected))
    }

    /// A child that is about to begin.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn child(&self) -> anyhow::Result<Tracee> {
        self.pages.copy(self.start.segment.memory(), self.shared.segment.memory())?;
        let path = self.shared.path.to_string_lossy();
        let requests = self.requests.path().to_string_lossy();
        // No file is made there unless it is about the backup file.
        let mut backup = String::from("/nowhere");
        if let Some(files) = &self.backup {
            files.restore()?;
            backup = files.directory().to_string_lossy().into_owned();
        }
        let places = ["--segment", &path, "--requests", &requests, "--backup", &backup];
        let arguments = [&["perform", "--work", self.work.name()], &places[..]].concat();
        Tracee::start(&arguments, self.shared.file.as_fd())
    }

    /// Whether it is about the backup file.
    pub fn has_files(&self) -> bool {
        self.backup.is_some()
    }

    /// What the backup files are now.
    ///
    /// # Errors
    /// What the disk says.
    pub fn files(&self) -> anyhow::Result<Option<State>> {
        self.backup.as_ref().map(Files::state).transpose()
    }

    /// Judges the image at hand.
    ///
    /// # Errors
    /// A violation.
    pub fn judge(&self, judge: &mut Judge<'_>) -> anyhow::Result<Judged> {
        judge.judge(self.backup.as_ref())
    }

    /// A child that is about to recover, again and again.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn recoverer(&self) -> anyhow::Result<Tracee> {
        let path = self.recovering.path.to_string_lossy();
        Tracee::start(&["recover", "--segment", &path], self.recovering.file.as_fd())
    }
}
