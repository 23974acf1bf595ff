//! The journal's twin without files, for simulations.

use super::{Event, Journal, record};
use crate::error::Error;

/// A journal in memory. Events go through the same encoding as on disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryJournal {
    records: Vec<Vec<u8>>,
    committed: usize,
}

impl MemoryJournal {
    /// An empty journal.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What a crash leaves: the committed events.
    #[must_use]
    pub fn after_crash(&self) -> Self {
        Self { records: self.records[..self.committed].to_vec(), committed: self.committed }
    }
}

impl Journal for MemoryJournal {
    fn append(&mut self, event: &Event) -> Result<(), Error> {
        self.records.push(record::encode(event)?);
        Ok(())
    }

    fn events(&self) -> Result<Vec<Event>, Error> {
        let event = |record: &Vec<u8>| record::decode(record).expect("a record in memory is as it was written");
        Ok(self.records.iter().map(event).collect())
    }

    fn commit(&mut self) -> Result<(), Error> {
        self.committed = self.records.len();
        Ok(())
    }
}
