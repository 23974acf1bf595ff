//! Bits do not depend on the batch, on where keys are stored, on threads, or on the instruction set.

#![expect(clippy::print_stdout, reason = "the narrow process reports its bits")]

use std::process::Command;
use std::sync::Arc;

use kernels::{
    AdamRule, AdamTensor, Chosen, Context, Draws, Heads, KeyValues, Matrix, NoiseKey, Pool, RopeTable, Scratch,
    SequencesGradient, Storage, Turn, Turned, adam_step, add, add_linear, approach, attend, attend_ahead_gradient,
    attend_sequences, draw, embed, embed_gradient, from_bf16, input_gradient, linear, log_prob, log_probs,
    log_probs_gradient, pack, packed_len, rms_norm, rms_norm_gradient, rope, round_to_bf16, softmax, sum_of_squares,
    swiglu, swiglu_gradient, to_bf16, unpack, weight_gradient,
};

fn values(stream: u32, len: usize) -> Vec<f32> {
    let key = NoiseKey::new(3, stream, 0, 0, 0);
    (0..len).map(|i| key.uniform(0, u32::try_from(i).unwrap()) as f32 - 0.5).collect()
}

fn matrix(stream: u32, n: usize, k: usize, storage: Storage) -> Matrix {
    Matrix::new(&Arc::new(pack(&values(stream, n * k), n, k)), n, k, storage)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

const STORAGES: [Storage; 2] = [Storage::F32, Storage::Bf16];

/// Numbers as products of weights in this storage see them.
fn seen(values: &[f32], storage: Storage) -> Vec<f32> {
    let rounded = |v: &f32| if storage == Storage::Bf16 { from_bf16(to_bf16(*v)) } else { *v };
    values.iter().map(rounded).collect()
}

/// Every element of x `(rows, k)` times w `(n, k)`: its chain as it is written down.
fn chains(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let chain = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| chain(x, w))).collect()
}

#[test]
fn linear_does_not_see_its_batch() {
    for (rows, k, n) in [(1, 5, 3), (2, 64, 48), (7, 33, 96), (13, 128, 352), (130, 600, 17), (40, 601, 80)] {
        let x = values(1, rows * k);
        let w = values(2, n * k);
        assert_eq!(bits(&unpack(&pack(&w, n, k), n, k)), bits(&w));
        for storage in STORAGES {
            let weight = matrix(2, n, k, storage);
            let run = |threads: usize, x: &[f32]| {
                let mut y = vec![0.25; x.len() / k * n];
                linear(&Pool::new(threads).unwrap(), x, &weight, &mut y);
                y
            };
            let y = run(1, &x);
            assert_eq!(bits(&run(3, &x)), bits(&y), "threads");
            for r in 0..rows {
                let alone = run(1, &x[r * k..(r + 1) * k]);
                assert_eq!(bits(&alone), bits(&y[r * n..(r + 1) * n]), "row {r} of {rows}");
            }
            // The chain over k as it is written down: one rounding a step, from zero or from what was there.
            let mut sums = values(5, rows * n);
            let before = sums.clone();
            add_linear(&Pool::default(), &x, &weight, &mut sums);
            for at in [0, n - 1, rows * n - 1] {
                let (r, j) = (at / n, at % n);
                let (x, w) = (seen(&x[r * k..][..k], storage), seen(&w[j * k..][..k], storage));
                let chain = |from: f32| (0..k).fold(from, |acc, i| x[i].mul_add(w[i], acc));
                assert_eq!(y[at].to_bits(), chain(0.0).to_bits(), "({r}, {j}) of {rows} x {n}");
                assert_eq!(sums[at].to_bits(), chain(before[at]).to_bits(), "({r}, {j}) of {rows} x {n}");
            }
        }
    }
}

/// Every element of some products against its chain as it is written down, whatever tiles, blocks and parts they are made of.
#[test]
fn products_are_their_chains() {
    for storage in STORAGES {
        for (k, n) in [(1, 17), (2, 16), (7, 150), (515, 150), (1070, 150)] {
            let weight = matrix(2, n, k, storage);
            let w = seen(&values(2, n * k), storage);
            for rows in (1..=26).chain([67]) {
                let x = values(1, rows * k);
                let mut y = vec![0.25; rows * n];
                linear(&Pool::new(1 + rows % 3).unwrap(), &x, &weight, &mut y);
                let want = chains(&seen(&x, storage), &w, k);
                assert_eq!(bits(&y), bits(&want), "{rows} rows of {k} by {n}, {storage:?}");
            }
        }
    }
}

