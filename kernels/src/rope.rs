//! Rotary position embedding (Su et al. 2021), halves layout: dimension i turns with dimension `i + head_dim / 2`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::tensor::{copied, output, tensor, values};

/// Cosines and sines of every position, shared by all layers.
#[derive(Debug, Clone)]
pub struct RopeTable {
    head_dim: usize,
    /// `(positions, head_dim / 2)` pairs of cosine and sine.
    turns: Arc<Vec<(f32, f32)>>,
}

impl RopeTable {
    /// Table for `positions` positions with base `theta`.
    #[must_use]
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let turns = (0..positions * half)
            .map(|i| {
                let frequency = theta.powf(-2.0 * (i % half) as f64 / head_dim as f64);
                let angle = (i / half) as f64 * frequency;
                (angle.cos() as f32, angle.sin() as f32)
            })
            .collect();
        Self { head_dim, turns: Arc::new(turns) }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.turns.len() / (self.head_dim / 2)
    }
}

/// Turns each head of x `(r, heads * head_dim)` by its row's position. Differentiable.
///
/// # Errors
/// If a position is outside the table or shapes do not fit.
pub fn rope(x: &Tensor, positions: &Arc<Vec<u32>>, table: &RopeTable) -> Result<Tensor> {
    x.apply_op1(Rope { positions: positions.clone(), table: table.clone() })
}

struct Rope {
    positions: Arc<Vec<u32>>,
    table: RopeTable,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = l.shape().dims2()?;
        if rows != self.positions.len() || width % self.table.head_dim != 0 {
            bail!(
                "rope: x {:?} does not fit {} positions, heads of {}",
                l.shape(),
                self.positions.len(),
                self.table.head_dim
            );
        }
        if let Some(p) = self.positions.iter().find(|p| **p as usize >= self.table.positions()) {
            bail!("rope: position {p} is past the longest sequence of {}", self.table.positions());
        }
        let mut y = values(s, l, "rope")?.to_vec();
        self.turn(&mut y, width, 1.0);
        Ok(output(y, (rows, width)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = copied(grad)?;
        self.turn(&mut dx, x.dim(1)?, -1.0);
        Ok(Some(tensor(dx, x.shape())?))
    }
}

impl Rope {
    fn turn(&self, data: &mut [f32], width: usize, direction: f32) {
        let half = self.table.head_dim / 2;
        for (row, position) in data.chunks_exact_mut(width).zip(self.positions.iter()) {
            let turns = &self.table.turns[*position as usize * half..][..half];
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
                    let sin = sin * direction;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
