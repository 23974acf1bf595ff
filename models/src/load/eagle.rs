//! The learned drafter as a folder, in the layout of EAGLE's own checkpoints (Li et al. 2024), which SGLang and vLLM read:
//! `config.json`, and `model.safetensors` with `fc.weight` and one layer, `layers.0`, without a norm before its attention.
//!
//! Embedding and head are the target's. Engines skip tensors whose names they do not know without a word and start others from
//! whatever was in memory, so that names, shapes and numbers are checked here, when writing and when reading.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::export::{self, Precision, write_json, write_tensors};
use super::{Config, RawWeights, dims, finite, hf, place, read, refused};
use crate::drafter::eagle;
use crate::error::{Error, Result};

/// Who is to read an exported drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `LlamaForCausalLMEagle`; its mixing matrix has a bias, which is zero here.
    Sglang,
    /// `LlamaForCausalLM`, which vLLM turns into its EAGLE variant; without a bias.
    Vllm,
    /// Taper itself. The same tensors as for vLLM, under the name that SGLang has for the architecture.
    Taper,
}

const ARCHITECTURES: [&str; 2] = ["LlamaForCausalLMEagle", "LlamaForCausalLM"];
/// The halves of `fc.weight`, side by side in this order.
const HALVES: [&str; 2] = ["fc_token.weight", "fc_hidden.weight"];

/// Writes a drafter of `target`, by way of `<folder>.partial`. An exported one that is there already is replaced.
///
/// # Errors
/// If weights do not fit the shape or the precision, the folder is something else, or it cannot be written.
pub fn export_drafter(
    folder: &Path,
    target: &Config,
    (weights, ffn): (&RawWeights, usize),
    layout: Layout,
    precision: Precision,
) -> Result<()> {
    let config = eagle::config(target, ffn);
    let tensors = joined(&config, weights, layout, &place(folder))?;
    export::replaceable(folder)?;
    let partial = export::beside(folder, "partial");
    export::remove(&partial)?;
    export::io(&partial, fs::create_dir_all(&partial))?;
    let mut value = export::config_json(&config, precision);
    value["architectures"] = json!([ARCHITECTURES[usize::from(layout == Layout::Vllm)]]);
    // The head is the target's, whose own it may be.
    value["tie_word_embeddings"] = json!(target.tied);
    write_json(&partial.join("config.json"), &value)?;
    write_tensors(&partial.join("model.safetensors"), &tensors, precision)?;
    export::publish(&partial, folder)
}

/// Reads a drafter of `target`, in any layout: its weights by our names, and the width of its feed-forward network.
///
/// # Errors
/// If a file is missing or damaged, it belongs to another target, or a tensor is missing, unknown, of another shape, or holds
/// numbers that are not finite.
pub fn load_drafter(folder: &Path, target: &Config) -> Result<(RawWeights, usize)> {
    let path = folder.join("config.json");
    let value = super::json(&path, &read("drafter configuration", &path)?)?;
    let ffn = fits(&path, &value, target)?;
    let path = folder.join("model.safetensors");
    let mut raw = hf::read_all(&path, &read("weights of the drafter", &path)?)?;
    let config = eagle::config(target, ffn);
    if let Some((_, bias)) = raw.tensors.remove("fc.bias")
        && let Some(value) = bias.iter().find(|value| **value != 0.0)
    {
        return Err(refused(&path, "fc.bias", value, "zeros: a drafter's mixing matrix has no bias here"));
    }
    // Some writers keep a copy of the target's.
    raw.tensors.remove("embed_tokens.weight");
    split(&config, &mut raw, &place(&path))?;
    Ok((raw, ffn))
}

/// Refuses what belongs to another target; the width of the feed-forward network.
fn fits(path: &Path, value: &Value, target: &Config) -> Result<usize> {
    let get = |field: &str| value.get(field).unwrap_or(&Value::Null);
    let architecture = get("architectures");
    if !ARCHITECTURES.iter().any(|known| *architecture == json!([known])) {
        let known = ARCHITECTURES.map(|known| format!("[\"{known}\"]")).join(" or ");
        return Err(refused(path, "architectures", architecture, &known));
    }
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
    size.ok_or_else(|| refused(path, "intermediate_size", ffn, "a whole number from 1"))
}

/// Our parameters become the engines' tensors, all of them and nothing else.
fn joined(config: &Config, weights: &RawWeights, layout: Layout, place: &str) -> Result<RawWeights> {
    let hidden = config.hidden;
    let mut own = named(config, weights, place)?;
    let [token, state] = HALVES.map(|name| own.tensors.remove(name).map(|(_, values)| values).unwrap_or_default());
    let rows = token.chunks_exact(hidden).zip(state.chunks_exact(hidden));
    let mixed = rows.flat_map(|(token, state)| [token, state].concat()).collect();
    own.tensors.insert("fc.weight".into(), (vec![hidden, 2 * hidden], mixed));
    if layout == Layout::Sglang {
        own.tensors.insert("fc.bias".into(), (vec![hidden], vec![0.0; hidden]));
    }
    Ok(own)
}

/// The other way round, in place.
fn split(config: &Config, raw: &mut RawWeights, place: &str) -> Result<()> {
    let hidden = config.hidden;
    let missing = || Error::MissingTensor { name: "fc.weight".into(), place: place.into() };
    let (found, mixed) = raw.tensors.remove("fc.weight").ok_or_else(missing)?;
    let expected = vec![hidden, 2 * hidden];
    if found != expected {
        return Err(Error::TensorShape { name: "fc.weight".into(), found, expected });
    }
    for (i, name) in HALVES.into_iter().enumerate() {
        let half = mixed.chunks_exact(hidden).skip(i).step_by(2).flatten().copied().collect();
        raw.tensors.insert(name.into(), (vec![hidden, hidden], half));
    }
    *raw = named(config, raw, place)?;
    Ok(())
}

