//! RMSNorm (Zhang and Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * w`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use crate::dispatch::simd;
use crate::math;
use crate::tensor::{copied, output, tensor, values};

/// Normalises each row of x `(r, k)` and scales it by w `(k)`. Differentiable in both.
///
/// # Errors
/// If shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (values(s1, l1, "rms_norm")?, values(s2, l2, "rms_norm")?);
        let (rows, k) = l1.shape().dims2()?;
        if w.len() != k {
            candle_core::bail!("rms_norm: {} weights for rows of {k}", w.len());
        }
        let mut y = vec![0.0; x.len()];
        forward(x, w, &mut y, self.eps);
        Ok(output(y, (rows, k)))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut dw) = (vec![0.0; x.elem_count()], vec![0.0; w.elem_count()]);
        backward(&copied(x)?, &copied(w)?, &copied(grad)?, &mut dx, &mut dw, self.eps);
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dw, w.shape())?)))
    }
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
    fn backward(x: &[f32], w: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32], eps: f32) {
        let k = w.len();
        for ((x, g), dx) in x.chunks_exact(k).zip(grad.chunks_exact(k)).zip(dx.chunks_exact_mut(k)) {
            let scale = inverse_rms(x, eps);
            let projection = math::lane_sum(k, |i| g[i] * w[i] * x[i]) * scale * scale / k as f32;
            for i in 0..k {
                dx[i] = scale * (g[i] * w[i] - x[i] * projection);
                dw[i] += g[i] * x[i] * scale;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (math::dot(x, x) / x.len() as f32 + eps).sqrt()
}
