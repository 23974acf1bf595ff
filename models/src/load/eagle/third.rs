//! What the folder of an `Eagle3` has beside its layer: which layers of the target it reads, and a head of its own over the tokens
//! that it drafts. Here that head is a part of the target's.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::super::export::{Table, Tables};
use super::{Config, Layout, OwnHead, RawWeights, Vocabulary, finite, place, refused};
use crate::error::{Error, Result};
use crate::target::{TAPS, Target, taps};

/// From tokens of the head to the target's, as offsets; and which of the target's are among them.
pub(super) const MAPS: [&str; 2] = ["d2t", "t2d"];
const HEAD: &str = "lm_head.weight";
/// Field that says that the head is the target's, of whichever step: engines pass it over.
pub(super) const OF_TARGET: &str = "lm_head_of_target";
/// The layers that are read.
const LAYERS: &str = "eagle_aux_hidden_state_layer_ids";

/// Least mean cosine between rows of a head and the target's: training moves a target's by less, and another head is far from it.
const COSINE_MIN: f64 = 0.9;

/// Adds fields to the configuration and the head to the tensors; returns the maps.
pub(super) fn add(value: &mut Value, own: &mut RawWeights, vocabulary: &Vocabulary, layout: Layout) -> Result<Tables> {
    let config = vocabulary.target().config();
    let layers = taps(config.layers);
    if layout != Layout::Taper && !layers.is_sorted_by(|a, b| a < b) {
        return Err(Error::TooFewLayers { layers: config.layers });
    }
    let (ids, size) = (vocabulary.ids(), vocabulary.size());
    value["draft_vocab_size"] = json!(size);
    value[OF_TARGET] = json!(true);
    value["tie_word_embeddings"] = json!(false);
    // vLLM counts what goes into a layer, SGLang what comes out of one; both are told, their defaults are for deep targets.
    value[LAYERS] = json!(layers);
    value["eagle_config"] = json!({ LAYERS: outputs_of(layers), "use_aux_hidden_state": true });
    let mut rows = Vec::new();
    kernels::embed(&ids, &vocabulary.target().head, &mut rows);
    own.tensors.insert(HEAD.into(), (vec![size, config.hidden], rows));
    let offsets = ids.iter().zip(0..).flat_map(|(id, draft)| (i64::from(*id) - draft).to_le_bytes()).collect();
    let mut drafted = vec![0; config.vocab];
    ids.iter().for_each(|id| drafted[*id as usize] = 1);
    Ok(vec![
        (MAPS[0].into(), Table { dtype: Dtype::I64, shape: vec![size], bytes: offsets }),
        (MAPS[1].into(), Table { dtype: Dtype::BOOL, shape: vec![config.vocab], bytes: drafted }),
    ])
}

/// Refuses a drafter that reads other layers.
pub(super) fn taps_fit(path: &Path, value: &Value, target: &Config) -> Result<()> {
    let layers = taps(target.layers);
    let inputs = value.get(LAYERS).unwrap_or(&Value::Null);
    let outputs = value.get("eagle_config").and_then(|config| config.get(LAYERS)).unwrap_or(&Value::Null);
    // Older folders do not say: they mean those of the public code.
    let is_public = layers == [2, target.layers / 2, target.layers.saturating_sub(3)];
    let is_silent = inputs.is_null() && outputs.is_null();
    for (found, wanted) in [(inputs, json!(layers)), (outputs, json!(outputs_of(layers)))] {
        if (is_silent && !is_public) || (!found.is_null() && *found != wanted) {
            return Err(refused(path, LAYERS, found, &format!("{wanted}, the layers that are read here")));
        }
    }
    Ok(())
}

/// Layers by what comes out of the ones before.
fn outputs_of(layers: [usize; TAPS]) -> [i64; TAPS] {
    layers.map(|layer| layer as i64 - 1)
}

/// Takes the head out, whose tokens have to be different ones of the target's, and which has to be the target's own, as the
/// configuration says or numbers show.
pub(super) fn take_head(
    (path, bytes): (&Path, &[u8]),
    value: &Value,
    target: &Target,
    raw: &mut RawWeights,
) -> Result<Option<OwnHead>> {
    let Some((shape, head)) = raw.tensors.remove(HEAD) else { return Ok(None) };
    let (size, hidden) = (shape.first().copied().unwrap_or(0), target.config().hidden);
    if shape != [size, hidden] || size == 0 {
        return Err(Error::shape(HEAD, &shape, &[size, hidden], place(path)));
    }
    finite(HEAD, &head, &place(path))?;
    let found = ids(path, bytes, target.config(), size)?;
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by_key(|row| found[*row]);
    let ids: Vec<u32> = order.iter().map(|row| found[*row]).collect();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(refused(path, MAPS[0], format!("token {} twice", twice[0]), "each token once"));
    }
    let head: Vec<f32> = order.iter().flat_map(|row| &head[row * hidden..(row + 1) * hidden]).copied().collect();
    if value.get(OF_TARGET) == Some(&json!(true)) {
        return Ok(Some(OwnHead { ids, rows: head }));
    }
    let mut own = Vec::new();
    kernels::embed(&ids, &target.head, &mut own);
    let cosines = head.chunks_exact(hidden).zip(own.chunks_exact(hidden)).map(|(a, b)| cosine(a, b));
    let mean = cosines.sum::<f64>() / size as f64;
    if mean >= COSINE_MIN {
        return Ok(Some(OwnHead { ids, rows: head }));
    }
    let wanted = "the target's own head: a drafter with a head of its own cannot follow what a run drafts";
    Err(refused(path, HEAD, format!("a head at a mean cosine of {mean:.2}"), wanted))
}

/// The target's tokens that a head of `size` rows is for.
fn ids(path: &Path, bytes: &[u8], target: &Config, size: usize) -> Result<Vec<u32>> {
    let damaged = |source| Error::NotSafetensors { path: path.into(), source };
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let all = || (0..target.vocab as u32).collect();
    let Ok(view) = file.tensor(MAPS[0]) else {
        let missing = || Error::MissingTensor { name: MAPS[0].into(), place: place(path) };
        return (size == target.vocab).then(all).ok_or_else(missing);
    };
    if view.shape() != [size] {
        return Err(Error::shape(MAPS[0], view.shape(), &[size], place(path)));
    }
    let dtype =
        || Error::TensorDtype { name: MAPS[0].into(), found: format!("{:?}", view.dtype()), place: place(path) };
    let (Dtype::I64, (offsets, [])) = (view.dtype(), view.data().as_chunks::<8>()) else { return Err(dtype()) };
    let id = |(offset, draft): (&[u8; 8], i64)| {
        let id = i64::from_le_bytes(*offset).checked_add(draft);
        let id = id.and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < target.vocab);
        let supported = format!("offsets to tokens below {}", target.vocab);
        id.ok_or_else(|| refused(path, MAPS[0], i64::from_le_bytes(*offset), &supported))
    };
    offsets.iter().zip(0..).map(id).collect()
}

pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}
