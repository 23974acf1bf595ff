//! Makes progress durable: checkpoints first, then the event that names them.

use ractor::{Actor, ActorProcessingErr, ActorRef};
use state::journal::{Event, Journal, SledJournal};

use crate::error::Result;
use crate::folder::{Checkpoint, RunFolder};
use crate::supervisor::Message;

/// What to record.
pub(crate) enum Record {
    /// An event, with the checkpoint that it names. The supervisor is told when both are durable.
    Commit { event: Event, checkpoint: Option<(String, Box<Checkpoint>)> },
    /// An event that need not be waited for.
    Note(Event),
}

pub(crate) struct Recorder;

pub(crate) struct Books {
    folder: RunFolder,
    journal: SledJournal,
    keep: usize,
    supervisor: ActorRef<Message>,
    /// A record could not be made. Later ones must not be: they would say that it had been.
    has_failed: bool,
}

impl Actor for Recorder {
    type Msg = Record;
    type State = Books;
    type Arguments = (RunFolder, SledJournal, usize, ActorRef<Message>);

    async fn pre_start(
        &self,
        _: ActorRef<Record>,
        args: Self::Arguments,
    ) -> std::result::Result<Books, ActorProcessingErr> {
        let (folder, journal, keep, supervisor) = args;
        Ok(Books { folder, journal, keep, supervisor, has_failed: false })
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
            Record::Commit { event, checkpoint } => (event, checkpoint, true),
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
}
