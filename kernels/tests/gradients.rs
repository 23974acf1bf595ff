//! Every operation against its specification: values against the plain f64 loops, gradients against their central
//! differences in f64.

use kernels::{
    AdamRule, AdamTensor, Chosen, Heads, Matrix, NoiseKey, Pool, RopeTable, SequencesGradient, Storage, Turn, Turned,
    adam_step, embed, embed_gradient, input_gradient, linear, log_probs, log_probs_gradient, pack, reference, rms_norm,
    rms_norm_gradient, rope, swiglu, swiglu_gradient, unpack, weight_gradient,
};

fn random(stream: u32, len: usize) -> Vec<f32> {
    let key = NoiseKey::new(9, stream, 0, 0, 0);
    (0..len).map(|i| key.uniform(1, u32::try_from(i).unwrap()) as f32 * 2.0 - 1.0).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn close(name: &str, found: &[f32], want: &[f64]) {
    assert_eq!(found.len(), want.len(), "{name}");
    for (i, (found, want)) in found.iter().zip(want).enumerate() {
        assert!((f64::from(*found) - want).abs() < 2e-5 * want.abs().max(1.0), "{name}[{i}]: {found} but {want}");
    }
}

/// Checks gradients by every input of a function whose output is projected on `projection`.
fn check(
    name: &str,
    inputs: &[&[f32]],
    projection: &[f32],
    gradients: &[Vec<f32>],
    f: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let inputs: Vec<Vec<f64>> = inputs.iter().map(|i| wide(i)).collect();
    let at = |inputs: &[Vec<f64>]| -> f64 { f(inputs).iter().zip(wide(projection)).map(|(y, p)| y * p).sum() };
    for (which, found) in gradients.iter().enumerate() {
        let mut want = Vec::new();
        for i in 0..inputs[which].len() {
            let moved = |by: f64| {
                let mut moved = inputs.clone();
                moved[which][i] += by;
                at(&moved)
            };
            want.push((moved(1e-5) - moved(-1e-5)) / 2e-5);
        }
        close(&format!("{name}, gradient {which}"), found, &want);
    }
}

fn matrix(packed: &[f32], n: usize, k: usize) -> Matrix {
    Matrix::new(&std::sync::Arc::new(packed.to_vec()), n, k, Storage::F32)
}

#[test]
fn linear_matches() {
    let pool = Pool::new(2).unwrap();
    for (rows, k, n) in [(7, 20, 27), (61, 300, 19), (1, 5, 64)] {
        let (x, w, g) = (random(1, rows * k), random(2, n * k), random(3, rows * n));
        let weight = matrix(&pack(&w, n, k), n, k);
        let mut y = vec![0.0; rows * n];
        linear(&pool, &x, &weight, &mut y);
        close("linear", &y, &reference::linear(&wide(&x), &wide(&w), n, k));
        let mut dx = vec![0.0; rows * k];
        input_gradient(&pool, &g, &weight, &mut dx, false, &mut Turned::default());
        let mut dw = vec![0.0; kernels::packed_len(n, k)];
        weight_gradient(&pool, &x, &g, &weight, &mut dw, &mut Turned::default());
        if rows * k * n < 10_000 {
            let f = |i: &[Vec<f64>]| reference::linear(&i[0], &i[1], n, k);
            check("linear", &[&x, &w], &g, &[dx, unpack(&dw, n, k)], &f);
        }
    }
}

#[test]
fn elementwise_operations_match() {
    let pool = Pool::default();
    let (x, w, g) = (random(1, 5 * 24), random(2, 24), random(3, 5 * 24));
    let mut y = vec![0.0; x.len()];
    rms_norm(&pool, &x, &w, 1e-5, &mut y);
    let norm = |i: &[Vec<f64>]| reference::rms_norm(&i[0], &i[1], f64::from(1e-5_f32));
    close("rms_norm", &y, &norm(&[wide(&x), wide(&w)]));
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    rms_norm_gradient(&pool, &x, &w, 1e-5, &g, &mut dx, &mut dw);
    check("rms_norm", &[&x, &w], &g, &[dx, dw], &norm);

    let up = random(4, x.len());
    swiglu(&pool, &x, &up, &mut y);
    let gated = |i: &[Vec<f64>]| reference::swiglu(&i[0], &i[1]);
    close("swiglu", &y, &gated(&[wide(&x), wide(&up)]));
    let (mut dgate, mut dup) = (x.clone(), up.clone());
    swiglu_gradient(&pool, &mut dgate, &mut dup, &g);
    check("swiglu", &[&x, &up], &g, &[dgate, dup], &gated);

    let positions = [0, 3, 1, 9, 15];
    let table = RopeTable::new(8, 10_000.0, 16);
    let mut turned = x.clone();
    rope(&mut turned, 24, &positions, &table, Turn::Forth);
    let turn = |i: &[Vec<f64>]| reference::rope(&i[0], 24, 8, 10_000.0, &positions);
    close("rope", &turned, &turn(&[wide(&x)]));
    let mut back = g.clone();
    rope(&mut back, 24, &positions, &table, Turn::Back);
    check("rope", &[&x], &g, &[back], &turn);
}

#[test]
fn tables_and_heads_match() {
    let pool = Pool::default();
    let (n, k) = (29, 12);
    let w = random(1, n * k);
    let ids = [3, 0, 3, 28];
    let mut y = Vec::new();
    embed(&ids, &matrix(&pack(&w, n, k), n, k), &mut y);
    let rows = |i: &[Vec<f64>]| ids.iter().flat_map(|id| i[0][*id as usize * k..][..k].to_vec()).collect::<Vec<f64>>();
    close("embed", &y, &rows(&[wide(&w)]));
    let g = random(2, y.len());
    let mut dw = vec![0.0; kernels::packed_len(n, k)];
    embed_gradient(&ids, &g, &mut dw);
    check("embed", &[&w], &g, &[unpack(&dw, n, k)], &rows);

    let (h, slopes) = (random(3, 5 * k), random(4, 5));
    let chosen = Chosen { targets: &[0, 28, 3, 3, 9], inverse_temperature: 0.8 };
    let head = matrix(&pack(&w, n, k), n, k);
    let f = |i: &[Vec<f64>]| reference::log_probs(&i[0], &i[1], k, chosen.targets, f64::from(0.8_f32));
    close("log_probs", &log_probs(&pool, &h, &head, chosen), &f(&[wide(&h), wide(&w)]));
    let (mut dh, mut dw) = (vec![0.0; h.len()], vec![0.0; kernels::packed_len(n, k)]);
    let mut seen = Vec::new();
    let mut slope = |row: usize, log_prob: f32| {
        seen.push(log_prob);
        slopes[row]
    };
    log_probs_gradient(&pool, &h, &head, chosen, &mut slope, &mut dh, &mut dw);
    assert_eq!(seen, log_probs(&pool, &h, &head, chosen), "the backward saw other log-probabilities");
    check("log_probs", &[&h, &w], &slopes, &[dh, unpack(&dw, n, k)], &f);
}

#[test]
fn attention_matches() {
    let few: &[usize] = &[3, 6];
    let long: &[usize] = &[61, 50];
    for (heads, kv_heads, head_dim, lengths) in [(4, 2, 8, few), (3, 1, 20, &[7]), (2, 2, 16, long)] {
        for ahead in [0, 1, 3] {
            attention_of(Heads { heads, kv_heads, head_dim, storage: Storage::F32 }, lengths, ahead);
        }
    }
}

/// Queries, keys and values that bf16 holds: only the weights of values are rounded.
#[test]
fn attention_in_bf16_is_near() {
    let shape = Heads { heads: 4, kv_heads: 2, head_dim: 24, storage: Storage::Bf16 };
    let lengths = [37, 20];
    let [q, k, v] = [(1, shape.width()), (2, shape.kv_width()), (3, shape.kv_width())].map(|(stream, width)| {
        let mut values = random(stream, 57 * width);
        kernels::round_to_bf16(&mut values);
        values
    });
    let mut y = vec![0.0; q.len()];
    kernels::attend_sequences(&Pool::new(2).unwrap(), [&q, &k, &v], &lengths, shape, &mut y);
    let want = reference::attention([&wide(&q), &wide(&k), &wide(&v)], &[], &lengths, shape);
    let far = y.iter().zip(&want).map(|(y, want)| (f64::from(*y) - want).abs()).fold(0.0, f64::max);
    // No value is larger than 1, and no weight is off by more than 2^-8 of it.
    assert!(far > 1e-5 && far < 1.0 / 256.0, "{far}");
}

/// Inputs: queries, keys, values, and keys and values of each step ahead.
fn attention_of(shape: Heads, lengths: &[usize], ahead: usize) {
    let pool = Pool::new(2).unwrap();
    let rows: usize = lengths.iter().sum();
    let (width, kv_width) = (rows * shape.width(), rows * shape.kv_width());
    let g = random(2, width);
    let mut inputs = vec![random(1, width)];
    inputs.extend((0..2 + 2 * ahead as u32).map(|i| random(3 + i, kv_width)));
    let [q, k, v] = [0, 1, 2].map(|i| inputs[i].as_slice());
    let beside: Vec<[&[f32]; 2]> = inputs[3..].as_chunks::<2>().0.iter().map(|[k, v]| [&k[..], &v[..]]).collect();
    let f = |i: &[Vec<f64>]| {
        let beside: Vec<[&[f64]; 2]> = i[3..].as_chunks::<2>().0.iter().map(|[k, v]| [&k[..], &v[..]]).collect();
        reference::attention([&i[0], &i[1], &i[2]], &beside, lengths, shape)
    };
    let mut y = vec![0.0; width];
    kernels::attend_ahead(&pool, [q, k, v], &beside, lengths, shape, &mut y);
    close("attention", &y, &f(&inputs.iter().map(|i| wide(i)).collect::<Vec<_>>()));
    let (mut dq, mut dk, mut dv) = (vec![0.0; width], vec![0.0; kv_width], vec![0.0; kv_width]);
    // These go on from what they hold.
    let mut by_ahead = vec![[vec![1.0; kv_width], vec![1.0; kv_width]]; ahead];
    let to = SequencesGradient { dq: &mut dq, dk: &mut dk, dv: &mut dv, ahead: &mut by_ahead };
    kernels::attend_ahead_gradient(&pool, [q, k, v], &beside, lengths, shape, &g, to);
    by_ahead.iter_mut().flatten().flatten().for_each(|slope| *slope -= 1.0);
    let d: Vec<Vec<f32>> = [dq, dk, dv].into_iter().chain(by_ahead.into_iter().flatten()).collect();
    if rows < 20 {
        let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        return check("attention", &inputs, &g, &d, &f);
    }
    // A few directions instead of every number.
    for stream in 10..16 {
        let direction = |(i, v): (usize, &Vec<f32>)| wide(&random(stream * 9 + i as u32, v.len()));
        let directions: Vec<Vec<f64>> = inputs.iter().enumerate().map(direction).collect();
        let at = |by: f64| -> f64 {
            let moved = |(i, d): (&Vec<f32>, &Vec<f64>)| wide(i).iter().zip(d).map(|(i, d)| i + by * d).collect();
            let moved: Vec<Vec<f64>> = inputs.iter().zip(&directions).map(moved).collect();
            f(&moved).iter().zip(wide(&g)).map(|(y, g)| y * g).sum()
        };
        let want = (at(1e-5) - at(-1e-5)) / 2e-5;
        let dot = |(d, by): (&Vec<f32>, &Vec<f64>)| d.iter().zip(by).map(|(d, b)| f64::from(*d) * b).sum::<f64>();
        let found: f64 = d.iter().zip(&directions).map(dot).sum();
        assert!((found - want).abs() < 1e-4 * want.abs().max(10.0), "attention: {found} but {want}");
    }
}

#[test]
fn adam_matches_and_rounds_what_it_wrote() {
    // An odd number of features has a step without a partner.
    adam_of(32, 70);
    adam_of(48, 61);
}

#[test]
fn the_sum_of_squares_matches() {
    for len in [0, 1, 7, 2048, 5001] {
        let values = random(6, len);
        let want: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let found = kernels::sum_of_squares(&Pool::new(2).unwrap(), &values);
        assert!((found - want).abs() <= 1e-12 * want, "{len} numbers: {found} but {want}");
    }
}

fn adam_of(n: usize, k: usize) {
    let rule = AdamRule {
        beta1: 0.9,
        beta2: 0.98,
        scale: 0.7,
        keep: 0.999,
        rate: 1e-2,
        second_correction: 1.0 / (1.0 - 0.98),
    };
    let (old, gradients) = (random(1, n * k), random(2, n * k));
    let (mut first, mut second) = (random(3, n * k), random(4, n * k).iter().map(|v| v * v).collect::<Vec<_>>());
    let before: Vec<[f64; 3]> = (0..n * k).map(|i| [old[i], first[i], second[i]].map(f64::from)).collect();
    let (mut new, mut rounded) = (gradients.clone(), vec![0; n * k]);
    let tensor = AdamTensor {
        old: &old,
        new: &mut new,
        first: &mut first,
        second: &mut second,
        rounded: Some((&mut rounded, k)),
    };
    adam_step(&Pool::new(2).unwrap(), rule, tensor);
    let want: Vec<[f64; 3]> = before.iter().zip(wide(&gradients)).map(|(b, g)| reference::adam(*b, g, rule)).collect();
    for (which, found) in [&new, &first, &second].into_iter().enumerate() {
        close(&format!("adam {which}"), found, &want.iter().map(|w| w[which]).collect::<Vec<_>>());
    }
    // The rounded weights are those that a matrix would make of the new numbers.
    let [mut by_step, mut by_matrix] = [vec![0.0; n], vec![0.0; n]];
    let x = random(5, k);
    linear(&Pool::default(), &x, &Matrix::of_bf16(rounded.into(), n, k), &mut by_step);
    linear(&Pool::default(), &x, &Matrix::new(&new.into(), n, k, Storage::Bf16), &mut by_matrix);
    assert_eq!(
        by_step.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        by_matrix.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
}