/// Sums of two products that all but cancel each other are never subnormal, on any instruction set: what is too small is zero before.
#[test]
fn sums_that_cancel_are_not_subnormal() {
    for exponent in -75..=-40 {
        let (size, bit) = (2.0_f32.powi(exponent), 2.0_f32.powi(-7));
        let x: Vec<f32> = [1.0 + bit, -1.0].map(|x| x * size).to_vec();
        let w: Vec<f32> = [1.0 + bit, 1.0 + 2.0 * bit].map(|w| w * size).to_vec();
        let weight = Matrix::new(&Arc::new(pack(&w, 1, 2)), 1, 2, Storage::Bf16);
        let mut y = [1.0];
        linear(&Pool::default(), &x, &weight, &mut y);
        let want = if exponent < -55 { 0.0 } else { 2.0_f32.powi(exponent).powi(2) * bit * bit };
        assert_eq!(y[0].to_bits(), want.to_bits(), "2^{exponent}");
    }
}

/// Numbers of all sizes: what is left of a sum is what is left of its chain.
#[test]
fn small_and_large_numbers_are_not_lost() {
    let (rows, k, n) = (5, 96, 48);
    let sized = |stream: u32, len: usize| -> Vec<f32> {
        let sizes = values(stream + 10, len).into_iter().map(|v| (v * 140.0).exp2());
        values(stream, len).into_iter().zip(sizes).map(|(value, size)| value * size).collect()
    };
    let (x, w) = (sized(1, rows * k), sized(2, n * k));
    let weight = Matrix::new(&Arc::new(pack(&w, n, k)), n, k, Storage::Bf16);
    let (x_seen, w_seen) = (seen(&x, Storage::Bf16), seen(&w, Storage::Bf16));
    assert!(x_seen.contains(&0.0) && x_seen.iter().all(|x| *x == 0.0 || x.abs() >= 2.0_f32.powi(-55)));
    let mut y = vec![0.0; rows * n];
    for steps in (2..=k).step_by(2) {
        // Zeros behind the first ones: sums of few products are small.
        let (mut x, mut x_seen) = (x.clone(), x_seen.clone());
        x.chunks_exact_mut(k).chain(x_seen.chunks_exact_mut(k)).for_each(|row| row[steps..].fill(0.0));
        linear(&Pool::default(), &x, &weight, &mut y);
        assert_eq!(bits(&y), bits(&chains(&x_seen, &w_seen, k)), "{steps} steps");
    }
}

/// The same of both gradients, with more rows than a block of k and more features than a block of rows.
#[test]
fn gradients_are_their_chains() {
    let shapes = [(1, 4, 3), (6, 1, 17), (3, 5, 17), (1100, 130, 33), (77, 34, 48)];
    for (storage, (rows, k, n)) in STORAGES.into_iter().flat_map(|storage| shapes.map(|shape| (storage, shape))) {
        let (x, g) = (values(1, rows * k), values(2, rows * n));
        let (w, sums) = (values(3, n * k), values(4, n * k));
        let weight = Matrix::new(&Arc::new(pack(&w, n, k)), n, k, storage);
        let runs = [1, 3].map(|threads| {
            let (mut dx, mut dw) = (values(5, rows * k), pack(&sums, n, k));
            input_gradient(&Pool::new(threads).unwrap(), &g, &weight, &mut dx, true, &mut Turned::default());
            weight_gradient(&Pool::new(threads).unwrap(), &x, &g, &weight, &mut dw, &mut Turned::default());
            (dx, dw)
        });
        let [x, g, w] = [x, g, w].map(|values| seen(&values, storage));
        for (dx, dw) in runs {
            let by_input = |(at, from): (usize, f32)| {
                (0..n).fold(from, |sum, j| g[at / k * n + j].mul_add(w[j * k + at % k], sum))
            };
            let want: Vec<f32> = values(5, rows * k).into_iter().enumerate().map(by_input).collect();
            assert_eq!(bits(&dx), bits(&want), "by input, {rows} rows");
            let by_weight = |(at, from): (usize, &f32)| {
                (0..rows).fold(*from, |sum, row| x[row * k + at % k].mul_add(g[row * n + at / k], sum))
            };
            let want: Vec<f32> = sums.iter().enumerate().map(by_weight).collect();
            assert_eq!(bits(&unpack(&dw, n, k)), bits(&want), "by weight, {rows} rows");
        }
    }
}

