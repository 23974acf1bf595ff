//! Writes a model as a Hugging Face folder: whole or not at all, the same bytes for the same model.

mod partial;

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};
use serde_json::{Value, json};

use super::{Config, RawWeights, place};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
pub(super) use partial::Partial;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Exact.
    F32,
    /// Half the size; rounds to 11 bits.
    F16,
}

/// What an exported folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A drafter of one.
    Drafter,
}

impl Kind {
    /// As `config.json` says it, and errors do.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Drafter => "drafter",
        }
    }
}

/// Where `config.json` says that the folder is an export, and of what: such a folder may be replaced by the next one.
pub(super) const MARK: &str = "exported_by_taper";
/// All files that exports write.
const FILES: [&str; 4] = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

/// Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json` to `folder`, by way of a hidden
/// folder beside it. An exported model that is there already is replaced.
///
/// # Errors
/// If weights do not fit the shape or the precision, the folder is something else, or it cannot be written.
pub fn export(
    folder: &Path,
    config: &Config,
    weights: &RawWeights,
    precision: Precision,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<()> {
    weights.check(config, &place(folder))?;
    let partial = Partial::begin(folder, Kind::Model)?;
    write_json(&partial.join("config.json"), &config_json(config, precision, Kind::Model))?;
    tokenizer.save(&partial.join("tokenizer.json"))?;
    write_json(&partial.join("tokenizer_config.json"), &tokenizer_json(config, tokenizer, chat_template))?;
    write_tensors(&partial.join("model.safetensors"), weights, precision)?;
    partial.publish()
}

/// Writes tensors to one safetensors file.
///
/// # Errors
/// If a value does not fit the precision or the file cannot be written.
pub fn write_tensors(path: &Path, weights: &RawWeights, precision: Precision) -> Result<()> {
    write_beside(path, weights, Vec::new(), precision)
}

/// A tensor of something else than weights.
pub(super) struct Table {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Little-endian.
    pub(super) bytes: Vec<u8>,
}

/// Such tensors by name.
pub(super) type Tables = Vec<(String, Table)>;

/// A tensor on its way to a file.
enum Stored {
    Weights(Tensor),
    Table(Table),
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Weights(tensor) => View::dtype(&tensor),
            Self::Table(table) => table.dtype,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Weights(tensor) => tensor.dims(),
            Self::Table(table) => &table.shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Weights(tensor) => Cow::Owned(View::data(&tensor).into_owned()),
            Self::Table(table) => Cow::Borrowed(&table.bytes),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Weights(tensor) => View::data_len(&tensor),
            Self::Table(table) => table.bytes.len(),
        }
    }
}

/// The same with other tensors beside the weights.
pub(super) fn write_beside(path: &Path, weights: &RawWeights, tables: Tables, precision: Precision) -> Result<()> {
    let tensors = weights
        .tensors
        .iter()
        .map(|(name, (shape, values))| Ok((name.clone(), Stored::Weights(stored(name, shape, values, precision)?))));
    let tables = tables.into_iter().map(|(name, table)| Ok((name, Stored::Table(table))));
    let tensors: Vec<(String, Stored)> = tensors.chain(tables).collect::<Result<_>>()?;
    let format = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(tensors, format, path).map_err(|source| match source {
        safetensors::SafeTensorError::IoError(source) => Error::Io { path: path.into(), source },
        source => Error::NotSafetensors { path: path.into(), source },
    })
}

fn stored(name: &str, shape: &[usize], values: &[f32], precision: Precision) -> Result<Tensor> {
    let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
    if precision == Precision::F32 {
        return Ok(tensor);
    }
    // 65,520 is the first number that rounds to infinity.
    match values.iter().position(|v| v.abs() >= 65_520.0) {
        Some(index) => Err(Error::Overflow { name: name.into(), index, value: values[index] }),
        None => Ok(tensor.to_dtype(DType::F16)?),
    }
}

