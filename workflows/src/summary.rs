//! How large a plan is, before anything runs.

use std::fmt;

use serde::Serialize;
use state::plan::{Compute, DrafterShape, Model, NetworkKind, Plan, Step, TinyShape};

/// Tokens of a tiny model's vocabulary.
const VOCABULARY: u64 = 80;
/// Bytes of a number.
const F32: u64 = 4;

/// The size of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Name of the run.
    pub name: String,
    /// Parameters of a tiny model; other models tell when they are loaded.
    pub parameters: Option<u64>,
    /// Memory of a run on one device with a tiny model, estimated: weights, gradients, optimiser, drafter, caches and
    /// the activations of one micro-batch.
    pub memory_bytes: Option<u64>,
    /// Optimiser steps of all steps.
    pub optimizer_steps: u64,
    /// Answers sampled to learn from.
    pub rollouts: u64,
    /// Held-out problems answered to measure accuracy.
    pub evaluations: u64,
    /// Tokens sampled, at most, for rollouts and evaluations.
    pub tokens_max: u64,
}

/// Sizes up a plan. Sums that do not fit stay at the largest number.
#[must_use]
pub fn describe(plan: &Plan) -> Summary {
    let total = |of: fn(&Step) -> u64| plan.steps.iter().map(of).fold(0, u64::saturating_add);
    let (rollouts, evaluations) = (total(rollouts), total(evaluations));
    Summary {
        name: plan.name.clone(),
        parameters: shape(plan).map(parameters),
        memory_bytes: shape(plan).map(|shape| memory(plan, shape)),
        optimizer_steps: total(optimizer_steps),
        rollouts,
        evaluations,
        tokens_max: product(&[rollouts.saturating_add(evaluations), wide(plan.sampling.tokens_max)]),
    }
}

fn shape(plan: &Plan) -> Option<&TinyShape> {
    match &plan.model {
        Model::Tiny { shape, .. } => Some(shape),
        Model::HuggingFace(_) | Model::Gguf(_) => None,
    }
}

fn optimizer_steps(step: &Step) -> u64 {
    match step {
        Step::Sft(sft) => wide(sft.steps),
        Step::Grpo(grpo) => wide(grpo.steps),
        Step::Evaluate(_) | Step::Export(_) => 0,
    }
}

fn rollouts(step: &Step) -> u64 {
    match step {
        Step::Grpo(grpo) => product(&[wide(grpo.steps), wide(grpo.prompts), wide(grpo.group)]),
        _ => 0,
    }
}

fn evaluations(step: &Step) -> u64 {
    match step {
        Step::Evaluate(evaluate) => wide(evaluate.problems),
        _ => 0,
    }
}

/// Parameters of a tiny model: layers, embedding (which is the head, too), last norm.
pub(crate) fn parameters(shape: &TinyShape) -> u64 {
    let hidden = wide(shape.hidden);
    let layers = product(&[wide(shape.layers), layer(shape, wide(shape.ffn))]);
    layers.saturating_add(product(&[VOCABULARY + 1, hidden]))
}

/// Parameters of one layer with a feed-forward network of width `ffn`.
fn layer(shape: &TinyShape, ffn: u64) -> u64 {
    let hidden = wide(shape.hidden);
    let attention = product(&[2, hidden, hidden.saturating_add(keys(shape))]);
    sum(&[attention, product(&[3, hidden, ffn]), product(&[2, hidden])])
}

/// Width of the keys of a position.
fn keys(shape: &TinyShape) -> u64 {
    product(&[wide(shape.hidden), wide(shape.kv_heads)]) / wide(shape.heads).max(1)
}

fn memory(plan: &Plan, shape: &TinyShape) -> u64 {
    let (target, drafter) = (parameters(shape), drafter(plan, shape));
    let has_reference = plan.steps.iter().any(|step| matches!(step, Step::Grpo(grpo) if grpo.kl > 0.0));
    // Weights, gradients, two moments; a reference is weights only.
    let copies = |gradients: u64| gradients + 3 + u64::from(has_reference);
    // Of a drafter what is in use, what learns, its average, and two moments. Each device that trains it has a gradient of its own;
    // how many there are may be the machine's to say.
    let trainers = wide(plan.devices.cpu.max(2));
    let weights = sum(&[product(&[copies(sums(plan)), target]), product(&[trainers.saturating_add(5), drafter])]);
    // In bf16 weights stand beside those that the optimiser moves, and keys and values take half their room.
    let (beside, cache) = match plan.compute {
        Compute::F32 => (0, cache(plan, shape)),
        Compute::Bf16 => (target / 2, cache(plan, shape) / 2),
    };
    let kept = plan.speculation.training.as_ref().map_or(0, |training| wide(training.buffer_tokens_max));
    // Three taps beside the last hidden state.
    let states = match plan.speculation.shape().map(|shape| shape.network) {
        Some(NetworkKind::Eagle3) => 4,
        _ => 1,
    };
    let bytes_max = plan.speculation.training.as_ref().map_or(0, |training| wide(training.buffer_bytes_max));
    let buffer = product(&[kept, states, wide(shape.hidden)]).min(bytes_max / F32);
    product(&[F32, sum(&[weights, beside, cache, buffer, activations(plan, shape)])])
}

