//! The hot loop: continuous batching, prefix sharing, and the cycle of draft, verify, accept.
//!
//! Every emitted token is the target's own: `argmax(logits / T + noise)` at its place (L1). A draft only decides how
//! many of them one forward yields.

mod batch;
mod levels;
mod prompts;
mod room;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use kernels::{Context, Draws, KeyValues, NoiseKey, Pick, Pool, Scratch, attend_requests};
use state::plan::Strategy;

use crate::cache::{Cache, Pages};
use crate::drafter::share::Lengths;
use crate::drafter::{self, Drafter};
use crate::error::{Error, Result};
use crate::request::{Answer, Entering, Request, Running};
use crate::stop::Stop;
use crate::target::{Hidden, Memory, Target};
use batch::Batch;
use levels::count_levels;
use prompts::Prompts;
use state::speculation::{Accepted, DraftTree, accept};

/// What the decoder must know of a rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Tokens are drawn from the likeliest ones that have together this probability; 1 is all of them.
    pub top_p: f32,
    /// Longest answer, in tokens.
    pub tokens_max: usize,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Texts that end an answer.
    pub stop: Option<Stop>,
    /// Hidden states that are kept: a drafter reads them, and its training.
    pub hidden: Hidden,
}

impl Decoding {
    /// How tokens are drawn.
    #[must_use]
    pub fn draws(&self) -> Draws {
        Draws { temperature: self.temperature, top_p: self.top_p }
    }
}

/// What one cycle did.
#[derive(Debug, Default)]
pub struct Cycle {
    /// Requests that took part.
    pub requests: usize,
    /// Tokens emitted.
    pub tokens: usize,
    /// Tokens that were to be expected of it, where the drafter can tell.
    pub promised: Option<f64>,
    /// Requests with a draft, and the tokens they emitted.
    pub drafted: (usize, usize),
    /// The same of drafts that a network guessed.
    pub learned: (usize, usize),
    /// Requests in whose draft a network guessed something, beside what another drafter proposed or alone, and those of its guesses
    /// that were right.
    pub guessed: (usize, usize),
    /// Levels of the deepest draft.
    pub deepest: usize,
    /// For each level of these drafts, how often its guesses were to decide (all above were right), and how often one was right.
    pub levels: Vec<(u64, u64)>,
    /// Rows that went through the target: one for each request, one for each drafted token, and those of prompts.
    pub rows: usize,
    /// Rows of prompts among them.
    pub prefilled: usize,
    /// Seconds of the target's forward.
    pub target_s: f64,
    /// Seconds of drafting, without those of catching up.
    pub draft_s: f64,
    /// Seconds that the drafter spent on what earlier cycles had left undone.
    pub catch_up_s: f64,
    /// Answers that ended.
    pub ended: Vec<Answer>,
    /// Identities of requests that wait for memory before they go on, under another one: drafters are to be told that they left.
    pub waiting: Vec<u64>,
}

/// Decodes the requests of one device.
#[derive(Debug)]
pub struct Decoder {
    target: Arc<Target>,
    decoding: Decoding,
    pool: Arc<Pool>,
    slots: Vec<Running>,
    /// Prompts that have not been through the target, in the order of their admission.
    entering: VecDeque<Entering>,
    prompts: Prompts,
    next_id: u64,
    /// Of answers that ended, here and where else they are shared.
    lengths: Lengths,
    pages: Pages,
    /// Pages that are used at a time, at most.
    pages_max: Option<usize>,
    memory: Memory,
    new: NewRows,
}

/// Rows that attend together.
const ATTEND_ROWS: usize = 16;

/// What the last forward made of its batch; memory that forwards reuse.
#[derive(Debug, Default)]
struct NewRows {
    /// Keys and values by layer, `(r, kv_heads * head_dim)` each.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// Keys and values of each slot's and prompt's rows in the layer that is being computed.
    fresh: Vec<KeyValues>,
    scratch: Vec<Scratch>,
    logits: Vec<f32>,
    /// The target's own token after each row.
    picks: Vec<Pick>,
}

