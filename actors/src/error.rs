//! What can end a run early.

use std::path::PathBuf;

use state::error::{advice, is_of_system};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a run ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model, the tokenizer or the data cannot be used.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] state::Error),
    /// A file of the run's folder cannot be read or written.
    #[error("cannot {action} {}; {}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another process has worked on the run meanwhile.
    #[error("another process has worked on the run in {} since it was read; run the command again", dir.display())]
    WorkedOn {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder holds a run of another workflow.
    #[error("{} holds a run of another workflow (not the same: {parts}); resume it with `taper resume`, name another folder with --out, or begin anew with --fresh", dir.display())]
    OtherRun {
        /// The folder.
        dir: PathBuf,
        /// What is not as it was.
        parts: String,
    },
    /// The model or the data is not what the run in the folder began with.
    #[error("the {input} {} is not what the run in {} began with (SHA-256 {found}, then {expected}): put it back as it was, name another folder with --out, or begin anew with --fresh", path.display(), dir.display())]
    OtherInput {
        /// The folder.
        dir: PathBuf,
        /// Which of the two.
        input: &'static str,
        /// Its file or folder.
        path: PathBuf,
        /// SHA-256 of what the run began with.
        expected: String,
        /// SHA-256 of what is there now.
        found: String,
    },
    /// The drafter to begin with is of another kind than the plan's.
    #[error("the drafter in {} is an `{found:?}` where the workflow says `{expected:?}`; write `{found:?}(…)` among `speculation.drafters`, and in strategies", path.display())]
    DrafterNetwork {
        /// Its folder.
        path: PathBuf,
        /// Its kind.
        found: state::plan::NetworkKind,
        /// The plan's.
        expected: state::plan::NetworkKind,
    },
    /// The drafter to begin with is not the one that the plan describes.
    #[error("the drafter in {} has a feed-forward network of width {found} where the workflow says {expected}; write `ffn: {found}`", path.display())]
    DrafterWidth {
        /// Its folder.
        path: PathBuf,
        /// Its width.
        found: usize,
        /// The plan's.
        expected: usize,
    },
    /// What a drafter learns from was kept for one that reads other hidden states.
    #[error("its examples hold {found} numbers a token where the workflow's drafter reads {expected}")]
    Examples {
        /// Numbers a token that were kept.
        found: usize,
        /// Numbers a token that the drafter reads.
        expected: usize,
    },
    /// A run without a learned drafter.
    #[error(
        "{name} has no learned drafter to export; its workflow needs `Eagle` or `Eagle3` among `speculation.drafters`, and time to train it"
    )]
    NoDrafter {
        /// The run's name.
        name: String,
    },
    /// There is no run in the folder.
    #[error("{} holds no run; name the folder that `taper run` printed", dir.display())]
    NoRun {
        /// The folder.
        dir: PathBuf,
    },
    /// The journal does not say where the run goes on.
    #[error("{} holds a run that cannot go on: {problem}{}; restore {} from a backup, or begin anew with `taper run` and --fresh", dir.display(), newest_is(newest.as_ref()), dir.join("journal").display())]
    Lost {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with its journal.
        problem: String,
        /// Its newest checkpoint, if it has one.
        newest: Option<String>,
        /// What the journal said.
        source: Option<Box<state::Error>>,
    },
    /// A checkpoint that is needed cannot be used, and no older one can.
    #[error("the checkpoint {} is missing or damaged, and no older one is whole; restore it from a backup, or begin anew with `taper run` and --fresh", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        source: Box<Error>,
    },
    /// The list of a checkpoint's parts is not what was written.
    #[error("{} is damaged", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The run draws its tokens with another noise function.
    #[error("the run in {} draws with noise version {found}, this taper has version {supported}; use the taper that began it", dir.display())]
    Noise {
        /// The folder.
        dir: PathBuf,
        /// Version of the run.
        found: u32,
        /// Version of this program.
        supported: u32,
    },
    /// The plan cannot be run.
    #[error(transparent)]
    Plan(#[from] state::plan::OutOfRange),
    /// The system has too few threads for this process.
    #[error(
        "this process may not start the {needed} threads that it needs; raise the limit (`ulimit -u`, or that of its container), or lower `devices` in the workflow"
    )]
    Threads {
        /// How many.
        needed: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A device failed too often.
    #[error("{reason}; the run can be resumed after its cause is removed")]
    Device {
        /// What the supervisor says.
        reason: String,
    },
    /// Nothing could be learned.
    #[error(
        "no answer to any of the {problems} problems in {} can be scored (line {line}: {reason}); change the data or the rewards",
        path.display()
    )]
    NothingScored {
        /// The problems' file.
        path: PathBuf,
        /// How many there are.
        problems: usize,
        /// Line of the first one.
        line: usize,
        /// Why answers to it cannot be scored.
        reason: String,
    },
    /// The weights are no longer numbers.
    #[error(
        "{kind}, step {}: {}; lower the learning rate and begin anew with --fresh", step + 1, diverged(*norm)
    )]
    NotFinite {
        /// `sft` or `grpo`.
        kind: String,
        /// Step of the training, from 0.
        step: usize,
        /// Norm of the gradient.
        norm: f64,
    },
    /// An actor ended without saying why.
    #[error("the runtime failed: {reason}")]
    Runtime {
        /// What it said.
        reason: String,
    },
}

fn newest_is(newest: Option<&String>) -> String {
    newest.map_or_else(String::new, |name| format!(" (its newest checkpoint is {name})"))
}

fn diverged(norm: f64) -> String {
    match norm.is_finite() {
        true => format!("weights are no longer finite, after a gradient of norm {norm:.3e}"),
        false => format!("the gradient's norm is {norm}"),
    }
}

impl Error {
    /// Whether the system refused to read what may be whole.
    pub(crate) fn is_of_system(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Model(models::Error::Io { source, .. }) => is_of_system(source),
            _ => false,
        }
    }

    /// With the reasons behind it, for where one line is all that is told.
    pub(crate) fn whole(&self) -> String {
        let reasons = std::iter::successors(std::error::Error::source(self), |reason| reason.source());
        reasons.fold(self.to_string(), |text, reason| format!("{text}: {reason}"))
    }

    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
