//! What a plan needs, loaded: shape, tokenizer, data, first weights.

use std::path::Path;
use std::sync::Arc;

use kernels::{RopeTable, Storage};
use models::chat::ChatTemplate;
use models::data::{Dataset, Problem};
use models::drafter::eagle;
use models::drafter::vocabulary::OwnHead;
use models::load::eagle::{Loaded, load_drafter};
use models::load::{gguf, hf, load_tiny};
use models::tokenizer::Tokenizer;
use models::train::Sequence;
use models::{Config, Stop, Target, Weights, sha};
use serde::Serialize;
use state::journal::Inputs;
use state::plan::{Compute, Devices, DrafterShape, Model, Plan, Source, Step};
use state::reward;

use crate::error::{Error, Result};
use crate::speculator::Published;

/// Generated problems that stand for all.
const GENERATED: u64 = 16;
/// As how many tokens the data's count at most for what is drafted: what the model says is soon known better than by its data.
const SEEN_MAX: u64 = 1 << 17;

/// Everything of a run that does not change while it runs.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) plan: Plan,
    pub(crate) config: Config,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Texts that end an answer.
    pub(crate) stop: Option<Stop>,
    pub(crate) chat_source: Option<String>,
    pub(crate) chat: Option<ChatTemplate>,
    pub(crate) dataset: Dataset,
    pub(crate) rope: RopeTable,
    /// The weights the run started from.
    pub(crate) initial: Weights,
    /// The drafter that learning begins with, if the plan names one.
    pub(crate) drafter: Option<Weights>,
    /// How often each token stands in the data, as far as it is listed.
    pub(crate) seen: Vec<u64>,
    /// SHA-256 of the listed problems, or of the first generated ones, and of their tokens.
    data_sha256: String,
    /// What is not as whoever wrote the data may think.
    pub(crate) warnings: Vec<String>,
}

impl Job {
    pub(crate) fn load(plan: &Plan) -> Result<Self> {
        let dataset = Dataset::open(&plan.data, plan.seed)?;
        let storage = match plan.compute {
            Compute::F32 => Storage::F32,
            Compute::Bf16 => Storage::Bf16,
        };
        let (config, tokenizer, chat, chat_source, initial) = match &plan.model {
            Model::Tiny { shape, weights, sha256 } => {
                let config = Config { storage, ..Config::tiny(shape)? };
                let initial = match weights {
                    Some(path) => Weights::from_raw(&config, &load_tiny(path, &config, sha256.as_deref())?)?,
                    None => Weights::random(&config, plan.seed)?,
                };
                (config, Tokenizer::chars(), None, None, initial)
            }
            Model::HuggingFace(path) | Model::Gguf(path) => {
                let is_gguf = matches!(plan.model, Model::Gguf(_));
                let loaded = if is_gguf { gguf::load(path)? } else { hf::load(path)? };
                let config = Config { storage, ..loaded.config.clone() };
                let initial = Weights::from_raw(&config, &loaded.weights)?;
                let chat = ChatTemplate::of(&loaded);
                (config, loaded.tokenizer, chat, loaded.chat_template, initial)
            }
        };
        let rope = Target::rope_table(&config);
        let seen = vec![0; config.vocab];
        let (mut plan, mut drafter) = (plan.clone(), None);
        if let Some(folder) = plan.drafter_weights() {
            let read = read_drafter(&plan, &Target::new(&config, &initial, &rope)?, folder)?;
            (plan.speculation, drafter) = (plan.speculation.as_wide_as(read.shape), Some(read.weights));
        }
        let tokenizer = Arc::new(tokenizer);
        let stop = Stop::new(&plan.sampling.stop, &tokenizer);
        let data_sha256 = String::new();
        let mut job = Self {
            plan,
            config,
            tokenizer,
            stop,
            chat_source,
            chat,
            dataset,
            rope,
            initial,
            drafter,
            seen,
            data_sha256,
            warnings: Vec::new(),
        };
        job.warnings.extend(crowd(&job.plan));
        job.read_problems()?;
        Ok(job)
    }