/// Exactly the drafter's parameters, in their shapes, finite.
fn named(config: &Config, raw: &RawWeights, place: &str) -> Result<RawWeights> {
    let mut own = BTreeMap::new();
    for parameter in eagle::parameters(config) {
        let name = parameter.name;
        let missing = || Error::MissingTensor { name: name.clone(), place: place.into() };
        let (found, values) = raw.tensors.get(&name).ok_or_else(missing)?;
        let expected = dims(parameter.shape);
        if *found != expected {
            return Err(Error::TensorShape { name, found: found.clone(), expected });
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
mod tests {
    use kernels::Storage;
    use safetensors::SafeTensors;
    use state::plan::TinyShape;

    use super::*;
    use crate::drafter::learn::Learner;

    /// What SGLang's `llama_eagle.py` and vLLM's `llama_eagle.py` look for in a checkpoint; see the file.
    const CONTRACT: &str = include_str!("../../tests/fixtures/eagle_layouts.json");

    fn tiny() -> (Config, RawWeights) {
        let shape = TinyShape { hidden: 16, layers: 2, heads: 2, kv_heads: 1, ffn: 24, positions_max: 64 };
        let config = Config { storage: Storage::F32, ..Config::tiny(&shape).unwrap() };
        let weights = Learner::fresh(&config, 10, 3).unwrap().to_raw();
        (config, weights)
    }

    fn export(to: &Path, layout: Layout) -> Result<()> {
        let (config, weights) = tiny();
        export_drafter(to, &config, (&weights, 10), layout, Precision::F32)
    }

    #[test]
    fn what_is_written_is_what_loads() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        for layout in [Layout::Sglang, Layout::Vllm, Layout::Taper] {
            let to = folder.path().join("drafter");
            export(&to, layout).unwrap();
            assert_eq!(load_drafter(&to, &config).unwrap(), (weights.clone(), 10), "{layout:?}");
        }
    }

    #[test]
    fn engines_find_what_they_look_for_and_nothing_else() {
        let contract: Value = serde_json::from_str(CONTRACT).unwrap();
        let size = |word: &Value| match word.as_str().unwrap() {
            "hidden" => 16,
            "2*hidden" => 32,
            "heads*head_dim" => 16,
            "kv_heads*head_dim" => 8,
            "intermediate" => 10,
            other => panic!("{other}"),
        };
        let folder = tempfile::tempdir().unwrap();
        for (engine, layout) in [("sglang", Layout::Sglang), ("vllm", Layout::Vllm)] {
            let to = folder.path().join(engine);
            export(&to, layout).unwrap();
            let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
            for (field, wanted) in contract[engine]["config"].as_object().unwrap() {
                assert_eq!(&config[field], wanted, "{engine}: {field}");
            }
            let bytes = fs::read(to.join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let found: BTreeMap<&str, Vec<usize>> = file.iter().map(|(n, v)| (n, v.shape().to_vec())).collect();
            let wanted = contract[engine]["tensors"].as_object().unwrap().iter();
            let wanted: BTreeMap<&str, Vec<usize>> =
                wanted.map(|(n, dims)| (n.as_str(), dims.as_array().unwrap().iter().map(size).collect())).collect();
            assert_eq!(found, wanted, "{engine}");
            assert_eq!(config["max_position_embeddings"], 64, "the whole range of positions");
        }
    }

    #[test]
    fn a_drafter_of_another_target_is_refused() {
        let (config, _) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("drafter");
        export(&to, Layout::Taper).unwrap();
        let refuses = |config: Config, word: &str| {
            let error = load_drafter(&to, &config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refuses(Config { hidden: 32, ..config.clone() }, "hidden_size");
        refuses(Config { vocab: 99, ..config.clone() }, "vocab_size");
        refuses(Config { rope_theta: 500_000.0, ..config.clone() }, "rope_theta");
        refuses(Config { positions_max: 128, ..config.clone() }, "max_position_embeddings");
        let config_file = to.join("config.json");
        let text = fs::read_to_string(&config_file).unwrap().replace("\"LlamaForCausalLMEagle\"", "\"Qwen\"");
        fs::write(&config_file, text).unwrap();
        refuses(config, "LlamaForCausalLMEagle");
    }

    #[test]
    fn damaged_tensors_are_named() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("drafter");
        export(&to, Layout::Sglang).unwrap();
        let spoil = |change: &dyn Fn(&mut RawWeights)| {
            let mut raw = joined(&eagle::config(&config, 10), &weights, Layout::Sglang, "here").unwrap();
            change(&mut raw);
            write_tensors(&to.join("model.safetensors"), &raw, Precision::F32).unwrap();
            load_drafter(&to, &config).unwrap_err().to_string()
        };
        let tensor = "layers.0.mlp.up_proj.weight";
        assert!(spoil(&|raw| drop(raw.tensors.remove(tensor))).contains(tensor));
        assert!(spoil(&|raw| raw.tensors.get_mut(tensor).unwrap().1[3] = f32::NAN).contains(tensor));
        assert!(spoil(&|raw| raw.tensors.get_mut("fc.bias").unwrap().1[0] = 1.0).contains("fc.bias"));
        let norm = "layers.0.input_layernorm.weight";
        assert!(spoil(&|raw| drop(raw.tensors.insert(norm.into(), (vec![16], vec![1.0; 16])))).contains(norm));
        fs::remove_file(to.join("model.safetensors")).unwrap();
        assert!(load_drafter(&to, &config).unwrap_err().to_string().contains("model.safetensors"));
    }
}
