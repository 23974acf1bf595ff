//! GGUF files of architecture `llama`, dequantised to f32.
//!
//! Such files hold the rows of q and k permuted for interleaved rotary pairs; here they go back to halves.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};

use super::{Config, Loaded, RawWeights, dims, open, place, refused};
use crate::error::{Error, Result};
use crate::layout::{Parameter, parameters};
use crate::tokenizer::{GgufParts, Tokenizer};

/// Loads a GGUF file: shape, weights, tokenizer and chat template.
///
/// # Errors
/// If the file is missing, damaged, or holds a model that is not supported.
pub fn load(path: &Path) -> Result<Loaded> {
    let mut reader = BufReader::new(open("GGUF file", path)?);
    let content = guarded(path, || Content::read(&mut reader))?;
    let values = content.metadata.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let metadata = Metadata { path, values };
    let config = metadata.config(&content)?;
    let weights = weights(&content, &mut reader, path, &config)?;
    let tokenizer = Tokenizer::from_gguf(&metadata.tokenizer()?, path, &config.eos)?.fitting(config.vocab, path)?;
    let chat_template = metadata.text("tokenizer.chat_template").ok().map(String::from);
    Ok(Loaded { config, weights, tokenizer, chat_template })
}

/// Runs candle's reader on bytes that may be anything: its errors and its panics both mean a damaged file.
fn guarded<T>(path: &Path, read: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
    let damaged = |reason: String| Error::NotGguf { path: path.into(), reason };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        // Only the first line: candle appends a backtrace if the environment asks for one.
        Ok(Err(e)) => Err(damaged(e.to_string().lines().next().unwrap_or("unreadable").into())),
        Err(_) => Err(damaged("its header makes no sense".into())),
    }
}

struct Metadata<'a> {
    path: &'a Path,
    values: BTreeMap<&'a str, &'a Value>,
}

impl Metadata<'_> {
    fn config(&self, content: &Content) -> Result<Config> {
        self.supported()?;
        let (hidden, heads) = (self.size("llama.embedding_length")?, self.size("llama.attention.head_count")?);
        let head_dim = self.size_or("llama.attention.key_length", hidden.checked_div(heads).unwrap_or(0))?;
        let config = Config {
            vocab: self.list("tokenizer.ggml.tokens")?.len(),
            hidden,
            layers: self.size("llama.block_count")?,
            heads,
            kv_heads: self.size_or("llama.attention.head_count_kv", heads)?,
            head_dim,
            ffn: self.size("llama.feed_forward_length")?,
            rope_theta: f64::from(self.float("llama.rope.freq_base", 10_000.0)?),
            eps: self.float("llama.attention.layer_norm_rms_epsilon", 1e-5)?,
            tied: !content.tensor_infos.contains_key("output.weight"),
            positions_max: self.size("llama.context_length")?,
            storage: kernels::Storage::F32,
            bos: self.id("tokenizer.ggml.bos_token_id")?,
            eos: self.ends()?,
        };
        self.same("llama.rope.dimension_count", head_dim)?;
        self.same("llama.attention.value_length", head_dim)?;
        config.check(self.path)?;
        Ok(config)
    }

    fn supported(&self) -> Result<()> {
        for (field, wanted) in [("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")] {
            let found = self.text(field)?;
            if found != wanted {
                return Err(refused(self.path, field, found, wanted));
            }
        }
        if let Ok(kind) = self.text("llama.rope.scaling.type")
            && kind != "none"
        {
            return Err(refused(self.path, "llama.rope.scaling.type", kind, "none"));
        }
        self.same("llama.expert_count", 0)
    }

    /// If the field is there, it must have this value.
    fn same(&self, field: &str, wanted: usize) -> Result<()> {
        match self.size_or(field, wanted)? {
            found if found == wanted => Ok(()),
            found => Err(refused(self.path, field, found, &wanted.to_string())),
        }
    }

    fn size(&self, field: &str) -> Result<usize> {
        match self.values.get(field).copied() {
            Some(_) => self.size_or(field, 0),
            None => Err(refused(self.path, field, "absent", "a whole number")),
        }
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        match self.values.get(field).copied() {
            None => Ok(default),
            Some(value) => whole(value)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| refused(self.path, field, brief(value), "a whole number")),
        }
    }

    fn id(&self, field: &str) -> Result<Option<u32>> {
        match self.values.contains_key(field) {
            true => Ok(u32::try_from(self.size(field)?).ok()),
            false => Ok(None),
        }
    }

    fn ends(&self) -> Result<Vec<u32>> {
        let mut ends: Vec<u32> = Vec::new();
        for field in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            ends.extend(self.id(field)?.filter(|id| !ends.contains(id)));
        }
        Ok(ends)
    }

    fn float(&self, field: &str, default: f32) -> Result<f32> {
        match self.values.get(field).copied() {
            None => Ok(default),
            Some(Value::F32(v)) => Ok(*v),
            Some(Value::F64(v)) => Ok(*v as f32),
            Some(other) => Err(refused(self.path, field, brief(other), "a number")),
        }
    }

    fn text(&self, field: &str) -> Result<&str> {
        match self.values.get(field).copied() {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(refused(self.path, field, brief(other), "a text")),
            None => Err(refused(self.path, field, "absent", "a text")),
        }
    }

    fn list(&self, field: &str) -> Result<&[Value]> {
        match self.values.get(field).copied() {
            Some(Value::Array(values)) => Ok(values),
            Some(other) => Err(refused(self.path, field, brief(other), "a list")),
            None => Err(refused(self.path, field, "absent", "a list")),
        }
    }

    fn texts(&self, field: &str) -> Result<Vec<String>> {
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(refused(self.path, field, brief(other), "texts")),
        };
        self.list(field)?.iter().map(text).collect()
    }

    fn tokenizer(&self) -> Result<GgufParts> {
        let types = self.list("tokenizer.ggml.token_type")?;
        Ok(GgufParts {
            tokens: self.texts("tokenizer.ggml.tokens")?,
            types: types.iter().map(|v| whole(v).and_then(|n| i64::try_from(n).ok()).unwrap_or(0)).collect(),
            merges: self.texts("tokenizer.ggml.merges")?,
            pre: self.text("tokenizer.ggml.pre").unwrap_or("gpt-2").into(),
        })
    }
}

fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::I8(n) => u64::try_from(*n).ok(),
        Value::I16(n) => u64::try_from(*n).ok(),
        Value::I32(n) => u64::try_from(*n).ok(),
        Value::I64(n) => u64::try_from(*n).ok(),
        Value::Bool(_) => None,
        value => value.to_u64().ok(),
    }
}

fn brief(value: &Value) -> String {
    format!("{value:?}").chars().take(40).collect()
}

fn weights(content: &Content, reader: &mut BufReader<File>, path: &Path, config: &Config) -> Result<RawWeights> {
    let mut weights = RawWeights::default();
    // A file that declares more layers than it has tensors must not make a long list first.
    if config.layers > content.tensor_infos.len() {
        return Err(refused(path, "llama.block_count", config.layers, "at most the number of tensors"));
    }
    let layout = parameters(config);
    known(content, &layout, path)?;
    for parameter in layout {
        let values = tensor(content, reader, path, &parameter)?;
        let values = match heads_of(&parameter.name, config) {
            Some(heads) => halves(&values, heads, config.head_dim, config.hidden),
            None => values,
        };
        weights.tensors.insert(parameter.name.clone(), (dims(parameter.shape), values));
    }
    weights.check(config, &place(path))?;
    Ok(weights)
}

/// Refuses tensors that no parameter comes from (biases, rotary factors, experts).
fn known(content: &Content, layout: &[Parameter], path: &Path) -> Result<()> {
    let names: Vec<String> = layout.iter().filter_map(|p| gguf_name(&p.name)).collect();
    let mut strangers: Vec<&String> = content.tensor_infos.keys().filter(|n| !names.contains(n)).collect();
    strangers.sort();
    match strangers.first() {
        None => Ok(()),
        Some(name) => Err(Error::UnexpectedTensor { name: (*name).clone(), place: place(path) }),
    }
}

