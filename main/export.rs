//! What a run made, as folders for others.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use actors::{Asked, DecodeOptions, Layout, Precision, Solo, real};
use kernels::NoiseKey;
use serde::Serialize;
use state::plan::{Controller, Strategy};
use state::run::{CHECKPOINTS, JOURNAL};

use crate::commands::Result;
use crate::failure::Failure;
use crate::generate::of_run;
use crate::output;

/// Separates the noise of these answers from that of rollouts and evaluations.
const STREAM: u32 = 4;
/// Answers decoded to see whether the folder drafts as the run does.
const ANSWERS: u64 = 8;
/// Levels of the drafts they are decoded with.
const DEPTH: usize = 4;
/// Share of the run's accept length below which a folder is no use: more than halves of numbers and so few answers explain.
const WORSE: f64 = 0.9;

/// What is written, and where to.
#[derive(clap::Args)]
pub(crate) struct Export {
    /// Folder of the run; its newest checkpoint is taken.
    run: PathBuf,
    /// Write the learned drafter instead of the model, as this engine reads it.
    #[arg(long, value_enum)]
    drafter: Option<Engine>,
    /// The target that vLLM is to load with an EAGLE-3 drafter: a folder or a name. Default: RUN/model, where the run's model is exported to.
    #[arg(long, value_name = "MODEL", requires = "drafter")]
    verifier: Option<String>,
    /// Where to. Default: RUN/model, RUN/model-half, or RUN/drafter-ENGINE.
    #[arg(long)]
    to: Option<PathBuf>,
    /// Store numbers in 16 bits instead of 32.
    #[arg(long)]
    half: bool,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Who reads a drafter.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Engine {
    Sglang,
    Vllm,
    Taper,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Exported {
    folder: PathBuf,
    drafter: Option<Comparison>,
}

/// A drafter and what became of it in the folder, on the same answers.
#[derive(Serialize)]
struct Comparison {
    engine: String,
    accept_length_run: f64,
    accept_length_folder: f64,
    answers: u64,
}

/// Whether a run keeps what it needs to go on there.
fn is_its_own(run: &Path, to: &Path) -> bool {
    let to = real(to);
    [CHECKPOINTS, JOURNAL].iter().any(|own| to.starts_with(real(&run.join(own))))
}

pub(crate) fn export(args: &Export) -> Result<ExitCode> {
    if let Some(to) = args.to.as_deref().filter(|to| is_its_own(&args.run, to)) {
        return Err(Failure::Taken { path: to.into() });
    }
    let solo = of_run(&args.run, 1)?;
    if solo.is_older() && args.to.is_none() {
        return Err(Failure::Older { path: args.run.clone() });
    }
    let precision = if args.half { Precision::F16 } else { Precision::F32 };
    let exported = match args.drafter {
        None => {
            let folder =
                args.to.clone().unwrap_or_else(|| args.run.join(if args.half { "model-half" } else { "model" }));
            solo.export(&folder, precision)?;
            Exported { folder, drafter: None }
        }
        Some(engine) => drafter(&solo, args, engine, precision)?,
    };
    match (args.json, &exported.drafter) {
        (true, _) => output::json(&exported)?,
        (false, None) => output::report(&format!("wrote the model to {}\n", exported.folder.display()))?,
        (false, Some(found)) => output::report(&format!(
            "wrote the drafter to {}, and read it again\n  accept length at depth {DEPTH} on {} answers: {:.2} from the folder, {:.2} in the run\n",
            exported.folder.display(),
            found.answers,
            found.accept_length_folder,
            found.accept_length_run,
        ))?,
    }
    let is_worse = |found: &Comparison| found.accept_length_folder < WORSE * found.accept_length_run;
    if exported.drafter.as_ref().is_some_and(is_worse) {
        output::note("the drafter in the folder guesses worse than the run's: do not use it, and tell us of it");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn drafter(solo: &Solo, args: &Export, engine: Engine, precision: Precision) -> Result<Exported> {
    let (layout, name) = match engine {
        Engine::Sglang => (Layout::Sglang, "sglang"),
        Engine::Vllm => (Layout::Vllm, "vllm"),
        Engine::Taper => (Layout::Taper, "taper"),
    };
    let folder = args.to.clone().unwrap_or_else(|| args.run.join(format!("drafter-{name}")));
    let verifier = match &args.verifier {
        Some(verifier) => verifier.clone(),
        None => real(&args.run).join("model").display().to_string(),
    };
    solo.export_drafter(&folder, (layout, &verifier), precision)?;
    // Before either drafts and learns how far it is to be believed.
    let read = solo.with_drafter(&folder)?;
    let (accept_length_run, accept_length_folder) = (accept_length(solo)?, accept_length(&read)?);
    let comparison = Comparison { engine: name.into(), accept_length_run, accept_length_folder, answers: ANSWERS };
    Ok(Exported { folder, drafter: Some(comparison) })
}

/// Tokens a cycle with the learned drafter alone, on held-out problems.
fn accept_length(solo: &Solo) -> Result<f64> {
    let asked = |i: u64| {
        let noise = NoiseKey::new(0, STREAM, 0, i as u32, 0);
        Ok(Asked { prompt: solo.heldout(i)?, noise })
    };
    let asked: Vec<Asked> = (0..ANSWERS).map(asked).collect::<Result<_>>()?;
    let plan = solo.plan();
    let learned = plan.speculation.learned().unwrap_or_default();
    let options = DecodeOptions::of(plan, 1, Controller::Fixed(Strategy::chain(learned, DEPTH)));
    Ok(solo.decode(&asked, &options)?.accept_length())
}
