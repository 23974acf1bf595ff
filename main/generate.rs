//! A prompt in, a text out.

#[path = "generate/stream.rs"]
mod stream;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use actors::{Asked, DecodeOptions, Decoded, Solo};
use kernels::NoiseKey;
use models::Stop;
use serde::Serialize;
use state::plan::{Controller, Model, Plan};
use state::watchdog::PutOff;

use crate::commands::{Result, load};
use crate::failure::Failure;
use crate::number;
use crate::output;
use stream::Stream;

/// Separates the noise of generated texts from that of rollouts and evaluations.
const STREAM: u32 = 3;

/// Seconds after which a comparison is believed.
const COMPARED_S: f64 = 0.25;

/// What is generated, from what, and how.
#[derive(clap::Args)]
pub(crate) struct Generate {
    /// A workflow file, the folder of a run (its newest checkpoint, and its drafter), a GGUF file, or a Hugging Face folder.
    model: PathBuf,
    /// The question. Default: what stdin has.
    prompt: Option<String>,
    /// Take the prompt as it stands, without template or chat.
    #[arg(long)]
    raw: bool,
    /// Sampling temperature; 0 is greedy. Default: the workflow's.
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw from the likeliest tokens that have together this probability, above 0 up to 1. Default: the workflow's.
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long)]
    tokens: Option<usize>,
    /// End the answer before this text. May be given several times. Default: the workflow's texts.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Decides the answer, together with the prompt.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Threads. Default: one a core.
    #[arg(long, value_parser = number::threads)]
    threads: Option<usize>,
    /// Decode without speculation, too: how much faster is it with, and is the text the same?
    #[arg(long)]
    compare: bool,
    /// For machines: one JSON object, at the end.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Generated {
    text: String,
    tokens: usize,
    truncated: bool,
    seconds: f64,
    tokens_per_s: f64,
    forwards: usize,
    accept_length: f64,
    /// Why the learned drafter was put off, if it was.
    drafter_off: Option<PutOff>,
    plain_tokens_per_s: Option<f64>,
    ratio: Option<f64>,
    identical: Option<bool>,
}

pub(crate) fn generate(args: &Generate) -> Result<ExitCode> {
    let threads = args.threads.unwrap_or_else(cores);
    let (solo, is_bare) = open(&args.model, threads)?;
    let text = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => {
            if std::io::stdin().is_terminal() {
                output::note("type the prompt; Ctrl-D on a line of its own ends it");
            }
            let text = std::io::read_to_string(std::io::stdin()).map_err(Failure::Input)?;
            // The newline that ends a line is not part of it.
            text.strip_suffix('\n').map_or(text.clone(), |line| line.trim_end_matches('\r').to_owned())
        }
    };
    if text.is_empty() {
        return Err(Failure::NoPrompt);
    }
    let is_chat = is_bare && solo.has_chat() && !args.raw;
    let prompt = if is_chat { solo.chat(&text)? } else { solo.prompt(&text, args.raw || is_bare)? };
    let asked = [Asked { prompt, noise: NoiseKey::new(args.seed, STREAM, 0, 0, 0) }];
    let plan = solo.plan();
    let usual = DecodeOptions::of(plan, 1, plan.speculation.controller.clone());
    let options = DecodeOptions {
        temperature: args.temperature.unwrap_or(usual.temperature),
        top_p: args.top_p.unwrap_or(usual.top_p),
        tokens_max: args.tokens.unwrap_or(usual.tokens_max),
        stop: if args.stop.is_empty() { usual.stop.clone() } else { args.stop.clone() },
        ..usual
    };
    if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        return Err(Failure::Temperature(options.temperature));
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        return Err(Failure::TopP(options.top_p));
    }
    if options.tokens_max == 0 {
        return Err(Failure::Tokens);
    }
    if options.stop.iter().any(String::is_empty) {
        return Err(Failure::Stop);
    }
    let (mut session, stop) = (solo.begin(&asked, &options)?, solo.stop(&options));
    let decode = |tokens: &[u32]| solo.text(tokens);
    let mut stream = (!args.json).then(|| Stream::new(decode, stop.as_ref(), asked[0].prompt.len()));
    while !session.is_done() {
        session.cycle()?;
        if let Some(stream) = &mut stream {
            session.progress().for_each(|(_, tokens)| show(&stream.grow(tokens)));
        }
    }
    let decoded = session.finish();
    if let Some((stream, answer)) = stream.zip(decoded.answers.first()) {
        show(&stream.end(&answer.tokens));
    }
    let plain = if args.compare { Some(compare((&solo, &decoded), &asked, &options)?) } else { None };
    tell(&Generated::of((&solo, stop.as_ref()), &decoded, plain.as_ref()), args.json)
}

