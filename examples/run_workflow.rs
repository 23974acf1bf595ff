//! A run from Rust: parse a workflow, run it, read its report. Stop it with Ctrl-C and start it again: it goes on.
//!
//!     cargo run --release --example run_workflow

#![expect(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::sync::Arc;

use taper::state::algorithm::Outcome;
use taper::state::reward::Answer;
use taper::{Options, OwnReward, Progress, inspect, parse, report, run};

const WORKFLOW: &str = r##"Workflow(
    name: "example",
    model: Tiny(hidden: 64, layers: 4, heads: 2, ffn: 128, positions_max: 128),
    data: Chains(terms_min: 2, terms_mean: 3.0, terms_max: 6, tail: 0.1, tail_min: 5, heldout: 50),
    steps: [
        Evaluate(problems: 50),
        Sft(steps: 150, batch: 32, micro_batch: 8, optimizer: (lr: 5e-3, warmup: 20)),
        Grpo(steps: 5, prompts: 8, group: 8, micro_batch: 16, optimizer: (lr: 3e-4)),
        Evaluate(problems: 50),
    ],
    sampling: (temperature: 1.0, tokens_max: 64),
)"##;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plan = parse(WORKFLOW, Path::new(".")).map_err(|problems| problems[0].render(WORKFLOW))?;
    // Beside those of the workflow: an answer that takes many steps is to say each of them.
    let score = |answer: &Answer<'_>| {
        let (said, asked) = (answer.text.matches(';').count(), answer.question.matches(['+', '-']).count());
        Outcome::Scored(if said + 1 == asked { 0.1 } else { 0.0 })
    };
    let reward = OwnReward { name: "every step".into(), score: Arc::new(score) };
    let options = Options { dir: "runs/example".into(), reward: Some(reward), ..Options::default() };
    let dir = options.dir.clone();
    let observer = |progress| {
        if let Progress::StepDone(step) = progress {
            println!(
                "{} {}/{} loss {:.3} accuracy {:.2}",
                step.kind,
                step.step + 1,
                step.steps,
                step.loss,
                step.accuracy
            );
        }
    };
    let interrupt = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    let ended = run(&plan, options, observer, interrupt).await?;
    let report = report(&inspect(&dir)?, false);
    println!("{ended:?}: accuracy {:?} -> {:?}", report.accuracy_before, report.accuracy_after);
    Ok(())
}