impl Decoder {
    /// An empty decoder that computes on these threads.
    #[must_use]
    pub fn new(target: Arc<Target>, decoding: Decoding, pool: Arc<Pool>) -> Self {
        let new = NewRows { layers: vec![Default::default(); target.config().layers], ..NewRows::default() };
        let (slots, entering, prompts, lengths) = Default::default();
        let pages = Pages::new(target.config().layers, target.heads());
        let memory = Memory { keeps: decoding.hidden, ..Memory::default() };
        Self {
            target,
            decoding,
            pool,
            slots,
            entering,
            prompts,
            next_id: 0,
            lengths,
            pages,
            pages_max: None,
            memory,
            new,
        }
    }

    /// The same with lengths that it shares with others: what answers are expected to have before them. They decide what is drafted.
    #[must_use]
    pub fn with_lengths(self, lengths: Lengths) -> Self {
        Self { lengths, ..self }
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn running(&self) -> usize {
        self.slots.len() + self.entering.iter().map(|prompt| prompt.requests.len()).sum::<usize>()
    }

    /// Requests that the next cycle decodes: those whose prompt has been through the target.
    #[must_use]
    pub fn decoding(&self) -> usize {
        self.slots.len()
    }

    /// The requests that are decoding, as far as they are.
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().map(|slot| &slot.request)
    }

    /// Admits a group: one request for each `(sample, noise)`. The prompt goes through the target once, with the cycles that follow; for
    /// more of the group that come meanwhile, or soon after, it does not again.
    ///
    /// # Errors
    /// If the prompt is empty or leaves no room for an answer, or answers may have no token.
    pub fn admit(&mut self, group: usize, prompt: &[u32], samples: &[(usize, NoiseKey)]) -> Result<()> {
        self.check(prompt)?;
        self.require_room(0)?;
        let request = |(sample, noise): &(usize, NoiseKey)| {
            let (tokens, log_probs) = (prompt.to_vec(), Vec::new());
            Request { group, sample: *sample, noise: *noise, tokens, prompt: prompt.len(), log_probs }
        };
        self.enter(samples.iter().map(request).collect());
        Ok(())
    }

    /// Admits a request that another decoder has begun; it goes on with the tokens it would have had there.
    ///
    /// # Errors
    /// If it has no prompt, or leaves no room for more of its answer.
    pub fn import(&mut self, request: Request) -> Result<()> {
        self.check(&request.tokens[..request.prompt])?;
        self.check(&request.tokens)?;
        self.require_room(request.log_probs.len())?;
        self.enter(vec![request]);
        Ok(())
    }

    /// Fails if an answer of so many tokens may not have another one.
    fn require_room(&self, tokens: usize) -> Result<()> {
        let tokens_max = self.decoding.tokens_max;
        if tokens < tokens_max { Ok(()) } else { Err(Error::AnswerLength { tokens, tokens_max }) }
    }

    /// Admits a request with the keys and values that it has already; what is missing, or of another target, is made again.
    ///
    /// # Errors
    /// As [`Decoder::import`].
    pub fn take_over(&mut self, running: Running) -> Result<()> {
        let is_whole = running.cache.rows() + 1 == running.request.tokens.len();
        if !is_whole || !Arc::ptr_eq(&running.target, &self.target) {
            return self.import(running.request);
        }
        self.push(running);
        self.settle();
        Ok(())
    }

    /// Takes the youngest requests out, at most `count`: those that others have to do the least again for. With the identity that
    /// each had here, which drafters are to be told has left.
    pub fn export(&mut self, count: usize) -> Vec<(u64, Request)> {
        self.sort();
        let mut out = Vec::new();
        while out.len() < count {
            let Some(request) = self.pop_entering() else { break };
            out.push((self.next_id, request));
            self.next_id += 1;
        }
        let kept = self.slots.len() - (count - out.len()).min(self.slots.len());
        out.extend(self.slots.drain(kept..).map(|running| (running.id, running.request)));
        out
    }