/// Sums of gradients that wait for their neighbours: one a level of the tree over micro-batches, one in the making, and half of the
/// eight stretches in which they are handed out.
fn sums(plan: &Plan) -> u64 {
    let parts = |step: &Step| match step {
        Step::Sft(sft) => sft.batch / sft.micro_batch.max(1),
        Step::Grpo(grpo) => grpo.prompts.saturating_mul(grpo.group) / grpo.micro_batch.max(1),
        _ => 1,
    };
    let parts = plan.steps.iter().map(parts).max().unwrap_or(1).max(1);
    u64::from(parts.ilog2()) + 2 + (parts as u64 / 2).min(4)
}

/// Keys and values of all slots.
fn cache(plan: &Plan, shape: &TinyShape) -> u64 {
    let all = product(&[wide(plan.devices.slots_max), wide(shape.positions_max)]);
    let tokens = match wide(plan.devices.cache_tokens_max) {
        0 => all,
        most => all.min(most.max(wide(shape.positions_max))),
    };
    product(&[2, tokens, wide(shape.layers), keys(shape)])
}

/// What a backward pass of the largest micro-batch keeps.
fn activations(plan: &Plan, shape: &TinyShape) -> u64 {
    let micro_batch = |step: &Step| match step {
        Step::Sft(sft) => sft.micro_batch,
        Step::Grpo(grpo) => grpo.micro_batch,
        _ => 0,
    };
    let rows = product(&[wide(plan.steps.iter().map(micro_batch).max().unwrap_or(0)), wide(shape.positions_max)]);
    let row = sum(&[product(&[8, wide(shape.hidden)]), product(&[3, wide(shape.ffn)])]);
    product(&[rows, wide(shape.layers), row])
}

/// Parameters of the learned drafter: a layer, and a matrix that joins embedding and hidden state, or hidden states; the
/// attention of an `Eagle3` reads twice as much.
fn drafter(plan: &Plan, shape: &TinyShape) -> u64 {
    let Some(DrafterShape { network, ffn }) = plan.speculation.shape() else { return 0 };
    let hidden = wide(shape.hidden);
    let own = layer(shape, wide(if ffn == 0 { shape.ffn } else { ffn }));
    let more = match network {
        NetworkKind::Eagle => product(&[2, hidden, hidden]),
        NetworkKind::Eagle3 => {
            let reads = wide(shape.heads).saturating_add(wide(shape.kv_heads).saturating_mul(2));
            product(&[3, hidden, hidden]).saturating_add(product(&[reads, hidden / wide(shape.heads).max(1), hidden]))
        }
    };
    own.saturating_add(more)
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn sum(numbers: &[u64]) -> u64 {
    numbers.iter().copied().fold(0, u64::saturating_add)
}

fn product(numbers: &[u64]) -> u64 {
    numbers.iter().copied().fold(1, u64::saturating_mul)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: String| writeln!(f, "{label:<17}{value}");
        line("run", self.name.clone())?;
        line("parameters", self.parameters.map_or("known once loaded".into(), |count| short(count, 1000.0, "")))?;
        line(
            "memory",
            self.memory_bytes
                .map_or("known once loaded".into(), |bytes| format!("about {}", short(bytes, 1024.0, "iB"))),
        )?;
        line("optimiser steps", self.optimizer_steps.to_string())?;
        line("rollouts", self.rollouts.to_string())?;
        line("evaluations", self.evaluations.to_string())?;
        line("tokens", format!("at most {}", short(self.tokens_max, 1000.0, "")))
    }
}

/// `1.6 M` for 1,606,656.
fn short(number: u64, base: f64, unit: &str) -> String {
    let mut scaled = number as f64;
    let mut prefix = "";
    for next in ["k", "M", "G", "T", "P", "E"] {
        if scaled < base {
            break;
        }
        (scaled, prefix) = (scaled / base, next);
    }
    if prefix.is_empty() {
        return format!("{number} {}", unit.trim_start_matches('i')).trim_end().to_owned();
    }
    format!("{scaled:.1} {prefix}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted() {
        let shape = TinyShape { hidden: 128, layers: 4, heads: 4, kv_heads: 4, ffn: 352, positions_max: 512 };
        let layer = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128;
        assert_eq!(parameters(&shape), 4 * layer + 80 * 128 + 128);
        let shared = TinyShape { kv_heads: 1, ..shape };
        assert_eq!(parameters(&shape) - parameters(&shared), 4 * 2 * 128 * 96);
    }

    #[test]
    fn bf16_takes_half_of_what_is_cached_and_stands_beside_what_learns() {
        let quickstart = crate::parse(include_str!("../quickstart.ron"), std::path::Path::new(".")).unwrap();
        let shape = shape(&quickstart).unwrap();
        let bytes = |compute| describe(&Plan { compute, ..quickstart.clone() }).memory_bytes.unwrap();
        let (target, cached) = (parameters(shape), cache(&quickstart, shape));
        assert_eq!(bytes(Compute::F32) + 2 * target - 2 * cached, bytes(Compute::Bf16));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(999, 1000.0, ""), "999");
        assert_eq!(short(1_606_656, 1000.0, ""), "1.6 M");
        assert_eq!(short(512, 1024.0, "iB"), "512 B");
        assert_eq!(short(3 << 20, 1024.0, "iB"), "3.0 MiB");
        assert_eq!(short(u64::MAX, 1000.0, ""), "18.4 E");
    }
}
