//! `y = x Wᵀ` over weights packed in panels, and its backward. All three products run through one tile loop.
//!
//! A packed weight has shape `(p, k, PANEL)`: panel `i` holds output features `i * PANEL ..`, padded with zeros, so that
//! the innermost loop streams. Each output element is one chain of fused multiply-adds over `k`, in order.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::dispatch::simd;
use crate::lanes::Lanes;
use crate::tensor::{copied, output, tensor, values};

/// Output features in a panel.
pub const PANEL: usize = 16;

/// Packs a weight of shape `(n, k)` to `(p, k, PANEL)`.
///
/// # Errors
/// If the tensor is not a matrix of f32.
pub fn pack(weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let data = copied(weight)?;
    let panels = n.div_ceil(PANEL);
    let mut packed = vec![0.0; panels * k * PANEL];
    for (row, values) in data.chunks_exact(k).enumerate() {
        let base = row / PANEL * k * PANEL + row % PANEL;
        for (i, v) in values.iter().enumerate() {
            packed[base + i * PANEL] = *v;
        }
    }
    tensor(packed, (panels, k, PANEL))
}

/// Inverse of [`pack`]: shape `(n, k)`.
///
/// # Errors
/// If the tensor is not a packed weight with at least `n` output features.
pub fn unpack(packed: &Tensor, n: usize) -> Result<Tensor> {
    let (panels, k, _) = packed.dims3()?;
    if n > panels * PANEL {
        bail!("unpack: {n} output features asked of {panels} panels");
    }
    let data = copied(packed)?;
    let mut weight = vec![0.0; n * k];
    for (row, values) in weight.chunks_exact_mut(k).enumerate() {
        let base = row / PANEL * k * PANEL + row % PANEL;
        for (i, v) in values.iter_mut().enumerate() {
            *v = data[base + i * PANEL];
        }
    }
    tensor(weight, (n, k))
}

/// `y = x Wᵀ`: x `(r, k)`, packed weight `(p, k, PANEL)`, y `(r, n)`. Differentiable in both.
///
/// # Errors
/// If shapes do not fit.
pub fn linear(x: &Tensor, packed: &Tensor, n: usize) -> Result<Tensor> {
    x.apply_op2(packed, Linear { n })
}

struct Linear {
    n: usize,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = l1.shape().dims2()?;
        let (panels, wk, _) = l2.shape().dims3()?;
        if wk != k || panels != self.n.div_ceil(PANEL) {
            bail!("linear: x {:?} does not fit weight {:?} with {} outputs", l1.shape(), l2.shape(), self.n);
        }
        let (x, w) = (values(s1, l1, "linear")?, values(s2, l2, "linear")?);
        let mut y = vec![0.0; rows * self.n];
        product(x, w, &mut y, rows, k, self.n);
        Ok(output(y, (rows, self.n)))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, k) = x.dims2()?;
        let grad = copied(grad)?;
        let dx = match x.track_op() {
            true => Some(tensor(input_gradient(&grad, &copied(w)?, rows, k, self.n), (rows, k))?),
            false => None,
        };
        let dw = match w.track_op() {
            true => {
                let mut dw = vec![0.0; w.elem_count()];
                weight_gradient(&copied(x)?, &grad, &mut dw, rows, k, self.n);
                Some(tensor(dw, w.shape())?)
            }
            false => None,
        };
        Ok((dx, dw))
    }
}

/// `y = x Wᵀ` on slices, y row-major `(rows, n)`.
pub(crate) fn product(x: &[f32], packed: &[f32], y: &mut [f32], rows: usize, k: usize, n: usize) {
    tiles(x, packed, y, [rows, k, n], [n, PANEL]);
}

/// `dx = g W`: the packed weight is re-packed by input features, then it is the forward product.
pub(crate) fn input_gradient(grad: &[f32], packed: &[f32], rows: usize, k: usize, n: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; k.div_ceil(PANEL) * n * PANEL];
    for (panel, block) in packed.chunks_exact(k * PANEL).enumerate() {
        let width = PANEL.min(n - panel * PANEL);
        for (i, lane) in block.chunks_exact(PANEL).enumerate() {
            let base = i / PANEL * n * PANEL + i % PANEL;
            for (j, v) in lane[..width].iter().enumerate() {
                transposed[base + (panel * PANEL + j) * PANEL] = *v;
            }
        }
    }
    let mut dx = vec![0.0; rows * k];
    product(grad, &transposed, &mut dx, rows, n, k);
    dx
}