    /// What was read from outside the run's folder.
    pub(crate) fn inputs(&self) -> Inputs {
        let Config { heads, kv_heads, head_dim, rope_theta, eps, positions_max, bos, eos, .. } = &self.config;
        let shape = (heads, kv_heads, head_dim, rope_theta.to_bits(), eps.to_bits(), positions_max, bos, eos);
        Inputs { model_sha256: hash(&(self.initial.blake3(), shape)), data_sha256: self.data_sha256.clone() }
    }

    /// The drafter that devices use before any was trained.
    pub(crate) fn first_drafter(&self) -> Option<Published> {
        self.drafter.as_ref().map(|weights| Published::new(1, weights))
    }

    /// The weights in a folder of an exported drafter, and its head if it has one.
    pub(crate) fn read_drafter(&self, target: &Target, folder: &Path) -> Result<(Weights, Option<OwnHead>)> {
        read_drafter(&self.plan, target, folder).map(|read| (read.weights, read.head))
    }

    /// Finds problems that would stop the run later on, counts tokens, and says what was read.
    fn read_problems(&mut self) -> Result<()> {
        let Source::Jsonl(path, _) = &self.plan.data.source else {
            let generated = (0..GENERATED).map(|i| self.dataset.problem(i));
            let hashes = generated.map(|problem| hash_of(&problem, &self.tokens(&problem).unwrap_or_default()));
            self.data_sha256 = sha::of_bytes(hashes.collect::<String>().as_bytes());
            return Ok(());
        };
        let (mut seen, mut hashes) = (std::mem::take(&mut self.seen), String::new());
        // The first ones are held out. Of several mistakes the first line's is told.
        let mut listed: Vec<_> = self.dataset.listed().enumerate().collect();
        listed.sort_by_key(|(_, (line, _))| *line);
        let heldout = self.plan.data.heldout;
        let reads_solutions = self.reads_solutions();
        let (all, mut cut) = (listed.len() - heldout, 0);
        for (i, (line, problem)) in listed {
            let tokens = self.tokens(problem).map_err(|error| match error {
                Error::Model(reason) => Error::Model(models::Error::Problem {
                    path: path.clone(),
                    line,
                    question: problem.question.chars().take(40).collect(),
                    reason: Box::new(reason),
                }),
                other => other,
            })?;
            tokens.iter().for_each(|token| seen[*token as usize] += 1);
            hashes.push_str(&hash_of(problem, &tokens));
            cut += usize::from(reads_solutions && i >= heldout && tokens.len() > self.config.positions_max);
        }
        if cut > 0 {
            let (path, positions_max) = (path.display(), self.config.positions_max);
            let are = if cut == 1 { "is" } else { "are" };
            let why = format!("longer than the model's {positions_max} positions with their prompts");
            self.warnings
                .push(format!("{cut} of {all} solutions {are} cut where `Sft` learns from them: {why} ({path})"));
        }
        let unscorable = self.unscorable(path)?;
        self.warnings.extend(unscorable);
        (self.seen, self.data_sha256) = (at_most(seen, SEEN_MAX), sha::of_bytes(hashes.as_bytes()));
        Ok(())
    }

    /// What to say of problems whose answers cannot be scored, whatever they are; an error if that leaves none to learn from.
    fn unscorable(&self, path: &Path) -> Result<Option<String>> {
        let is_asked = self.plan.steps.iter().any(|step| matches!(step, Step::Grpo(_) | Step::Evaluate(_)));
        if !is_asked || self.plan.rewards.is_empty() {
            return Ok(None);
        }
        let failure = |(line, problem): (usize, &Problem)| {
            let (reference, solution) = (problem.answer.as_str(), problem.solution.as_deref());
            let tokens_max = self.plan.sampling.tokens_max;
            let question = problem.question.as_str();
            let answer =
                reward::Answer { question, text: "", reference, solution, tokens: 0, tokens_max, truncated: false };
            Some((line, reward::score(&self.plan.rewards, &answer).failure()?.to_owned()))
        };
        let failures: Vec<(usize, String)> = self.dataset.listed().filter_map(failure).collect();
        let (count, all) = (failures.len(), self.dataset.listed().count());
        let Some((line, reason)) = failures.into_iter().min() else { return Ok(None) };
        if count == all && self.plan.grpo().is_some() {
            return Err(Error::NothingScored { path: path.into(), problems: all, line, reason });
        }
        let so = "they teach nothing in `Grpo`, and count as wrong in accuracies";
        Ok(Some(format!("no answer to {count} of {all} problems can be scored: {so} (line {line}: {reason})")))
    }

