//! Hugging Face folders: `config.json`, `*.safetensors` (one or many), `tokenizer.json`, `tokenizer_config.json`.
//!
//! Only `LlamaForCausalLM`. A field that would change the arithmetic is refused by name, never ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{Config, Loaded, RawWeights, dims, json, place, read, refused};
use crate::error::{Error, Result};
use crate::layout::parameters;
use crate::tokenizer::Tokenizer;

/// Loads a folder.
///
/// # Errors
/// If a file is missing or damaged, the architecture is not supported, or a weight is missing, of another shape,
/// infinite or not a number.
pub fn load(folder: &Path) -> Result<Loaded> {
    let config = config(folder)?;
    let weights = weights(folder, &config)?;
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"), &config.eos)?;
    let tokenizer = tokenizer.fitting(config.vocab, &folder.join("tokenizer.json"))?;
    Ok(Loaded { chat_template: chat_template(folder)?, config, weights, tokenizer })
}

/// Reads and checks `config.json` (and the end tokens of `generation_config.json`, if there is one).
///
/// # Errors
/// If the file is missing, not JSON, or describes a model that is not supported.
pub fn config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let value = json(&path, &read("model configuration", &path)?)?;
    let fields = Fields { path: &path, value: &value };
    supported(&fields)?;
    let mut config = fields.config()?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        let value = json(&generation, &read("generation configuration", &generation)?)?;
        let more = Fields { path: &generation, value: &value }.ids("eos_token_id")?;
        let known: BTreeSet<u32> = config.eos.iter().copied().collect();
        config.eos.extend(more.into_iter().filter(|id| !known.contains(id)));
    }
    config.check(&path)?;
    Ok(config)
}

/// Refuses what would compute something else than plain Llama.
fn supported(fields: &Fields<'_>) -> Result<()> {
    let architectures = fields.get("architectures");
    if *architectures != serde_json::json!(["LlamaForCausalLM"]) {
        return Err(refused(fields.path, "architectures", architectures, "[\"LlamaForCausalLM\"]"));
    }
    let plain: [(&str, &[Value]); 12] = [
        ("model_type", &[Value::Null, "llama".into()]),
        ("hidden_act", &[Value::Null, "silu".into()]),
        ("rope_scaling", &[Value::Null]),
        ("attention_bias", &[Value::Null, false.into()]),
        ("mlp_bias", &[Value::Null, false.into()]),
        ("sliding_window", &[Value::Null]),
        ("use_sliding_window", &[Value::Null, false.into()]),
        ("rope_interleaved", &[Value::Null, false.into()]),
        ("partial_rotary_factor", &[Value::Null, 1.0.into(), 1.into()]),
        ("quantization_config", &[Value::Null]),
        ("num_local_experts", &[Value::Null]),
        ("is_encoder_decoder", &[Value::Null, false.into()]),
    ];
    for (field, allowed) in plain {
        fields.one_of(field, fields.get(field), allowed)?;
    }
    let rope = fields.get("rope_parameters");
    let allowed = [Value::Null, "default".into()];
    fields.one_of("rope_parameters.rope_type", rope.get("rope_type").unwrap_or(&Value::Null), &allowed)
}

