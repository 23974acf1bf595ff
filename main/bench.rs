//! Measurements that a user can repeat.

#[path = "bench/controller.rs"]
mod controller;
#[path = "bench/drafter.rs"]
mod drafter;
#[path = "bench/lossless.rs"]
mod lossless;
#[path = "bench/paper.rs"]
mod paper;
#[path = "bench/race.rs"]
mod race;
#[path = "bench/rollout.rs"]
mod rollout;
#[path = "bench/sampler.rs"]
mod sampler;

use std::process::ExitCode;

use clap::Subcommand;

use crate::commands::Result;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Decode a workflow's prompts plainly and with each strategy: speed, accept length, and whether the answers are the same.
    ///
    /// What it calls neither target nor drafter is the share of the whole time, from the first request's admission on, that is neither in
    /// forwards of the target, those of prompts among them, nor in drafting, where a drafter's network and its catching up count as
    /// drafting: what is left is admitting, choosing, drawing tokens, accepting and measuring.
    Rollout(rollout::Rollout),
    /// Decode a workflow's prompts with every drafter under every controller, in several batch sizes, and while answers move between
    /// devices: is any of them not the one of plain decoding?
    Lossless(lossless::Lossless),
    /// Play rollouts again from recorded cycles: what does the controller lose against the best strategy or table in hindsight?
    Controller(controller::Controllers),
    /// Run a workflow's GRPO with its drafter trained in idle time, trained before, and not at all: what does it cost and bring?
    Drafter(drafter::Drafter),
    /// Draw figures of the paper on the long tail for a model of one's own: depth, width and size of drafts, batch sizes,
    /// acceptance by level, running requests over time.
    Paper(paper::Paper),
    /// Draw a million tokens from each of two dozen distributions: are they drawn as softmax at T, and its nucleus, say (chi-square)?
    Sampler(sampler::Sampler),
}

pub(crate) fn bench(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Rollout(args) => rollout::rollout(args),
        Bench::Lossless(args) => lossless::lossless(args),
        Bench::Controller(args) => controller::controller(args),
        Bench::Drafter(args) => drafter::drafter(args),
        Bench::Paper(args) => paper::paper(args),
        Bench::Sampler(args) => sampler::sampler(args),
    }
}