fn tensor(content: &Content, reader: &mut BufReader<File>, path: &Path, parameter: &Parameter) -> Result<Vec<f32>> {
    let missing = || Error::MissingTensor { name: parameter.name.clone(), place: place(path) };
    let name = gguf_name(&parameter.name).ok_or_else(missing)?;
    let info = content.tensor_infos.get(&name).ok_or_else(missing)?;
    let expected = dims(parameter.shape);
    if info.shape.dims() != expected {
        return Err(Error::shape(name, info.shape.dims(), &expected, place(path)));
    }
    guarded(path, || {
        let tensor = info.read(reader, content.tensor_data_offset, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        tensor.flatten_all()?.to_vec1()
    })
}

/// `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`.
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let part = match part.strip_suffix(".weight")? {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.weight"))
}

/// Heads of a matrix whose rows are permuted.
fn heads_of(name: &str, config: &Config) -> Option<usize> {
    match name {
        name if name.ends_with("q_proj.weight") => Some(config.heads),
        name if name.ends_with("k_proj.weight") => Some(config.kv_heads),
        _ => None,
    }
}

/// Rows from interleaved pairs to halves: row `2 i + j` of a head becomes row `j head_dim / 2 + i`.
fn halves(values: &[f32], heads: usize, head_dim: usize, inputs: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for row in 0..heads * head_dim {
        let (head, in_head) = (row / head_dim, row % head_dim);
        let to = head * head_dim + (in_head % 2) * (head_dim / 2) + in_head / 2;
        out[to * inputs..(to + 1) * inputs].copy_from_slice(&values[row * inputs..(row + 1) * inputs]);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use candle_core::Tensor;
    use candle_core::quantized::gguf_file::write;
    use candle_core::quantized::{GgmlDType, QTensor};

    use super::*;

    /// Metadata of a model with hidden 32, one layer, two heads of 16, one key/value head, ffn 32, two tokens.
    fn metadata() -> BTreeMap<&'static str, Value> {
        let texts = |list: &[&str]| Value::Array(list.iter().map(|t| Value::String((*t).into())).collect());
        BTreeMap::from([
            ("general.architecture", Value::String("llama".into())),
            ("llama.embedding_length", Value::U32(32)),
            ("llama.block_count", Value::U32(1)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.attention.head_count_kv", Value::U32(1)),
            ("llama.feed_forward_length", Value::U32(32)),
            ("llama.context_length", Value::U32(64)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String("smollm".into())),
            ("tokenizer.ggml.tokens", texts(&["<eos>", "a"])),
            ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(3), Value::I32(1)])),
            ("tokenizer.ggml.merges", texts(&[])),
            ("tokenizer.ggml.eos_token_id", Value::U32(0)),
        ])
    }

    fn shapes() -> Vec<(&'static str, Vec<usize>)> {
        vec![
            ("token_embd.weight", vec![2, 32]),
            ("output_norm.weight", vec![32]),
            ("blk.0.attn_norm.weight", vec![32]),
            ("blk.0.ffn_norm.weight", vec![32]),
            ("blk.0.attn_q.weight", vec![32, 32]),
            ("blk.0.attn_k.weight", vec![16, 32]),
            ("blk.0.attn_v.weight", vec![16, 32]),
            ("blk.0.attn_output.weight", vec![32, 32]),
            ("blk.0.ffn_gate.weight", vec![32, 32]),
            ("blk.0.ffn_up.weight", vec![32, 32]),
            ("blk.0.ffn_down.weight", vec![32, 32]),
        ]
    }

    /// Every number is that of its row.
    fn bytes(metadata: &BTreeMap<&'static str, Value>, shapes: &[(&'static str, Vec<usize>)]) -> Vec<u8> {
        let tensors: Vec<(&str, QTensor)> = shapes
            .iter()
            .map(|(name, shape)| {
                let width = shape[shape.len() - 1];
                let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i / width) as f32).collect();
                let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
                (*name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
            })
            .collect();
        let mut out = Cursor::new(Vec::new());
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (*k, v)).collect();
        write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }

    fn loaded(bytes: &[u8]) -> Result<Loaded> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        load(file.path())
    }

    #[test]
    fn rows_of_queries_and_keys_go_back_to_halves() {
        let model = loaded(&bytes(&metadata(), &shapes())).unwrap();
        let column = |name: &str| -> Vec<f32> {
            let (shape, values) = &model.weights.tensors[&format!("model.layers.0.self_attn.{name}.weight")];
            values.chunks_exact(shape[1]).map(|row| row[0]).collect()
        };
        let head = |from: f32| {
            (0..8).map(move |i| from + 2.0 * i as f32).chain((0..8).map(move |i| from + 1.0 + 2.0 * i as f32))
        };
        assert_eq!(column("k_proj"), head(0.0).collect::<Vec<_>>());
        assert_eq!(column("q_proj"), head(0.0).chain(head(16.0)).collect::<Vec<_>>());
        assert_eq!(column("v_proj"), (0..16).map(|i| i as f32).collect::<Vec<_>>());
        assert_eq!((model.config.head_dim, model.config.tied, model.config.eos.as_slice()), (16, true, &[0][..]));
        assert_eq!(model.tokenizer.encode("a<eos>").unwrap(), [1, 0]);
    }

    #[test]
    fn cut_files_are_errors() {
        let whole = bytes(&metadata(), &shapes());
        for cut in (0..whole.len()).step_by(61).chain([whole.len() - 1]) {
            match loaded(&whole[..cut]) {
                Err(Error::NotGguf { reason, .. }) => assert!(!reason.is_empty()),
                other => panic!("cut at {cut}: {other:?}"),
            }
        }
    }

    #[test]
    fn damaged_files_never_panic() {
        let whole = bytes(&metadata(), &shapes());
        let header = whole.len() - shapes().iter().map(|(_, s)| s.iter().product::<usize>() * 4).sum::<usize>();
        for at in 0..header {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let _ = loaded(&bytes);
            }
        }
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let refused = [
            ("general.architecture", Value::String("qwen2".into())),
            ("tokenizer.ggml.model", Value::String("llama".into())),
            ("llama.rope.scaling.type", Value::String("yarn".into())),
            ("llama.expert_count", Value::U32(8)),
            ("llama.rope.dimension_count", Value::U32(8)),
            ("llama.block_count", Value::U32(4_000)),
            ("llama.embedding_length", Value::I64(-1)),
            ("llama.context_length", Value::F32(1.0)),
        ];
        for (field, value) in refused {
            let mut metadata = metadata();
            metadata.insert(field, value);
            match loaded(&bytes(&metadata, &shapes())) {
                Err(Error::Config { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn tensors_must_be_the_models() {
        let with = |change: fn(&mut Vec<(&'static str, Vec<usize>)>)| {
            let mut shapes = shapes();
            change(&mut shapes);
            loaded(&bytes(&metadata(), &shapes)).unwrap_err()
        };
        assert!(matches!(with(|s| drop(s.pop())), Error::MissingTensor { .. }));
        assert!(matches!(with(|s| s.push(("blk.0.attn_q.bias", vec![32]))), Error::UnexpectedTensor { .. }));
        assert!(matches!(with(|s| s[4].1 = vec![32, 16]), Error::TensorShape { .. }));
    }

    /// With the real file, if it is there (`target/models/`): shape, sums of tensors, tokens of forty texts.
    #[test]
    fn smollm2_is_read_as_the_reference_reads_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = root.join("target/models/SmolLM2-135M-Instruct.Q4_1.gguf");
        if !path.exists() {
            return;
        }
        let model = load(&path).unwrap();
        let count: usize = model.weights.tensors.values().map(|(_, v)| v.len()).sum();
        assert_eq!(count, 134_515_008);
        let golden =
            candle_core::safetensors::load(root.join("tests/golden/smollm2.safetensors"), &Device::Cpu).unwrap();
        for (name, wanted) in golden.iter().filter_map(|(k, v)| Some((k.strip_prefix("sum.")?, v))) {
            let sum: f64 = model.weights.tensors[name].1.iter().map(|v| f64::from(*v)).sum();
            assert!((sum - wanted.to_vec1::<f64>().unwrap()[0]).abs() < 1e-6, "{name}");
        }
        let cases = std::fs::read(root.join("tests/golden/smollm2_tokens.json")).unwrap();
        let cases: Vec<serde_json::Value> = serde_json::from_slice(&cases).unwrap();
        for case in &cases {
            let text = case["text"].as_str().unwrap();
            let wanted: Vec<u32> =
                case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(model.tokenizer.encode(text).unwrap(), wanted, "{text:?}");
        }
        assert_eq!(cases.len(), 40);
    }
}
