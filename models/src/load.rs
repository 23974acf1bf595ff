//! Models from files: their shape, their weights as plain numbers, their tokenizer.
//!
//! Everything that a file says is checked here against everything else it says, so that later code may rely on it.
//! Weights are f32 in memory whatever the file holds. Nothing here computes with a model.

pub mod eagle;
pub mod export;
pub mod gguf;
pub mod hf;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use kernels::Storage;
use state::plan::TinyShape;

use crate::error::{Error, Result};
use crate::layout::{ParameterShape, parameters};
use crate::sha;
use crate::tokenizer::Tokenizer;

/// Shape of a Llama-style decoder, and the few numbers its arithmetic needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in norms.
    pub eps: f32,
    /// The output head is the embedding.
    pub tied: bool,
    /// Longest sequence, in tokens.
    pub positions_max: usize,
    /// What matrices are computed with, and keys and values kept as; f32 unless asked otherwise.
    pub storage: Storage,
    /// Token that begins a text, where the model has one.
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

/// Weights as a file holds them, by Hugging Face names: shape and row-major values.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawWeights {
    /// By name, as in `model.layers.0.self_attn.q_proj.weight`; `lm_head.weight` only if untied.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// All that a model's files say.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Shape.
    pub config: Config,
    /// Weights, complete and finite.
    pub weights: RawWeights,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Jinja source that turns a chat into a prompt.
    pub chat_template: Option<String>,
}

/// Longest sequence that is believed, in tokens: tables of this length are made.
const POSITIONS_MAX: usize = 1 << 20;
/// Largest width or count that is believed.
const SIZE_MAX: usize = 1 << 22;

impl Config {
    /// Shape of a [`state::plan::Model::Tiny`]: the character vocabulary, tied, theta 10,000, eps 1e-5.
    ///
    /// # Errors
    /// If the sizes do not fit each other.
    pub fn tiny(shape: &TinyShape) -> Result<Self> {
        let tokenizer = Tokenizer::chars();
        let config = Self {
            vocab: tokenizer.vocab_size(),
            hidden: shape.hidden,
            layers: shape.layers,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.hidden / shape.heads.max(1),
            ffn: shape.ffn,
            rope_theta: 10_000.0,
            eps: 1e-5,
            tied: true,
            positions_max: shape.positions_max,
            storage: Storage::F32,
            bos: None,
            eos: tokenizer.eos().to_vec(),
        };
        if shape.heads > 0 && !shape.hidden.is_multiple_of(shape.heads) {
            return Err(refused(Path::new("the workflow"), "hidden", shape.hidden, "a multiple of `heads`"));
        }
        config.check(Path::new("the workflow"))?;
        Ok(config)
    }

    /// Refuses sizes that are zero, absurd, or do not fit each other. `path` is named in errors.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab, SIZE_MAX),
            ("hidden_size", self.hidden, SIZE_MAX),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("intermediate_size", self.ffn, SIZE_MAX),
            ("max_position_embeddings", self.positions_max, POSITIONS_MAX),
        ];
        for (field, value, most) in sizes {
            if value == 0 || value > most {
                return Err(refused(path, field, value, &format!("1 to {most}")));
            }
        }
        self.check_heads(path)?;
        self.check_numbers(path)
    }

    fn check_heads(&self, path: &Path) -> Result<()> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(refused(path, "num_key_value_heads", self.kv_heads, "a divisor of the number of heads"));
        }
        match self.head_dim.is_multiple_of(2) {
            true => Ok(()),
            false => Err(refused(path, "head_dim", self.head_dim, "an even number")),
        }
    }

    fn check_numbers(&self, path: &Path) -> Result<()> {
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return Err(refused(path, "rope_theta", self.rope_theta, "a number from 1"));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(refused(path, "rms_norm_eps", self.eps, "a number above 0"));
        }
        match self.eos.iter().chain(&self.bos).find(|id| **id as usize >= self.vocab) {
            Some(id) => Err(refused(path, "eos_token_id or bos_token_id", id, "an id below `vocab_size`")),
            None => Ok(()),
        }
    }
}

impl RawWeights {
    /// Asserts that exactly the parameters of `config` are there, in their shapes, finite.
    pub(crate) fn check(&self, config: &Config, place: &str) -> Result<()> {
        for parameter in parameters(config) {
            let Some((found, values)) = self.tensors.get(&parameter.name) else {
                return Err(Error::MissingTensor { name: parameter.name, place: place.into() });
            };
            let expected = dims(parameter.shape);
            if *found != expected {
                return Err(Error::shape(parameter.name, found, &expected, place));
            }
            finite(&parameter.name, values, place)?;
        }
        Ok(())
    }
}

/// Weights of a Tiny model from one safetensors file (f32, f16 or bf16), checked against `config` and, if given, a
/// SHA-256 in hex.
///
/// # Errors
/// If the file is missing, damaged, another one, or does not fit the shape.
pub fn load_tiny(path: &Path, config: &Config, sha256: Option<&str>) -> Result<RawWeights> {
    let bytes = read("weights file", path)?;
    if let Some(expected) = sha256 {
        sha::expect(path, sha::of_bytes(&bytes), expected)?;
    }
    let mut weights = RawWeights::default();
    hf::read_tensors(path, &bytes, config, &mut weights)?;
    weights.check(config, &place(path))?;
    Ok(weights)
}

pub(crate) fn dims(shape: ParameterShape) -> Vec<usize> {
    match shape {
        ParameterShape::Vector(k) => vec![k],
        ParameterShape::Matrix(n, k) => vec![n, k],
    }
}

pub(crate) fn finite(name: &str, values: &[f32], place: &str) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite { name: name.into(), index, value: values[index], place: place.into() }),
    }
}

pub(crate) fn place(path: &Path) -> String {
    format!("`{}`", path.display())
}

pub(crate) fn refused(path: &Path, field: &str, value: impl std::fmt::Display, supported: &str) -> Error {
    Error::Config { path: path.into(), field: field.into(), value: value.to_string(), supported: supported.into() }
}

/// All tensors of a safetensors file whose hash is known: a part of a checkpoint.
///
/// # Errors
/// If the file is missing, is another one than was written, or holds numbers that are not finite.
pub fn load_part(path: &Path, sha256: &str) -> Result<RawWeights> {
    let bytes = read("part of a checkpoint", path)?;
    if crate::sha::of_bytes(&bytes) != sha256 {
        return Err(Error::Altered { path: path.into() });
    }
    hf::read_all(path, &bytes)
}

/// Reads a whole file; a missing one is an error of its own.
pub(crate) fn read(what: &'static str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| missing_or(what, path, source))
}

fn missing_or(what: &'static str, path: &Path, source: std::io::Error) -> Error {
    match source.kind() {
        std::io::ErrorKind::NotFound => Error::FileMissing { what, path: path.into() },
        _ => Error::Io { path: path.into(), source },
    }
}

fn open(what: &'static str, path: &Path) -> Result<File> {
    File::open(path).map_err(|source| missing_or(what, path, source))
}

/// Parses JSON, with the place of a mistake.
pub(crate) fn json(path: &Path, bytes: &[u8]) -> Result<serde_json::Value> {
    serde_json::from_slice(bytes).map_err(|source| Error::Json {
        path: PathBuf::from(path),
        line: source.line(),
        column: source.column(),
        source,
    })
}
