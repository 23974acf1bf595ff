//! The learned drafter: one decoder layer over [embedding of the next token ; target hidden state], with the target's
//! embedding and head (Li et al. 2024, "EAGLE"). Coupled drafting: candidates are ranked by logits / T plus the noise
//! that the target will be sampled with, so that a perfect drafter is always accepted.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{Heads, KeyRun, NoiseKey, Scratch, attend, linear, noise, push_key};
use state::plan::Strategy;

use super::{Context, Drafter};
use crate::cache::KvRows;
use crate::error::Result;
use crate::layer::{Layer, Rows, heads};
use crate::layout::{self, Parameter, ParameterShape};
use crate::load::Config;
use crate::target::Target;
use crate::weights::Weights;
use state::speculation::tree::{DraftTree, ROOT};

/// Shape of the drafter of a target.
#[must_use]
pub fn config(target: &Config, ffn: usize) -> Config {
    let ffn = if ffn == 0 { target.ffn } else { ffn };
    Config { layers: 1, ffn, ..target.clone() }
}

/// Its parameters: two halves of the mixing matrix, and one layer.
#[must_use]
pub fn parameters(config: &Config) -> Vec<Parameter> {
    let shape = ParameterShape::Matrix(config.hidden, config.hidden);
    let mix = |half: &str| Parameter { name: format!("fc_{half}.weight"), shape };
    let mut all = vec![mix("token"), mix("hidden")];
    all.extend(layout::layer(config, "layers.0."));
    all
}

/// The network over one version of its weights.
#[derive(Debug, Clone)]
pub struct Network {
    config: Config,
    mix_token: Tensor,
    mix_hidden: Tensor,
    layer: Layer,
}

impl Network {
    pub(crate) fn over(config: &Config, tensors: Vec<Tensor>) -> Result<Self> {
        let short = || candle_core::Error::Msg("the drafter's weights have too few parameters".into());
        let mut tensors = tensors.into_iter();
        let mix_token = tensors.next().ok_or_else(short)?;
        let mix_hidden = tensors.next().ok_or_else(short)?;
        let layer = Layer::new(config, &mut tensors).ok_or_else(short)?;
        Ok(Self { config: config.clone(), mix_token, mix_hidden, layer })
    }

    /// Predicted hidden states `(r, hidden)` of the tokens whose embeddings are given, from the hidden states before them.
    pub(crate) fn forward(
        &self,
        embedded: &Tensor,
        hidden: &Tensor,
        rows: &Rows<'_>,
        attend: &mut crate::layer::Attend<'_>,
    ) -> candle_core::Result<Tensor> {
        let width = self.config.hidden;
        let mixed = (linear(embedded, &self.mix_token, width)? + linear(hidden, &self.mix_hidden, width)?)?;
        self.layer.forward(&mixed, rows, attend)
    }
}

/// What the drafter keeps of a request: keys and values of the rows already seen, and its last prediction.
#[derive(Debug)]
struct Seen {
    rows: KvRows,
    /// Predicted hidden state of the last token.
    prediction: Vec<f32>,
}

/// The drafter of one device.
#[derive(Debug)]
pub struct Eagle {
    target: Arc<Target>,
    network: Network,
    heads: Heads,
    seen: BTreeMap<u64, Seen>,
}

/// A node that may get children: its place in the tree, its prediction, and the nodes above it as rows of this draft.
#[derive(Debug, Clone)]
struct Leaf {
    request: usize,
    node: usize,
    token: u32,
    score: f32,
    hidden: Vec<f32>,
    above: Vec<usize>,
}

impl Eagle {
    /// A drafter for `target` over these weights.
    ///
    /// # Errors
    /// If the weights are of another layout.
    pub fn new(target: Arc<Target>, weights: &Weights, ffn: usize) -> Result<Self> {
        let config = config(target.config(), ffn);
        let network = Network::over(&config, weights.plain())?;
        Ok(Self { target, network, heads: heads(&config), seen: BTreeMap::new() })
    }

