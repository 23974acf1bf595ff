//! How failures reach the user: on stderr, with exit code 2 for bad input and 1 for the rest.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What can go wrong on the command line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A workflow file that cannot be read.
    #[error("cannot read the workflow {}; check the path", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// A workflow with problems.
    #[error("{} of {} cannot be run as it is", count(problems.len()), path.display())]
    Workflow { path: PathBuf, text: String, problems: Vec<workflows::Problem> },
    /// A run that failed.
    #[error(transparent)]
    Run(#[from] actors::Error),
    /// Output that could not be made.
    #[error("cannot write the report")]
    Json(#[from] serde_json::Error),
    /// A folder that cannot be removed.
    #[error("cannot remove {}; check permissions", path.display())]
    Remove { path: PathBuf, source: std::io::Error },
    /// A folder that is not a run's.
    #[error("{} is not the folder of a run; --fresh removes only runs", path.display())]
    NotARun { path: PathBuf },
    /// The runtime did not start.
    #[error("the runtime cannot start")]
    Runtime(#[source] std::io::Error),
}

fn count(problems: usize) -> String {
    if problems == 1 { "1 problem".into() } else { format!("{problems} problems") }
}

impl Failure {
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { path, source }
    }

    /// Prints it; the exit code.
    pub(crate) fn tell(&self) -> ExitCode {
        if let Self::Workflow { text, problems, .. } = self {
            for problem in problems {
                eprintln!("{}", problem.render(text));
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
        eprintln!("{message}");
        ExitCode::from(if self.is_input() { 2 } else { 1 })
    }

    fn is_input(&self) -> bool {
        use actors::Error;
        !matches!(
            self,
            Self::Runtime(_)
                | Self::Run(
                    Error::Device { .. }
                        | Error::Runtime { .. }
                        | Error::NotFinite { .. }
                        | Error::NothingScored { .. }
                )
        )
    }
}
