//! The tile loop behind every product: `y[row, panel] (+)= x[row] · panel`.
//!
//! Each output element is one chain of fused multiply-adds over k, in order, from zero or from what y holds; weights in bf16 are
//! multiplied with x in bf16. Tiles, blocks and threads split outputs; a block of k ends by storing the chain and the next one
//! takes it up again, which rounds nothing. So neither the number of rows nor the instruction set changes a bit.

mod rows;
mod tile;

use std::cell::Cell;
use std::ops::Range;

use crate::dispatch::{multiplies_pairs, simd};
use crate::lanes::{Element, Lanes, widen};
use crate::matrix::PANEL;
use crate::pool::{Pool, Shares};

use rows::Parts;
use tile::{Block, Place, sized};

/// Depth of a block, at most: its part of a panel stays in the nearest cache that holds it.
const DEPTH: usize = 512;
/// Rows of a block: their part of x stays in the second-level cache.
const ROWS: usize = 120;
/// Up to here the panel is read once or from the second-level cache, and blocks of k would only cost.
const ROWS_FEW: usize = 24;

/// From this depth on a single row reads several panels at once.
const ROW_DEPTH: usize = 512;
/// Rows of w that are fetched ahead where its panels stand side by side.
const ROWS_AHEAD: usize = 24;

/// Operands of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a, E> {
    /// `(rows, k)`.
    pub(crate) x: &'a [f32],
    /// Panels of sixteen output features each.
    pub(crate) w: &'a [E],
    /// Rows, steps of k (of [`Element::NUMBERS`] each), and output features.
    pub(crate) shape: [usize; 3],
    pub(crate) strides: Strides,
    /// Whether chains go on from what y holds.
    pub(crate) keep: bool,
}

/// Distances, in numbers of x and y, and in elements of w.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strides {
    /// In x, between rows and between numbers of k. Either is 1.
    pub(crate) x_row: usize,
    pub(crate) x_step: usize,
    /// In w, between steps of k and between panels.
    pub(crate) w_step: usize,
    pub(crate) w_panel: usize,
    /// In y, between rows and between panels.
    pub(crate) y_row: usize,
    pub(crate) y_panel: usize,
}

impl Strides {
    /// x `(rows, k)`, w `(p, k, PANEL)`, y `(rows, n)`, nothing between.
    pub(crate) fn packed(k: usize, n: usize) -> Self {
        Self { x_row: k, x_step: 1, w_step: PANEL, w_panel: k * PANEL, y_row: n, y_panel: PANEL }
    }

    /// The same where two steps of w, beside each other, are one element.
    pub(crate) fn in_pairs(self) -> Self {
        Self { w_panel: self.w_panel / 2, ..self }
    }
}

impl<'a, E: Element> Operands<'a, E> {
    /// Operands and result of a product in which every access of the tiles lies inside.
    ///
    /// # Panics
    /// If one would not, or strides are none that tiles can read.
    fn check(self, y: &'a mut [f32]) -> Checked<'a, E> {
        let [rows, k, n] = self.shape;
        let Strides { x_row, x_step, w_step, w_panel, y_row, y_panel } = self.strides;
        let last = n.div_ceil(PANEL) - 1;
        let y_width = last * y_panel + (n - last * PANEL);
        let x_len = (rows - 1) * x_row + (k * E::NUMBERS - 1) * x_step + 1;
        let w_len = last * w_panel + (k - 1) * w_step + PANEL;
        let fits = x_len <= self.x.len() && w_len <= self.w.len() && (rows - 1) * y_row + y_width <= y.len();
        let reads = (x_row == 1 || x_step == 1) && (w_step == PANEL || !E::TAKES_TURNS);
        // Rows of y stand one after another, or its panels do: no two elements share a place.
        let by_rows = y_width <= y_row || rows == 1;
        let by_panels = (rows - 1) * y_row + PANEL <= y_panel || last == 0;
        let is_disjoint = (by_rows && (y_panel >= PANEL || last == 0)) || (by_panels && (y_row >= PANEL || rows == 1));
        let len = y.len();
        assert!(fits && reads && is_disjoint, "a product of {:?} and {:?} into {len} floats", self.shape, self.strides);
        Checked { operands: self, y: Shares::of(y) }
    }
}

/// Made by [`Operands::check`] only.
#[derive(Clone, Copy)]
pub(crate) struct Checked<'a, E> {
    operands: Operands<'a, E>,
    y: Shares<'a>,
}

