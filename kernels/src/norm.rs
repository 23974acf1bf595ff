//! RMSNorm (Zhang and Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * w`.

use crate::dispatch::simd;
use crate::math;
use crate::pool::{Pool, Shares};

/// Normalises each row of x `(r, k)` and scales it by w `(k)`.
///
/// # Panics
/// If x has no whole rows, or y another length.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let k = weight.len();
    assert!(x.len().is_multiple_of(k) && x.len() == y.len(), "rms_norm of {} floats by {k}", x.len());
    let y = Shares::of(y);
    pool.split(x.len() / k, 8, |rows| {
        let at = rows.start * k..rows.end * k;
        // SAFETY: ranges of a split are disjoint.
        forward(&x[at.clone()], weight, unsafe { y.part(at) }, eps);
    });
}

/// Backward of [`rms_norm`] from `grad`: adds to `dx` and, over the rows in order, to `dw`.
///
/// # Panics
/// If lengths do not fit.
pub fn rms_norm_gradient(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    grad: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let k = weight.len();
    assert!(x.len() == grad.len() && x.len() == dx.len() && dw.len() == k, "gradient of rms_norm of {}", x.len());
    let dx = Shares::of(dx);
    pool.split(x.len() / k, 8, |rows| {
        let at = rows.start * k..rows.end * k;
        // SAFETY: ranges of a split are disjoint.
        by_input(&x[at.clone()], weight, &grad[at.clone()], unsafe { dx.part(at) }, eps);
    });
    by_weight(x, grad, dw, eps);
}

simd! {
    fn forward(x: &[f32], w: &[f32], y: &mut [f32], eps: f32) {
        let k = w.len();
        for (x, y) in x.chunks_exact(k).zip(y.chunks_exact_mut(k)) {
            let scale = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * scale * w;
            }
        }
    }
}

simd! {
    fn by_input(x: &[f32], w: &[f32], grad: &[f32], dx: &mut [f32], eps: f32) {
        let k = w.len();
        let mut products = vec![0.0; k];
        for ((x, g), dx) in x.chunks_exact(k).zip(grad.chunks_exact(k)).zip(dx.chunks_exact_mut(k)) {
            let scale = inverse_rms(x, eps);
            for (product, ((g, w), x)) in products.iter_mut().zip(g.iter().zip(w).zip(x)) {
                *product = g * w * x;
            }
            let projection = math::lane_sum(&products, |product| product) * scale * scale / k as f32;
            for i in 0..k {
                dx[i] += scale * (g[i] * w[i] - x[i] * projection);
            }
        }
    }
}

simd! {
    fn by_weight(x: &[f32], grad: &[f32], dw: &mut [f32], eps: f32) {
        let k = dw.len();
        for (x, g) in x.chunks_exact(k).zip(grad.chunks_exact(k)) {
            let scale = inverse_rms(x, eps);
            for i in 0..k {
                dw[i] += g[i] * x[i] * scale;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (math::dot(x, x) / x.len() as f32 + eps).sqrt()
}