    /// Tokens of a problem and its solution; an error if they cannot be used.
    fn tokens(&self, problem: &Problem) -> Result<Vec<u32>> {
        let prompt = self.prompt(problem)?;
        let (tokens, positions_max) = (prompt.len(), self.config.positions_max);
        if tokens == 0 || tokens >= positions_max {
            return Err(models::Error::PromptLength { tokens, positions_max }.into());
        }
        match self.solved(prompt.clone(), problem) {
            Ok(tokens) => Ok(tokens),
            Err(_) if !self.reads_solutions() => Ok(prompt),
            Err(error) => Err(error),
        }
    }

    /// Whether anything is learned from worked solutions; nothing else needs to read them.
    fn reads_solutions(&self) -> bool {
        self.plan.steps.iter().any(|step| matches!(step, Step::Sft(_)))
    }

    pub(crate) fn prompt(&self, problem: &Problem) -> Result<Vec<u32>> {
        let text = self.dataset.prompt(problem, self.chat.as_ref())?;
        // A chat template writes its own special tokens.
        Ok(if self.plan.data.chat { self.tokenizer.encode(&text)? } else { self.tokenizer.encode_first(&text)? })
    }

    /// A worked solution to learn from, with the token that ends it.
    pub(crate) fn solution(&self, problem: &Problem) -> Result<Sequence> {
        let prompt = self.prompt(problem)?;
        let (prompt, mut tokens) = (prompt.len(), self.solved(prompt, problem)?);
        tokens.truncate(self.config.positions_max);
        Ok(Sequence { tokens, prompt })
    }

    /// A prompt with its worked solution, however long.
    fn solved(&self, mut tokens: Vec<u32>, problem: &Problem) -> Result<Vec<u32>> {
        let text = problem.solution.as_deref().unwrap_or(&problem.answer);
        tokens.extend(self.tokenizer.encode(text)?);
        tokens.extend(self.config.eos.first());
        Ok(tokens)
    }
}

/// What to say of many more threads than cores.
fn crowd(plan: &Plan) -> Option<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let Devices { cpu, threads, .. } = plan.devices;
    let is_crowded = cpu.saturating_mul(threads) > 2 * cores;
    let count = if threads == 1 { format!("{cpu} devices") } else { format!("{cpu} devices of {threads} threads") };
    is_crowded.then(|| format!("{count} share {cores} cores: they mostly wait for each other (`devices`)"))
}

/// SHA-256 of a problem as the model reads it.
fn hash_of(Problem { question, answer, solution }: &Problem, tokens: &[u32]) -> String {
    hash(&(question, answer, solution, tokens))
}

/// SHA-256 of numbers, texts and lists of them: nothing in them could fail.
pub(crate) fn hash(what: &impl Serialize) -> String {
    sha::of_bytes(&serde_json::to_vec(what).unwrap_or_default())
}

/// A drafter as it was exported.
struct Read {
    weights: Weights,
    shape: DrafterShape,
    head: Option<OwnHead>,
}

/// A drafter that was exported for this target.
fn read_drafter(plan: &Plan, target: &Target, folder: &Path) -> Result<Read> {
    let Loaded { weights: raw, shape: found, head } = load_drafter(folder, target)?;
    let config = target.config();
    let width = |shape| eagle::config(config, shape).ffn;
    let found = DrafterShape { ffn: width(found), ..found };
    let shape = plan.speculation.shape().map_or(found, |shape| shape.as_wide_as(found));
    if shape.network != found.network {
        return Err(Error::DrafterNetwork { path: folder.into(), found: found.network, expected: shape.network });
    }
    if width(found) != width(shape) {
        return Err(Error::DrafterWidth { path: folder.into(), found: width(found), expected: width(shape) });
    }
    Ok(Read { weights: eagle::weights(config, shape, &raw)?, shape, head })
}

/// Counts whose sum is at most `most`, in the same proportion.
fn at_most(mut counts: Vec<u64>, most: u64) -> Vec<u64> {
    let total: u64 = counts.iter().sum();
    if total > most {
        counts.iter_mut().for_each(|count| *count = (*count as f64 * most as f64 / total as f64) as u64);
    }
    counts
}