    /// Takes out the last of the requests that have not begun.
    fn pop_entering(&mut self) -> Option<Request> {
        let last = self.entering.back_mut()?;
        let request = last.requests.pop();
        if last.requests.is_empty() {
            self.entering.pop_back();
        }
        request
    }

    /// Takes half of the requests that are decoding out, rounded down, every second one by length: what is left to do is about as
    /// much here as where they go. And half of those that wait for memory. Drafters are to be told that they have left.
    pub fn halve(&mut self) -> Vec<Running> {
        self.sort();
        let waiting = self.halve_waiting();
        let (mut kept, mut out) = (Vec::new(), Vec::new());
        for (i, running) in std::mem::take(&mut self.slots).into_iter().enumerate() {
            if i % 2 == 0 { kept.push(running) } else { out.push(running) }
        }
        self.slots = kept;
        for request in waiting {
            let running =
                Running::new(request, &self.target, self.decoding.tokens_max, Cache::default(), Arc::default());
            out.push(Running { id: self.next_id, ..running });
            self.next_id += 1;
        }
        out
    }

    /// The longest first.
    fn sort(&mut self) {
        self.slots.sort_by_key(|slot| (std::cmp::Reverse(slot.request.tokens.len()), slot.id));
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let positions_max = self.target.config().positions_max;
        match tokens.is_empty() || tokens.len() >= positions_max {
            true => Err(Error::PromptLength { tokens: tokens.len(), positions_max }),
            false => Ok(()),
        }
    }

    fn push(&mut self, running: Running) {
        self.slots.push(Running { id: self.next_id, ..running });
        self.next_id += 1;
    }

    /// One forward for all running requests; with a drafter, over their drafts too. Stretches of prompts go along.
    ///
    /// # Errors
    /// If the drafter fails, or reads hidden states that are not kept.
    pub fn cycle(&mut self, draft: Option<(&mut dyn Drafter, &Strategy)>) -> Result<Cycle> {
        if self.running() == 0 {
            return Ok(Cycle::default());
        }
        let waiting = self.make_room();
        let (mut drafter, began) = (draft.filter(|_| !self.slots.is_empty()), Instant::now());
        let trees = match drafter.as_mut() {
            Some((drafter, strategy)) => self.drafts(*drafter, strategy)?,
            None => vec![DraftTree::default(); self.slots.len()],
        };
        let draft_s = began.elapsed().as_secs_f64();
        let (mut cycle, accepted, emitted) = self.verify(&trees);
        if let Some((drafter, _)) = drafter.as_mut() {
            cycle.promised = drafter.promised().map(|right| trees.len() as f64 + right);
            drafter.verified(&trees, &accepted);
            for request in (0..trees.len()).filter(|i| !trees[*i].is_empty()) {
                let is_learned = drafter.learned(request);
                cycle.deepest = cycle.deepest.max(trees[request].levels());
                if is_learned {
                    count_levels(&trees[request], &accepted[request], &mut cycle.levels);
                }
                if let Some(right) = drafter.guessed(request, &accepted[request]) {
                    cycle.guessed = (cycle.guessed.0 + 1, cycle.guessed.1 + right);
                }
                let counts = [Some(&mut cycle.drafted), is_learned.then_some(&mut cycle.learned)];
                for (requests, tokens) in counts.into_iter().flatten() {
                    (*requests, *tokens) = (*requests + 1, *tokens + emitted[request]);
                }
            }
        }
        cycle.catch_up_s = drafter.map_or(0.0, |(drafter, _)| drafter.catch_up_s());
        cycle.draft_s = (draft_s - cycle.catch_up_s).max(0.0);
        (cycle.ended, cycle.waiting) = (self.take_ended(), waiting);
        self.settle();
        Ok(cycle)
    }

