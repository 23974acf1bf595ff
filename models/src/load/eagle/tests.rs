//! What is written is what engines look for, and what loads again.

use std::fs;
use std::sync::Arc;

use kernels::Storage;
use safetensors::SafeTensors;
use state::plan::TinyShape;

use super::export::write_tensors;
use super::*;
use crate::drafter::learn::Learner;
use crate::weights::Weights;

/// What the loaders of SGLang and vLLM look for in a checkpoint; see the file.
const CONTRACT: &str = include_str!("../../../tests/fixtures/eagle_layouts.json");
const EAGLE: DrafterShape = DrafterShape::eagle(10);
const EAGLE3: DrafterShape = DrafterShape::eagle3(10);

fn config() -> Config {
    let shape = TinyShape { hidden: 16, layers: 4, heads: 2, kv_heads: 1, ffn: 24, positions_max: 64 };
    Config { storage: Storage::F32, ..Config::tiny(&shape).unwrap() }
}

fn target_of(config: &Config) -> Arc<Target> {
    let weights = Weights::random(config, 7).unwrap();
    Arc::new(Target::new(config, &weights, &Target::rope_table(config)).unwrap())
}

/// A target with a part of its vocabulary, and a drafter.
fn tiny(shape: DrafterShape) -> (Vocabulary, RawWeights) {
    let target = target_of(&config());
    let weights = Learner::fresh(&target, shape, 3).unwrap().to_raw();
    (Vocabulary::of(&target, Some(&Arc::new(vec![2, 3, 7, 40]))), weights)
}

fn export(to: &Path, shape: DrafterShape, layout: Layout) -> Result<()> {
    let (vocabulary, weights) = tiny(shape);
    export_drafter(to, &vocabulary, (&weights, shape), (layout, "runs/a/model"), Precision::F32)
}

/// What is read of an exported EAGLE-3 once its configuration was changed.
fn changed(to: &Path, layout: Layout, change: &dyn Fn(&mut Value)) -> std::result::Result<Loaded, String> {
    export(to, EAGLE3, layout).unwrap();
    let file = to.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut value);
    fs::write(&file, value.to_string()).unwrap();
    load_drafter(to, &target_of(&config())).map_err(|error| error.to_string())
}

#[test]
fn what_is_written_is_what_loads() {
    let folder = tempfile::tempdir().unwrap();
    for shape in [EAGLE, EAGLE3] {
        let (vocabulary, weights) = tiny(shape);
        for layout in [Layout::Sglang, Layout::Vllm, Layout::Taper] {
            let to = folder.path().join("drafter");
            export(&to, shape, layout).unwrap();
            let loaded = load_drafter(&to, vocabulary.target()).unwrap();
            assert_eq!((loaded.weights, loaded.shape), (weights.clone(), shape), "{layout:?}");
            let ids = vocabulary.ids();
            let mut rows = Vec::new();
            kernels::embed(&ids, &vocabulary.target().head, &mut rows);
            let own = (shape.network == NetworkKind::Eagle3).then_some(OwnHead { ids, rows });
            assert_eq!(loaded.head, own, "{layout:?}");
        }
    }
}

#[test]
fn engines_find_what_they_look_for_and_nothing_else() {
    let contract: Value = serde_json::from_str(CONTRACT).unwrap();
    let size = |word: &Value| match word.as_str().unwrap() {
        "hidden" | "heads*head_dim" => 16,
        "2*hidden" => 32,
        "3*hidden" => 48,
        "kv_heads*head_dim" => 8,
        "intermediate" => 10,
        "vocab" => 80,
        "draft_vocab" => 4,
        other => panic!("{other}"),
    };
    let folder = tempfile::tempdir().unwrap();
    for (name, shape, layout) in [
        ("sglang", EAGLE, Layout::Sglang),
        ("vllm", EAGLE, Layout::Vllm),
        ("eagle3", EAGLE3, Layout::Sglang),
        ("speculators", EAGLE3, Layout::Vllm),
    ] {
        let (to, contract) = (folder.path().join(name), &contract[name]);
        export(&to, shape, layout).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
        for (field, wanted) in contract["config"].as_object().unwrap() {
            assert_eq!(config.pointer(field).unwrap_or(&config[field]), wanted, "{name}: {field}");
        }
        let bytes = fs::read(to.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let found: BTreeMap<&str, Vec<usize>> = file.iter().map(|(n, v)| (n, v.shape().to_vec())).collect();
        let wanted = contract["tensors"].as_object().unwrap().iter();
        let wanted: BTreeMap<&str, Vec<usize>> =
            wanted.map(|(n, dims)| (n.as_str(), dims.as_array().unwrap().iter().map(size).collect())).collect();
        assert_eq!(found, wanted, "{name}");
        for (tensor, view) in file.iter() {
            let dtype = contract["dtypes"].get(tensor).and_then(Value::as_str).unwrap_or("F32");
            assert_eq!(format!("{:?}", view.dtype()), dtype, "{name}: {tensor}");
        }
        let layer = config.get("transformer_layer_config").unwrap_or(&config);
        assert_eq!(layer["max_position_embeddings"], 64, "the whole range of positions");
    }
}

#[test]
fn a_head_comes_with_its_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    export(&to, EAGLE3, Layout::Sglang).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["draft_vocab_size"], 4);
    assert_eq!(config["eagle_aux_hidden_state_layer_ids"], json!([1, 2, 3]), "inputs of layers");
    assert_eq!(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"], json!([0, 1, 2]), "outputs of layers");
    let bytes = fs::read(to.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let offsets = file.tensor("d2t").unwrap().data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
    assert_eq!(offsets.collect::<Vec<_>>(), [2, 2, 5, 37]);
    let drafted: Vec<usize> =
        file.tensor("t2d").unwrap().data().iter().enumerate().filter(|(_, b)| **b == 1).map(|(id, _)| id).collect();
    assert_eq!(drafted, [2, 3, 7, 40]);
    // Another head would guess something else than what the run drafts; this one is an earlier step's.
    let weights = Weights::random(&self::config(), 8).unwrap();
    let stranger = Target::new(&self::config(), &weights, &Target::rope_table(&self::config())).unwrap();
    load_drafter(&to, &stranger).unwrap();
    let mut unsaid = config.clone();
    unsaid.as_object_mut().unwrap().remove("lm_head_of_target").unwrap();
    fs::write(to.join("config.json"), unsaid.to_string()).unwrap();
    load_drafter(&to, &target_of(&self::config())).unwrap();
    let error = load_drafter(&to, &stranger).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("cosine"), "{error}");
}

