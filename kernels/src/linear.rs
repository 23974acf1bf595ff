//! `y = x Wᵀ` over packed weights, and its backward. All three products run through one tile loop.

use std::ops::Range;

use crate::dispatch::simd;
use crate::matrix::{Matrix, PANEL, Panels};
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

/// `y += x Wᵀ`, each chain going on from what y holds: with [`linear`] before, one chain over two inputs laid end to end.
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
    let (shape, strides) = ([rows, k, n], Strides::packed(k, n));
    match weight.panels() {
        Panels::F32(w) => product(pool, Operands { x, w: w.as_slice(), shape, strides, keep }, y),
        Panels::Bf16(w) => product(pool, Operands { x, w: w.as_slice(), shape, strides, keep }, y),
    }
}

/// `dx = g W` (`keep`: `dx += g W`): g `(r, n)`, dx `(r, k)`. The weight is packed by input features, then it is a forward
/// product: one chain over the output features per element.
///
/// # Panics
/// If g or dx do not have whole rows of the weight's features, or not the same number.
pub fn input_gradient(pool: &Pool, grad: &[f32], weight: &Matrix, dx: &mut [f32], keep: bool, turned: &mut Turned) {
    turn_weight(pool, weight, &mut turned.weight);
    turned_product(pool, grad, &turned.weight, dx, [weight.n(), weight.k()], keep);
}

/// The weight packed by input features: `(ceil(k / PANEL), n, PANEL)`.
pub(crate) fn turn_weight(pool: &Pool, weight: &Matrix, turned: &mut Vec<f32>) {
    let (n, panels) = (weight.n(), weight.k().div_ceil(PANEL));
    turned.resize(panels * n * PANEL, 0.0);
    let shares = Shares::of(turned);
    pool.split(panels, 1, |panels| {
        // SAFETY: ranges of a split are disjoint.
        let to = unsafe { shares.part(panels.start * n * PANEL..panels.end * n * PANEL) };
        turn_panels(weight, panels.start, to);
    });
}

/// [`input_gradient`] of a weight of shape `(n, k)` that is already turned.
pub(crate) fn turned_product(
    pool: &Pool,
    grad: &[f32],
    turned: &[f32],
    dx: &mut [f32],
    [n, k]: [usize; 2],
    keep: bool,
) {
    let rows = grad.len() / n;
    assert!(grad.len() == rows * n && dx.len() == rows * k, "gradient of linear ({n}, {k}): {}", grad.len());
    product(pool, Operands { x: grad, w: turned, shape: [rows, n, k], strides: Strides::packed(n, k), keep }, dx);
}

simd! {
    /// Packs panels of input features, from panel `first` on: `(panels, n, PANEL)`.
    fn turn_panels<V>(weight: &Matrix, first: usize, to: &mut [f32]) {
        let (n, k) = (weight.n(), weight.k());
        for (i, panel) in to.chunks_exact_mut(n * PANEL).enumerate() {
            let inputs = (first + i) * PANEL..k.min((first + i + 1) * PANEL);
            for (outputs, block) in panel.chunks_mut(PANEL * PANEL).enumerate() {
                let square = weight.square::<V>(outputs, inputs.clone());
                turn(square.as_flattened(), PANEL, PANEL, block);
            }
        }
    }
}

/// Memory that calls of [`input_gradient`] and [`weight_gradient`] reuse.
#[derive(Debug, Default)]
pub struct Turned {
    weight: Vec<f32>,
    grad: Vec<f32>,
}

/// `dw += gᵀ x` in the packed layout: x `(r, k)`, g `(r, n)`. One chain over the rows per element, going on from what `dw`
/// holds.
///
/// # Panics
/// If x and g do not have the same number of whole rows, or `dw` is not a packed weight of shape `(n, k)`.
pub fn weight_gradient(pool: &Pool, x: &[f32], grad: &[f32], dw: &mut [f32], [n, k]: [usize; 2], turned: &mut Turned) {
    let rows = x.len() / k;
    let panels = n.div_ceil(PANEL);
    assert!(x.len() == rows * k && grad.len() == rows * n && dw.len() == panels * k * PANEL, "gradient of ({n}, {k})");
    turned.grad.resize(panels * rows * PANEL, 0.0);
    let shares = Shares::of(&mut turned.grad);
    pool.split(panels, 1, |panels| {
        for panel in panels {
            // SAFETY: ranges of a split are disjoint.
            let to = unsafe { shares.part(panel * rows * PANEL..(panel + 1) * rows * PANEL) };
            pack_panel(grad, n, panel * PANEL..n.min((panel + 1) * PANEL), to);
        }
    });
    // Input features are the rows of this product, batch rows its depth: x is read column by column where it stands.
    let strides = Strides { x_row: 1, x_step: k, y_row: PANEL, y_panel: k * PANEL, ..Strides::packed(rows, 0) };
    let shape = [k, rows, panels * PANEL];
    product(pool, Operands { x, w: turned.grad.as_slice(), shape, strides, keep: true }, dw);
}

/// Some columns of g `(r, n)` become a panel.
fn pack_panel(grad: &[f32], n: usize, columns: Range<usize>, to: &mut [f32]) {
    let width = columns.len();
    for (to, row) in to.as_chunks_mut::<PANEL>().0.iter_mut().zip(grad.chunks_exact(n)) {
        match row[columns.start..].first_chunk() {
            Some(row) if width == PANEL => *to = *row,
            _ => {
                to[..width].copy_from_slice(&row[columns.clone()]);
                to[width..].fill(0.0);
            }
        }
    }
}