    fn drafts(&self, drafter: &mut dyn Drafter, strategy: &Strategy) -> Result<Vec<DraftTree>> {
        let (reads, kept) = (drafter.reads(), self.decoding.hidden);
        if reads != Hidden::Nothing && reads != kept {
            return Err(Error::Hidden { reads, kept });
        }
        let requests: Vec<drafter::Context<'_>> = self.slots.iter().map(|s| self.context(s)).collect();
        let budget_all = strategy.drafted_max();
        let trees = drafter.draft(&requests, &strategy.with_budget_all(budget_all))?;
        debug_assert!(trees.iter().map(DraftTree::len).sum::<usize>() <= budget_all, "drafts are within their budget");
        for (tree, request) in trees.iter().zip(&requests) {
            debug_assert!(
                (0..tree.len()).all(|n| tree.depth(n) < request.depth_max),
                "a draft is deeper than its answer"
            );
        }
        Ok(trees)
    }

    fn context<'a>(&'a self, slot: &'a Running) -> drafter::Context<'a> {
        let said = slot.request.log_probs.len();
        drafter::Context {
            id: slot.id,
            tokens: &slot.request.tokens,
            prompt: slot.request.prompt,
            hidden: [&slot.shared_hidden, &slot.hidden],
            noise: slot.request.noise,
            draws: self.decoding.draws(),
            depth_max: slot.limit - said - 1,
            remainder: self.lengths.remainder(said).min((slot.limit - said) as f32),
            proposal: &[],
        }
    }

    /// What the target made of the drafts: the cycle so far, what it accepted of each, and how many tokens each emitted.
    fn verify(&mut self, trees: &[DraftTree]) -> (Cycle, Vec<Accepted>, Vec<usize>) {
        let (mut batch, began) = (Batch::default(), Instant::now());
        for (slot, tree) in self.slots.iter().zip(trees) {
            batch.push_draft(&slot.request.tokens, tree);
        }
        for (prompt, count) in self.entering.iter().zip(self.stretches()) {
            batch.push_stretch(prompt.tokens(), prompt.done()..prompt.done() + count);
        }
        self.forward(&batch);
        let target_s = began.elapsed().as_secs_f64();
        self.draw(&batch);
        let (requests, rows, prefilled) = (trees.len(), batch.ids.len(), self.entered(&batch));
        let mut cycle = Cycle { requests, rows, prefilled, target_s, ..Cycle::default() };
        let (mut all, mut counts) = (Vec::with_capacity(trees.len()), Vec::with_capacity(trees.len()));
        for (slot, tree) in trees.iter().enumerate() {
            let rows = batch.rows[slot].clone();
            let targets: Vec<u32> = self.new.picks[rows.clone()].iter().map(|pick| pick.token).collect();
            let accepted = accept(tree, targets[0], &targets[1..]);
            let emitted = self.emit(slot, &accepted, rows.start);
            cycle.tokens += emitted;
            counts.push(emitted);
            all.push(accepted);
        }
        (cycle, all, counts)
    }

    /// Takes in what the target made of stretches of prompts; returns how many rows.
    fn entered(&mut self, batch: &Batch) -> usize {
        let (hidden, width) = (self.memory.kept(), self.decoding.hidden.width(self.target.config()));
        let stretches = &batch.rows[self.slots.len()..];
        for (prompt, rows) in self.entering.iter_mut().zip(stretches) {
            rows.clone().for_each(|row| prompt.cache.push(&mut self.pages, &self.new.layers, row));
            Arc::make_mut(&mut prompt.hidden).extend_from_slice(&hidden[rows.start * width..rows.end * width]);
        }
        stretches.iter().map(|rows| rows.len()).sum()
    }

