//! SwiGLU (Shazeer 2020): `silu(gate) * up`.

use crate::dispatch::simd;
use crate::math;
use crate::pool::{Pool, Shares};

/// Floats that are worth a thread.
const GRAIN: usize = 4096;

/// `y = silu(gate) * up`, element by element.
///
/// # Panics
/// If lengths differ.
pub fn swiglu(pool: &Pool, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == y.len(), "swiglu of {} and {}", gate.len(), up.len());
    let y = Shares::of(y);
    pool.split(gate.len(), GRAIN, |at| {
        // SAFETY: ranges of a split are disjoint.
        forward(&gate[at.clone()], &up[at.clone()], unsafe { y.part(at) });
    });
}

/// Backward of [`swiglu`] from `grad`: gate and up become their gradients.
///
/// # Panics
/// If lengths differ.
pub fn swiglu_gradient(pool: &Pool, gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    assert!(gate.len() == up.len() && gate.len() == grad.len(), "gradient of swiglu of {}", gate.len());
    let (gate, up) = (Shares::of(gate), Shares::of(up));
    pool.split(grad.len(), GRAIN, |at| {
        // SAFETY: ranges of a split are disjoint.
        unsafe { backward(gate.part(at.clone()), up.part(at.clone()), &grad[at]) };
    });
}

simd! {
    fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + math::exp(-g)) * u;
        }
    }
}

simd! {
    fn backward(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        for ((g, u), d) in gate.iter_mut().zip(up).zip(grad) {
            let sigmoid = 1.0 / (1.0 + math::exp(-*g));
            let silu = *g * sigmoid;
            (*g, *u) = (d * *u * sigmoid * (1.0 + *g - silu), d * silu);
        }
    }
}
