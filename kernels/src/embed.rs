//! Embedding lookup in a packed weight, so that a tied output head needs no second copy.

use crate::matrix::{Matrix, PANEL};

/// Rows `ids` of a packed weight `(p, k, PANEL)`, as `(r, k)`.
///
/// # Panics
/// If an id is outside the table.
pub fn embed(ids: &[u32], table: &Matrix, y: &mut Vec<f32>) {
    y.clear();
    y.reserve(ids.len() * table.k());
    for &id in ids {
        assert!((id as usize) < table.n(), "token {id} is outside a table of {}", table.n());
        table.push_row(id as usize, y);
    }
}

/// Backward of [`embed`]: adds each row of `grad` to its row of `dw`, in order.
///
/// # Panics
/// If lengths do not fit.
pub fn embed_gradient(ids: &[u32], grad: &[f32], dw: &mut [f32]) {
    let k = grad.len().checked_div(ids.len()).unwrap_or(0);
    for (&id, row) in ids.iter().zip(grad.chunks_exact(k.max(1))) {
        let base = id as usize / PANEL * k * PANEL + id as usize % PANEL;
        for (i, g) in row.iter().enumerate() {
            dw[base + i * PANEL] += g;
        }
    }
}