    fn forward(&mut self, batch: &Batch) {
        let Self { target, pool, slots, entering, memory, new, .. } = self;
        let NewRows { layers, fresh, scratch, logits, .. } = new;
        let shape = target.heads();
        let kv_width = shape.kv_width();
        let paths: Vec<&[usize]> = batch.paths.iter().map(Vec::as_slice).collect();
        let running = slots.iter().map(|slot| &slot.cache);
        let caches: Vec<&Cache> =
            running.chain(entering.iter().map(|prompt| &prompt.cache)).take(batch.rows.len()).collect();
        fresh.resize_with(batch.rows.len().max(fresh.len()), || KeyValues::new(shape));
        let mut attend_rows = |layer: usize, [q, keys, values]: [&[f32]; 3], out: &mut [f32]| {
            for (fresh, rows) in fresh.iter_mut().zip(&batch.rows) {
                let here = rows.start * kv_width..rows.end * kv_width;
                fresh.clear();
                fresh.extend(&keys[here.clone()], &values[here]);
            }
            let known: Vec<&KeyValues> = caches.iter().flat_map(|cache| cache.layer(layer)).collect();
            let mut rest = known.as_slice();
            // Many rows of one prompt are work for several threads.
            let mut pieces = Vec::with_capacity(batch.rows.len());
            for ((cache, fresh), rows) in caches.iter().zip(&*fresh).zip(&batch.rows) {
                let (shared, later) = rest.split_at(cache.pages());
                rest = later;
                pieces.extend(paths[rows.clone()].chunks(ATTEND_ROWS).map(|paths| Context { shared, fresh, paths }));
            }
            attend_requests(pool, q, &pieces, shape, scratch, out);
            let (stored_keys, stored_values) = &mut layers[layer];
            stored_keys.clear();
            stored_keys.extend_from_slice(keys);
            stored_values.clear();
            stored_values.extend_from_slice(values);
        };
        target.forward(pool, &batch.ids, &batch.positions, &mut attend_rows, memory);
        // Nothing is drawn behind the rows of a prompt.
        let rows = slots.len().checked_sub(1).map_or(0, |last| batch.rows[last].end);
        target.logits_into(pool, &memory.hidden[..rows * target.config().hidden], logits);
    }

    /// The target's own token after each row of the slots.
    fn draw(&mut self, batch: &Batch) {
        let Self { slots, pool, target, new: NewRows { logits, picks, .. }, decoding, .. } = self;
        let place = |(slot, row): (&Running, usize)| {
            let position = batch.positions[row] as usize + 1 - slot.request.prompt;
            (slot.request.noise, u32::try_from(position).unwrap_or(u32::MAX))
        };
        let rows = slots.iter().zip(&batch.rows).flat_map(|(slot, rows)| rows.clone().map(move |row| (slot, row)));
        let places: Vec<(NoiseKey, u32)> = rows.map(place).collect();
        kernels::draw(pool, (logits, target.config().vocab), decoding.draws(), &places, picks);
    }

    /// Appends accepted tokens up to the end of the answer, and the rows that went through the target. Returns how many.
    fn emit(&mut self, slot: usize, accepted: &Accepted, first: usize) -> usize {
        let (width, pages) = (self.decoding.hidden.width(self.target.config()), &mut self.pages);
        let (slot, new, hidden, stop) =
            (&mut self.slots[slot], &self.new, self.memory.kept(), self.decoding.stop.as_ref());
        let rows = std::iter::once(first).chain(accepted.nodes.iter().map(|n| first + 1 + n));
        let mut emitted = 0;
        for (row, token) in rows.zip(&accepted.tokens) {
            slot.cache.push(pages, &new.layers, row);
            slot.hidden.extend_from_slice(&hidden[row * width..(row + 1) * width]);
            slot.request.log_probs.push(new.picks[row].log_prob);
            slot.request.tokens.push(*token);
            emitted += 1;
            let answer = &slot.request.tokens[slot.request.prompt..];
            slot.ended = self.decoding.eos.contains(token) || stop.is_some_and(|stop| stop.ends(answer));
            if slot.is_over() {
                break;
            }
        }
        emitted
    }

    fn take_ended(&mut self) -> Vec<Answer> {
        let (ended, running) = std::mem::take(&mut self.slots).into_iter().partition(Running::is_over);
        self.slots = running;
        let (answers, caches): (Vec<_>, Vec<_>) = ended.into_iter().map(Running::answer).unzip();
        answers.iter().for_each(|answer| self.lengths.observe(answer.log_probs.len()));
        caches.into_iter().for_each(|cache| self.pages.give_back(cache));
        answers
    }
}
