//! Logits against the reference implementation's, on the same weights. See tests/golden/README.md.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, safetensors};
use kernels::Pool;
use models::load::{Loaded, gguf, hf};
use models::{Hidden, Target, Weights};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn logits(loaded: &Loaded, ids: &[u32]) -> Tensor {
    let weights = Weights::from_raw(&loaded.config, &loaded.weights).unwrap();
    let target = Target::new(&loaded.config, &weights, &Target::rope_table(&loaded.config)).unwrap();
    let pool = Pool::new(2).unwrap();
    let logits = target.logits(&pool, &target.hidden_of_sequences(&pool, &[ids], Hidden::Last));
    Tensor::from_vec(logits, (ids.len(), loaded.config.vocab), &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_vec1::<i64>().unwrap().iter().map(|i| u32::try_from(*i).unwrap()).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn tiny_models_match() {
    for folder in ["tiny", "tiny_tied"] {
        let loaded = hf::load(&golden(folder)).unwrap();
        let want = safetensors::load(golden(folder).join("logits.safetensors"), &Device::Cpu).unwrap();
        let found = logits(&loaded, &ids(&want["ids"]));
        let difference = largest_difference(&found, &want["logits"]);
        assert!(difference < 1e-4, "{folder}: logits differ by {difference}");
    }
}

/// Runs where the model is installed.
#[test]
fn smollm2_matches() {
    let folder = golden("../../target/models");
    let file = std::fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "gguf"));
    let Some(file) = file else {
        assert!(std::env::var("CI").is_err(), "CI installs the model into {}", folder.display());
        return;
    };
    let want = safetensors::load(golden("smollm2.safetensors"), &Device::Cpu).unwrap();
    let found = logits(&gguf::load(&file).unwrap(), &ids(&want["ids"]));
    let columns = Tensor::new(ids(&want["columns"]), &Device::Cpu).unwrap();
    let difference = largest_difference(&found.index_select(&columns, 1).unwrap(), &want["logits"]);
    assert!(difference < 1e-4, "logits differ by {difference}");
}