/// The product on all threads. Lanes beyond n are not written.
pub(crate) fn product<E: Weight>(pool: &Pool, operands: Operands<'_, E>, y: &mut [f32]) {
    let [rows, k, n] = operands.shape;
    if rows == 0 || n == 0 || k == 0 {
        return nothing(operands, y);
    }
    let (checked, panels) = (operands.check(y), n.div_ceil(PANEL));
    if rows >= ROWS_FEW * 2 * pool.threads() || pool.threads() == 1 {
        pool.split(rows, 12, |rows| E::block(checked, rows, 0..panels));
    } else {
        pool.split(panels, 4, |panels| E::block(checked, 0..rows, panels));
    }
}

/// The product on the calling thread.
pub(crate) fn multiply<E: Weight>(operands: Operands<'_, E>, y: &mut [f32]) {
    let [rows, k, n] = operands.shape;
    if rows == 0 || n == 0 || k == 0 {
        return nothing(operands, y);
    }
    E::block(operands.check(y), 0..rows, 0..n.div_ceil(PANEL));
}

/// An empty sum is zero.
fn nothing<E>(operands: Operands<'_, E>, y: &mut [f32]) {
    let [rows, _, n] = operands.shape;
    if operands.keep {
        return;
    }
    for row in 0..rows {
        for feature in 0..n {
            let Strides { y_row, y_panel, .. } = operands.strides;
            y[row * y_row + feature / PANEL * y_panel + feature % PANEL] = 0.0;
        }
    }
}

/// Weights that have a block for each instruction set.
pub(crate) trait Weight: Element {
    /// Rows times panels of a product; blocks that run at the same time have no element in common.
    fn block(checked: Checked<'_, Self>, rows: Range<usize>, panels: Range<usize>);
}

impl Weight for f32 {
    fn block(checked: Checked<'_, Self>, rows: Range<usize>, panels: Range<usize>) {
        block_f32(checked, rows, panels);
    }
}

impl Weight for [u16; 2] {
    fn block(checked: Checked<'_, Self>, rows: Range<usize>, panels: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        if multiplies_pairs() {
            #[target_feature(enable = "avx512f,avx512vl,avx512bf16,avx2,fma")]
            fn at_once(checked: Checked<'_, [u16; 2]>, rows: Range<usize>, panels: Range<usize>) {
                block::<crate::lanes::Avx512<true>, _>(checked, rows, panels);
            }
            // SAFETY: the processor was asked for these instruction sets when the variant was chosen.
            return unsafe { at_once(checked, rows, panels) };
        }
        block_pairs(checked, rows, panels);
    }
}

simd! {
    /// Where pairs are multiplied one by one.
    fn block_pairs<V>(checked: Checked<'_, [u16; 2]>, rows: Range<usize>, panels: Range<usize>) {
        block::<V, [u16; 2]>(checked, rows, panels);
    }
}

impl Weight for u16 {
    fn block(checked: Checked<'_, Self>, rows: Range<usize>, panels: Range<usize>) {
        block_bf16(checked, rows, panels);
    }
}

simd! {
    fn block_f32<V>(checked: Checked<'_, f32>, rows: Range<usize>, panels: Range<usize>) {
        block::<V, f32>(checked, rows, panels);
    }
}

simd! {
    fn block_bf16<V>(checked: Checked<'_, u16>, rows: Range<usize>, panels: Range<usize>) {
        block::<V, u16>(checked, rows, panels);
    }
}

#[inline(always)]
fn block<V: Lanes, E: Element>(checked: Checked<'_, E>, rows: Range<usize>, panels: Range<usize>) {
    let Checked { operands, y } = checked;
    let [all_rows, k, n] = operands.shape;
    assert!(rows.end <= all_rows && panels.end <= n.div_ceil(PANEL), "rows {rows:?}, panels {panels:?}");
    let is_few = rows.len() <= ROWS_FEW;
    // Blocks of about the same depth: a short rest would cost as much to begin and to end as a whole one. Even, so that pairs of
    // steps stay together.
    let is_whole = is_few && rows.len() * k <= ROWS * DEPTH;
    let depth = if is_whole { k } else { k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(2) };
    // Narrow numbers take registers in a tile: where that costs rows and there are many, they are widened before. Pairs are not: x
    // is in pairs, too.
    let widens = !is_few && E::NUMBERS == 1 && E::tile_rows::<V>() < V::TILE.0;
    let highest = if widens { V::TILE.0 } else { E::tile_rows::<V>() };
    let [mut packed, mut wide, mut narrow] = SCRATCH.take();
    let blocks = Parts::of(rows, ROWS);
    for tiles in (0..blocks.count).map(|i| Parts::of(blocks.get(i), highest)) {
        for from in (0..k).step_by(depth) {
            let steps = from..k.min(from + depth);
            let keep = operands.keep || from > 0;
            let x = tiles.side_by_side::<E>(operands.x, operands.strides, steps.clone(), [&mut packed, &mut narrow]);
            let block = Block { x, from, depth: steps.len(), keep };
            if widens {
                widened::<V, E>(operands, y, &tiles, panels.clone(), block, &mut wide);
            } else {
                strip::<V, E>(operands, y, &tiles, panels.clone(), block);
            }
        }
    }
    SCRATCH.set([packed, wide, narrow]);
}

