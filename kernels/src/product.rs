//! The tile loop behind every product: `y[row, panel] (+)= x[row] · panel`.
//!
//! Each output element is one chain of fused multiply-adds over k, in order, from zero or from what y holds. Tiles, blocks
//! and threads split outputs; a block of k ends by storing the chain and the next one takes it up again, which rounds
//! nothing. So neither the number of rows nor the instruction set changes a bit.

mod rows;
mod tile;

use std::cell::Cell;
use std::ops::Range;

use crate::dispatch::simd;
use crate::lanes::{Element, Lanes};
use crate::matrix::PANEL;
use crate::pool::{Pool, Shares};

use rows::Tiles;
use tile::{Block, Place, sized};

/// Depth of a block: its part of a panel stays in the first-level cache. Even, so that pairs of steps stay together.
const DEPTH: usize = 512;
/// Rows of a block: their part of x stays in the second-level cache.
const ROWS: usize = 120;
/// Up to here the panel is read once or from the second-level cache, and blocks of k would only cost.
const ROWS_FEW: usize = 24;

/// From this depth on a single row reads several panels at once.
const ROW_DEPTH: usize = 512;
/// Operands of a product.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a, E> {
    /// `(rows, k)`.
    pub(crate) x: &'a [f32],
    /// Panels of sixteen output features each.
    pub(crate) w: &'a [E],
    /// Rows, k, and output features.
    pub(crate) shape: [usize; 3],
    pub(crate) strides: Strides,
    /// Whether chains go on from what y holds.
    pub(crate) keep: bool,
}

/// Distances between elements, in numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strides {
    /// In x, between rows and between steps of k. Either is 1.
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
}

impl<E> Operands<'_, E> {
    /// What the unchecked accesses of the tiles rely on.
    fn check(&self, y: &[f32]) {
        let [rows, k, n] = self.shape;
        let Strides { x_row, x_step, w_step, w_panel, y_row, y_panel } = self.strides;
        let last = n.div_ceil(PANEL) - 1;
        let x_len = (rows - 1) * x_row + (k - 1) * x_step + 1;
        let w_len = last * w_panel + (k - 1) * w_step + PANEL;
        let y_len = (rows - 1) * y_row + last * y_panel + (n - last * PANEL);
        let fits = x_len <= self.x.len() && w_len <= self.w.len() && y_len <= y.len();
        assert!(fits, "a product of {:?} and {:?} into {} floats", self.shape, self.strides, y.len());
    }
}

/// The product on all threads. Lanes beyond n are not written.
pub(crate) fn product<E: Chosen>(pool: &Pool, operands: Operands<'_, E>, y: &mut [f32]) {
    let [rows, k, n] = operands.shape;
    if rows == 0 || n == 0 || k == 0 {
        return nothing(operands, y);
    }
    operands.check(y);
    let (y, panels) = (Shares::of(y), n.div_ceil(PANEL));
    if rows >= ROWS_FEW * 2 * pool.threads() || pool.threads() == 1 {
        pool.split(rows, 12, |rows| E::block(operands, y, rows, 0..panels));
    } else {
        pool.split(panels, 4, |panels| E::block(operands, y, 0..rows, panels));
    }
}

