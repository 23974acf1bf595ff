//! Windows laid end to end, and what a drafter says ahead of each of their tokens.

use kernels::{Heads, NoiseKey, Pool, SequencesGradient, attend_ahead, attend_ahead_gradient};
use state::plan::DrafterShape;

use crate::drafter::Vocabulary;
use crate::drafter::buffer::Window;
use crate::drafter::eagle::reads;
use crate::drafter::network::{Network, Pass};
use crate::layer::{Attention, Rows};
use crate::load::Config;

/// A token of an answer, and what drew it.
pub(super) struct Drawn {
    pub(super) token: u32,
    pub(super) noise: NoiseKey,
    pub(super) position: u32,
}

/// Rows of all windows. At level 0 row t sees token t + 1 and what the target made of token t, and predicts what the target makes
/// of token t + 1, from which token t + 2 is guessed. At level l it stands l tokens further on, on its own prediction.
pub(super) struct Batch {
    hidden: usize,
    /// Rows of each window.
    lengths: Vec<usize>,
    /// What the target made of each row's token, all that is kept.
    kept: Vec<f32>,
    levels: Vec<Level>,
    /// The tokens of answers that are guessed, and the last hidden states that they were drawn from.
    drawn: Vec<Drawn>,
    last: Vec<f32>,
}

/// What the rows see at a level. Those that would look beyond their window see nothing of use.
struct Level {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// Rows whose prediction a draft would use, and which of the drawn tokens each guesses.
    used: Vec<(usize, usize)>,
}

impl Batch {
    pub(super) fn new(windows: &[Window], target: &Config, shape: DrafterShape, levels: usize) -> Self {
        let (width, hidden) = (reads(shape).width(target), target.hidden);
        let level = |_| Level { ids: Vec::new(), positions: Vec::new(), used: Vec::new() };
        let mut batch = Self {
            hidden,
            lengths: Vec::new(),
            kept: Vec::new(),
            levels: (0..levels).map(level).collect(),
            drawn: Vec::new(),
            last: Vec::new(),
        };
        for window in windows {
            batch.push(window, width);
        }
        batch
    }

    fn push(&mut self, Window { example, tokens }: &Window, width: usize) {
        let (start, end) = (tokens.start, tokens.end);
        let rows = start..end.max(start + 2) - 2;
        let (first, first_drawn) = (self.lengths.iter().sum::<usize>(), self.drawn.len());
        // The first token that is guessed.
        let answer = example.prompt.max(start + 2);
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        for (ahead, level) in self.levels.iter_mut().enumerate() {
            for (i, row) in rows.clone().enumerate() {
                let guessed = row + 2 + ahead;
                level.ids.push(if guessed < end { example.tokens[guessed - 1] } else { 0 });
                level.positions.push(small((row + ahead).min(end - 1)));
                if (answer..end).contains(&guessed) {
                    level.used.push((first + i, first_drawn + guessed - answer));
                }
            }
        }
        for at in answer..end {
            let position = small(at - example.prompt);
            self.drawn.push(Drawn { token: example.tokens[at], noise: example.noise, position });
            self.last.extend_from_slice(&example.hidden[at * width - self.hidden..at * width]);
        }
        self.kept.extend_from_slice(&example.hidden[rows.start * width..rows.end * width]);
        self.lengths.push(rows.len());
    }

    /// Guesses of the first level.
    pub(super) fn guesses(&self) -> usize {
        self.levels[0].used.len()
    }

    /// The rows that guess at a level, in the order of [`Batch::used_into`], and the tokens they guess.
    pub(super) fn drawn(&self, level: usize) -> impl Iterator<Item = (usize, &Drawn)> {
        self.levels[level].used.iter().map(|(row, drawn)| (*row, &self.drawn[*drawn]))
    }

    /// For each row whether all it has guessed is right, before it guesses.
    pub(super) fn rows_right(&self) -> Vec<bool> {
        vec![true; self.lengths.iter().sum()]
    }

    /// Numbers of the rows in use at a level.
    pub(super) fn used_len(&self, level: usize) -> usize {
        self.levels[level].used.len() * self.hidden
    }

    /// Appends the rows in use at a level, out of all `(r, hidden)`.
    pub(super) fn used_into(&self, level: usize, all: &[f32], used: &mut Vec<f32>) {
        let row = |(at, _): &(usize, usize)| &all[at * self.hidden..(at + 1) * self.hidden];
        self.levels[level].used.iter().for_each(|at| used.extend_from_slice(row(at)));
    }