/// The answer decoded plainly, and how fast it was that way and, as it has been already, with speculation: again and again, in turns,
/// where once is too short to tell.
fn compare((solo, with): (&Solo, &Decoded), asked: &[Asked], options: &DecodeOptions) -> Result<Compared> {
    let off = DecodeOptions { controller: Controller::Off, ..options.clone() };
    let plain = solo.decode(asked, &off)?;
    let (mut seconds, mut times) = ([plain.seconds, with.seconds], 1);
    while seconds[0].min(seconds[1]) < COMPARED_S {
        for (seconds, options) in seconds.iter_mut().zip([&off, options]) {
            *seconds += solo.decode(asked, options)?.seconds;
        }
        times += 1;
    }
    let tokens = (times * plain.tokens()) as f64;
    Ok(Compared { plain, rates: seconds.map(|seconds| tokens / seconds) })
}

/// Plain decoding beside speculation.
struct Compared {
    plain: Decoded,
    /// Tokens a second without and with.
    rates: [f64; 2],
}

impl Generated {
    fn of((solo, stop): (&Solo, Option<&Stop>), decoded: &Decoded, compared: Option<&Compared>) -> Self {
        let tokens = |d: &Decoded| d.answers.first().map(|a| a.tokens.clone()).unwrap_or_default();
        let text = decoded.answers.first().map(|a| solo.text(&a.tokens[a.prompt..])).unwrap_or_default();
        Self {
            text: stop.map_or(text.as_str(), |stop| stop.before(&text)).to_owned(),
            tokens: decoded.tokens(),
            truncated: decoded.answers.iter().any(|a| a.truncated),
            seconds: decoded.seconds,
            tokens_per_s: decoded.rate(),
            forwards: decoded.forwards(),
            accept_length: decoded.accept_length(),
            drafter_off: decoded.put_off,
            plain_tokens_per_s: compared.map(|c| c.rates[0]),
            ratio: compared.map(|c| c.rates[1] / c.rates[0]),
            identical: compared.map(|c| tokens(&c.plain) == tokens(decoded)),
        }
    }
}

fn tell(generated: &Generated, json: bool) -> Result<ExitCode> {
    let Generated { tokens, seconds, tokens_per_s, accept_length, .. } = generated;
    if json {
        output::json(generated)?;
    } else {
        output::report("\n")?;
        let cut = if generated.truncated { ", cut there (--tokens)" } else { "" };
        output::note(&format!(
            "{}{cut}  {seconds:.2} s  {tokens_per_s:.1} tokens/s  {accept_length:.2} tokens a forward",
            output::count(*tokens as u64, "token")
        ));
    }
    if let Some(why) = generated.drafter_off {
        output::note(&format!("the learned drafter is off: {why}"));
    }
    if let (Some(plain), Some(ratio), Some(identical)) =
        (generated.plain_tokens_per_s, generated.ratio, generated.identical)
    {
        let same = if identical { "the same text" } else { "ANOTHER TEXT" };
        let with = plain * ratio;
        output::note(&format!(
            "in turns: {plain:.1} tokens/s without speculation, {with:.1} with it: {ratio:.2}x, {same}"
        ));
        return Ok(if identical { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a part of an answer to stdout at once.
fn show(text: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that has gone misses the rest.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The model of whatever the path names; whether it is a model alone, without workflow.
pub(crate) fn open(path: &Path, threads: usize) -> Result<(Solo, bool)> {
    if path.join("journal").is_dir() {
        return Ok((of_run(path, threads)?, false));
    }
    let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    match (path.join("config.json").is_file(), is_gguf) {
        (true, _) => Ok((Solo::load(&bare("HuggingFace", path)?, threads)?, true)),
        (_, true) => Ok((Solo::load(&bare("Gguf", path)?, threads)?, true)),
        _ if path.is_dir() => Err(Failure::NoModel { path: path.into() }),
        _ if path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) => {
            Err(Failure::WeightsAlone { path: path.into() })
        }
        _ => {
            let plan = load(path)?;
            if matches!(plan.model, Model::Tiny { weights: None, .. }) {
                let run = "name the folder of a run for what one has learned";
                output::note(&format!("warning: {} names no weights, so they are random; {run}", path.display()));
            }
            Ok((Solo::load(&plan, threads)?, false))
        }
    }
}

/// The model of a run, as its newest whole checkpoint has it; before there is one, as the run began.
pub(crate) fn of_run(path: &Path, threads: usize) -> Result<Solo> {
    let solo = Solo::of_run(path, threads)?;
    solo.warnings().iter().for_each(|text| output::note(&format!("warning: {text}")));
    Ok(solo)
}

/// A plan around a model that comes without one.
fn bare(kind: &str, path: &Path) -> Result<Plan> {
    let absolute = std::path::absolute(path).map_err(Failure::file(path))?;
    let text = format!(
        "Workflow(name: \"model\", model: {kind}({:?}), compute: Bf16, data: Chains(heldout: 1), steps: [Evaluate(problems: 1)], \
         speculation: (drafters: [Suffix()]))",
        absolute.display().to_string()
    );
    workflows::parse(&text, Path::new("/")).map_err(|problems| Failure::Workflow { path: path.into(), text, problems })
}