/// `dW += gᵀ x` in the packed layout: one chain over the rows per element, continued from what `dw` holds.
pub(crate) fn weight_gradient(x: &[f32], grad: &[f32], dw: &mut [f32], rows: usize, k: usize, n: usize) {
    let mut transposed = vec![0.0; k * rows];
    for (r, row) in x.chunks_exact(k).enumerate() {
        for (i, v) in row.iter().enumerate() {
            transposed[i * rows + r] = *v;
        }
    }
    let panels = n.div_ceil(PANEL);
    let mut panelled = vec![0.0; panels * rows * PANEL];
    for (r, row) in grad.chunks_exact(n).enumerate() {
        for (panel, chunk) in row.chunks(PANEL).enumerate() {
            let base = (panel * rows + r) * PANEL;
            panelled[base..base + chunk.len()].copy_from_slice(chunk);
        }
    }
    tiles(&transposed, &panelled, dw, [k, rows, panels * PANEL], [PANEL, k * PANEL]);
}

simd! {
    /// `y[row, panel] += x[row] · panel` with the strides of y in floats: `[row, panel]`. Lanes beyond n are not written.
    fn tiles<V>(x: &[f32], packed: &[f32], y: &mut [f32], shape: [usize; 3], strides: [usize; 2]) {
        let [rows, k, n] = shape;
        let panels = n.div_ceil(PANEL);
        let mut row = 0;
        // Rows in the outer loop only between blocks that leave the panel in the first-level cache.
        while row < rows {
            let block = (rows - row).min(96);
            let mut panel = 0;
            while panel < panels {
                let step = match block {
                    1..=2 if panel + 4 <= panels => 4,
                    3..=4 if panel + 2 <= panels => 2,
                    _ => 1,
                };
                let mut r = row;
                while r < row + block {
                    let place = Place { row: r, panel, k, n, strides };
                    r += match (row + block - r, step) {
                        (1, 4) => tile::<V, 1, 4>(x, packed, y, place),
                        (2, 4) => tile::<V, 2, 4>(x, packed, y, place),
                        (3, 2) => tile::<V, 3, 2>(x, packed, y, place),
                        (4, 2) => tile::<V, 4, 2>(x, packed, y, place),
                        (1, _) => tile::<V, 1, 1>(x, packed, y, place),
                        (2, _) => tile::<V, 2, 1>(x, packed, y, place),
                        (3, _) => tile::<V, 3, 1>(x, packed, y, place),
                        (4, _) => tile::<V, 4, 1>(x, packed, y, place),
                        (5, _) => tile::<V, 5, 1>(x, packed, y, place),
                        _ => tile::<V, 6, 1>(x, packed, y, place),
                    };
                }
                panel += step;
            }
            row += block;
        }
    }
}

#[derive(Clone, Copy)]
struct Place {
    row: usize,
    panel: usize,
    k: usize,
    n: usize,
    strides: [usize; 2],
}

/// R rows times P panels; the accumulators stay in registers. Returns R.
#[inline(always)]
fn tile<V: Lanes, const R: usize, const P: usize>(x: &[f32], packed: &[f32], y: &mut [f32], at: Place) -> usize {
    let Place { row, panel, k, n, strides } = at;
    let xs: [&[f32]; R] = std::array::from_fn(|r| &x[(row + r) * k..(row + r + 1) * k]);
    let ws: [&[[f32; PANEL]]; P] =
        std::array::from_fn(|p| &packed[(panel + p) * k * PANEL..(panel + p + 1) * k * PANEL].as_chunks().0[..k]);
    let offset = |r: usize, p: usize| (row + r) * strides[0] + (panel + p) * strides[1];
    let width = |p: usize| PANEL.min(n - (panel + p) * PANEL);
    let mut acc: [[V; P]; R] = std::array::from_fn(|r| {
        std::array::from_fn(|p| {
            let mut whole = [0.0; PANEL];
            let from = &y[offset(r, p)..][..width(p)];
            whole[..from.len()].copy_from_slice(from);
            V::load(&whole)
        })
    });
    for i in 0..k {
        let w: [V; P] = std::array::from_fn(|p| V::load(&ws[p][i]));
        for r in 0..R {
            let v = V::splat(xs[r][i]);
            for p in 0..P {
                acc[r][p] = v.mul_add(w[p], acc[r][p]);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (p, acc) in acc.iter().enumerate() {
            let mut whole = [0.0; PANEL];
            acc.store(&mut whole);
            let to = &mut y[offset(r, p)..][..width(p)];
            to.copy_from_slice(&whole[..to.len()]);
        }
    }
    R
}
