//! Greedy decoding with the quickstart's model: one forward a token.
//!
//!     cargo run --release --example greedy_decode -- '3+5-2+4?'

#![expect(clippy::print_stdout, reason = "an example")]

use std::path::Path;
use std::sync::Arc;

use taper::kernels::NoiseKey;
use taper::models::load::load_tiny;
use taper::models::tokenizer::Tokenizer;
use taper::models::{Config, Decoder, Decoding, Hidden, Target, Weights};
use taper::plan::TinyShape;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let question = std::env::args().nth(1).unwrap_or_else(|| "3+5-2+4?".into());
    let shape = TinyShape { hidden: 128, layers: 10, heads: 4, kv_heads: 1, ffn: 352, positions_max: 512 };
    let config = Config::tiny(&shape)?;
    let weights = load_tiny(Path::new("workflows/quickstart.safetensors"), &config, None)?;
    let weights = Weights::from_raw(&config, &weights)?;
    let target = Arc::new(Target::new(&config, &weights, &Target::rope_table(&config))?);

    let tokenizer = Tokenizer::chars();
    let decoding = Decoding {
        temperature: 0.0,
        top_p: 1.0,
        tokens_max: 256,
        eos: config.eos.clone(),
        stop: None,
        hidden: Hidden::Nothing,
    };
    let mut decoder = Decoder::new(target, decoding, Arc::default());
    decoder.admit(0, &tokenizer.encode(&question)?, &[(0, NoiseKey::new(0, 0, 0, 0, 0))])?;
    let mut forwards = 0;
    let answer = loop {
        forwards += 1;
        if let Some(answer) = decoder.cycle(None)?.ended.pop() {
            break answer;
        }
    };
    println!("{question}{}", tokenizer.decode(&answer.tokens[answer.prompt..]));
    println!("{forwards} forwards for {} tokens", answer.log_probs.len());
    Ok(())
}
