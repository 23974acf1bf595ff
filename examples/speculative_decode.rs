//! Speculative decoding: a drafter is trained for a moment on the model's own answers, then drafts for new questions.
//! The same tokens, in fewer forwards of the target.
//!
//!     cargo run --release --example speculative_decode

#![expect(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::sync::Arc;

use taper::kernels::{NoiseKey, Pool};
use taper::models::drafter::buffer::{Example, Window};
use taper::models::drafter::eagle::Eagle;
use taper::models::drafter::learn::{Learner, Workspace};
use taper::models::drafter::{Drafter, Vocabulary};
use taper::models::load::load_tiny;
use taper::models::tokenizer::Tokenizer;
use taper::models::{Answer, Config, Decoder, Decoding, Hidden, Target, Weights};
use taper::plan::{DrafterShape, Strategy, TinyShape};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const LEARNED: [&str; 4] = ["3+5-2+4-1+2?", "9-4+2-3+5-1?", "1+1+1+1+1+1+1?", "8-2-2-2+5+1-3?"];
const ASKED: [&str; 3] = ["2+3+4-5+1-2?", "7-1-1+3-6+4?", "4+4-3-3+6-2?"];

/// Answers to the questions and the number of forwards they took.
fn decode(
    target: &Arc<Target>,
    questions: &[&str],
    mut drafter: Option<&mut dyn Drafter>,
) -> Result<(Vec<Answer>, usize)> {
    let eos = target.config().eos.clone();
    let decoding = Decoding { temperature: 1.0, top_p: 1.0, tokens_max: 200, eos, stop: None, hidden: Hidden::Last };
    let mut decoder = Decoder::new(target.clone(), decoding, Arc::default());
    for (group, question) in questions.iter().enumerate() {
        let noise = |sample: u32| NoiseKey::new(1, 0, 0, group as u32, sample);
        decoder.admit(group, &Tokenizer::chars().encode(question)?, &[(0, noise(0)), (1, noise(1))])?;
    }
    let strategy = Strategy::chain(0, 5);
    let (mut answers, mut forwards) = (Vec::new(), 0);
    while decoder.running() > 0 {
        let draft = drafter.as_mut().map(|d| (&mut **d as &mut dyn Drafter, &strategy));
        answers.extend(decoder.cycle(draft)?.ended);
        forwards += 1;
    }
    answers.sort_by_key(|a| (a.group, a.sample));
    Ok((answers, forwards))
}

fn main() -> Result<()> {
    let shape = TinyShape { hidden: 128, layers: 10, heads: 4, kv_heads: 1, ffn: 352, positions_max: 512 };
    let config = Config::tiny(&shape)?;
    let weights = load_tiny(Path::new("workflows/quickstart.safetensors"), &config, None)?;
    let weights = Weights::from_raw(&config, &weights)?;
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config))?);

    let pool = Arc::new(Pool::default());
    let vocabulary = Arc::new(Vocabulary::whole(&target));
    let shape = DrafterShape::eagle(0);
    let mut learner = Learner::new(&config, shape, Learner::fresh(&target, shape, 1)?, 2e-3);
    let mut workspace = Workspace::default();
    let (answers, _) = decode(&target, &LEARNED, None)?;
    let windows: Vec<Window> = answers.iter().filter_map(Example::of).map(|e| Arc::new(e).whole()).collect();
    for _ in 0..60 {
        learner.learn(&pool, &vocabulary, &windows, &mut workspace)?;
    }

    let (plain, plain_forwards) = decode(&target, &ASKED, None)?;
    let mut eagle = Eagle::new(vocabulary, learner.weights(), shape, pool)?;
    let (drafted, drafted_forwards) = decode(&target, &ASKED, Some(&mut eagle))?;
    for (plain, drafted) in plain.iter().zip(&drafted) {
        assert_eq!(plain.tokens, drafted.tokens, "speculation changes no token");
        println!("{}", Tokenizer::chars().decode(&drafted.tokens));
    }
    println!("{plain_forwards} forwards without drafts, {drafted_forwards} with: the same tokens");
    Ok(())
}
