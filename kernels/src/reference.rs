//! What each operation means, in plain f64 loops: the specification that tests hold the kernels against.
//!
//! Nothing else uses it. Weights are row-major `(n, k)`, not packed.

/// `y = x Wᵀ`.
#[must_use]
pub fn linear(x: &[f64], weight: &[f64], n: usize, k: usize) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        (0..n).map(|j| x.iter().zip(&weight[j * k..(j + 1) * k]).map(|(a, b)| a * b).sum()).collect()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

/// `y = x / sqrt(mean(x²) + eps) * w`.
#[must_use]
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let k = weight.len();
    let row = |x: &[f64]| -> Vec<f64> {
        let rms = (x.iter().map(|v| v * v).sum::<f64>() / k as f64 + eps).sqrt();
        x.iter().zip(weight).map(|(v, w)| v / rms * w).collect()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

/// `silu(gate) * up`.
#[must_use]
pub fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// Each head of x turned by its row's position: pair `(i, i + half)` by `position * theta^(-2i / head_dim)`.
#[must_use]
pub fn rope(x: &[f64], width: usize, head_dim: usize, theta: f64, positions: &[u32]) -> Vec<f64> {
    let mut y = x.to_vec();
    let half = head_dim / 2;
    for (row, position) in y.chunks_exact_mut(width).zip(positions) {
        for head in row.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let angle = f64::from(*position) * theta.powf(-2.0 * i as f64 / head_dim as f64);
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + half] = b * angle.cos() + a * angle.sin();
            }
        }
    }
    y
}

/// Causal grouped-query attention within each sequence, and of each row to its own row of each of `ahead`: keys and values.
#[must_use]
pub fn attention([q, k, v]: [&[f64]; 3], ahead: &[[&[f64]; 2]], lengths: &[usize], shape: crate::Heads) -> Vec<f64> {
    let crate::Heads { heads, kv_heads, head_dim, .. } = shape;
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut y = vec![0.0; q.len()];
    let mut start = 0;
    for length in lengths {
        for row in start..start + length {
            for head in 0..heads {
                let kv = head / (heads / kv_heads) * head_dim;
                let query = &q[row * width + head * head_dim..][..head_dim];
                let before = (start..=row).map(|t| (k, v, t));
                let seen: Vec<_> = before.chain(ahead.iter().map(|[k, v]| (*k, *v, row))).collect();
                let score = |(k, _, t): &(&[f64], &[f64], usize)| {
                    let key = &k[t * kv_width + kv..][..head_dim];
                    query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() / (head_dim as f64).sqrt()
                };
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for ((_, v, t), score) in seen.into_iter().zip(scores) {
                    for i in 0..head_dim {
                        y[row * width + head * head_dim + i] += (score - max).exp() / total * v[t * kv_width + kv + i];
                    }
                }
            }
        }
        start += length;
    }
    y
}

/// `log softmax(h Wᵀ / T)[target]` of each row.
#[must_use]
pub fn log_probs(hidden: &[f64], head: &[f64], k: usize, targets: &[u32], inverse_temperature: f64) -> Vec<f64> {
    let n = head.len() / k;
    let row = |(logits, target): (&[f64], &u32)| {
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(l * inverse_temperature));
        let total: f64 = logits.iter().map(|l| (l * inverse_temperature - max).exp()).sum();
        logits[*target as usize] * inverse_temperature - max - total.ln()
    };
    linear(hidden, head, n, k).chunks_exact(n).zip(targets).map(row).collect()
}

/// A number, its first and its second moment after one step of AdamW, from those before and the gradient.
#[must_use]
pub fn adam([value, first, second]: [f64; 3], gradient: f64, rule: crate::AdamRule) -> [f64; 3] {
    let crate::AdamRule { beta1, beta2, scale, keep, rate, second_correction } = rule;
    let [beta1, beta2, scale, keep] = [beta1, beta2, scale, keep].map(f64::from);
    let gradient = gradient * scale;
    let first = beta1 * first + (1.0 - beta1) * gradient;
    let second = beta2 * second + (1.0 - beta2) * gradient * gradient;
    let step = f64::from(rate) * first / ((second * f64::from(second_correction)).sqrt() + 1e-8);
    [value * keep - step, first, second]
}