/// The product on the calling thread.
pub(crate) fn multiply(operands: Operands<'_, f32>, y: &mut [f32]) {
    let [rows, k, n] = operands.shape;
    if rows == 0 || n == 0 || k == 0 {
        return nothing(operands, y);
    }
    operands.check(y);
    block_f32(operands, Shares::of(y), 0..rows, 0..n.div_ceil(PANEL));
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
pub(crate) trait Chosen: Element {
    /// Rows times panels of a product; blocks that run at the same time have no element in common.
    fn block(operands: Operands<'_, Self>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>);
}

impl Chosen for f32 {
    fn block(operands: Operands<'_, Self>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>) {
        block_f32(operands, y, rows, panels);
    }
}

impl Chosen for u16 {
    fn block(operands: Operands<'_, Self>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>) {
        block_bf16(operands, y, rows, panels);
    }
}

simd! {
    fn block_f32<V>(operands: Operands<'_, f32>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>) {
        block::<V, f32>(operands, y, rows, panels);
    }
}

simd! {
    fn block_bf16<V>(operands: Operands<'_, u16>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>) {
        block::<V, u16>(operands, y, rows, panels);
    }
}

#[inline(always)]
fn block<V: Lanes, E: Element>(operands: Operands<'_, E>, y: Shares<'_>, rows: Range<usize>, panels: Range<usize>) {
    let k = operands.shape[1];
    let is_few = rows.len() <= ROWS_FEW;
    // Blocks of about the same depth: a short rest would cost as much to begin and to end as a whole one.
    let depth = if is_few { k } else { k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(2) };
    // Narrow numbers take registers in a tile: where that costs rows and there are many, they are widened before.
    let widens = !is_few && E::tile_rows::<V>() < V::TILE.0;
    let highest = if widens { V::TILE.0 } else { E::tile_rows::<V>() };
    let [mut packed, mut wide] = SCRATCH.take();
    let blocks = Tiles::of(rows, ROWS);
    for tiles in (0..blocks.count).map(|i| Tiles::of(blocks.get(i), highest)) {
        for from in (0..k).step_by(depth) {
            let steps = from..k.min(from + depth);
            let keep = operands.keep || from > 0;
            let x = tiles.x(operands.x, operands.strides, steps.clone(), &mut packed);
            let block = Block { x, from, depth: steps.len(), keep };
            if widens {
                widened::<V, E>(operands, y, &tiles, panels.clone(), block, &mut wide);
            } else {
                strip::<V, E>(operands, y, &tiles, panels.clone(), block);
            }
        }
    }
    SCRATCH.set([packed, wide]);
}

thread_local! {
    /// Rows of x side by side, and widened panels: memory that products of a thread reuse.
    static SCRATCH: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// The first floats of what is only as long as it ever was.
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
    tiles: &Tiles,
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
        let width = if panel + wide <= panels.end { wide } else { 1 };
        column::<V, E>(operands, y, tiles, (panel, panel * w_panel + block.from * w_step, width), block);
        panel += width;
    }
}

/// As [`strip`], for many rows of x: narrow panels are widened once for all of them, not once for each tile.
#[inline(always)]
fn widened<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    tiles: &Tiles,
    panels: Range<usize>,
    block: Block<'_>,
    wide: &mut Vec<f32>,
) {
    let Operands { x, w, shape, strides, keep } = operands;
    let size = block.depth * PANEL;
    let wide = first_of(wide, V::TILE.1 * size);
    let mut panel = panels.start;
    while panel < panels.end {
        let width = if panel + V::TILE.1 <= panels.end { V::TILE.1 } else { 1 };
        for (p, to) in wide.chunks_exact_mut(size).take(width).enumerate() {
            let (pairs, last) = w[(panel + p) * strides.w_panel + block.from * PANEL..][..size].as_chunks();
            let (to, to_last) = to.as_chunks_mut::<{ 2 * PANEL }>();
            for (pair, to) in pairs.iter().zip(to) {
                let to = to.as_chunks_mut().0;
                E::even::<V>(pair).store(&mut to[0]);
                E::odd::<V>(pair).store(&mut to[1]);
            }
            for (step, to) in last.as_chunks().0.iter().zip(to_last.as_chunks_mut().0) {
                E::lanes::<V>(step).store(to);
            }
        }
        let strides = Strides { w_panel: size, ..strides };
        let operands = Operands { x, w: &*wide, shape, strides, keep };
        column::<V, f32>(operands, y, tiles, (panel, 0, width), block);
        panel += width;
    }
}

/// All rows of the panels that stand side by side from a panel on, which begins at a place of w.
#[inline(always)]
fn column<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    tiles: &Tiles,
    (panel, w, width): (usize, usize, usize),
    block: Block<'_>,
) {
    for tile in 0..tiles.count {
        let rows = tiles.get(tile);
        let x = (rows.start - tiles.rows.start) * block.depth;
        let place = Place { row: rows.start, panel, x, w, ahead: (tile, tiles.count) };
        // SAFETY: the asserts of `product` cover every tile; blocks of other threads have other outputs.
        unsafe { sized::<V, E>(operands, y, block, place, rows.len(), width) };
    }
}
