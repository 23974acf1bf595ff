//! `y = x Wᵀ` over packed weights, and its backward. All three products run through one tile loop.

use std::ops::Range;

use crate::dispatch::{multiplies_pairs, simd};
use crate::matrix::{Matrix, PANEL, Panels, Storage, round_steps};
use crate::pool::{Pool, Shares};
use crate::product::{Operands, Strides, product};
use crate::turn::turn;

/// `y = x Wᵀ`: x `(r, k)`, y `(r, n)`.
///
/// # Panics
/// If x or y do not have whole rows of the weight's features, or not the same number.
pub fn linear(pool: &Pool, x: &[f32], weight: &Matrix, y: &mut [f32]) {
    apply(pool, x, weight, y, false);
}

/// `y += x Wᵀ`, each chain going on from what y holds: with [`linear`] before, one chain over two inputs laid end to end. If the weight
/// is in bf16, what y holds is to be such sums, see [`to_bf16`](crate::to_bf16).
///
/// # Panics
/// As [`linear`].
pub fn add_linear(pool: &Pool, x: &[f32], weight: &Matrix, y: &mut [f32]) {
    apply(pool, x, weight, y, true);
}

simd! {
    /// `y += x`, element by element.
    pub fn add(y: &mut [f32], x: &[f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }
}

fn apply(pool: &Pool, x: &[f32], weight: &Matrix, y: &mut [f32], keep: bool) {
    let (n, k) = (weight.n(), weight.k());
    let rows = x.len() / k;
    assert!(x.len() == rows * k && y.len() == rows * n, "linear ({n}, {k}) of {} to {} floats", x.len(), y.len());
    by_rows(pool, x, weight.panels(), y, [rows, k, n], keep);
}

/// `y (+)= x · w`: x `(rows, k)`, w `(ceil(n / PANEL), k, PANEL)`, y `(rows, n)`.
fn by_rows(pool: &Pool, x: &[f32], w: Panels<'_>, y: &mut [f32], shape: [usize; 3], keep: bool) {
    let [rows, k, n] = shape;
    let strides = Strides::packed(k, n);
    match w {
        Panels::F32(w) => product(pool, Operands { x, w, shape, strides, keep }, y),
        Panels::Bf16(w) if multiplies_pairs() && k.is_multiple_of(2) => {
            let (w, shape, strides) = (w.as_chunks::<2>().0, [rows, k / 2, n], strides.in_pairs());
            product(pool, Operands { x, w, shape, strides, keep }, y);
        }
        Panels::Bf16(w) => product(pool, Operands { x, w, shape, strides, keep }, y),
    }
}

/// Memory that calls of [`input_gradient`] and [`weight_gradient`] reuse.
#[derive(Debug, Default)]
pub struct Turned {
    weight: Packed,
    grad: Packed,
}

/// Memory for panels, of either storage.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    wide: Vec<f32>,
    narrow: Vec<u16>,
}

/// `count` panels of so many steps, each written by `write`.
fn filled<'a, T: Copy + Default + Send + Sync>(
    pool: &Pool,
    memory: &'a mut Vec<T>,
    [count, steps]: [usize; 2],
    write: impl Fn(usize, &mut [T]) + Sync,
) -> &'a [T] {
    let size = steps * PANEL;
    memory.resize(count * size, T::default());
    let shares = Shares::of(memory);
    pool.split(count, 1, |panels| {
        for panel in panels {
            // SAFETY: ranges of a split are disjoint, and so are their panels.
            write(panel, unsafe { shares.part(panel * size..(panel + 1) * size) });
        }
    });
    memory
}

/// `dx = g W` (`keep`: `dx += g W`): g `(r, n)`, dx `(r, k)`. The weight is packed by input features, then it is a forward
/// product: one chain over the output features per element, of g in the weight's storage.
///
/// # Panics
/// If g or dx do not have whole rows of the weight's features, or not the same number.
pub fn input_gradient(pool: &Pool, grad: &[f32], weight: &Matrix, dx: &mut [f32], keep: bool, turned: &mut Turned) {
    let panels = turn_weight(pool, weight, &mut turned.weight);
    turned_product(pool, grad, panels, dx, [weight.n(), weight.k()], keep);
}

/// The weight packed by input features: `(ceil(k / PANEL), n, PANEL)`.
pub(crate) fn turn_weight<'a>(pool: &Pool, weight: &Matrix, turned: &'a mut Packed) -> Panels<'a> {
    let (size, Packed { wide, narrow }) = ([weight.k().div_ceil(PANEL), weight.n()], turned);
    match weight.storage() {
        Storage::F32 => Panels::F32(filled(pool, wide, size, |panel, to| turn_panel(weight, panel, to))),
        Storage::Bf16 => Panels::Bf16(filled(pool, narrow, size, |panel, to| turn_panel_bf16(weight, panel, to))),
    }
}