/// Access to a JSON object whose errors name the field and the file.
struct Fields<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl Fields<'_> {
    fn config(&self) -> Result<Config> {
        let (hidden, heads) = (self.size("hidden_size", None)?, self.size("num_attention_heads", None)?);
        Ok(Config {
            vocab: self.size("vocab_size", None)?,
            hidden,
            layers: self.size("num_hidden_layers", None)?,
            heads,
            kv_heads: self.size("num_key_value_heads", Some(heads))?,
            head_dim: self.size("head_dim", hidden.checked_div(heads))?,
            ffn: self.size("intermediate_size", None)?,
            rope_theta: self.rope_theta()?,
            eps: self.number("rms_norm_eps", self.get("rms_norm_eps"), 1e-6)? as f32,
            tied: self.tied()?,
            positions_max: self.size("max_position_embeddings", None)?,
            storage: kernels::Storage::F32,
            bos: self.ids("bos_token_id")?.first().copied(),
            eos: self.ids("eos_token_id")?,
        })
    }

    fn get(&self, field: &str) -> &Value {
        self.value.get(field).unwrap_or(&Value::Null)
    }

    fn one_of(&self, field: &str, value: &Value, allowed: &[Value]) -> Result<()> {
        let listed = || allowed.iter().map(|v| if v.is_null() { "absent".into() } else { v.to_string() });
        match allowed.contains(value) {
            true => Ok(()),
            false => Err(refused(self.path, field, value, &listed().collect::<Vec<_>>().join(" or "))),
        }
    }

    fn size(&self, field: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(field), default) {
            (Value::Null, Some(default)) => Ok(default),
            (value, _) => (value.as_u64().and_then(|n| usize::try_from(n).ok()))
                .ok_or_else(|| refused(self.path, field, value, "a whole number")),
        }
    }

    fn number(&self, field: &str, value: &Value, default: f64) -> Result<f64> {
        match value {
            Value::Null => Ok(default),
            value => value.as_f64().ok_or_else(|| refused(self.path, field, value, "a number")),
        }
    }

    fn rope_theta(&self) -> Result<f64> {
        let newer = self.get("rope_parameters").get("rope_theta");
        self.number("rope_theta", newer.unwrap_or_else(|| self.get("rope_theta")), 10_000.0)
    }

    fn tied(&self) -> Result<bool> {
        match self.get("tie_word_embeddings") {
            Value::Null => Ok(false),
            value => value.as_bool().ok_or_else(|| refused(self.path, "tie_word_embeddings", value, "true or false")),
        }
    }

    /// An id, a list of ids, or nothing.
    fn ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| refused(self.path, field, value, "a token id or a list of them"))
        };
        match self.get(field) {
            Value::Null => Ok(Vec::new()),
            Value::Array(values) => values.iter().map(id).collect(),
            value => Ok(vec![id(value)?]),
        }
    }
}

fn weights(folder: &Path, config: &Config) -> Result<RawWeights> {
    let mut weights = RawWeights::default();
    for path in shards(folder)? {
        read_tensors(&path, &read("weights file", &path)?, config, &mut weights)?;
    }
    weights.check(config, &place(folder))?;
    Ok(weights)
}

/// The weight files: those that the index names, or the only one.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let value = json(&index, &read("weights index", &index)?)?;
    let map = value.get("weight_map").unwrap_or(&Value::Null);
    let files: Option<BTreeSet<&str>> = map.as_object().and_then(|m| m.values().map(Value::as_str).collect());
    let files = files.ok_or_else(|| refused(&index, "weight_map", map, "an object from tensor names to file names"))?;
    match files.iter().find(|f| Path::new(f).components().count() != 1 || f.contains("..")) {
        Some(outside) => Err(refused(&index, "weight_map", outside, "files in the same folder")),
        None => Ok(files.iter().map(|f| folder.join(f)).collect()),
    }
}

/// All tensors of a safetensors file, whatever their names.
pub(super) fn read_all(path: &Path, bytes: &[u8]) -> Result<RawWeights> {
    read_but(path, bytes, &[])
}

/// The same without some, which are no weights.
pub(super) fn read_but(path: &Path, bytes: &[u8], others: &[&str]) -> Result<RawWeights> {
    let damaged = |source| Error::NotSafetensors { path: path.into(), source };
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let tensor = |(name, view): (&str, _)| Ok((name.to_owned(), shaped(name, &view, path)?));
    let weights = file.iter().filter(|(name, _)| !others.contains(name));
    Ok(RawWeights { tensors: weights.map(tensor).collect::<Result<_>>()? })
}