#[test]
fn engines_tell_the_taps_of_shallow_targets_apart() {
    let target = target_of(&Config { layers: 2, ..config() });
    let weights = Learner::fresh(&target, EAGLE3, 3).unwrap().to_raw();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    let vocabulary = Vocabulary::whole(&target);
    let error = export_drafter(&to, &vocabulary, (&weights, EAGLE3), (Layout::Vllm, ""), Precision::F32).unwrap_err();
    assert!(error.to_string().contains("of 2 layers"), "{error}");
    assert!(!to.exists());
    export_drafter(&to, &vocabulary, (&weights, EAGLE3), (Layout::Taper, ""), Precision::F32).unwrap();
    assert_eq!(load_drafter(&to, &target).unwrap().weights, weights);
}

#[test]
fn a_drafter_of_another_target_is_refused() {
    let config = config();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    let refuses = |config: Config, word: &str| {
        let error = load_drafter(&to, &target_of(&config)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    for shape in [EAGLE, EAGLE3] {
        export(&to, shape, Layout::Taper).unwrap();
        refuses(Config { hidden: 32, ..config.clone() }, "hidden_size");
        refuses(Config { vocab: 99, ..config.clone() }, "vocab_size");
        refuses(Config { rope_theta: 500_000.0, ..config.clone() }, "rope_theta");
        refuses(Config { positions_max: 128, ..config.clone() }, "max_position_embeddings");
    }
    refuses(Config { layers: 8, ..config.clone() }, "eagle_aux_hidden_state_layer_ids");
    let config_file = to.join("config.json");
    let text = fs::read_to_string(&config_file).unwrap().replace("\"LlamaForCausalLMEagle3\"", "\"Qwen\"");
    fs::write(&config_file, text).unwrap();
    refuses(config, "LlamaForCausalLMEagle");
}

#[test]
fn speculators_that_others_write_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (to, (_, weights)) = (folder.path().join("drafter"), tiny(EAGLE3));
    let with = |change: &dyn Fn(&mut Value)| changed(&to, Layout::Vllm, change);
    let newer = with(&|value| {
        let layer = value["transformer_layer_config"].as_object_mut().unwrap();
        let theta = layer.remove("rope_theta").unwrap();
        layer.insert("rope_parameters".into(), json!({ "rope_theta": theta, "rope_type": "default" }));
        value.as_object_mut().unwrap().remove("norm_before_fc");
    });
    assert_eq!(newer.unwrap().weights, weights);
    let refused = |field: &str, change: &dyn Fn(&mut Value)| {
        let error = with(change).unwrap_err();
        assert!(error.contains(field), "{error}");
    };
    refused("norm_before_residual", &|value| value["norm_before_residual"] = json!(true));
    refused("norm_before_residual", &|value| drop(value.as_object_mut().unwrap().remove("norm_before_residual")));
    refused("norm_before_fc", &|value| value["norm_before_fc"] = json!(true));
    refused("speculators_model_type", &|value| value["speculators_model_type"] = json!("dflash"));
    refused("hidden_size", &|value| value["transformer_layer_config"]["hidden_size"] = json!(32));
    refused("transformer_layer_config", &|value| value["transformer_layer_config"] = json!("none"));
}

#[test]
fn a_drafter_that_reads_other_layers_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    let with = |change: &dyn Fn(&mut Value)| changed(&to, Layout::Sglang, change).map(drop);
    let ids = "eagle_aux_hidden_state_layer_ids";
    assert_eq!(with(&|value| value["eagle_config"] = Value::Null), Ok(()));
    assert_eq!(with(&|value| value[ids] = Value::Null), Ok(()));
    let refused = |change: &dyn Fn(&mut Value)| assert!(with(change).unwrap_err().contains(ids));
    refused(&|value| value[ids] = json!([0, 1, 2]));
    refused(&|value| (value[ids], value["eagle_config"][ids]) = (Value::Null, json!([1, 2, 3])));
    // Those of the public code are none of four layers.
    refused(&|value| (value[ids], value["eagle_config"]) = (Value::Null, Value::Null));
}

