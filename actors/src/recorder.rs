//! Makes progress durable: checkpoints first, then the event that names them.

use std::sync::{Arc, Weak};

use models::Weights;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use state::journal::{Event, Journal, SledJournal};
use state::metrics::StepMetrics;
use tokio::sync::oneshot;

use crate::error::Result;
use crate::folder::{Checkpoint, RunFolder};
use crate::supervisor::Message;

/// What to record.
pub(crate) enum Record {
    /// A step: the weights after it, and a checkpoint if one is due. The supervisor is told when all of it is durable.
    Step { metrics: Box<StepMetrics>, weights: Arc<Weights>, checkpoint: Option<(String, Box<Checkpoint>)> },
    /// The end of the run, with its last weights. The supervisor is told.
    End { weights: Arc<Weights> },
    /// The end of the session before that of the run, with a checkpoint of the last step if it had none. The supervisor is told.
    Interruption { checkpoint: Option<(String, Box<Checkpoint>)> },
    /// An event that need not be waited for.
    Note(Event),
}

pub(crate) struct Recorder;

pub(crate) struct Books {
    folder: RunFolder,
    journal: SledJournal,
    keep: usize,
    supervisor: ActorRef<Message>,
    /// The weights of the last record, if they are still in use, and their hash.
    last: (Weak<Weights>, String),
    /// A record could not be made. Later ones must not be: they would say that it had been.
    has_failed: bool,
    /// Dropped after the journal.
    _closed: oneshot::Sender<()>,
}

impl Actor for Recorder {
    type Msg = Record;
    type State = Books;
    type Arguments = (RunFolder, (SledJournal, oneshot::Sender<()>), usize, ActorRef<Message>);

    async fn pre_start(
        &self,
        _: ActorRef<Record>,
        args: Self::Arguments,
    ) -> std::result::Result<Books, ActorProcessingErr> {
        let (folder, (journal, closed), keep, supervisor) = args;
        let (last, has_failed) = Default::default();
        Ok(Books { folder, journal, keep, supervisor, last, has_failed, _closed: closed })
    }

    async fn handle(
        &self,
        _: ActorRef<Record>,
        message: Record,
        books: &mut Books,
    ) -> std::result::Result<(), ActorProcessingErr> {
        if books.has_failed {
            return Ok(());
        }
        // Files may block; the runtime moves other actors to another thread.
        let result = tokio::task::block_in_place(|| books.record(message));
        match result {
            Ok(true) => books.supervisor.cast(Message::Committed)?,
            Ok(false) => {}
            Err(error) => {
                books.has_failed = true;
                books.supervisor.cast(Message::Failed(Box::new(error)))?;
            }
        }
        Ok(())
    }
}

impl Books {
    /// Whether the supervisor waits for it.
    fn record(&mut self, record: Record) -> Result<bool> {
        let (event, checkpoint, is_awaited) = match record {
            Record::Step { metrics, weights, checkpoint } => {
                let (weights_blake3, name) = (self.blake3(&weights), checkpoint.as_ref().map(|c| c.0.clone()));
                (Event::StepCommitted { metrics, weights_blake3, checkpoint: name }, checkpoint, true)
            }
            Record::End { weights } => (Event::RunCompleted { weights_blake3: self.blake3(&weights) }, None, true),
            Record::Interruption { checkpoint } => {
                let name = checkpoint.as_ref().map(|c| c.0.clone());
                (Event::Interrupted { checkpoint: name }, checkpoint, true)
            }
            Record::Note(event) => (event, None, false),
        };
        if let Some((name, checkpoint)) = &checkpoint {
            self.folder.write(name, checkpoint)?;
        }
        self.journal.append(&event)?;
        self.journal.commit()?;
        if let Some((name, _)) = &checkpoint {
            // Only now is the older one not needed any more.
            self.folder.prune(name, self.keep)?;
        }
        Ok(is_awaited)
    }

    /// Hashes weights here, where nobody waits for it.
    fn blake3(&mut self, weights: &Arc<Weights>) -> String {
        if !self.last.0.upgrade().is_some_and(|last| Arc::ptr_eq(&last, weights)) {
            self.last = (Arc::downgrade(weights), weights.blake3());
        }
        self.last.1.clone()
    }
}
