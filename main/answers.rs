//! Answers of a run as JSON lines: what was asked, what was said, and what that was worth.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use actors::{Progress, ScoredGroup};
use serde::Serialize;
use state::metrics::StepMetrics;

use crate::failure::Failure;
use crate::output;

/// A file that answers are added to, step by step, each step's in the order of its groups.
pub(crate) struct Answers {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    /// Gone once it could not be written.
    file: Option<File>,
    /// Those of the step that is going on.
    groups: BTreeMap<usize, ScoredGroup>,
}

/// Keys of a line.
#[derive(Serialize)]
struct Line<'a> {
    stage: usize,
    step: usize,
    kind: &'a str,
    group: usize,
    sample: usize,
    question: &'a str,
    reference: &'a str,
    answer: &'a str,
    score: Option<f32>,
    failed: Option<&'a str>,
    correct: bool,
    tokens: usize,
    truncated: bool,
    policy_version: u32,
    drafter_version: u64,
}

impl Answers {
    /// Adds to the file, or begins it.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::options().create(true).append(true).open(path);
        let file = file.map_err(|source| Failure::Unwritable { path: path.into(), source })?;
        let state = State { file: Some(file), groups: BTreeMap::new() };
        Ok(Self { path: path.into(), state: Mutex::new(state) })
    }

    /// Takes in what a run tells.
    pub(crate) fn tell(&self, progress: &Progress) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::StepBegan { .. } => state.groups.clear(),
            Progress::Scored(group) => drop(state.groups.insert(group.group, ScoredGroup::clone(group))),
            Progress::StepDone(metrics) => {
                let text = lines(metrics, &std::mem::take(&mut state.groups));
                if let Some(Err(error)) = state.file.as_mut().map(|file| file.write_all(text.as_bytes())) {
                    // A training goes on when nobody can look at it.
                    output::note(&format!(
                        "warning: answers are not written any more to {}: {error}",
                        self.path.display()
                    ));
                    state.file = None;
                }
            }
            _ => {}
        }
    }
}

fn lines(metrics: &StepMetrics, groups: &BTreeMap<usize, ScoredGroup>) -> String {
    let mut text = String::new();
    for ScoredGroup { group, question, reference, answers } in groups.values() {
        for (sample, answer) in answers.iter().enumerate() {
            let line = Line {
                stage: metrics.stage,
                step: metrics.begun + metrics.step,
                kind: &metrics.kind,
                group: *group,
                sample,
                question,
                reference,
                answer: &answer.text,
                score: answer.outcome.score(),
                failed: answer.outcome.failure(),
                correct: answer.is_correct,
                tokens: answer.tokens,
                truncated: answer.truncated,
                policy_version: metrics.policy_version,
                drafter_version: answer.drafter_version,
            };
            // Nothing in it could fail.
            text += &serde_json::to_string(&line).unwrap_or_default();
            text.push('\n');
        }
    }
    text
}
