//! The learned drafter as a folder, in the layouts of EAGLE's and EAGLE-3's own checkpoints, which SGLang and vLLM read:
//! `config.json`, and `model.safetensors`.
//!
//! An `Eagle` (Li et al. 2024) is `fc.weight` and one layer, `layers.0`, without a norm before its attention; embedding and head are the
//! target's. An `Eagle3` (Li et al. 2025) has its layer as `midlayer`, and the part of the target's head that it drafts with
//! (`third`); for vLLM it is written in the form of its library of drafters (`speculators`).
//!
//! Engines skip tensors whose names they do not know without a word and start others from whatever was in memory, so that
//! names, shapes and numbers are checked here, when writing and when reading.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use state::plan::{DrafterShape, NetworkKind};

use super::export::{self, Kind, Partial, Precision, write_beside, write_json};
use super::{Config, RawWeights, dims, finite, hf, place, read, refused};
use crate::drafter::vocabulary::OwnHead;
use crate::drafter::{Vocabulary, eagle};
use crate::error::{Error, Result};
use crate::target::Target;

mod speculators;
pub(crate) mod third;

/// Who is to read an exported drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `LlamaForCausalLMEagle`, whose mixing matrix has a bias, which is zero here; or `LlamaForCausalLMEagle3`.
    Sglang,
    /// `LlamaForCausalLM`, which vLLM turns into its EAGLE variant, without a bias; or an EAGLE-3 speculator, which names its target.
    Vllm,
    /// Taper itself. The same tensors as for vLLM, under the names that SGLang has for the architectures.
    Taper,
}

/// What files call the architectures, and which network it is.
const ARCHITECTURES: [(&str, NetworkKind); 3] = [
    ("LlamaForCausalLMEagle", NetworkKind::Eagle),
    ("LlamaForCausalLM", NetworkKind::Eagle),
    ("LlamaForCausalLMEagle3", NetworkKind::Eagle3),
];
/// The halves of `fc.weight` of an `Eagle`, side by side in this order.
const HALVES: [&str; 2] = ["fc_token.weight", "fc_hidden.weight"];

/// Writes a drafter, by way of a hidden folder beside it; an `Eagle3` with the tokens of `vocabulary`. An exported one that is there already
/// is replaced. `verifier` is where vLLM finds the target: a folder or a name.
///
/// # Errors
/// If weights do not fit the shape or the precision, an engine cannot tell the target's layers apart, the folder is something
/// else, or it cannot be written.
pub fn export_drafter(
    folder: &Path,
    vocabulary: &Vocabulary,
    (weights, shape): (&RawWeights, DrafterShape),
    (layout, verifier): (Layout, &str),
    precision: Precision,
) -> Result<()> {
    let target = vocabulary.target().config();
    let mut value = export::config_json(&eagle::config(target, shape), precision, Kind::Drafter);
    let mut tensors = named((target, shape), weights, &place(folder))?;
    let mut tables = Vec::new();
    let architecture = match (shape.network, layout) {
        (NetworkKind::Eagle, Layout::Vllm) => 1,
        (NetworkKind::Eagle, _) => 0,
        (NetworkKind::Eagle3, _) => 2,
    };
    value["architectures"] = json!([ARCHITECTURES[architecture].0]);
    match shape.network {
        // The head is the target's, whose own it may be.
        NetworkKind::Eagle => {
            value["tie_word_embeddings"] = json!(target.tied);
            joined(target, &mut tensors, layout);
        }
        NetworkKind::Eagle3 => {
            tables = third::add(&mut value, &mut tensors, vocabulary, layout)?;
            if layout == Layout::Vllm {
                value = speculators::wrap(value, verifier);
                speculators::rename(&mut tensors);
            }
        }
    }
    let partial = Partial::begin(folder, Kind::Drafter)?;
    write_json(&partial.join("config.json"), &value)?;
    write_beside(&partial.join("model.safetensors"), &tensors, tables, precision)?;
    partial.publish()
}

/// A drafter as a folder has it.
#[derive(Debug)]
pub struct Loaded {
    /// Its weights by our names.
    pub weights: RawWeights,
    /// Its shape.
    pub shape: DrafterShape,
    /// The tokens that it drafts and the head that it reads them with, where it has one.
    pub head: Option<OwnHead>,
}

/// Reads a drafter of `target`, in any layout.
///
/// # Errors
/// If a file is missing or damaged, it belongs to another target, or a tensor is missing, unknown, of another shape, or holds
/// numbers that are not finite.
pub fn load_drafter(folder: &Path, target: &Target) -> Result<Loaded> {
    let path = folder.join("config.json");
    let value = speculators::unwrap(&path, super::json(&path, &read("drafter configuration", &path)?)?)?;
    let shape = fits(&path, &value, target.config())?;
    if shape.network == NetworkKind::Eagle3 {
        third::taps_fit(&path, &value, target.config())?;
    }
    let path = folder.join("model.safetensors");
    let bytes = read("weights of the drafter", &path)?;
    let mut raw = hf::read_but(&path, &bytes, &third::MAPS)?;
    // Some writers keep a copy of the target's.
    raw.tensors.remove("embed_tokens.weight");
    let head = match shape.network {
        NetworkKind::Eagle => split(&path, target.config(), &mut raw).map(|()| None)?,
        NetworkKind::Eagle3 => {
            speculators::rename_back(&mut raw);
            third::take_head((&path, &bytes), &value, target, &mut raw)?
        }
    };
    Ok(Loaded { weights: named((target.config(), shape), &raw, &place(&path))?, shape, head })
}

