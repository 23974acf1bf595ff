//! The hot loop: continuous batching, prefix sharing, and the cycle of draft, verify, accept.
//!
//! Every emitted token is the target's own: `argmax(logits / T + noise)` at its place (L1). A draft only decides how
//! many of them one forward yields.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{Context, Heads, KeyRun, NoiseKey, Scratch, attend, log_prob, noise, push_key};
use state::plan::Strategy;

use crate::cache::{Cache, KvRows};
use crate::drafter::{self, Drafter};
use crate::error::{Error, Result};
use crate::layer::heads;
use crate::target::Target;
use state::speculation::{Accepted, DraftTree, accept};

/// What the decoder must know of a rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Longest answer, in tokens.
    pub tokens_max: usize,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Keep hidden states: drafters read them, and drafter training.
    pub keep_hidden: bool,
}

/// A finished answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Identity of the request on its device.
    pub id: u64,
    /// Group of the request, as admitted.
    pub group: usize,
    /// Sample within the group.
    pub sample: usize,
    /// Prompt and answer, the end token included if there was one.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt: usize,
    /// Log-probability of each answer token under `softmax(logits / T)` (T = 1 if greedy).
    pub log_probs: Vec<f32>,
    /// Whether the answer was cut at its longest allowed length.
    pub truncated: bool,
    /// Hidden states `(tokens - 1, hidden)` if kept, else empty.
    pub hidden: Vec<f32>,
}

/// What one cycle did.
#[derive(Debug, Default)]
pub struct Cycle {
    /// Requests that took part.
    pub requests: usize,
    /// Tokens emitted.
    pub tokens: usize,
    /// Requests with a draft, and the tokens they emitted.
    pub drafted: (usize, usize),
    /// Answers that ended.
    pub ended: Vec<Answer>,
}

#[derive(Debug)]
struct Slot {
    id: u64,
    group: usize,
    sample: usize,
    noise: NoiseKey,
    tokens: Vec<u32>,
    prompt: usize,
    limit: usize,
    log_probs: Vec<f32>,
    cache: Cache,
    shared_hidden: Arc<Vec<f32>>,
    hidden: Vec<f32>,
    ended: bool,
}

/// Decodes the requests of one device.
#[derive(Debug)]
pub struct Decoder {
    target: Arc<Target>,
    decoding: Decoding,
    slots: Vec<Slot>,
    next_id: u64,
}

/// Rows that go through the target together: each request's last token, then its draft.
#[derive(Default)]
struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// For each slot its rows of the batch.
    rows: Vec<Range<usize>>,
    /// For each row the rows of its slot it stands below, from the slot's first on, itself last.
    paths: Vec<Vec<usize>>,
}

