//! Rotary position embedding (Su et al. 2021), halves layout: dimension i turns with dimension `i + head_dim / 2`.

use std::sync::Arc;

use crate::dispatch::simd;

/// Cosines and sines of every position, shared by all layers.
#[derive(Debug, Clone)]
pub struct RopeTable {
    head_dim: usize,
    /// `(positions, head_dim / 2)`.
    cosines: Arc<Vec<f32>>,
    sines: Arc<Vec<f32>>,
}

/// Which way heads are turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// By their positions.
    Forth,
    /// Back: the gradient of turning forth.
    Back,
}

impl RopeTable {
    /// Table for `positions` positions with base `theta`.
    #[must_use]
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let angle = |i: usize| (i / half) as f64 * frequencies[i % half];
        let table = |f: fn(f64) -> f64| Arc::new((0..positions * half).map(|i| f(angle(i)) as f32).collect());
        Self { head_dim, cosines: table(f64::cos), sines: table(f64::sin) }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.cosines.len() / (self.head_dim / 2)
    }
}

/// Turns each head of x `(r, heads * head_dim)` by its row's position, in place.
///
/// # Panics
/// If x does not have `width` floats a row, or a position is outside the table.
pub fn rope(x: &mut [f32], width: usize, positions: &[u32], table: &RopeTable, turn: Turn) {
    assert!(x.len() == positions.len() * width && width.is_multiple_of(table.head_dim), "rope of {} floats", x.len());
    turn_rows(x, width, positions, table, if turn == Turn::Forth { 1.0 } else { -1.0 });
}

simd! {
    fn turn_rows(x: &mut [f32], width: usize, positions: &[u32], table: &RopeTable, direction: f32) {
        let half = table.head_dim / 2;
        for (row, position) in x.chunks_exact_mut(width).zip(positions) {
            let at = *position as usize * half..(*position as usize + 1) * half;
            let (cosines, sines) = (&table.cosines[at.clone()], &table.sines[at]);
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                    let sin = sin * direction;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