pub(super) fn config_json(config: &Config, precision: Precision, kind: Kind) -> Value {
    let dtype = match precision {
        Precision::F32 => "float32",
        Precision::F16 => "float16",
    };
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": config.bos,
        "eos_token_id": if let [one] = config.eos[..] { json!(one) } else { json!(config.eos) },
        MARK: kind.name(),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.positions_max,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": shortest(config.eps),
        "rope_scaling": null,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "vocab_size": config.vocab,
    })
}

/// The f64 with the same shortest decimal: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

fn tokenizer_json(config: &Config, tokenizer: &Tokenizer, chat_template: Option<&str>) -> Value {
    let mut value = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.positions_max,
        "bos_token": config.bos.and_then(|id| tokenizer.token(id)),
        "eos_token": config.eos.first().and_then(|id| tokenizer.token(*id)),
    });
    if let Some(template) = chat_template {
        value["chat_template"] = template.into();
    }
    value
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    io(path, fs::write(path, format!("{value:#}\n")))
}

/// Nothing, an empty folder, or an earlier export of the same kind may be replaced; anything else may be somebody's work.
///
/// # Errors
/// If there is such a folder, or a file.
pub fn replaceable(folder: &Path, kind: Kind) -> Result<()> {
    // The run's folder, which the path may lead through, may not be there yet.
    let folder = real(folder);
    let refused = |because: String| Err(Error::ExportTarget { path: folder.clone(), kind: kind.name(), because });
    if !folder.exists() {
        return Ok(());
    }
    let entries = io(&folder, fs::read_dir(&folder))?;
    let names: Vec<OsString> = entries.flatten().map(|entry| entry.file_name()).collect();
    if let Some(other) = names.iter().find(|name| !FILES.iter().any(|file| name == file)) {
        return refused(format!("`{}` is in it", other.display()));
    }
    let config = fs::read(folder.join("config.json")).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    match names.is_empty() || config.is_some_and(|config| config[MARK] == kind.name()) {
        true => Ok(()),
        false => refused(format!("no `{MARK}: \"{}\"` in its config.json", kind.name())),
    }
}

/// A path without links, as far as it is there, and without detours.
#[must_use]
pub fn real(path: &Path) -> PathBuf {
    let mut real = PathBuf::new();
    for part in std::path::absolute(path).unwrap_or_else(|_| path.into()).components() {
        match part {
            Component::ParentDir => drop(real.pop()),
            part => real.push(part),
        }
        real = real.canonicalize().unwrap_or(real);
    }
    real
}

fn sync(path: &Path) -> Result<()> {
    io(path, File::open(path).and_then(|file| file.sync_all()))
}

