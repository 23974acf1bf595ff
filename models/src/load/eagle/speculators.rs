//! An `Eagle3` in the form of vLLM's library of drafters ("speculators"): the configuration of its layer stands within another one, which
//! says whom it drafts for, and its layer is `layers.0`. vLLM serves such a folder as it is, target and all.

use std::path::Path;

use serde_json::{Value, json};

use super::{RawWeights, refused};
use crate::error::Result;
use crate::load::export::MARK;

/// The layer here and there.
const LAYER: [&str; 2] = ["midlayer.", "layers.0."];
const KIND: &str = "speculators_model_type";
const INNER: &str = "transformer_layer_config";
/// Fields that stand beside the layer's configuration; the last one is for engines to pass over.
const OUTER: [&str; 5] =
    ["draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "torch_dtype", MARK, super::third::OF_TARGET];
/// The version of the form.
const VERSION: &str = "0.3.0";
/// Tokens that engines draft at a time if nobody asks for another number.
const TOKENS: usize = 4;

/// The configuration in that form, for a target that is found there.
pub(super) fn wrap(mut layer: Value, verifier: &str) -> Value {
    let mut outer = json!({
        "architectures": ["Eagle3Speculator"],
        // Where nothing is said, vLLM means the contrary.
        "norm_before_residual": false,
        "norm_before_fc": false,
        KIND: "eagle3",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{
                "proposal_type": "greedy", "speculative_tokens": TOKENS, "accept_tolerance": 0.0, "verifier_accept_k": 1,
            }],
            "verifier": { "name_or_path": verifier, "architectures": ["LlamaForCausalLM"] },
        },
        "target_hidden_size": null,
        "tie_word_embeddings": false,
    });
    for field in OUTER {
        outer[field] = layer[field].take();
    }
    if let Some(fields) = layer.as_object_mut() {
        fields.retain(|field, _| {
            !OUTER.contains(&field.as_str()) && !["architectures", "eagle_config"].contains(&field.as_str())
        });
    }
    outer[INNER] = layer;
    outer
}

/// Names of tensors in that form.
pub(super) fn rename(own: &mut RawWeights) {
    renamed(own, LAYER);
}

/// The configuration and the names of tensors as other folders have them, if these are of that form.
///
/// # Errors
/// If it is of another kind of drafter, or normalises where ours do not, or there is no layer.
pub(super) fn unwrap(path: &Path, mut value: Value) -> Result<Value> {
    let Some(kind) = value.get(KIND).cloned() else { return Ok(value) };
    if kind != json!("eagle3") {
        return Err(refused(path, KIND, kind, "\"eagle3\""));
    }
    // Before there was the field, vLLM took it for true.
    for (field, missing) in [("norm_before_residual", true), ("norm_before_fc", false)] {
        let found = value.get(field).filter(|found| !found.is_null()).cloned().unwrap_or(json!(missing));
        if found != json!(false) {
            return Err(refused(path, field, found, "false: what is added to the stream is not normalised here"));
        }
    }
    let mut layer = value[INNER].take();
    if !layer.is_object() {
        return Err(refused(path, INNER, layer, "the configuration of a layer"));
    }
    // As newer versions of transformers write it.
    if let Some(theta) = layer.get("rope_parameters").and_then(|rope| rope.get("rope_theta")).cloned() {
        layer["rope_theta"] = theta;
    }
    for field in OUTER {
        layer[field] = value[field].take();
    }
    layer["architectures"] = json!(["LlamaForCausalLMEagle3"]);
    Ok(layer)
}

/// The other way round.
pub(super) fn rename_back(raw: &mut RawWeights) {
    let [here, there] = LAYER;
    renamed(raw, [there, here]);
}

fn renamed(raw: &mut RawWeights, [from, to]: [&str; 2]) {
    let name = |name: String| name.strip_prefix(from).map(|rest| format!("{to}{rest}")).unwrap_or(name);
    raw.tensors = std::mem::take(&mut raw.tensors).into_iter().map(|(old, tensor)| (name(old), tensor)).collect();
}
