//! The tile loop behind every product: `y[row, panel] (+)= x[row] · panel`.
//!
//! Each output element is one chain of fused multiply-adds over k, in order, from zero or from what y holds. Tiles, blocks
//! and threads split outputs; a block of k ends by storing the chain and the next one takes it up again, which rounds
//! nothing. So neither the number of rows nor the instruction set changes a bit.

use std::ops::Range;

use crate::dispatch::simd;
use crate::lanes::{Element, Lanes};
use crate::matrix::PANEL;
use crate::pool::{Pool, Shares};

/// Depth of a block: its part of a panel stays in the first-level cache.
const DEPTH: usize = 512;
/// Rows of a block: their part of x stays in the second-level cache.
const ROWS: usize = 120;
/// Up to here the panel is read once or from the second-level cache, and blocks of k would only cost.
const ROWS_FEW: usize = 24;

/// From this depth on a single row reads several panels at once.
const ROW_DEPTH: usize = 512;
/// Rows of w that are fetched ahead where its panels stand side by side.
const ROWS_AHEAD: usize = 24;

/// Steps of k between two looks at the loop's end. Addresses are computed once for all of them: where another process has the
/// other half of a core, instructions are what is short.
const STEPS: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;

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
    let depth = if rows.len() <= ROWS_FEW { k } else { DEPTH };
    let mut gathered = Vec::new();
    for first in rows.clone().step_by(ROWS) {
        let some_rows = first..rows.end.min(first + ROWS);
        for from in (0..k).step_by(depth) {
            let keep = operands.keep || from > 0;
            let depth = depth.min(k - from);
            let mut place = Place { row: 0, panel: 0, from, depth, keep, ahead: (0, 1), origin: [0, 0] };
            let mut operands = operands;
            if operands.strides.x_step > 1 {
                gather(operands.x, operands.strides, some_rows.clone(), from..from + depth, &mut gathered);
                operands.x = &gathered;
                operands.strides = Strides { x_row: depth + PANEL, x_step: 1, ..operands.strides };
                place.origin = [first, from];
            }
            strip::<V, E>(operands, y, some_rows.clone(), panels.clone(), place);
        }
    }
}