#[test]
fn gradients_do_not_see_threads() {
    let (rows, k, n) = (130, 40, 72);
    let (x, g, weight) = (values(1, rows * k), values(2, rows * n), matrix(3, n, k, Storage::Bf16));
    let shape = Heads { heads: 2, kv_heads: 1, head_dim: 20, storage: Storage::Bf16 };
    let lengths = [70, 60];
    let run = |threads: usize| {
        let pool = Pool::new(threads).unwrap();
        let (mut dx, mut dw) = (vec![0.0; rows * k], values(4, kernels::packed_len(n, k)));
        input_gradient(&pool, &g, &weight, &mut dx, false, &mut Turned::default());
        weight_gradient(&pool, &x, &g, &weight, &mut dw, &mut Turned::default());
        let targets: Vec<u32> = (0..rows as u32).map(|i| i % 72).collect();
        let chosen = Chosen { targets: &targets, inverse_temperature: 0.9 };
        log_probs_gradient(&pool, &x, &weight, chosen, &mut |row, _| g[row], &mut dx, &mut dw);
        let mut d = [vec![0.0; rows * k], vec![0.0; rows * 20], vec![0.0; rows * 20]];
        let [dq, dk, dv] = &mut d;
        let kv = &g[..rows * 20];
        let mut by_ahead = [[vec![0.0; rows * 20], vec![0.0; rows * 20]]];
        let to = SequencesGradient { dq, dk, dv, ahead: &mut by_ahead };
        attend_ahead_gradient(&pool, [&x, kv, kv], &[[kv, kv]], &lengths, shape, &x, to);
        let squares = both_words(sum_of_squares(&pool, &values(5, 12_345)));
        [bits(&[dx, dw, d.concat(), by_ahead.concat().concat()].concat()), squares.to_vec()].concat()
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn attention_does_not_see_where_keys_are_stored() {
    for (heads, kv_heads, head_dim) in [(4, 2, 24), (2, 1, 22), (3, 1, 64), (4, 2, 80), (1, 1, 96)] {
        STORAGES.into_iter().for_each(|storage| attention_of(Heads { heads, kv_heads, head_dim, storage }));
    }
}

fn attention_of(shape: Heads) {
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let (q, k, v) = (values(1, 40 * width), values(2, 40 * kv_width), values(3, 40 * kv_width));
    let mut packed = vec![0.0; q.len()];
    attend_sequences(&Pool::new(2).unwrap(), [&q, &k, &v], &[40], shape, &mut packed);
    if shape.storage == Storage::Bf16 {
        // Rounding is part of it: whoever has done it before changes nothing.
        let [mut q, mut k, mut v] = [&q, &k, &v].map(Clone::clone);
        [&mut q, &mut k, &mut v].into_iter().for_each(|values| round_to_bf16(values));
        let mut again = vec![0.0; q.len()];
        attend_sequences(&Pool::default(), [&q, &k, &v], &[40], shape, &mut again);
        assert_eq!(bits(&again), bits(&packed), "{shape:?}");
    }
    let stored = |rows: &[usize]| {
        let mut stored = KeyValues::new(shape);
        let at = |row: usize| row * kv_width..(row + 1) * kv_width;
        rows.iter().for_each(|row| stored.push(&k[at(*row)], &v[at(*row)]));
        stored
    };
    // Keys up to `cut` are cached in two runs; the rest are fresh, stored backwards and found by their paths.
    for (last, cut) in [(39, 0), (39, 5), (39, 16), (39, 33), (4, 3), (20, 20), (22, 20)] {
        let cached: [Vec<usize>; 2] = [(0..cut / 3).collect(), (cut / 3..cut).collect()];
        let fresh: Vec<usize> = (cut..=last).rev().collect();
        let [first, mut second, fresh] = [stored(&cached[0]), stored(&cached[1]), stored(&fresh)];
        // A copy of some of it goes on as the whole.
        if let Some((newest, rest)) = cached[1].split_last() {
            second.copy_from(&stored(rest));
            let at = newest * kv_width..(newest + 1) * kv_width;
            second.push(&k[at.clone()], &v[at]);
        }
        let paths: Vec<Vec<usize>> = (cut..=last).map(|row| (cut..=row).map(|r| last - r).collect()).collect();
        let paths: Vec<&[usize]> = paths.iter().map(Vec::as_slice).collect();
        let context = Context { shared: &[&first, &second], fresh: &fresh, paths: &paths };
        let (mut out, here) = (vec![0.0; paths.len() * width], cut * width..(last + 1) * width);
        attend(&q[here.clone()], context, shape, &mut Scratch::default(), &mut out);
        assert_eq!(bits(&out), bits(&packed[here]), "rows from {cut} to {last}");
    }
}

#[test]
fn training_and_decoding_agree_on_log_probabilities() {
    let (pool, h) = (Pool::new(2).unwrap(), values(1, 400 * 32));
    let targets: Vec<u32> = (0..400).map(|i| i * 7 % 90).collect();
    for storage in STORAGES {
        let w = matrix(2, 90, 32, storage);
        for inverse_temperature in [1.0, 0.7, 1.9] {
            let trained = log_probs(&pool, &h, &w, Chosen { targets: &targets, inverse_temperature });
            for (row, h) in h.chunks_exact(32).enumerate() {
                let mut logits = vec![0.0; 90];
                linear(&pool, h, &w, &mut logits);
                assert_eq!(log_prob(&logits, targets[row], inverse_temperature).to_bits(), trained[row].to_bits());
            }
        }
    }
}

/// Whatever rows are drawn with it, on however many threads, a row's token and log-probability are its own.
#[test]
fn draws_do_not_know_of_their_neighbours() {
    let (rows, n) = (23, 1_501);
    let logits: Vec<f32> = values(8, rows * n).iter().map(|v| v * 9.0).collect();
    let places: Vec<(NoiseKey, u32)> = (0..23).map(|row| (NoiseKey::new(3, 0, 1, row / 4, row % 4), row * 7)).collect();
    for (temperature, top_p) in [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)] {
        let (draws, mut all, mut one) = (Draws { temperature, top_p }, Vec::new(), Vec::new());
        draw(&Pool::new(3).unwrap(), (&logits, n), draws, &places, &mut all);
        let inverse = if temperature == 0.0 { 1.0 } else { 1.0 / temperature };
        for (row, logits) in logits.chunks_exact(n).enumerate() {
            draw(&Pool::new(1).unwrap(), (logits, n), draws, &places[row..=row], &mut one);
            assert_eq!(all[row], one[0], "row {row} at T = {temperature}");
            let expected = log_prob(logits, one[0].token, inverse);
            assert_eq!(all[row].log_prob.to_bits(), expected.to_bits(), "row {row} at T = {temperature}");
        }
    }
}

fn fingerprint() -> String {
    let pool = Pool::default();
    let mut all = Vec::new();
    for storage in STORAGES {
        let (x, w) = (values(1, 9 * 64), matrix(2, 90, 64, storage));
        let heads = Heads { heads: 4, kv_heads: 4, head_dim: 16, storage };
        let (mut a, mut b, mut c) = (vec![0.0; 9 * 64], vec![0.0; 9 * 64], Vec::new());
        attend_sequences(&pool, [&x, &x, &x], &[4, 5], heads, &mut a);
        rms_norm(&pool, &a, &[1.0; 64], 1e-5, &mut b);
        embed(&[0, 1, 2, 3, 4, 5, 6, 7, 8], &w, &mut c);
        swiglu(&pool, &b, &c, &mut a);
        let mut logits = vec![0.0; 9 * 90];
        linear(&pool, &a, &w, &mut logits);
        let chosen = Chosen { targets: &[0, 1, 2, 3, 4, 5, 6, 7, 8], inverse_temperature: 0.9 };
        all.extend(log_probs(&pool, &a, &w, chosen));
        let (mut dh, mut dw) = (vec![0.0; 9 * 64], vec![0.0; kernels::packed_len(90, 64)]);
        log_probs_gradient(&pool, &a, &w, chosen, &mut |row, _| x[row], &mut dh, &mut dw);
        let mut d = [vec![0.0; 9 * 64], vec![0.0; 9 * 64], vec![0.0; 9 * 64]];
        let [dq, dk, dv] = &mut d;
        let to = SequencesGradient { dq, dk, dv, ahead: &mut [] };
        attend_ahead_gradient(&pool, [&x, &x, &x], &[], &[4, 5], heads, &dh, to);
        let places: Vec<(NoiseKey, u32)> = (0..9).map(|row| (NoiseKey::new(2, 0, 0, row, 0), row)).collect();
        for top_p in [1.0, 0.7] {
            let (mut drawn, draws) = (Vec::new(), Draws { temperature: 0.8, top_p });
            draw(&pool, (&logits, 90), draws, &places, &mut drawn);
            all.extend(drawn.iter().flat_map(|drawn| [drawn.token as f32, drawn.log_prob]));
        }
        all.extend(logits.into_iter().chain(dh).chain(dw).chain(d.concat()));
        // Many rows, more than a block of k, an odd number of features or of rows.
        let mut many = vec![0.0; 40 * 50];
        for k in [601, 1070] {
            linear(&pool, &values(4, 40 * k), &matrix(5, 50, k, storage), &mut many);
            all.extend(&many);
        }
        let mut by_rows = vec![0.0; kernels::packed_len(90, 64)];
        let (x, g) = (values(6, 41 * 64), values(7, 41 * 90));
        weight_gradient(&pool, &x, &g, &w, &mut by_rows, &mut Turned::default());
        all.extend(by_rows);
        let mut attended = vec![0.0; x.len()];
        attend_sequences(&pool, [&x, &x, &x], &[23, 18], heads, &mut attended);
        all.extend(attended);
        let wide = Heads { heads: 4, kv_heads: 2, head_dim: 70, storage };
        let (q, k) = (values(8, 41 * wide.width()), values(9, 41 * wide.kv_width()));
        let mut attended = vec![0.0; q.len()];
        attend_sequences(&pool, [&q, &k, &k], &[23, 18], wide, &mut attended);
        all.extend(attended);
    }
    all.extend(element_by_element(&pool));
    format!("{:x?} {:x?}", bits(&all), both_words(sum_of_squares(&pool, &values(5, 12_345))))
}

/// What operations without a product make.
fn element_by_element(pool: &Pool) -> Vec<f32> {
    let [x, mut turned, mut added, mut chances] = [0, 1, 2, 3].map(|stream| values(20 + stream, 9 * 66));
    let table = RopeTable::new(22, 1e4, 40);
    rope(&mut turned, 66, &[3, 1, 4, 1, 5, 9, 2, 6, 39], &table, Turn::Forth);
    add(&mut added, &x);
    chances.chunks_mut(66).for_each(softmax);
    let (mut dx, mut dw) = (values(24, 9 * 66), vec![0.1; 66]);
    rms_norm_gradient(pool, &x, &values(25, 66), 1e-5, &turned, &mut dx, &mut dw);
    let [mut gate, mut up] = [26, 27].map(|stream| values(stream, 9 * 66));
    swiglu_gradient(pool, &mut gate, &mut up, &x);
    // An odd number of input features: pairs of steps end with half a one.
    let (len, k) = (packed_len(50, 33), 33);
    let (old, mut new, mut rounded) = (values(28, len), values(29, len), vec![0; len]);
    let [mut first, mut second] = [vec![0.01; len], vec![0.02; len]];
    let rule = AdamRule { beta1: 0.9, beta2: 0.95, scale: 0.7, keep: 0.99, rate: 3e-2, second_correction: 7.0 };
    let (first_of, second_of, to) = (&mut first, &mut second, Some((rounded.as_mut_slice(), k)));
    let tensor = AdamTensor { old: &old, new: &mut new, first: first_of, second: second_of, rounded: to };
    adam_step(pool, rule, tensor);
    let mut mean = old;
    approach(pool, &mut mean, &new, 0.3);
    let mut embedded = vec![0.0; packed_len(50, 66)];
    embed_gradient(&[0, 49, 3, 3, 7, 16, 15, 31, 0], &x, &mut embedded);
    let rounded = rounded.into_iter().map(from_bf16).collect();
    [turned, added, chances, dx, dw, gate, up, new, first, second, rounded, mean, embedded].concat()
}

fn both_words(value: f64) -> [u32; 2] {
    let bits = value.to_bits();
    [(bits >> 32) as u32, bits as u32]
}

/// Runs all these tests in processes of their own with narrower kernels, and compares what everything together makes.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    if std::env::var("TAPER_KERNELS").is_ok() {
        println!("fingerprint {}", fingerprint());
        return;
    }
    for narrower in ["portable", "avx2", "avx512"] {
        // Asked for a wider one than it has, a processor takes its widest: nothing new, and right all the same.
        let run = Command::new(std::env::current_exe().unwrap())
            .arg("--nocapture")
            .env("TAPER_KERNELS", narrower)
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap();
        assert!(run.status.success(), "{narrower}: {text}{}", String::from_utf8_lossy(&run.stderr));
        assert!(
            text.contains(&format!("fingerprint {}", fingerprint())),
            "{narrower} and {} differ",
            kernels::variant()
        );
    }
}

#[test]
fn the_variant_is_told() {
    let variant = kernels::variant();
    println!("variant {variant}");
    assert!(["portable", "avx2", "avx512", "avx512bf16"].contains(&variant));
}