    /// Brings every request's rows up to its last token; leaves the prediction of the last token's hidden state.
    fn catch_up(&mut self, requests: &[Context<'_>]) -> Result<()> {
        let width = self.target.config().hidden;
        let (mut ids, mut positions, mut hidden, mut owner) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (i, request) in requests.iter().enumerate() {
            let seen = self.seen.entry(request.id).or_insert_with(|| Seen {
                rows: KvRows::new(1, self.heads.kv_heads * self.heads.head_dim),
                prediction: Vec::new(),
            });
            for row in seen.rows.rows()..request.tokens.len() - 1 {
                ids.push(request.tokens[row + 1]);
                positions.push(u32::try_from(row).unwrap_or(u32::MAX));
                hidden.extend_from_slice(hidden_row(request, row, width));
                owner.push(i);
            }
        }
        if ids.is_empty() {
            return Ok(());
        }
        let predicted = self.rows(requests, ids, positions, hidden, &owner)?;
        for (row, request) in owner.iter().enumerate() {
            if let Some(seen) = self.seen.get_mut(&requests[*request].id) {
                seen.prediction.clear();
                seen.prediction.extend_from_slice(&predicted[row * width..(row + 1) * width]);
            }
        }
        Ok(())
    }

    /// Runs rows of known hidden states through the network and keeps their keys and values. Rows of a request stand
    /// together, in order.
    fn rows(
        &mut self,
        requests: &[Context<'_>],
        ids: Vec<u32>,
        positions: Vec<u32>,
        hidden: Vec<f32>,
        owner: &[usize],
    ) -> Result<Vec<f32>> {
        let seen = &mut self.seen;
        let shape = self.heads;
        let kv_width = shape.kv_heads * shape.head_dim;
        let longest = owner.chunk_by(|a, b| a == b).map(<[usize]>::len).max().unwrap_or(0);
        let order: Vec<usize> = (0..longest).collect();
        let chain: Vec<&[usize]> = (1..=longest).map(|n| &order[..n]).collect();
        let mut attend_own = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (q, k, v) = (flat(q)?, flat(k)?, flat(v)?);
            let width = shape.heads * shape.head_dim;
            let (mut out, mut scratch, mut first) = (vec![0.0; q.len()], Scratch::default(), 0);
            for group in owner.chunk_by(|a, b| a == b) {
                let last = first + group.len();
                let Some(seen) = seen.get_mut(&requests[group[0]].id) else { continue };
                let mut panels = Vec::new();
                let here = first * kv_width..last * kv_width;
                k[here.clone()].chunks_exact(kv_width).enumerate().for_each(|(i, key)| push_key(&mut panels, i, key));
                let fresh = KeyRun { keys: &panels, values: &v[here] };
                let context = kernels::Context { shared: &[seen.rows.run(0)], fresh, paths: &chain[..group.len()] };
                let at = first * width..last * width;
                attend(&q[at.clone()], context, shape, &mut scratch, &mut out[at]);
                (first..last).for_each(|row| seen.rows.push(0, &k, &v, row));
                first = last;
            }
            Tensor::from_vec(out, (owner.len(), width), &Device::Cpu)
        };
        run(&self.network, &self.target, ids, positions, hidden, &mut attend_own)
    }

    /// Predictions below nodes of the trees. Each row attends to its request's rows and to the rows above it.
    fn deepen(&self, requests: &[Context<'_>], leaves: &mut [Leaf], level: usize, drafts: &mut [KvRows]) -> Result<()> {
        let shape = self.heads;
        let ids = leaves.iter().map(|l| l.token).collect();
        let position = |l: &Leaf| u32::try_from(requests[l.request].tokens.len() - 1 + level).unwrap_or(u32::MAX);
        let positions = leaves.iter().map(position).collect();
        let hidden = leaves.iter().flat_map(|l| l.hidden.iter().copied()).collect();
        for group in leaves.chunk_by_mut(|a, b| a.request == b.request) {
            let first = drafts[group[0].request].rows();
            group.iter_mut().enumerate().for_each(|(i, leaf)| leaf.above.push(first + i));
        }
        let known = &*leaves;
        let mut attend_path = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let (q, k, v) = (flat(q)?, flat(k)?, flat(v)?);
            let width = shape.heads * shape.head_dim;
            let (mut out, mut scratch, mut first) = (vec![0.0; q.len()], Scratch::default(), 0);
            for group in known.chunk_by(|a, b| a.request == b.request) {
                let last = first + group.len();
                let draft = &mut drafts[group[0].request];
                (first..last).for_each(|row| draft.push(0, &k, &v, row));
                let Some(seen) = self.seen.get(&requests[group[0].request].id) else { continue };
                let paths: Vec<&[usize]> = group.iter().map(|l| l.above.as_slice()).collect();
                let context = kernels::Context { shared: &[seen.rows.run(0)], fresh: draft.run(0), paths: &paths };
                let at = first * width..last * width;
                attend(&q[at.clone()], context, shape, &mut scratch, &mut out[at]);
                first = last;
            }
            Tensor::from_vec(out, (known.len(), width), &Device::Cpu)
        };
        let predicted = run(&self.network, &self.target, ids, positions, hidden, &mut attend_path)?;
        for (leaf, hidden) in leaves.iter_mut().zip(predicted.chunks_exact(self.target.config().hidden)) {
            leaf.hidden = hidden.to_vec();
        }
        Ok(())
    }

    fn no_rows(&self) -> KvRows {
        KvRows::new(1, self.heads.kv_heads * self.heads.head_dim)
    }
}

fn flat(t: &Tensor) -> candle_core::Result<Vec<f32>> {
    t.flatten_all()?.to_vec1()
}

fn hidden_row<'a>(request: &Context<'a>, row: usize, width: usize) -> &'a [f32] {
    let shared = request.hidden[0].len() / width;
    match row.checked_sub(shared) {
        None => &request.hidden[0][row * width..(row + 1) * width],
        Some(row) => &request.hidden[1][row * width..(row + 1) * width],
    }
}