fn shaped(name: &str, view: &safetensors::tensor::TensorView<'_>, path: &Path) -> Result<(Vec<usize>, Vec<f32>)> {
    Ok((view.shape().to_vec(), values(name, view, path)?))
}

/// Adds the tensors of one safetensors file. Shapes are checked before any number is converted.
pub(super) fn read_tensors(path: &Path, bytes: &[u8], config: &Config, weights: &mut RawWeights) -> Result<()> {
    let damaged = |source| Error::NotSafetensors { path: path.into(), source };
    let expected: BTreeMap<_, _> = parameters(config).into_iter().map(|p| (p.name, dims(p.shape))).collect();
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    for (name, view) in file.iter() {
        match expected.get(name) {
            Some(shape) if view.shape() == shape => {
                let values = values(name, &view, path)?;
                weights.tensors.insert(name.into(), (shape.clone(), values));
            }
            Some(shape) => {
                return Err(Error::shape(name, view.shape(), shape, place(path)));
            }
            None if harmless(name, config) => {}
            None => return Err(Error::UnexpectedTensor { name: name.into(), place: place(path) }),
        }
    }
    Ok(())
}

/// Tables that older writers stored, and a tied head stored twice.
fn harmless(name: &str, config: &Config) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.tied && name == "lm_head.weight")
}

fn values(name: &str, view: &TensorView<'_>, path: &Path) -> Result<Vec<f32>> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => {
            return Err(Error::TensorDtype { name: name.into(), found: format!("{other:?}"), place: place(path) });
        }
    };
    let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?;
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The chat template: a file of its own (newer folders), else a field of `tokenizer_config.json`.
fn chat_template(folder: &Path) -> Result<Option<String>> {
    let own = folder.join("chat_template.jinja");
    if own.exists() {
        return Ok(Some(String::from_utf8_lossy(&read("chat template", &own)?).into_owned()));
    }
    let path = folder.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(None);
    }
    let value = json(&path, &read("tokenizer configuration", &path)?)?;
    match value.get("chat_template").unwrap_or(&Value::Null) {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => Ok(default_template(named)),
        other => Err(refused(&path, "chat_template", other, "a string, or a list of named templates")),
    }
}

