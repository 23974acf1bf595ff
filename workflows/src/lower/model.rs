//! The model: its arithmetic must come out even.

use std::path::{Path, PathBuf};

use state::plan::{Model, TinyShape};

use super::check::Check;
use crate::nearest::{divisor, multiple};
use crate::spec;
use crate::summary;

/// Parameters of a tiny model, at most.
const PARAMETERS_MAX: u64 = 10_000_000_000;

pub(super) fn lower(check: &mut Check<'_>, model: &spec::Model, folder: &Path) -> Model {
    match model {
        spec::Model::Tiny(tiny) => lower_tiny(check, tiny, folder),
        spec::Model::HuggingFace(path) => Model::HuggingFace(resolved(check, "model", path, folder)),
        spec::Model::Gguf(path) => Model::Gguf(resolved(check, "model", path, folder)),
    }
}

/// A path from the folder of the file.
pub(super) fn resolved(check: &mut Check<'_>, at: &str, path: &Path, folder: &Path) -> PathBuf {
    check.path(at, path);
    folder.join(path)
}

fn lower_tiny(check: &mut Check<'_>, tiny: &spec::Tiny, folder: &Path) -> Model {
    let spec::Tiny { hidden, layers, heads, kv_heads, ffn, positions_max, .. } = *tiny;
    let shape = TinyShape { hidden, layers, heads, kv_heads: kv_heads.unwrap_or(heads), ffn, positions_max };
    if sizes(check, &shape) {
        divisibility(check, &shape);
        total(check, &shape);
    }
    digest(check, tiny);
    let weights = tiny.weights.as_ref().map(|path| resolved(check, "model.weights", path, folder));
    Model::Tiny { shape, weights, sha256: tiny.sha256.as_ref().map(|digest| digest.to_lowercase()) }
}

fn sizes(check: &mut Check<'_>, shape: &TinyShape) -> bool {
    let sizes = [
        check.count("model.hidden", shape.hidden, 2, 65_536),
        check.count("model.layers", shape.layers, 1, 1024),
        check.count("model.heads", shape.heads, 1, 1024),
        !check.is_given("model.kv_heads") || check.count("model.kv_heads", shape.kv_heads, 1, 1024),
        check.count("model.ffn", shape.ffn, 1, 1 << 20),
        check.count("model.positions_max", shape.positions_max, 2, 1 << 20),
    ];
    sizes.iter().all(|is_good| *is_good)
}

fn divisibility(check: &mut Check<'_>, shape: &TinyShape) {
    let TinyShape { hidden, heads, kv_heads, .. } = *shape;
    if !heads.is_multiple_of(kv_heads) {
        let message = format!("`kv_heads` {kv_heads} does not divide `heads` {heads}");
        let help = format!("write `kv_heads: {}`", divisor(heads, kv_heads));
        check.wrong("workflow::not_divisible", "model.kv_heads", message, help);
    }
    let even = multiple(heads * 2, hidden);
    if !hidden.is_multiple_of(heads) {
        let message = format!("`heads` {heads} does not divide `hidden` {hidden}");
        let help = format!("write `heads: {}` or `hidden: {even}`", even_heads(hidden, heads));
        check.wrong("workflow::not_divisible", "model.heads", message, help);
    } else if !(hidden / heads).is_multiple_of(2) {
        let message =
            format!("`hidden` {hidden} / `heads` {heads} is {}; rotary positions need an even number", hidden / heads);
        check.wrong("workflow::not_divisible", "model.hidden", message, format!("write `hidden: {even}`"));
    }
}

/// The number of heads nearest to `heads` that leaves each an even width, if there is one.
fn even_heads(hidden: usize, heads: usize) -> usize {
    if hidden.is_multiple_of(2) { divisor(hidden / 2, heads) } else { divisor(hidden, heads) }
}

fn total(check: &mut Check<'_>, shape: &TinyShape) {
    let parameters = summary::parameters(shape);
    if parameters > PARAMETERS_MAX {
        let message = format!("a model of {parameters} parameters, more than {PARAMETERS_MAX}");
        check.wrong("workflow::too_large", "model", message, "make `hidden`, `ffn` or `layers` smaller");
    }
}

fn digest(check: &mut Check<'_>, tiny: &spec::Tiny) {
    let Some(digest) = &tiny.sha256 else { return };
    let path = "model.sha256";
    if digest.len() != 64 || !digest.chars().all(|c| c.is_ascii_hexdigit()) {
        let help = "write the first word that `sha256sum FILE` prints";
        let message =
            format!("a SHA-256 has 64 hexadecimal digits, this text has {} characters", digest.chars().count());
        check.wrong("workflow::sha256", path, message, help);
    }
    if tiny.weights.is_none() {
        let help = "add `weights: \"model.safetensors\"`, or remove `sha256`";
        check.wrong("workflow::sha256", path, "`sha256` without `weights` checks nothing", help);
    }
}