thread_local! {
    /// Rows of x side by side, widened panels, and narrow rows of x: memory that products of a thread reuse.
    static SCRATCH: Cell<[Vec<f32>; 3]> = const { Cell::new([const { Vec::new() }; 3]) };
}

/// The first `len` floats of scratch that only grows.
#[inline(always)]
fn first_of(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}

/// All panels, each for all rows.
#[inline(always)]
fn strip<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    tiles: &Parts,
    panels: Range<usize>,
    block: Block<'_>,
) {
    let Strides { w_step, w_panel, .. } = operands.strides;
    // A row of its own reads several panels at once where they come from memory; else one after another is what caches and
    // their prefetchers like best. Panels side by side in rows are one stream, and few rows need them to fill the pipeline.
    let wide = match tiles.rows.len().div_ceil(tiles.count) {
        1 if block.depth >= ROW_DEPTH => 4,
        1 => 1,
        2..=5 if V::TILE.1 > 1 && w_step > PANEL => 4,
        _ => V::TILE.1,
    };
    let mut panel = panels.start;
    while panel < panels.end {
        let fits = |width: &usize| *width <= wide && panel + width <= panels.end;
        let width = [4, V::TILE.1].into_iter().find(fits).unwrap_or(1);
        // Panels that stand behind each other: tiles fetch the next ones while they compute. Panels side by side: rows to come.
        let is_behind = w_panel > w_step;
        let next = if is_behind { (width * w_panel, block.depth * w_step) } else { (ROWS_AHEAD * w_step, 0) };
        let column = Column { panel, width, w: panel * w_panel + block.from * w_step, next };
        tiles_of::<V, E>(operands, y, tiles, column, block);
        panel += width;
    }
}

/// As [`strip`], for many rows of x: narrow panels are widened once for all of them, not once for each tile.
#[inline(always)]
fn widened<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    tiles: &Parts,
    panels: Range<usize>,
    block: Block<'_>,
    wide: &mut Vec<f32>,
) {
    assert!(E::NUMBERS == 1, "pairs are not widened");
    let Operands { x, w, shape, strides, keep } = operands;
    let size = block.depth * PANEL;
    let wide = first_of(wide, V::TILE.1 * size);
    let mut panel = panels.start;
    while panel < panels.end {
        let width = if panel + V::TILE.1 <= panels.end { V::TILE.1 } else { 1 };
        for (p, to) in wide.chunks_exact_mut(size).take(width).enumerate() {
            widen::<V, E>(&w[(panel + p) * strides.w_panel + block.from * PANEL..][..size], to);
        }
        let strides = Strides { w_panel: size, ..strides };
        let operands = Operands { x, w: &*wide, shape, strides, keep };
        // What is asked for ahead is there already.
        let column = Column { panel, width, w: 0, next: (0, size) };
        tiles_of::<V, f32>(operands, y, tiles, column, block);
        panel += width;
    }
}

/// Some panels for all rows of a block.
#[derive(Clone, Copy)]
struct Column {
    panel: usize,
    width: usize,
    /// Where its first panel begins in w.
    w: usize,
    /// What is fetched ahead: how far from its first panel it begins, and how long it is.
    next: (usize, usize),
}

#[inline(always)]
fn tiles_of<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    tiles: &Parts,
    column: Column,
    block: Block<'_>,
) {
    let Column { panel, width, w, next: (next, size) } = column;
    for tile in 0..tiles.count {
        let rows = tiles.get(tile);
        let x = (rows.start - tiles.rows.start) * block.depth;
        let next = next + size * tile / tiles.count;
        let place = Place { row: rows.start, panel, x, w, next, tiles: tiles.count };
        // SAFETY: `Operands::check` has seen that these rows and panels lie in y and w, or `widened` has just written these panels;
        // `Parts::side_by_side` has laid x; blocks of other threads have other outputs.
        unsafe { sized::<V, E>(operands, y, block, place, rows.len(), width) };
    }
}
