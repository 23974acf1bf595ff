//! Every backward against central differences in the direction of a random vector.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use kernels::{Heads, NoiseKey, RopeTable, attend_sequences, embed, linear, log_probs, rms_norm, rope, swiglu};

fn random(stream: u32, shape: &[usize]) -> Tensor {
    let key = NoiseKey::new(9, stream, 0, 0, 0);
    let len: usize = shape.iter().product();
    let values: Vec<f32> = (0..len).map(|i| key.uniform(1, u32::try_from(i).unwrap()) as f32 * 2.0 - 1.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// `f` of the inputs, projected on a fixed random vector.
fn project(f: &dyn Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<Tensor> {
    let y = f(inputs)?;
    (&y * random(99, y.dims()))?.sum_all()
}

fn check(name: &str, shapes: &[&[usize]], f: &dyn Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> =
        shapes.iter().enumerate().map(|(i, s)| Var::from_tensor(&random(i as u32, s)).unwrap()).collect();
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = project(f, &inputs).unwrap().backward().unwrap();
    for (i, var) in vars.iter().enumerate() {
        let direction = random(50 + i as u32, shapes[i]);
        let slope = (grads.get(var).unwrap() * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let eps = 2e-3;
        let at = |sign: f64| {
            let mut moved: Vec<Tensor> = vars.iter().map(Var::as_detached_tensor).collect();
            moved[i] = (&moved[i] + (&direction * (sign * eps)).unwrap()).unwrap();
            f64::from(project(f, &moved).unwrap().to_scalar::<f32>().unwrap())
        };
        let want = (at(1.0) - at(-1.0)) / (2.0 * eps);
        assert!((f64::from(slope) - want).abs() < 2e-2 * want.abs().max(1.0), "{name} input {i}: {slope} but {want}");
    }
}

#[test]
fn backward_is_the_derivative() {
    check("linear", &[&[7, 20], &[2, 20, 16]], &|x| linear(&x[0], &x[1], 27));
    check("rms_norm", &[&[5, 24], &[24]], &|x| rms_norm(&x[0], &x[1], 1e-5));
    check("swiglu", &[&[5, 24], &[5, 24]], &|x| swiglu(&x[0], &x[1]));
    let positions = Arc::new(vec![0, 3, 1, 9]);
    let table = RopeTable::new(8, 10_000.0, 16);
    check("rope", &[&[4, 16]], &|x| rope(&x[0], &positions, &table));
    let ids = Arc::new(vec![3, 0, 3, 30]);
    check("embed", &[&[2, 12, 16]], &|x| embed(&ids, &x[0]));
    check("log_probs", &[&[5, 12], &[2, 12, 16]], &|x| log_probs(&x[0], &x[1], 29, vec![0, 28, 3, 3, 9], 0.8));
    let shape = Heads { heads: 4, kv_heads: 2, head_dim: 8 };
    let lengths = Arc::new(vec![3, 6]);
    check("attention", &[&[9, 32], &[9, 16], &[9, 16]], &|x| attend_sequences(&x[0], &x[1], &x[2], &lengths, shape));
}
