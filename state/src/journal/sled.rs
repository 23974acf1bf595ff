//! The journal on disk: sled, a folder of its own.
//!
//! Files beside sled's: `lock` (held while the journal is open for writing), `count` (how many events were committed,
//! so that a lost tail is noticed), `aside-N/` (what had to be moved away to open a damaged store).

mod folder;
mod store;

use std::fs::File;
use std::path::{Path, PathBuf};

use super::record::{self, Fault, VERSION};
use super::{Event, Journal};
use crate::error::Error;
use folder::Copy;
use store::{Records, Store};

/// A journal in a folder.
#[derive(Debug)]
pub struct SledJournal {
    /// The folder as the caller named it.
    dir: PathBuf,
    store: Store,
    /// Number of the next record.
    next: u64,
    recovery: Recovery,
    mode: Mode,
}

/// What opening a journal found, beyond its events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Events that can be read.
    pub records: u64,
    /// Damaged records at the end that were dropped.
    pub dropped: u64,
    /// Events that had been committed and are gone, dropped ones included. sled cuts its log at the first damage and
    /// says nothing, so this is the only sign of it; 0 if the file `count` is gone as well.
    pub lost: u64,
    /// Where files went that the store could not be opened with.
    pub aside: Option<PathBuf>,
}

/// Fields are held for what dropping them does.
#[derive(Debug)]
enum Mode {
    /// Holds the lock.
    Write { _lock: File },
    /// Reads a copy.
    Read { _copy: Copy },
}

impl SledJournal {
    /// Opens the journal in `dir` for writing; makes the folder if there is none.
    ///
    /// A store that cannot be opened is tried once more without its snapshots, which it can rebuild; they go to
    /// `aside-N/` with a copy of the rest. Damaged records at the end are dropped. [`Self::recovery`] tells of both.
    ///
    /// # Errors
    /// If another process has it open, if it is damaged beyond its end, of another format, or cannot be read, or if the
    /// folder holds something else.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let lock = Self::lock(dir)?;
        Self::open_locked(dir, lock)
    }

    /// As [`Self::open`], after removing what a journal in `dir` held, and whatever `before` removes before that. Other files stay.
    ///
    /// # Errors
    /// As [`Self::open`], and if a file cannot be removed. Nothing is removed if another process has it open.
    pub fn begin_anew<E: From<Error>>(dir: &Path, before: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        let lock = Self::lock(dir)?;
        before()?;
        folder::clear(dir)?;
        Ok(Self::open_locked(dir, lock)?)
    }

    /// Whether a process has the journal in `dir` open for writing.
    #[must_use]
    pub fn is_in_use(dir: &Path) -> bool {
        folder::is_locked(dir)
    }

    fn lock(dir: &Path) -> Result<File, Error> {
        folder::require_own(dir)?;
        folder::create(dir)?;
        folder::lock(dir)
    }

    fn open_locked(dir: &Path, lock: File) -> Result<Self, Error> {
        let (mut store, found) = Store::open(dir, dir)?;
        store.forget_from(found.events.len() as u64, &found.keys)?;
        folder::sync(dir)?;
        Ok(Self::with(dir, store, found, Mode::Write { _lock: lock }))
    }

    /// Opens a copy of the journal in `dir`, which may be in use; the folder itself is not touched.
    ///
    /// # Errors
    /// As [`Self::open`], and if there is no such folder.
    pub fn open_read_only(dir: &Path) -> Result<Self, Error> {
        let copy = Copy::of(dir)?;
        let (store, found) = Store::open(copy.path(), dir)?;
        Ok(Self::with(dir, store, found, Mode::Read { _copy: copy }))
    }

    /// Events in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.next
    }

    /// What opening found.
    #[must_use]
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    fn with(dir: &Path, store: Store, found: Found, mode: Mode) -> Self {
        let next = found.events.len() as u64;
        Self { dir: dir.into(), store, next, recovery: found.recovery, mode }
    }

    fn require_writable(&self) -> Result<(), Error> {
        match self.mode {
            Mode::Write { .. } => Ok(()),
            Mode::Read { .. } => Err(Error::ReadOnly { dir: self.dir.clone() }),
        }
    }
}

impl Journal for SledJournal {
    fn append(&mut self, event: &Event) -> Result<(), Error> {
        self.require_writable()?;
        self.store.insert(self.next, record::encode(event)?)?;
        self.next += 1;
        Ok(())
    }

    fn events(&self) -> Result<Vec<Event>, Error> {
        let records = self.store.records()?;
        Found::in_records(&records, &self.dir).map(|found| found.events)
    }

    fn commit(&mut self) -> Result<(), Error> {
        self.require_writable()?;
        self.store.flush()?;
        folder::write_count(&self.dir, self.next)
    }
}

/// What the records of a store are.
#[derive(Debug)]
struct Found {
    events: Vec<Event>,
    /// Keys of all records, dropped ones included.
    keys: Vec<Vec<u8>>,
    recovery: Recovery,
}

impl Found {
    /// Reads records up to the first that is damaged or missing; fails if an intact one follows.
    fn in_records(records: &Records, dir: &Path) -> Result<Self, Error> {
        let file = dir.join("db");
        let (mut events, mut fault) = (Vec::with_capacity(records.len()), None);
        for (record, (key, bytes)) in (0u64..).zip(records) {
            match record::decode(bytes) {
                Err(Fault::Version(found)) => return Err(Error::Version { file, record, found, supported: VERSION }),
                Err(Fault::Damaged(reason)) => fault = fault.or(Some((record, reason))),
                Ok(event) if fault.is_none() && *key == record.to_be_bytes() => events.push(event),
                Ok(_) => {
                    let (record, reason) = fault.unwrap_or_else(|| (record, "missing".into()));
                    return Err(Error::Damaged { file, record, reason });
                }
            }
        }
        let good = events.len() as u64;
        let recovery = Recovery { records: good, dropped: records.len() as u64 - good, ..Recovery::default() };
        Ok(Self { events, keys: records.iter().map(|(key, _)| key.clone()).collect(), recovery })
    }
}
