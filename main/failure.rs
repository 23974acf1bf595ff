//! How failures reach the user: on stderr, with exit code 2 for bad input and 1 for the rest.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use state::error::{advice, is_of_path};

use crate::output;

/// What can go wrong on the command line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A workflow file that cannot be read.
    #[error("cannot read {}; {}", path.display(), advice(source))]
    File { path: PathBuf, source: std::io::Error },
    /// A workflow with problems.
    #[error("{} cannot be run as it is: {}", path.display(), output::count(problems.len() as u64, "problem"))]
    Workflow { path: PathBuf, text: String, problems: Vec<workflows::Problem> },
    /// A run that failed.
    #[error(transparent)]
    Run(#[from] actors::Error),
    /// A report that cannot be made.
    #[error("cannot write the report")]
    Json(#[from] serde_json::Error),
    /// A report that has nowhere to go.
    #[error("cannot write to stdout; check free space")]
    Output(#[source] std::io::Error),
    /// A comparison of a run with itself.
    #[error("speculation and lending of {} are off: there is nothing to compare; give it drafters and a controller, or `lending: true`", path.display())]
    NothingToCompare { path: PathBuf },
    /// A workflow without a drafter that learns while a policy does.
    #[error("{} has no step of GRPO, or no drafter that learns: give it `Grpo(…)`, and `Eagle` or `Eagle3` among `speculation.drafters`", path.display())]
    NothingToTeach { path: PathBuf },
    /// A workflow whose controller measures nothing.
    #[error("{} has no controller that measures: give it `speculation: (controller: Bandit(strategies: […]))`", path.display())]
    NoBandit { path: PathBuf },
    /// A model without a drafter that learned.
    #[error("{} has no drafter that learns: give it `Eagle` or `Eagle3` among `speculation.drafters`, `training`, and more of `--learn-from` and `--learn-s`", path.display())]
    NothingToDraft { path: PathBuf },
    /// A drafter that nothing was made of yet.
    #[error("the drafter of {} cannot draft yet: give it more of `--learn-from` and `--learn-s`, and `training` in its workflow", path.display())]
    NothingLearned { path: PathBuf },
    /// Ways to draft that were compared without drafts.
    #[error(
        "nothing was drafted by {ways}: what was compared is plain decoding; decode more (`--requests`, `--tokens`), let the drafter learn more (`--learn-from`, `--learn-s`), or give `Suffix` a smaller `match_min`"
    )]
    NeverDrafted { ways: String },
    /// A file of decisions that is none.
    #[error("line {line} of {} is no decision; give it a file that `taper run --decisions` has written", path.display())]
    Decision { path: PathBuf, line: usize, source: serde_json::Error },
    /// A file without decisions.
    #[error("{} has no decisions; give it a file that `taper run --decisions` has written", path.display())]
    NoDecisions { path: PathBuf },
    /// A file that cannot be written.
    #[error("cannot write {}; check the path and free space", path.display())]
    Unwritable { path: PathBuf, source: std::io::Error },
    /// A chart that cannot be drawn.
    #[error("a chart could not be drawn: {0}")]
    Chart(String),
    /// A prompt that cannot be read.
    #[error("cannot read the prompt from stdin; it must be text in UTF-8")]
    Input(#[source] std::io::Error),
    /// A temperature that is none.
    #[error("--temperature {0} is not a number from 0 on; 0 is greedy, 1 draws as likely as the model says")]
    Temperature(f32),
    /// A probability that is none.
    #[error("--top-p {0} is not above 0 and up to 1; 1 draws from all tokens")]
    TopP(f32),
    /// An answer without a token.
    #[error("--tokens 0 leaves no room for an answer; write 1 or more")]
    Tokens,
    /// A text that stands everywhere.
    #[error("--stop \"\" would end every answer before it begins; give it a text")]
    Stop,
    /// A question without a word.
    #[error("the prompt is empty; write one, or send it through stdin")]
    NoPrompt,
    /// A folder without a model.
    #[error("{} is neither the folder of a run nor a model: there is no journal and no config.json in it", path.display())]
    NoModel { path: PathBuf },
    /// A folder that a run keeps for itself.
    #[error("{} is where the run keeps what it goes on from; name another folder", path.display())]
    Taken { path: PathBuf },
    /// A run whose files are elsewhere now.
    #[error("{source}; if it was moved, `{again}` goes on with the places that the workflow names now")]
    Moved { again: String, source: models::Error },
    /// An export that may take the place of a better one.
    #[error("{} has learned more than what can be read of it: go on with the run, or name a folder for the older model with --to", path.display())]
    Older { path: PathBuf },
    /// Weights without what tells how to use them.
    #[error("{} has weights only; name the workflow, the run or the Hugging Face folder that they belong to", path.display())]
    WeightsAlone { path: PathBuf },
    /// An environment variable that means nothing.
    #[error("{name}={value} means nothing; {wanted}")]
    Variable { name: &'static str, value: String, wanted: &'static str },
    /// The runtime did not start.
    #[error("the runtime cannot start")]
    Runtime(#[source] std::io::Error),
}

impl Failure {
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { path, source }
    }

    /// Prints it; the exit code.
    pub(crate) fn tell(&self) -> ExitCode {
        if let Self::Workflow { path, text, problems } = self {
            for problem in problems {
                output::note(&format!("{}:{}", path.display(), problem.render(text)));
            }
        }
        let mut message = format!("error: {self}");
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !message.contains(&text) {
                message.push_str(&format!("\n  because: {text}"));
            }
            cause = error.source();
        }
        output::note(&message);
        ExitCode::from(if self.is_input() { 2 } else { 1 })
    }

    /// Whether what was given is to be changed. Else the same command may do another time.
    fn is_input(&self) -> bool {
        match self {
            Self::Runtime(_) | Self::Json(_) | Self::Output(_) | Self::Chart(_) => false,
            Self::File { source, .. } | Self::Unwritable { source, .. } => is_of_path(source),
            Self::Run(error) => is_input(error),
            _ => true,
        }
    }
}

fn is_input(error: &actors::Error) -> bool {
    use actors::Error;
    match error {
        Error::Device { .. }
        | Error::Runtime { .. }
        | Error::NotFinite { .. }
        | Error::WorkedOn { .. }
        | Error::Threads { .. } => false,
        Error::Io { source, .. }
        | Error::Model(models::Error::Io { source, .. })
        | Error::Journal(state::Error::Io { source, .. }) => is_of_path(source),
        Error::Journal(state::Error::Store { .. }) => false,
        _ => true,
    }
}