/// [`input_gradient`] of a weight of shape `(n, k)` that is already turned.
pub(crate) fn turned_product(
    pool: &Pool,
    grad: &[f32],
    turned: Panels<'_>,
    dx: &mut [f32],
    [n, k]: [usize; 2],
    keep: bool,
) {
    let rows = grad.len() / n;
    assert!(grad.len() == rows * n && dx.len() == rows * k, "gradient of linear ({n}, {k}): {}", grad.len());
    by_rows(pool, grad, turned, dx, [rows, n, k], keep);
}

simd! {
    /// Packs a panel of input features: `(n, PANEL)`.
    fn turn_panel<V>(weight: &Matrix, panel: usize, to: &mut [f32]) {
        for (outputs, block) in to.chunks_mut(PANEL * PANEL).enumerate() {
            let inputs = panel * PANEL..weight.k().min((panel + 1) * PANEL);
            let square = weight.square::<V>(outputs, inputs);
            turn(square.as_flattened(), PANEL, PANEL, block);
        }
    }
}

simd! {
    /// The same in bf16, which loses nothing.
    fn turn_panel_bf16<V>(weight: &Matrix, panel: usize, to: &mut [u16]) {
        let mut turned = [0.0; PANEL * PANEL];
        for (outputs, block) in to.chunks_mut(PANEL * PANEL).enumerate() {
            let inputs = panel * PANEL..weight.k().min((panel + 1) * PANEL);
            let square = weight.square::<V>(outputs, inputs);
            turn(square.as_flattened(), PANEL, PANEL, &mut turned);
            round_steps(&turned[..block.len()], block);
        }
    }
}

/// `dw += gᵀ x` in the packed layout of `weight`, of shape `(n, k)`: x `(r, k)`, g `(r, n)`. One chain over the rows per element,
/// going on from what `dw` holds, of x and g in the weight's storage; if that is bf16, `dw` is to hold such sums, see
/// [`to_bf16`](crate::to_bf16).
///
/// # Panics
/// If x and g do not have the same number of whole rows, or `dw` is not a packed weight of this shape.
pub fn weight_gradient(pool: &Pool, x: &[f32], grad: &[f32], weight: &Matrix, dw: &mut [f32], turned: &mut Turned) {
    let (n, k) = (weight.n(), weight.k());
    let rows = x.len() / k;
    let panels = n.div_ceil(PANEL);
    assert!(x.len() == rows * k && grad.len() == rows * n && dw.len() == panels * k * PANEL, "gradient of ({n}, {k})");
    let columns = |panel: usize| panel * PANEL..n.min((panel + 1) * PANEL);
    let Packed { wide, narrow } = &mut turned.grad;
    // Input features are the rows of this product, batch rows its depth: x is read column by column where it stands.
    let strides = Strides { x_row: 1, x_step: k, y_row: PANEL, y_panel: k * PANEL, ..Strides::packed(rows, 0) };
    let shape = |steps: usize| [k, steps, panels * PANEL];
    let size = [panels, rows];
    if weight.storage() == Storage::F32 {
        let w = filled(pool, wide, size, |panel, to| pack_panel(grad, n, columns(panel), to));
        return product(pool, Operands { x, w, shape: shape(rows), strides, keep: true }, dw);
    }
    let w = filled(pool, narrow, size, |panel, to| pack_panel_bf16(grad, n, columns(panel), to));
    if !multiplies_pairs() {
        return product(pool, Operands { x, w, shape: shape(rows), strides, keep: true }, dw);
    }
    let (pairs, shape_of_pairs) = (w.as_chunks::<2>().0, shape(rows / 2));
    product(pool, Operands { x, w: pairs, shape: shape_of_pairs, strides: strides.in_pairs(), keep: true }, dw);
    if !rows.is_multiple_of(2) {
        let (x, w) = (&x[(rows - 1) * k..], &w[(rows - 1) * PANEL..]);
        product(pool, Operands { x, w, shape: shape(1), strides, keep: true }, dw);
    }
}

/// Some columns of g `(r, n)` become a panel.
fn pack_panel(grad: &[f32], n: usize, columns: Range<usize>, to: &mut [f32]) {
    for (to, row) in to.as_chunks_mut::<PANEL>().0.iter_mut().zip(grad.chunks_exact(n)) {
        *to = sixteen(&row[columns.clone()]);
    }
}

simd! {
    /// The same in bf16.
    fn pack_panel_bf16(grad: &[f32], n: usize, columns: Range<usize>, to: &mut [u16]) {
        for (to, rows) in to.chunks_mut(2 * PANEL).zip(grad.chunks(2 * n)) {
            let mut steps = [[0.0; PANEL]; 2];
            steps.iter_mut().zip(rows.chunks_exact(n)).for_each(|(to, row)| *to = sixteen(&row[columns.clone()]));
            round_steps(&steps.as_flattened()[..to.len()], to);
        }
    }
}

/// At most sixteen numbers, and zeros behind them.
#[inline(always)]
fn sixteen(numbers: &[f32]) -> [f32; PANEL] {
    if let Ok(all) = numbers.try_into() {
        return all;
    }
    let mut padded = [0.0; PANEL];
    padded[..numbers.len()].copy_from_slice(numbers);
    padded
}