fn run(
    network: &Network,
    target: &Target,
    ids: Vec<u32>,
    positions: Vec<u32>,
    hidden: Vec<f32>,
    attend: &mut crate::layer::Attend<'_>,
) -> Result<Vec<f32>> {
    let count = ids.len();
    let embedded = target.embed(&Arc::new(ids))?;
    let hidden = Tensor::from_vec(hidden, (count, target.config().hidden), &Device::Cpu)?;
    let rows = Rows { positions: &Arc::new(positions), rope: target.rope() };
    Ok(flat(&network.forward(&embedded, &hidden, &rows, attend)?)?)
}

/// The `width` best tokens by logits / T plus noise, best first, with their distance to the best (0 or below).
fn candidates(logits: &[f32], temperature: f32, key: &NoiseKey, position: u32, width: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(width + 1);
    let mut consider = |v: u32, score: f32| {
        if best.len() < width || score > best[best.len() - 1].1 {
            let at = best.partition_point(|(_, s)| *s >= score);
            best.insert(at, (v, score));
            best.truncate(width);
        }
    };
    let mut perturbed = Vec::with_capacity(logits.len());
    noise::perturb(logits, temperature, key, position, &mut perturbed);
    (0_u32..).zip(perturbed).for_each(|(v, score)| consider(v, score));
    let top = best.first().map_or(0.0, |b| b.1);
    best.into_iter().map(|(v, score)| (v, score - top)).collect()
}

impl Drafter for Eagle {
    fn wants_hidden(&self) -> bool {
        true
    }

    fn draft(&mut self, requests: &[Context<'_>], strategy: &Strategy) -> Result<Vec<DraftTree>> {
        self.catch_up(requests)?;
        let mut trees = vec![DraftTree::default(); requests.len()];
        let root = |(i, r): (usize, &Context<'_>)| Leaf {
            request: i,
            node: ROOT,
            token: 0,
            score: 0.0,
            hidden: self.seen.get(&r.id).map(|s| s.prediction.clone()).unwrap_or_default(),
            above: Vec::new(),
        };
        // A prompt of one token has no hidden state before it to draft from.
        let mut leaves: Vec<Leaf> = requests.iter().enumerate().map(root).filter(|l| !l.hidden.is_empty()).collect();
        let mut drafts: Vec<KvRows> = requests.iter().map(|_| self.no_rows()).collect();
        for level in 0..strategy.depth {
            let grown = self.grow(requests, &leaves, level, strategy, &mut trees)?;
            if grown.is_empty() || level + 1 == strategy.depth {
                break;
            }
            leaves = grown;
            self.deepen(requests, &mut leaves, level, &mut drafts)?;
        }
        Ok(trees)
    }

    fn ended(&mut self, id: u64, _: &[u32], _: usize) {
        self.seen.remove(&id);
    }
}

impl Eagle {
    /// Adds one level: the best `width` children of each request's leaves together. Returns the new leaves.
    fn grow(
        &self,
        requests: &[Context<'_>],
        leaves: &[Leaf],
        level: usize,
        strategy: &Strategy,
        trees: &mut [DraftTree],
    ) -> Result<Vec<Leaf>> {
        let hidden: Vec<f32> = leaves.iter().flat_map(|l| l.hidden.iter().copied()).collect();
        if hidden.is_empty() {
            return Ok(Vec::new());
        }
        let config = self.target.config();
        let hidden = Tensor::from_vec(hidden, (leaves.len(), config.hidden), &Device::Cpu)?;
        let logits = flat(&self.target.logits(&hidden)?)?;
        let mut grown: Vec<Leaf> = Vec::new();
        for (leaf, logits) in leaves.iter().zip(logits.chunks_exact(config.vocab)) {
            let request = &requests[leaf.request];
            if level >= request.depth_max {
                continue;
            }
            let position = u32::try_from(request.tokens.len() - request.prompt + level).unwrap_or(u32::MAX);
            for (token, gap) in candidates(logits, request.temperature, &request.noise, position, strategy.width) {
                grown.push(Leaf { token, score: leaf.score + gap, ..leaf.clone() });
            }
        }
        // Stable: requests in order, each one's children best first.
        grown.sort_by(|a, b| a.request.cmp(&b.request).then(b.score.total_cmp(&a.score)));
        let mut kept: Vec<Leaf> = Vec::new();
        for mut leaf in grown {
            let same = kept.iter().rev().take_while(|k| k.request == leaf.request).count();
            let tree = &mut trees[leaf.request];
            if same < strategy.width && tree.len() < strategy.budget {
                leaf.node = tree.push(leaf.node, leaf.token);
                kept.push(leaf);
            }
        }
        Ok(kept)
    }
}
