//! Measurements that a user can repeat.

#[path = "bench/drafter.rs"]
mod drafter;
#[path = "bench/paper.rs"]
mod paper;
#[path = "bench/race.rs"]
mod race;
#[path = "bench/rollout.rs"]
mod rollout;

use std::process::ExitCode;

use clap::Subcommand;

use crate::commands::Result;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Decode a workflow's prompts plainly and with each strategy: speed, accept length, and whether the answers are the same.
    Rollout(rollout::Rollout),
    /// Run a workflow's GRPO with its drafter trained in idle time, trained before, and not at all: what does it cost and bring?
    Drafter(drafter::Drafter),
    /// Draw figures of the paper on the long tail for a model of one's own: depth, width and size of drafts, batch sizes,
    /// acceptance by level, running requests over time.
    Paper(paper::Paper),
}

pub(crate) fn bench(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Rollout(args) => rollout::rollout(args),
        Bench::Drafter(args) => drafter::drafter(args),
        Bench::Paper(args) => paper::paper(args),
    }
}