fn default_template(named: &[Value]) -> Option<String> {
    let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"))?;
    Some(default.get("template")?.as_str()?.into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
    }

    /// A copy of the golden folder, to be damaged.
    fn copy() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::copy(golden("tiny").join(name), folder.path().join(name)).unwrap();
        }
        folder
    }

    fn with_field(field: &str, value: Value) -> Result<Config> {
        let folder = copy();
        let path = folder.path().join("config.json");
        let mut config = json(&path, &fs::read(&path).unwrap()).unwrap();
        config[field] = value;
        fs::write(&path, config.to_string()).unwrap();
        super::config(folder.path())
    }

    #[test]
    fn golden_folders_load() {
        let model = load(&golden("tiny")).unwrap();
        let config = &model.config;
        assert_eq!((config.vocab, config.hidden, config.layers, config.head_dim), (97, 64, 3, 16));
        assert_eq!((config.bos, config.eos.as_slice(), config.tied), (Some(1), &[0][..], false));
        assert_eq!(model.weights.tensors.len(), 3 * 9 + 3);
        let tied = load(&golden("tiny_tied")).unwrap();
        assert!(tied.config.tied && !tied.weights.tensors.contains_key("lm_head.weight"));
    }

    #[test]
    fn what_is_not_plain_llama_is_refused_by_name() {
        let refused = [
            ("architectures", serde_json::json!(["Qwen2ForCausalLM"])),
            ("model_type", "mistral".into()),
            ("rope_scaling", serde_json::json!({"type": "linear", "factor": 2.0})),
            ("rope_parameters", serde_json::json!({"rope_type": "llama3"})),
            ("attention_bias", true.into()),
            ("mlp_bias", true.into()),
            ("sliding_window", 4096.into()),
            ("hidden_act", "gelu".into()),
            ("quantization_config", serde_json::json!({})),
            ("num_attention_heads", 0.into()),
            ("num_key_value_heads", 3.into()),
            ("head_dim", 15.into()),
            ("vocab_size", (1_u64 << 60).into()),
            ("num_hidden_layers", (-1).into()),
            ("max_position_embeddings", Value::Null),
            ("rms_norm_eps", 0.into()),
            ("rope_theta", "big".into()),
            ("eos_token_id", 97.into()),
            ("tie_word_embeddings", "yes".into()),
        ];
        for (field, value) in refused {
            match with_field(field, value) {
                Err(Error::Config { field: named, .. }) => assert!(named.contains(field), "{named} {field}"),
                other => panic!("{field}: {other:?}"),
            }
        }
        assert!(with_field("rope_scaling", Value::Null).is_ok());
        assert_eq!(with_field("eos_token_id", serde_json::json!([3, 4])).unwrap().eos, [3, 4]);
    }

    #[test]
    fn damaged_weights_are_errors() {
        let folder = copy();
        let path = folder.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        for cut in (0..whole.len()).step_by(whole.len() / 60).chain([1, 7, 8, 9, whole.len() - 1]) {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(load(folder.path()), Err(Error::NotSafetensors { .. })), "cut at {cut}");
        }
        // A damaged header is some typed error; a damaged number may go unseen, but never panics.
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for at in (0..header).step_by(13) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x15;
            fs::write(&path, bytes).unwrap();
            let _ = load(folder.path());
        }
        let mut bytes = whole.clone();
        bytes[header..header + 2].copy_from_slice(&0x7e00_u16.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        assert!(matches!(load(folder.path()), Err(Error::NonFinite { index: 0, .. })));
    }

    #[test]
    fn weights_of_another_shape_are_errors() {
        let folder = copy();
        let path = folder.path().join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        let swap = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            fs::write(&path, text.replace(from, to)).unwrap();
            load(folder.path()).unwrap_err()
        };
        let layers = "\"num_hidden_layers\": 3";
        assert!(matches!(swap(layers, "\"num_hidden_layers\": 4"), Error::MissingTensor { .. }));
        assert!(matches!(swap(layers, "\"num_hidden_layers\": 2"), Error::UnexpectedTensor { .. }));
        let ffn = swap("\"intermediate_size\": 160", "\"intermediate_size\": 161");
        assert!(matches!(ffn, Error::TensorShape { .. }), "{ffn}");
        assert!(matches!(swap("{", "{,"), Error::Json { line: 1, column: 2, .. }));
    }

    #[test]
    fn missing_files_are_named() {
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            let folder = copy();
            fs::remove_file(folder.path().join(name)).unwrap();
            match load(folder.path()) {
                Err(Error::FileMissing { path, .. }) => assert!(path.ends_with(name)),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn shards_are_joined() {
        let folder = copy();
        let whole = load(folder.path()).unwrap().weights;
        let mut map = serde_json::Map::new();
        let mut parts = [RawWeights::default(), RawWeights::default()];
        for (i, (name, tensor)) in whole.tensors.iter().enumerate() {
            parts[i % 2].tensors.insert(name.clone(), tensor.clone());
            map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        }
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(&index, serde_json::json!({"weight_map": map}).to_string()).unwrap();
        for (i, part) in parts.iter().enumerate() {
            let path = folder.path().join(format!("part-{i}.safetensors"));
            super::super::export::write_tensors(&path, part, super::super::export::Precision::F32).unwrap();
        }
        assert_eq!(load(folder.path()).unwrap().weights, whole);
        fs::write(&index, "{\"weight_map\": {\"x\": \"../x.safetensors\"}}").unwrap();
        assert!(matches!(load(folder.path()), Err(Error::Config { .. })));
        fs::write(&index, "{}").unwrap();
        assert!(matches!(load(folder.path()), Err(Error::Config { .. })));
    }
}