    /// Puts rows in use, in the order of [`Batch::used_into`], back to their places among all.
    pub(super) fn place(&self, level: usize, used: &[f32], all: &mut [f32]) {
        for ((at, _), row) in self.levels[level].used.iter().zip(used.chunks_exact(self.hidden)) {
            all[at * self.hidden..(at + 1) * self.hidden].copy_from_slice(row);
        }
    }

    /// For each guess of a level the drawn token that it is to be, as an index.
    pub(super) fn wanted(&self, level: usize) -> impl Iterator<Item = usize> {
        self.levels[level].used.iter().map(|(_, drawn)| *drawn)
    }

    /// The true last hidden states `(drawn, hidden)`.
    pub(super) fn last(&self) -> &[f32] {
        &self.last
    }

    pub(super) fn kept(&self) -> &[f32] {
        &self.kept
    }

    pub(super) fn rows<'a>(&'a self, level: usize, vocabulary: &'a Vocabulary) -> Rows<'a> {
        Rows { positions: &self.levels[level].positions, rope: vocabulary.target().rope(), beside: &[] }
    }

    /// All levels, one after the other; nothing if the pool was interrupted.
    pub(super) fn forward(
        &self,
        pool: &Pool,
        network: &Network,
        vocabulary: &Vocabulary,
        passes: &mut Vec<Pass>,
    ) -> Option<()> {
        passes.resize_with(self.levels.len(), Pass::default);
        for (i, level) in self.levels.iter().enumerate() {
            pool.goes_on()?;
            let (above, rest) = passes.split_at_mut(i);
            let pass = &mut rest[0];
            match above.last() {
                None => network.enter(pool, &self.kept, &mut pass.entered),
                Some(above) => pass.entered.clone_from(&above.predicted),
            }
            kernels::embed(&level.ids, &vocabulary.target().embedding, &mut pass.embedded);
            let mut ahead = self.ahead((pool, network), above, &mut []);
            let mut attend = |qkv: [&[f32]; 3], out: &mut [f32]| ahead.forth(qkv, out);
            network.predict(pool, self.rows(i, vocabulary), &mut attend, pass);
        }
        pool.goes_on()
    }

    /// How rows below `above` attend; `by` gets gradients by keys and values of those levels and of this one.
    pub(super) fn ahead<'a>(
        &'a self,
        (pool, network): (&'a Pool, &Network),
        above: &'a [Pass],
        by: &'a mut [[Vec<f32>; 2]],
    ) -> Ahead<'a> {
        Ahead { pool, heads: network.heads(), lengths: &self.lengths, above, by }
    }
}

/// Attention of rows that are ahead: they see their sequence as level 0 left it, and themselves at each level since.
pub(super) struct Ahead<'a> {
    pool: &'a Pool,
    heads: Heads,
    lengths: &'a [usize],
    above: &'a [Pass],
    by: &'a mut [[Vec<f32>; 2]],
}

impl Ahead<'_> {
    /// Queries with keys and values of the sequence, and keys and values of the rows since.
    fn seen<'q>(&'q self, [q, k, v]: [&'q [f32]; 3]) -> ([&'q [f32]; 3], Vec<[&'q [f32]; 2]>) {
        let Some((sequence, since)) = self.above.split_first() else { return ([q, k, v], Vec::new()) };
        let [keys, values] = sequence.values.keys_values();
        let since = since.iter().map(|pass| pass.values.keys_values()).chain([[k, v]]);
        ([q, keys, values], since.collect())
    }
}

impl Attention for Ahead<'_> {
    fn forth(&mut self, qkv: [&[f32]; 3], out: &mut [f32]) {
        let (qkv, since) = self.seen(qkv);
        attend_ahead(self.pool, qkv, &since, self.lengths, self.heads, out);
    }

    fn back(&mut self, qkv: [&[f32]; 3], d: &[f32], [dq, dk, dv]: [&mut [f32]; 3]) {
        let by = std::mem::take(&mut self.by);
        let (qkv, since) = self.seen(qkv);
        if let Some((sequence, ahead)) = by.split_first_mut() {
            // By the sequence's keys and values, in the place of this level's own until these are known.
            let to = SequencesGradient { dq, dk: &mut *dk, dv: &mut *dv, ahead };
            attend_ahead_gradient(self.pool, qkv, &since, self.lengths, self.heads, d, to);
            for (sum, own) in sequence.iter_mut().zip([&mut *dk, &mut *dv]) {
                kernels::add(sum, own);
            }
        }
        if let Some([by_keys, by_values]) = by.last() {
            dk.copy_from_slice(by_keys);
            dv.copy_from_slice(by_values);
        }
    }
}