/// A block of an x whose rows stand in columns, packed row by row, square by square: its columns stand far apart. Rows get
/// PANEL floats of room between them, so that they do not fall on each other in a cache.
#[inline(always)]
fn gather(x: &[f32], strides: Strides, rows: Range<usize>, steps: Range<usize>, to: &mut Vec<f32>) {
    let stride = steps.len() + PANEL;
    to.resize(rows.len() * stride, 0.0);
    for first in rows.clone().step_by(PANEL) {
        let height = PANEL.min(rows.end - first);
        for from in steps.clone().step_by(PANEL) {
            let width = PANEL.min(steps.end - from);
            let mut square = [[0.0_f32; PANEL]; PANEL];
            for step in 0..width {
                let line = &x[first * strides.x_row + (from + step) * strides.x_step..][..height];
                for (square, value) in square.iter_mut().zip(line) {
                    square[step] = *value;
                }
            }
            let to = &mut to[(first - rows.start) * stride + from - steps.start..];
            for (row, square) in square[..height].iter().enumerate() {
                to[row * stride..][..width].copy_from_slice(&square[..width]);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Place {
    row: usize,
    panel: usize,
    /// First step of k, and how many.
    from: usize,
    depth: usize,
    keep: bool,
    /// Which of how many tiles over the same panels this is: each asks for its share of the panels that come next.
    ahead: (usize, usize),
    /// Row and step at which x begins.
    origin: [usize; 2],
}

/// All panels, each for all rows.
#[inline(always)]
fn strip<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    mut place: Place,
) {
    // Tiles of about the same height keep more chains in flight than full ones and a rest.
    let tiles = rows.len().div_ceil(V::TILE.0);
    let height = rows.len().div_ceil(tiles);
    // A row of its own reads several panels at once where they come from memory; else one after another is what caches and
    // their prefetchers like best.
    let wide = match height {
        1 if place.depth >= ROW_DEPTH => 4,
        6.. => V::TILE.1,
        _ => 1,
    };
    place.panel = panels.start;
    while place.panel < panels.end {
        let width = if place.panel + wide <= panels.end { wide } else { 1 };
        for tile in 0..tiles {
            let bound = |i: usize| rows.start + rows.len() * i / tiles;
            place.row = bound(tile);
            let height = bound(tile + 1) - place.row;
            place.ahead = (tile, tiles);
            // SAFETY: the asserts of `product` cover every tile; blocks of other threads have other outputs.
            unsafe { sized::<V, E>(operands, y, place, height, width) };
        }
        place.panel += width;
    }
}

/// Calls the tile of this size.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn sized<V: Lanes, E: Element>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    place: Place,
    height: usize,
    width: usize,
) {
    macro_rules! sizes {
        ($($height:literal $width:literal),*) => {
            match (height, width) {
                // SAFETY: as for this function.
                $(($height, $width) => unsafe { tile::<V, E, $height, $width>(operands, y, place) },)*
                _ => unreachable!("no tile of {height} rows and {width} panels"),
            }
        };
    }
    sizes!(
        1 4, 1 1, 2 1, 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 9 1, 10 1, 11 1, 12 1, 6 2, 7 2, 8 2, 9 2, 10 2, 11 2, 12 2
    );
}

/// R rows times P panels; the accumulators stay in registers.
///
/// # Safety
/// Rows `row..row + R` and panels `panel..panel + P` lie within the operands and y, nobody else uses these elements of y,
/// and `from + depth <= k`.
#[expect(clippy::needless_range_loop, reason = "constant indices keep the accumulators in registers")]
#[inline(always)]
unsafe fn tile<V: Lanes, E: Element, const R: usize, const P: usize>(
    operands: Operands<'_, E>,
    y: Shares<'_>,
    place: Place,
) {
    // Never asked for on this instruction set: its accumulators would not fit.
    if R > V::TILE.0 || (R * P > V::TILE.0 * V::TILE.1 && P > 1) {
        return;
    }
    let Operands { x, w, shape: [_, _, n], strides, .. } = operands;
    let Strides { x_row, w_step, w_panel, y_row, y_panel, .. } = strides;
    let Place { row, panel, from, depth, keep, ahead: (tile, tiles), origin } = place;
    // SAFETY: inside x, by the promise above.
    let xs: [*const f32; R] =
        std::array::from_fn(|r| unsafe { x.as_ptr().add((row - origin[0] + r) * x_row + from - origin[1]) });
    // SAFETY: inside w, by the promise above.
    let ws: [*const E; P] = std::array::from_fn(|p| unsafe { w.as_ptr().add((panel + p) * w_panel + from * w_step) });
    // Panels that stand behind each other: each tile fetches a stretch of the next ones while it computes. Panels side by
    // side in rows: the rows to come.
    let is_behind = w_panel > w_step;
    let next = if is_behind { P * w_panel + depth * w_step * tile / tiles } else { ROWS_AHEAD * w_step };
    let share = if is_behind { w_step.div_ceil(tiles) } else { w_step };
    // SAFETY: inside y, by the promise above.
    let at = |r: usize, p: usize| unsafe { y.pointer().add((row + r) * y_row + (panel + p) * y_panel) };
    let width = |p: usize| PANEL.min(n - (panel + p) * PANEL);
    let mut acc = [[V::splat(0.0); P]; R];
    if keep {
        for r in 0..R {
            for p in 0..P {
                // SAFETY: `width(p)` floats stand there, and no other thread uses them.
                acc[r][p] = unsafe { load(at(r, p), width(p)) };
            }
        }
    }
    let mut ahead = ws.map(|w| w.wrapping_add(next));
    let mut i = 0;
    // Steps that stand side by side: a distance that is known makes them one address. A single row waits for memory only, and
    // for that prefetches are best spread evenly.
    if w_step == PANEL && R > 1 {
        let lines = (STEPS * PANEL * size_of::<E>() / LINE).div_ceil(tiles);
        while i + STEPS <= depth {
            for p in 0..P {
                let line = |i: usize| ahead[p].cast::<u8>().wrapping_add(i * LINE);
                V::prefetch(line(0));
                // Not a loop: the accumulators would fall out of their registers.
                if lines > 1 {
                    V::prefetch(line(1));
                }
                if lines > 2 {
                    V::prefetch(line(2));
                    V::prefetch(line(3));
                }
                if lines > 4 {
                    V::prefetch(line(4));
                    V::prefetch(line(5));
                    V::prefetch(line(6));
                    V::prefetch(line(7));
                }
                ahead[p] = ahead[p].cast::<u8>().wrapping_add(lines * LINE).cast();
            }
            for step in 0..STEPS {
                for p in 0..P {
                    // SAFETY: step i < depth of a panel, so that the sixteen numbers lie inside w.
                    let w: V = E::lanes(unsafe { &*ws[p].add((i + step) * PANEL).cast() });
                    for r in 0..R {
                        // SAFETY: i < depth, inside the row.
                        acc[r][p] = V::splat(unsafe { *xs[r].add(i + step) }).mul_add(w, acc[r][p]);
                    }
                }
            }
            i += STEPS;
        }
    }
    while i < depth {
        for p in 0..P {
            // SAFETY: step i < depth of a panel, so that the sixteen numbers lie inside w.
            let w: V = E::lanes(unsafe { &*ws[p].add(i * w_step).cast() });
            V::prefetch(ahead[p].cast());
            ahead[p] = ahead[p].wrapping_add(share);
            for r in 0..R {
                // SAFETY: i < depth, inside the row.
                acc[r][p] = V::splat(unsafe { *xs[r].add(i) }).mul_add(w, acc[r][p]);
            }
        }
        i += 1;
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: as for the loads.
            unsafe { store(acc[r][p], at(r, p), width(p)) };
        }
    }
}

/// # Safety
/// `width` floats are readable, at most sixteen.
#[inline(always)]
unsafe fn load<V: Lanes>(from: *const f32, width: usize) -> V {
    if width == PANEL {
        // SAFETY: sixteen floats are readable.
        return V::load(unsafe { &*from.cast() });
    }
    let mut whole = [0.0; PANEL];
    // SAFETY: `width` floats are readable.
    whole[..width].copy_from_slice(unsafe { std::slice::from_raw_parts(from, width) });
    V::load(&whole)
}

/// # Safety
/// `width` floats are writable, at most sixteen.
#[inline(always)]
unsafe fn store<V: Lanes>(lanes: V, to: *mut f32, width: usize) {
    if width == PANEL {
        // SAFETY: sixteen floats are writable.
        return lanes.store(unsafe { &mut *to.cast() });
    }
    let mut whole = [0.0; PANEL];
    lanes.store(&mut whole);
    // SAFETY: `width` floats are writable.
    unsafe { std::slice::from_raw_parts_mut(to, width) }.copy_from_slice(&whole[..width]);
}