#[test]
fn damaged_tensors_are_named() {
    let (vocabulary, weights) = tiny(EAGLE);
    let target = vocabulary.target();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    export(&to, EAGLE, Layout::Sglang).unwrap();
    let spoil = |change: &dyn Fn(&mut RawWeights)| {
        let mut raw = weights.clone();
        joined(target.config(), &mut raw, Layout::Sglang);
        change(&mut raw);
        write_tensors(&to.join("model.safetensors"), &raw, Precision::F32).unwrap();
        load_drafter(&to, target).unwrap_err().to_string()
    };
    let tensor = "layers.0.mlp.up_proj.weight";
    assert!(spoil(&|raw| drop(raw.tensors.remove(tensor))).contains(tensor));
    assert!(spoil(&|raw| raw.tensors.get_mut(tensor).unwrap().1[3] = f32::NAN).contains(tensor));
    assert!(spoil(&|raw| raw.tensors.get_mut("fc.bias").unwrap().1[0] = 1.0).contains("fc.bias"));
    let norm = "layers.0.input_layernorm.weight";
    assert!(spoil(&|raw| drop(raw.tensors.insert(norm.into(), (vec![16], vec![1.0; 16])))).contains(norm));
    fs::remove_file(to.join("model.safetensors")).unwrap();
    assert!(load_drafter(&to, target).unwrap_err().to_string().contains("model.safetensors"));
}

#[test]
fn damaged_maps_are_named() {
    let (vocabulary, weights) = tiny(EAGLE3);
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("drafter");
    export(&to, EAGLE3, Layout::Sglang).unwrap();
    let text = fs::read_to_string(to.join("config.json")).unwrap();
    let set_own = |is_of_target: bool| {
        let now = text.replace("\"lm_head_of_target\": true", &format!("\"lm_head_of_target\": {is_of_target}"));
        fs::write(to.join("config.json"), now).unwrap();
    };
    set_own(false);
    let spoil = |change: &dyn Fn(&mut export::Tables)| {
        let (mut raw, mut value) = (weights.clone(), json!({}));
        let mut tables = third::add(&mut value, &mut raw, &vocabulary, Layout::Sglang).unwrap();
        change(&mut tables);
        write_beside(&to.join("model.safetensors"), &raw, tables, Precision::F32).unwrap();
        load_drafter(&to, vocabulary.target()).unwrap_err().to_string()
    };
    assert!(spoil(&|tables| drop(tables.remove(0))).contains("d2t"));
    assert!(spoil(&|tables| tables[0].1.bytes[..8].copy_from_slice(&79_i64.to_le_bytes())).contains("lm_head.weight"));
    assert!(spoil(&|tables| tables[0].1.bytes[..8].copy_from_slice(&80_i64.to_le_bytes())).contains("below 80"));
    assert!(spoil(&|tables| tables[0].1.bytes[8..16].copy_from_slice(&(-2_i64).to_le_bytes())).contains("-2"));
    assert!(spoil(&|tables| tables[0].1.dtype = safetensors::Dtype::U64).contains("U64"));
    assert!(spoil(&|tables| tables[0].1.bytes[8..16].copy_from_slice(&1_i64.to_le_bytes())).contains("token 2 twice"));
    // Where the head is said to be the target's, of whichever step, what drafts is what the folder says: its rows, for its tokens.
    set_own(true);
    let read = load_drafter(&to, vocabulary.target());
    assert!(read.unwrap_err().to_string().contains("twice"));
    let (mut raw, mut value) = (weights.clone(), json!({}));
    let mut tables = third::add(&mut value, &mut raw, &vocabulary, Layout::Sglang).unwrap();
    // Tokens 40, 3, 7 and 2 for the rows of 2, 3, 7 and 40.
    tables[0].1.bytes[..8].copy_from_slice(&40_i64.to_le_bytes());
    tables[0].1.bytes[24..].copy_from_slice(&(-1_i64).to_le_bytes());
    write_beside(&to.join("model.safetensors"), &raw, tables, Precision::F32).unwrap();
    let head = load_drafter(&to, vocabulary.target()).unwrap().head.unwrap();
    let mut rows = Vec::new();
    kernels::embed(&[40, 3, 7, 2], &vocabulary.target().head, &mut rows);
    assert_eq!(head, OwnHead { ids: vec![2, 3, 7, 40], rows });
}
