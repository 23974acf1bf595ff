//! What earlier sessions left in a run's folder, read without touching it.

use std::path::Path;

use state::journal::{Event, Journal, Recovery, SledJournal};
use state::run::{RunState, steps_of};

use crate::error::{Error, Result};
use crate::folder::{Place, RunFolder};

/// What is known of a run before it goes on.
#[derive(Debug, Default)]
pub struct Past {
    /// What its journal says.
    pub state: RunState,
    /// Whether a process works on it now.
    pub is_running: bool,
    /// What its journal has lost, if that can be made good.
    pub warning: Option<String>,
    pub(crate) events: Vec<Event>,
}

/// What the folder of a run says about it.
///
/// # Errors
/// If there is no run, its journal cannot be read, or it does not say where to go on.
pub fn look(dir: &Path) -> Result<Past> {
    let past = Past::read(&RunFolder::new(dir))?;
    if past.state.plan.is_none() { Err(Error::NoRun { dir: dir.into() }) } else { Ok(past) }
}

/// What the journal in a run's folder says.
///
/// # Errors
/// As [`look`].
pub fn inspect(dir: &Path) -> Result<RunState> {
    Ok(look(dir)?.state)
}

impl Past {
    /// Reads what is there; of a folder without a run, nothing.
    pub(crate) fn read(folder: &RunFolder) -> Result<Self> {
        if !folder.journal().is_dir() {
            return match folder.newest() {
                Some(_) => Err(lost(folder, "its journal is missing".into())),
                None => Ok(Self::default()),
            };
        }
        let is_running = SledJournal::is_in_use(&folder.journal());
        let (events, recovery) = read_journal(folder)?;
        let mut past = Self { state: RunState::replay(&events), is_running, warning: None, events };
        // A run at work has lost nothing: it has not written its end.
        if !is_running {
            past.warning = past.check(folder, &recovery)?;
        }
        Ok(past)
    }

    /// Fails if the run would silently begin anew, or go on from a checkpoint that is not there.
    fn check(&self, folder: &RunFolder, recovery: &Recovery) -> Result<Option<String>> {
        let lost_events = format!("its journal has lost its last {} events", recovery.lost);
        if self.state.plan.is_none() {
            return match (recovery.lost, folder.newest()) {
                (0, None) => Ok(None),
                (0, Some(_)) => Err(lost(folder, "its journal is empty".into())),
                _ => Err(lost(folder, lost_events)),
            };
        }
        // A checkpoint is written before the event that names it: the first one may be ahead of a journal that names none. Where it names
        // one, the run goes on from that: what is further may be of a session that was given up.
        let is_ahead = folder.newest_place().is_some_and(|newest| newest > due(&self.state));
        if recovery.lost == 0 && self.state.checkpoint.is_none() && is_ahead {
            return Err(lost(folder, "its journal ends before its checkpoints".into()));
        }
        if recovery.lost == 0 || self.state.is_complete {
            let newest = folder.newest().filter(|_| is_ahead && !self.state.is_complete);
            let (dir, named) = (folder.dir().display(), self.state.checkpoint.as_deref().unwrap_or_default());
            let behind = |newest| {
                format!("{dir}: its journal names {named} and not the later {newest}; the run goes on from the former")
            };
            return Ok(newest.map(behind));
        }
        let goes_on = match &self.state.checkpoint {
            Some(name) if folder.checkpoint(name).is_dir() => format!("from checkpoint {name}"),
            None if folder.newest().is_none() => "from its beginning".into(),
            _ => return Err(lost(folder, format!("{lost_events}, the newest checkpoint among them"))),
        };
        Ok(Some(format!("{}: {lost_events}; the run goes on {goes_on}", folder.dir().display())))
    }
}

/// The checkpoint that is due next: its stage, and steps of it.
fn due(state: &RunState) -> Place {
    let Some(plan) = &state.plan else { return (u64::MAX, u64::MAX) };
    let every = plan.checkpoint.every.max(1);
    let mut stages = plan.steps.iter().enumerate().skip(state.next.stage);
    let learns = stages.find_map(|(stage, step)| Some((stage, step, step.part()?)));
    let Some((stage, step, part)) = learns else { return (u64::MAX, u64::MAX) };
    let done = if stage == state.next.stage { state.next.step } else { 0 };
    let due = ((part.begun + done) / every + 1).saturating_mul(every) - part.begun;
    (stage as u64, due.min(steps_of(step)) as u64)
}

/// Where a run goes on.
pub(crate) struct Whole<C> {
    pub(crate) state: RunState,
    /// The newest checkpoint that can be read, and its name. What follows an older one is done again, with the same result.
    pub(crate) checkpoint: Option<(String, C)>,
    /// What is wrong with the newest of all, if that is another one.
    pub(crate) warning: Option<String>,
}

impl<C> Whole<C> {
    /// `read` reads what is needed of a checkpoint. Where the system refuses, an older one is no help.
    pub(crate) fn find(folder: &RunFolder, mut events: &[Event], read: impl Fn(&str) -> Result<C>) -> Result<Self> {
        let mut damaged = None;
        loop {
            let state = RunState::replay(events);
            let Some(name) = state.checkpoint.clone() else {
                return damaged.map_or(Ok(Self { state, checkpoint: None, warning: None }), Err);
            };
            match read(&name) {
                Ok(checkpoint) => {
                    let warning = damaged.map(|error| older(&name, &error));
                    return Ok(Self { state, checkpoint: Some((name, checkpoint)), warning });
                }
                Err(source) if source.is_of_system() => return Err(source),
                Err(source) => {
                    let path = folder.checkpoint(&name);
                    damaged.get_or_insert(Error::Checkpoint { path, source: Box::new(source) });
                }
            }
            let is_older = |event: &Event| match event {
                Event::StepCommitted { checkpoint: Some(c), .. } | Event::Interrupted { checkpoint: Some(c) } => {
                    *c != name
                }
                _ => false,
            };
            events = &events[..events.iter().rposition(is_older).map_or(0, |at| at + 1)];
        }
    }
}

fn older(name: &str, error: &Error) -> String {
    match error {
        Error::Checkpoint { path, source } => {
            format!("the checkpoint {} cannot be used ({}); going on from {name}", path.display(), source.whole())
        }
        other => other.to_string(),
    }
}

fn read_journal(folder: &RunFolder) -> Result<(Vec<Event>, Recovery)> {
    let read = || {
        let journal = SledJournal::open_read_only(&folder.journal())?;
        Ok((journal.events()?, journal.recovery().clone()))
    };
    read().map_err(|source: state::Error| match source {
        state::Error::Damaged { .. } | state::Error::Unreadable { .. } => Error::Lost {
            dir: folder.dir().into(),
            problem: "its journal is damaged".into(),
            newest: folder.newest(),
            source: Some(Box::new(source)),
        },
        other => other.into(),
    })
}

fn lost(folder: &RunFolder, problem: String) -> Error {
    Error::Lost { dir: folder.dir().into(), problem, newest: folder.newest(), source: None }
}
