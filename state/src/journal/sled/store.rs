//! sled, with its panics turned into errors and its flush into one that reaches the disk.
//!
//! sled 0.34.7 panics on some damaged files, and its `flush` does not fsync on Linux.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Error, Found, folder};
use crate::error::is_of_system;

/// Size of sled's page cache, in bytes. A journal is small and read once.
const CACHE_BYTES: u64 = 8 << 20;
/// Attempts to open a store, and the time between them: sled's threads let go of its files a moment after it was closed. Nobody else
/// has them, as the folder is locked, or a copy.
const ATTEMPTS: u32 = 200;
const BETWEEN: Duration = Duration::from_millis(10);
/// What sled says meanwhile.
const HELD: &str = "could not acquire lock";

/// Keys and values, in order of the keys.
pub(super) type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// An open store.
pub(super) struct Store {
    /// `None` only while being dropped.
    db: Option<sled::Db>,
    /// Where its files are.
    dir: PathBuf,
    /// After a failure, why no more is written.
    failure: Option<String>,
    /// Files of large records that are on the disk.
    synced: BTreeSet<PathBuf>,
}

impl Store {
    /// Opens the store in `dir` and reads it all; `named` is the folder to tell the user of.
    ///
    /// A failure is tried once more without what sled can rebuild. A store that opened with less than was committed is
    /// not: sled has cut its log at the damage by then.
    pub(super) fn open(dir: &Path, named: &Path) -> Result<(Self, Found), Error> {
        let committed = folder::read_count(dir).unwrap_or(0);
        let (error, broken) = match Self::start(dir, named).map(|store| (store.read(named, committed), store)) {
            Ok((Ok(found), store)) => return Ok((store, found)),
            Ok((Err(error), store)) => (error, Some(store)),
            Err(error) => (error, None),
        };
        // Where the system refuses, nothing is to be rebuilt.
        if matches!(error, Error::Version { .. } | Error::Io { .. }) {
            return Err(error);
        }
        let aside = folder::set_aside(dir)?;
        // Only now: closing it may write, and from here on that goes to a file no one will read.
        drop(broken);
        let store = Self::start(dir, named)?;
        let mut found = store.read(named, committed)?;
        found.recovery.aside = Some(aside);
        Ok((store, found))
    }

    fn start(dir: &Path, named: &Path) -> Result<Self, Error> {
        let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let mut opened = guarded(|| config.open());
        for _ in 1..ATTEMPTS {
            if !opened.as_ref().is_err_and(|trouble| trouble.text().contains(HELD)) {
                break;
            }
            std::thread::sleep(BETWEEN);
            opened = guarded(|| config.open());
        }
        let db = opened.map_err(|trouble| trouble.while_reading(named))?;
        Ok(Self { db: Some(db), dir: dir.into(), failure: None, synced: BTreeSet::new() })
    }

    fn read(&self, named: &Path, committed: u64) -> Result<Found, Error> {
        let records = self.scan().map_err(|trouble| trouble.while_reading(named))?;
        let mut found = Found::in_records(&records, named)?;
        found.recovery.lost = committed.saturating_sub(found.recovery.records);
        Ok(found)
    }

    /// All records.
    pub(super) fn records(&self) -> Result<Records, Error> {
        self.scan().map_err(|trouble| self.error(trouble.text()))
    }

    /// Writes a record; durable after [`Self::flush`].
    pub(super) fn insert(&mut self, number: u64, record: Vec<u8>) -> Result<(), Error> {
        self.change(|db| db.insert(number.to_be_bytes(), record).map(drop))
    }

    /// Removes the records behind the first `count`.
    pub(super) fn forget_from(&mut self, count: u64, keys: &[Vec<u8>]) -> Result<(), Error> {
        for key in &keys[count as usize..] {
            self.change(|db| db.remove(key).map(drop))?;
        }
        if keys.len() as u64 > count { self.flush() } else { Ok(()) }
    }

    /// Brings everything to the disk.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.change(|db| db.flush().map(drop))?;
        folder::sync_store(&self.dir, &mut self.synced)
    }

    fn scan(&self) -> Result<Records, Trouble> {
        let pair =
            |pair: sled::Result<(sled::IVec, sled::IVec)>| pair.map(|(key, value)| (key.to_vec(), value.to_vec()));
        guarded(|| self.db().iter().map(pair).collect())
    }

    fn change(&mut self, work: impl FnOnce(&sled::Db) -> sled::Result<()>) -> Result<(), Error> {
        if let Some(reason) = &self.failure {
            return Err(self.error(reason.clone()));
        }
        guarded(|| work(self.db())).map_err(|trouble| {
            self.failure = Some(trouble.text());
            self.error(trouble.text())
        })
    }

    fn db(&self) -> &sled::Db {
        self.db.as_ref().expect("the store is open until it is dropped")
    }

    fn error(&self, reason: String) -> Error {
        Error::Store { dir: self.dir.clone(), reason }
    }
}

impl fmt::Debug for Store {
    /// Without the records, which sled would list.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("dir", &self.dir).field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let db = self.db.take();
        // Closing writes, and can panic as everything else; there is no one left to tell.
        let _ = guarded(|| {
            drop(db);
            Ok(())
        });
    }
}

/// Why sled did not do something.
enum Trouble {
    /// The system refused.
    System(io::Error),
    Other(String),
}

impl Trouble {
    fn text(&self) -> String {
        match self {
            Self::System(error) => error.to_string(),
            Self::Other(text) => text.clone(),
        }
    }

    /// What reading a store ends with.
    fn while_reading(self, named: &Path) -> Error {
        match self {
            Self::System(error) => Error::io("read the journal in", named)(error),
            Self::Other(reason) => Error::Unreadable { dir: named.into(), reason },
        }
    }
}

/// Runs `work`; an error or a panic becomes a trouble.
fn guarded<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, Trouble> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Err(sled::Error::Io(error))) if is_of_system(&error) => Err(Trouble::System(error)),
        Ok(result) => result.map_err(|error| Trouble::Other(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Trouble::Other(format!("sled panicked: {text}")))
        }
    }
}