/// Refuses what belongs to another target.
fn fits(path: &Path, value: &Value, target: &Config) -> Result<DrafterShape> {
    let get = |field: &str| value.get(field).unwrap_or(&Value::Null);
    let architecture = get("architectures");
    let Some((_, network)) = ARCHITECTURES.iter().find(|(known, _)| *architecture == json!([known])) else {
        let known = ARCHITECTURES.map(|(known, _)| format!("[\"{known}\"]")).join(" or ");
        return Err(refused(path, "architectures", architecture, &known));
    };
    let sizes = [
        ("num_hidden_layers", 1),
        ("hidden_size", target.hidden),
        ("num_attention_heads", target.heads),
        ("num_key_value_heads", target.kv_heads),
        ("head_dim", target.head_dim),
        ("vocab_size", target.vocab),
    ];
    for (field, expected) in sizes {
        if *get(field) != json!(expected) {
            return Err(refused(path, field, get(field), &format!("{expected}, as in the target")));
        }
    }
    // A shorter range would clamp the rotary angles of long answers.
    let positions = get("max_position_embeddings").as_u64().unwrap_or(0);
    if positions < target.positions_max as u64 {
        let expected = format!("{} or more, as in the target", target.positions_max);
        return Err(refused(path, "max_position_embeddings", positions, &expected));
    }
    let numbers = [("rope_theta", target.rope_theta), ("rms_norm_eps", f64::from(target.eps))];
    for (field, expected) in numbers {
        let found = get(field).as_f64().unwrap_or(f64::NAN);
        let is_near = (found - expected).abs() <= expected.abs() * 1e-6;
        if !is_near {
            return Err(refused(path, field, found, &format!("{expected}, as in the target")));
        }
    }
    let ffn = get("intermediate_size");
    let size = ffn.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 20).contains(n));
    let ffn = size.ok_or_else(|| refused(path, "intermediate_size", ffn, "a whole number from 1"))?;
    Ok(DrafterShape { network: *network, ffn })
}

/// The halves of the mixing matrix become one.
fn joined(target: &Config, own: &mut RawWeights, layout: Layout) {
    let hidden = target.hidden;
    let [token, state] = HALVES.map(|name| own.tensors.remove(name).map(|(_, values)| values).unwrap_or_default());
    let rows = token.chunks_exact(hidden).zip(state.chunks_exact(hidden));
    let mixed = rows.flat_map(|(token, state)| [token, state].concat()).collect();
    own.tensors.insert("fc.weight".into(), (vec![hidden, 2 * hidden], mixed));
    if layout == Layout::Sglang {
        own.tensors.insert("fc.bias".into(), (vec![hidden], vec![0.0; hidden]));
    }
}

/// The other way round.
fn split(path: &Path, target: &Config, raw: &mut RawWeights) -> Result<()> {
    let hidden = target.hidden;
    if let Some((_, bias)) = raw.tensors.remove("fc.bias")
        && let Some(value) = bias.iter().find(|value| **value != 0.0)
    {
        return Err(refused(path, "fc.bias", value, "zeros: a drafter's mixing matrix has no bias here"));
    }
    let missing = || Error::MissingTensor { name: "fc.weight".into(), place: place(path) };
    let (found, mixed) = raw.tensors.remove("fc.weight").ok_or_else(missing)?;
    let expected = vec![hidden, 2 * hidden];
    if found != expected {
        return Err(Error::shape("fc.weight", &found, &expected, place(path)));
    }
    for (i, name) in HALVES.into_iter().enumerate() {
        let half = mixed.chunks_exact(hidden).skip(i).step_by(2).flatten().copied().collect();
        raw.tensors.insert(name.into(), (vec![hidden, hidden], half));
    }
    Ok(())
}

/// Exactly the drafter's parameters, in their shapes, finite.
fn named((target, shape): (&Config, DrafterShape), raw: &RawWeights, place: &str) -> Result<RawWeights> {
    let mut own = BTreeMap::new();
    for parameter in eagle::parameters(target, shape) {
        let name = parameter.name;
        let missing = || Error::MissingTensor { name: name.clone(), place: place.into() };
        let (found, values) = raw.tensors.get(&name).ok_or_else(missing)?;
        let expected = dims(parameter.shape);
        if *found != expected {
            return Err(Error::shape(name, found, &expected, place));
        }
        finite(&name, values, place)?;
        own.insert(name, (expected, values.clone()));
    }
    match raw.tensors.keys().find(|name| !own.contains_key(*name)) {
        Some(name) => Err(Error::UnexpectedTensor { name: name.clone(), place: place.into() }),
        None => Ok(RawWeights { tensors: own }),
    }
}

#[cfg(test)]
mod tests;