fn io<T>(path: &Path, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|source| Error::Io { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use state::plan::TinyShape;

    use super::super::{hf, load_tiny};
    use super::partial::host;
    use super::*;
    use crate::layout::parameters;
    use crate::load::dims;

    fn tiny() -> (Config, RawWeights) {
        let shape = TinyShape { hidden: 16, layers: 2, heads: 2, kv_heads: 1, ffn: 24, positions_max: 64 };
        let config = Config::tiny(&shape).unwrap();
        let mut weights = RawWeights::default();
        for parameter in parameters(&config) {
            // Multiples of 1/64 below 8 are exact in f16.
            let values = (0..parameter.shape.len()).map(|i| ((i * 37 % 997) as f32 - 498.0) / 64.0).collect();
            weights.tensors.insert(parameter.name, (dims(parameter.shape), values));
        }
        (config, weights)
    }

    #[test]
    fn what_is_written_is_what_loads() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        for precision in [Precision::F32, Precision::F16] {
            let to = folder.path().join("model");
            export(&to, &config, &weights, precision, &Tokenizer::chars(), Some("{{ bos_token }}")).unwrap();
            let again = hf::load(&to).unwrap();
            assert_eq!((&again.config, &again.weights), (&config, &weights));
            assert_eq!(again.chat_template.as_deref(), Some("{{ bos_token }}"));
            assert_eq!(again.tokenizer.encode("3+5?").unwrap(), Tokenizer::chars().encode("3+5?").unwrap());
            assert_eq!(load_tiny(&to.join("model.safetensors"), &config, None).unwrap(), weights);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
    }

    #[test]
    fn the_same_model_is_the_same_bytes() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| {
            let to = folder.path().join(name);
            export(&to, &config, &weights, Precision::F16, &Tokenizer::chars(), None).unwrap();
            let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
            names.map(|name| fs::read(to.join(name)).unwrap())
        });
        assert!(a == b);
    }

    #[test]
    fn nobodys_folder_is_overwritten() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let export = |to: &Path| export(to, &config, &weights, Precision::F32, &Tokenizer::chars(), None);
        let refuses = |to: &Path, why: &str| {
            let count = || fs::read_dir(real(to)).unwrap().count();
            let before = count();
            let result = export(to);
            assert!(matches!(&result, Err(Error::ExportTarget { because, .. }) if because.contains(why)), "{result:?}");
            assert_eq!(count(), before);
        };
        let [others, ours] = ["others", "ours"].map(|name| folder.path().join(name));
        fs::create_dir(&others).unwrap();
        fs::write(others.join("thesis.txt"), "dear").unwrap();
        refuses(&others, "thesis.txt");
        // A model that somebody has downloaded.
        fs::remove_file(others.join("thesis.txt")).unwrap();
        fs::write(others.join("config.json"), "{}").unwrap();
        fs::write(others.join("model.safetensors"), "x").unwrap();
        refuses(&others, "exported_by_taper");
        refuses(&ours.join("not").join("there").join("..").join("..").join("..").join("others"), "exported_by_taper");
        // What was exported, as long as it is nothing else.
        export(&ours).unwrap();
        export(&ours).unwrap();
        assert!(matches!(replaceable(&ours, Kind::Drafter), Err(Error::ExportTarget { .. })));
        fs::write(ours.join("notes.txt"), "dear").unwrap();
        refuses(&ours, "notes.txt");
    }

    #[test]
    fn copies_beside_it_stay_and_what_a_killed_export_left_goes() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("model");
        let export = || export(&to, &config, &weights, Precision::F16, &Tokenizer::chars(), None).unwrap();
        let fill = |name: &str| {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("model.safetensors"), name).unwrap();
        };
        let mine = ["model.old", "model.partial"];
        mine.into_iter().for_each(fill);
        export();
        // Killed while it wrote, and between its two moves, when there is no model.
        // No process has a number like that.
        let left = |what: &str| format!(".model.taper-{what}-{}-4294967295-0", host());
        fill(&left("partial"));
        export();
        fs::rename(&to, folder.path().join(left("old"))).unwrap();
        fill(&left("partial"));
        export();
        assert!(hf::load(&to).is_ok());
        for name in mine {
            assert_eq!(fs::read_to_string(folder.path().join(name).join("model.safetensors")).unwrap(), name);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "something was left behind");
    }

    #[test]
    fn of_several_exports_at_a_time_one_stays_whole() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("model");
        let export = || export(&to, &config, &weights, Precision::F32, &Tokenizer::chars(), None).unwrap();
        for _ in 0..10 {
            std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(export))));
            assert_eq!(hf::load(&to).unwrap().weights, weights);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left behind");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("model");
        let spoiled = |value: f32| {
            let mut weights = weights.clone();
            weights.tensors.get_mut("model.norm.weight").unwrap().1[3] = value;
            export(&to, &config, &weights, Precision::F16, &Tokenizer::chars(), None)
        };
        assert!(matches!(spoiled(65_520.0), Err(Error::Overflow { index: 3, .. })));
        assert!(matches!(spoiled(f32::NAN), Err(Error::NonFinite { index: 3, .. })));
        assert!(!to.exists());
        assert!(spoiled(65_519.0).is_ok());
    }

    #[test]
    fn another_weights_file_is_noticed() {
        let (config, weights) = tiny();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write_tensors(&path, &weights, Precision::F32).unwrap();
        let hash = crate::sha::of_file(&path).unwrap();
        assert_eq!(load_tiny(&path, &config, Some(&hash)).unwrap(), weights);
        assert!(matches!(load_tiny(&path, &config, Some("0")), Err(Error::Sha256 { .. })));
        let missing = load_tiny(&folder.path().join("none"), &config, None);
        assert!(matches!(missing, Err(Error::FileMissing { .. })));
    }
}
