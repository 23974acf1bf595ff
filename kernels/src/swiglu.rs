//! SwiGLU (Shazeer 2020): `silu(gate) * up`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::dispatch::simd;
use crate::math;
use crate::tensor::{copied, output, tensor, values};

/// `silu(gate) * up`, element by element. Differentiable in both.
///
/// # Errors
/// If shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        if l1.shape() != l2.shape() {
            bail!("swiglu: gate {:?} and up {:?} differ", l1.shape(), l2.shape());
        }
        let (gate, up) = (values(s1, l1, "swiglu")?, values(s2, l2, "swiglu")?);
        let mut y = vec![0.0; gate.len()];
        forward(gate, up, &mut y);
        Ok(output(y, l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dg, mut du) = (copied(gate)?, copied(up)?);
        backward(&mut dg, &mut du, &copied(grad)?);
        Ok((Some(tensor(dg, gate.shape())?), Some(tensor(du, up.shape())?)))
    }
}

simd! {
    fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + math::exp(-g)) * u;
        }
    }
}

simd! {
    /// Replaces gate and up by their gradients.
    fn backward(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(grad) {
            let sigmoid = 1.0 / (1.0 + math::exp(-*g));
            let silu = *g * sigmoid;
            (*g, *u) = (d * *u * sigmoid * (1.0 + *g - silu), d * silu);
        }
    }
}
