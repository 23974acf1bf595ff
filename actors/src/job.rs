//! What a plan needs, loaded: shape, tokenizer, data, first weights.

use std::path::Path;
use std::sync::Arc;

use kernels::{RopeTable, Storage};
use models::chat::ChatTemplate;
use models::data::{Dataset, Problem};
use models::drafter::eagle;
use models::load::eagle::load_drafter;
use models::load::{gguf, hf, load_tiny};
use models::tokenizer::Tokenizer;
use models::train::Sequence;
use models::{Config, Stop, Target, Weights, sha};
use serde::Serialize;
use state::journal::Inputs;
use state::plan::{Compute, Model, Plan, Source, Step};

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
        let drafter =
            plan.drafter_weights().map(|folder| drafter(plan, &Target::new(&config, &initial, &rope)?, folder));
        let drafter = drafter.transpose()?;
        let plan = plan.clone();
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
        };
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

    /// The weights in a folder of an exported drafter.
    pub(crate) fn read_drafter(&self, target: &Target, folder: &Path) -> Result<Weights> {
        drafter(&self.plan, target, folder)
    }

    /// Finds problems that would stop the run later on, counts tokens, and says what was read.
    fn read_problems(&mut self) -> Result<()> {
        let Source::Jsonl(path) = &self.plan.data.source else {
            let generated = (0..GENERATED).map(|i| self.dataset.problem(i));
            let hashes = generated.map(|problem| hash_of(&problem, &self.tokens(&problem).unwrap_or_default()));
            self.data_sha256 = sha::of_bytes(hashes.collect::<String>().as_bytes());
            return Ok(());
        };
        let (mut seen, mut hashes) = (std::mem::take(&mut self.seen), String::new());
        for (i, problem) in self.dataset.listed().iter().enumerate() {
            let tokens = self.tokens(problem).map_err(|error| match error {
                Error::Model(reason) => Error::Model(models::Error::Problem {
                    path: path.clone(),
                    number: i + 1,
                    question: problem.question.chars().take(40).collect(),
                    reason: Box::new(reason),
                }),
                other => other,
            })?;
            tokens.iter().for_each(|token| seen[*token as usize] += 1);
            hashes.push_str(&hash_of(problem, &tokens));
        }
        (self.seen, self.data_sha256) = (at_most(seen, SEEN_MAX), sha::of_bytes(hashes.as_bytes()));
        Ok(())
    }

    /// Tokens of a problem and its solution; an error if they cannot be used.
    fn tokens(&self, problem: &Problem) -> Result<Vec<u32>> {
        let prompt = self.prompt(problem)?;
        let (tokens, positions_max) = (prompt.len(), self.config.positions_max);
        if tokens == 0 || tokens >= positions_max {
            return Err(models::Error::PromptLength { tokens, positions_max }.into());
        }
        match self.solved(prompt.clone(), problem) {
            Ok(sequence) => Ok(sequence.tokens),
            // Only learning from solutions needs to read them.
            Err(_) if !self.plan.steps.iter().any(|step| matches!(step, Step::Sft(_))) => Ok(prompt),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn prompt(&self, problem: &Problem) -> Result<Vec<u32>> {
        let text = self.dataset.prompt(problem, self.chat.as_ref())?;
        // A chat template writes its own special tokens.
        Ok(if self.plan.data.chat { self.tokenizer.encode(&text)? } else { self.tokenizer.encode_first(&text)? })
    }

    /// A worked solution to learn from, with the token that ends it.
    pub(crate) fn solution(&self, problem: &Problem) -> Result<Sequence> {
        self.solved(self.prompt(problem)?, problem)
    }

    fn solved(&self, mut tokens: Vec<u32>, problem: &Problem) -> Result<Sequence> {
        let prompt = tokens.len();
        let text = problem.solution.as_deref().unwrap_or(&problem.answer);
        tokens.extend(self.tokenizer.encode(text)?);
        tokens.extend(self.config.eos.first());
        tokens.truncate(self.config.positions_max);
        Ok(Sequence { tokens, prompt })
    }
}

/// SHA-256 of a problem as the model reads it.
fn hash_of(Problem { question, answer, solution }: &Problem, tokens: &[u32]) -> String {
    hash(&(question, answer, solution, tokens))
}

/// SHA-256 of numbers, texts and lists of them: nothing in them could fail.
pub(crate) fn hash(what: &impl Serialize) -> String {
    sha::of_bytes(&serde_json::to_vec(what).unwrap_or_default())
}

/// A drafter that was exported for this target.
fn drafter(plan: &Plan, target: &Target, folder: &Path) -> Result<Weights> {
    let (raw, found) = load_drafter(folder, target)?;
    let config = target.config();
    let shape = plan.speculation.shape().unwrap_or(found);
    let width = |shape| eagle::config(config, shape).ffn;
    if shape.network != found.network {
        return Err(Error::DrafterNetwork { path: folder.into(), found: found.network, expected: shape.network });
    }
    if width(found) != width(shape) {
        return Err(Error::DrafterWidth { path: folder.into(), found: width(found), expected: width(shape) });
    }
    Ok(eagle::weights(config, shape, &raw)?)
}

/// Counts whose sum is at most `most`, in the same proportion.
fn at_most(mut counts: Vec<u64>, most: u64) -> Vec<u64> {
    let total: u64 = counts.iter().sum();
    if total > most {
        counts.iter_mut().for_each(|count| *count = (*count as f64 * most as f64 / total as f64) as u64);
    }
    counts
}