/// Keys and values of a batch, by layer.
type NewRows = Vec<(Vec<f32>, Vec<f32>)>;

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new(target: Arc<Target>, decoding: Decoding) -> Self {
        Self { target, decoding, slots: Vec::new(), next_id: 0 }
    }

    /// Requests that are decoding.
    #[must_use]
    pub fn running(&self) -> usize {
        self.slots.len()
    }

    /// Admits a group: one request for each `(sample, noise)`. The prompt goes through the target once.
    ///
    /// # Errors
    /// If the prompt is empty or leaves no room for an answer, or a tensor operation fails.
    pub fn admit(&mut self, group: usize, prompt: &[u32], samples: &[(usize, NoiseKey)]) -> Result<()> {
        let room = self.target.config().positions_max.saturating_sub(prompt.len());
        if prompt.is_empty() || room == 0 {
            return Err(Error::PromptLength {
                tokens: prompt.len(),
                positions_max: self.target.config().positions_max,
            });
        }
        let (prefix, hidden) = self.prefill(&prompt[..prompt.len() - 1])?;
        for (sample, noise) in samples {
            let own = KvRows::new(self.target.config().layers, self.kv_width());
            self.slots.push(Slot {
                id: self.next_id,
                group,
                sample: *sample,
                noise: *noise,
                tokens: prompt.to_vec(),
                prompt: prompt.len(),
                limit: self.decoding.tokens_max.min(room),
                log_probs: Vec::new(),
                cache: Cache { prefix: prefix.clone(), own },
                shared_hidden: hidden.clone(),
                hidden: Vec::new(),
                ended: false,
            });
            self.next_id += 1;
        }
        Ok(())
    }

    fn kv_width(&self) -> usize {
        let Heads { kv_heads, head_dim, .. } = heads(self.target.config());
        kv_heads * head_dim
    }

    fn prefill(&self, tokens: &[u32]) -> Result<(Arc<KvRows>, Arc<Vec<f32>>)> {
        let layers = self.target.config().layers;
        let mut rows = KvRows::new(layers, self.kv_width());
        if tokens.is_empty() {
            return Ok((Arc::new(rows), Arc::default()));
        }
        let lengths = Arc::new(vec![tokens.len()]);
        let shape = heads(self.target.config());
        let mut attend_all = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            let (keys, values) = (flat(k)?, flat(v)?);
            (0..tokens.len()).for_each(|row| rows.push(layer, &keys, &values, row));
            kernels::attend_sequences(q, k, v, &lengths, shape)
        };
        let positions = (0..u32::try_from(tokens.len()).unwrap_or(u32::MAX)).collect();
        let hidden = self.target.hidden(&Arc::new(tokens.to_vec()), &Arc::new(positions), &mut attend_all)?;
        let hidden = if self.decoding.keep_hidden { flat(&hidden)? } else { Vec::new() };
        Ok((Arc::new(rows), Arc::new(hidden)))
    }

    /// One forward for all running requests; with a drafter, over their drafts too.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn cycle(&mut self, draft: Option<(&mut dyn Drafter, &Strategy)>) -> Result<Cycle> {
        if self.slots.is_empty() {
            return Ok(Cycle::default());
        }
        let mut drafter = draft;
        let trees = match drafter.as_mut() {
            Some((drafter, strategy)) => self.drafts(*drafter, strategy)?,
            None => vec![DraftTree::default(); self.slots.len()],
        };
        let mut cycle = self.verify(&trees)?;
        cycle.ended = self.take_ended();
        Ok(cycle)
    }

    fn drafts(&self, drafter: &mut dyn Drafter, strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let contexts: Vec<Vec<&[u32]>> = self.slots.iter().map(|s| self.siblings(s)).collect();
        let requests: Vec<drafter::Context<'_>> =
            self.slots.iter().zip(&contexts).map(|(s, siblings)| self.context(s, siblings)).collect();
        let trees = drafter.draft(&requests, strategy)?;
        for (tree, request) in trees.iter().zip(&requests) {
            debug_assert!(
                (0..tree.len()).all(|n| tree.depth(n) < request.depth_max),
                "a draft is deeper than its answer"
            );
        }
        Ok(trees)
    }

    fn siblings(&self, slot: &Slot) -> Vec<&[u32]> {
        self.slots.iter().filter(|s| s.group == slot.group && s.id != slot.id).map(|s| s.tokens.as_slice()).collect()
    }

    fn context<'a>(&'a self, slot: &'a Slot, siblings: &'a [&'a [u32]]) -> drafter::Context<'a> {
        drafter::Context {
            id: slot.id,
            tokens: &slot.tokens,
            prompt: slot.prompt,
            hidden: [&slot.shared_hidden, &slot.hidden],
            noise: slot.noise,
            temperature: self.decoding.temperature,
            depth_max: slot.limit - slot.log_probs.len() - 1,
            siblings,
        }
    }

    fn verify(&mut self, trees: &[DraftTree]) -> Result<Cycle> {
        let batch = self.batch(trees);
        let mut new_rows = NewRows::new();
        let hidden = self.forward(&batch, &mut new_rows)?;
        let logits = flat(&self.target.logits(&hidden)?)?;
        let hidden = if self.decoding.keep_hidden { flat(&hidden)? } else { Vec::new() };
        let mut cycle = Cycle { requests: trees.len(), ..Cycle::default() };
        for (slot, tree) in trees.iter().enumerate() {
            let targets = self.targets(&batch, &logits, slot);
            let accepted = accept(tree, targets[0], &targets[1..]);
            let emitted = self.emit(slot, &accepted, &logits, batch.rows[slot].start, (&new_rows, &hidden));
            cycle.tokens += emitted;
            if !tree.is_empty() {
                cycle.drafted.0 += 1;
                cycle.drafted.1 += emitted;
            }
        }
        Ok(cycle)
    }

    fn batch(&self, trees: &[DraftTree]) -> Batch {
        let mut batch = Batch::default();
        for (state, tree) in self.slots.iter().zip(trees) {
            let (first, length) = (batch.ids.len(), state.tokens.len());
            batch.ids.push(state.tokens[length - 1]);
            batch.paths.push(vec![0]);
            for node in 0..tree.len() {
                batch.ids.push(tree.tokens[node]);
                batch.paths.push(std::iter::once(0).chain(tree.path(node).into_iter().map(|n| n + 1)).collect());
            }
            let depth = |path: &Vec<usize>| u32::try_from(length - 2 + path.len()).unwrap_or(u32::MAX);
            batch.positions.extend(batch.paths[first..].iter().map(depth));
            batch.rows.push(first..batch.ids.len());
        }
        batch
    }

    fn forward(&self, batch: &Batch, new_rows: &mut NewRows) -> Result<Tensor> {
        let shape = heads(self.target.config());
        let (width, kv_width) = (shape.heads * shape.head_dim, self.kv_width());
        let paths: Vec<&[usize]> = batch.paths.iter().map(Vec::as_slice).collect();
        let (mut scratch, mut panels) = (Scratch::default(), Vec::new());
        let mut attend_rows = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            let (q, keys, values) = (flat(q)?, flat(k)?, flat(v)?);
            let mut out = vec![0.0; q.len()];
            for (slot, rows) in self.slots.iter().zip(&batch.rows) {
                let here = rows.start * kv_width..rows.end * kv_width;
                panels.clear();
                let new = keys[here.clone()].chunks_exact(kv_width);
                new.enumerate().for_each(|(i, key)| push_key(&mut panels, i, key));
                let fresh = KeyRun { keys: &panels, values: &values[here] };
                let context = Context { shared: &slot.cache.runs(layer), fresh, paths: &paths[rows.clone()] };
                let at = rows.start * width..rows.end * width;
                attend(&q[at.clone()], context, shape, &mut scratch, &mut out[at]);
            }
            new_rows.push((keys, values));
            Tensor::from_vec(out, (batch.ids.len(), width), &Device::Cpu)
        };
        Ok(self.target.hidden(&Arc::new(batch.ids.clone()), &Arc::new(batch.positions.clone()), &mut attend_rows)?)
    }

    /// The target's own token after each row of a slot.
    fn targets(&self, batch: &Batch, logits: &[f32], slot: usize) -> Vec<u32> {
        let vocab = self.target.config().vocab;
        let state = &self.slots[slot];
        let token = |row: usize| {
            let position = u32::try_from(batch.positions[row] as usize + 1 - state.prompt).unwrap_or(u32::MAX);
            noise::sample(&logits[row * vocab..(row + 1) * vocab], self.decoding.temperature, &state.noise, position)
        };
        batch.rows[slot].clone().map(token).collect()
    }

    /// Appends accepted tokens up to the end of the answer, and the rows that went through the target. Returns how many.
    fn emit(
        &mut self,
        slot: usize,
        accepted: &Accepted,
        logits: &[f32],
        first: usize,
        new: (&NewRows, &[f32]),
    ) -> usize {
        let config = self.target.config();
        let (vocab, width) = (config.vocab, config.hidden);
        let inverse = if self.decoding.temperature == 0.0 { 1.0 } else { 1.0 / self.decoding.temperature };
        let slot = &mut self.slots[slot];
        let rows = std::iter::once(first).chain(accepted.nodes.iter().map(|n| first + 1 + n));
        let mut emitted = 0;
        for (row, token) in rows.zip(&accepted.tokens) {
            for (layer, (keys, values)) in new.0.iter().enumerate() {
                slot.cache.own.push(layer, keys, values, row);
            }
            if !new.1.is_empty() {
                slot.hidden.extend_from_slice(&new.1[row * width..(row + 1) * width]);
            }
            slot.log_probs.push(log_prob(&logits[row * vocab..(row + 1) * vocab], *token, inverse));
            slot.tokens.push(*token);
            emitted += 1;
            slot.ended = self.decoding.eos.contains(token);
            if slot.ended || slot.log_probs.len() == slot.limit {
                break;
            }
        }
        emitted
    }

    fn take_ended(&mut self) -> Vec<Answer> {
        let over = |s: &Slot| s.ended || s.log_probs.len() == s.limit;
        let (ended, running) = std::mem::take(&mut self.slots).into_iter().partition(over);
        self.slots = running;
        ended.into_iter().map(Slot::answer).collect()
    }
}

impl Slot {
    fn answer(self) -> Answer {
        let hidden =
            if self.hidden.is_empty() { Vec::new() } else { [self.shared_hidden.as_slice(), &self.hidden].concat() };
        Answer {
            id: self.id,
            group: self.group,
            sample: self.sample,
            tokens: self.tokens,
            prompt: self.prompt,
            log_probs: self.log_probs,
            truncated: !self.ended,
            hidden,
        }
    }
}

fn flat(t: &Tensor) -> candle_core::Result<Vec<f32>> {
    t.flatten_all()?.to_vec1()
}
