//! Bits do not depend on the batch, on where keys are stored, or on the instruction set.

#![expect(clippy::print_stdout, reason = "the narrow process reports its bits")]

use std::process::Command;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use kernels::{
    Context, Heads, KeyRun, NoiseKey, Scratch, attend, attend_sequences, embed, linear, log_prob, log_probs, pack,
    push_key, rms_norm, swiglu, unpack,
};

fn values(stream: u32, len: usize) -> Vec<f32> {
    let key = NoiseKey::new(3, stream, 0, 0, 0);
    (0..len).map(|i| key.uniform(0, u32::try_from(i).unwrap()) as f32 - 0.5).collect()
}

fn matrix(stream: u32, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(values(stream, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn linear_is_the_plain_product_and_does_not_see_its_batch() {
    for (rows, k, n) in [(1, 5, 3), (2, 64, 48), (7, 33, 96), (13, 128, 352), (130, 40, 17)] {
        let (x, w) = (matrix(1, rows, k), matrix(2, n, k));
        let packed = pack(&w).unwrap();
        assert_eq!(bits(&unpack(&packed, n).unwrap()), bits(&w));
        let y = linear(&x, &packed, n).unwrap();
        let (xs, ws, ys) = (x.to_vec2::<f32>().unwrap(), w.to_vec2::<f32>().unwrap(), y.to_vec2::<f32>().unwrap());
        for r in 0..rows {
            let alone = linear(&x.narrow(0, r, 1).unwrap().contiguous().unwrap(), &packed, n).unwrap();
            assert_eq!(bits(&alone), ys[r].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), "row {r} of {rows}");
            for j in 0..n {
                let want: f64 = xs[r].iter().zip(&ws[j]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(ys[r][j]) - want).abs() < 1e-5, "({r}, {j}) of {rows} x {n}");
            }
        }
    }
}

#[test]
fn attention_does_not_see_where_keys_are_stored() {
    let shape = Heads { heads: 4, kv_heads: 2, head_dim: 24 };
    let (q, k, v) = (matrix(1, 40, 96), matrix(2, 40, 48), matrix(3, 40, 48));
    let packed = attend_sequences(&q, &k, &v, &Arc::new(vec![40]), shape).unwrap().to_vec2::<f32>().unwrap();
    let [q, k, v] = [q, k, v].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let panels = |rows: &[usize]| {
        let mut panels = Vec::new();
        rows.iter().enumerate().for_each(|(i, row)| push_key(&mut panels, i, &k[row * 48..(row + 1) * 48]));
        panels
    };
    let values = |rows: &[usize]| rows.iter().flat_map(|row| v[row * 48..(row + 1) * 48].to_vec()).collect::<Vec<_>>();
    // Keys up to `cut` are cached in two runs; the rest are fresh, stored backwards and found by their paths.
    for (last, cut) in [(39, 0), (39, 5), (39, 16), (39, 33), (4, 3), (20, 20)] {
        let cached: [Vec<usize>; 2] = [(0..cut / 3).collect(), (cut / 3..cut).collect()];
        let fresh: Vec<usize> = (cut..=last).rev().collect();
        let stored: Vec<_> = cached.iter().chain([&fresh]).map(|rows| (panels(rows), values(rows))).collect();
        let runs: Vec<_> = stored.iter().map(|(keys, values)| KeyRun { keys, values }).collect();
        let paths: Vec<Vec<usize>> = (cut..=last).map(|row| (cut..=row).map(|r| last - r).collect()).collect();
        let paths: Vec<&[usize]> = paths.iter().map(Vec::as_slice).collect();
        let context = Context { shared: &runs[..2], fresh: runs[2], paths: &paths };
        let mut out = vec![0.0; paths.len() * 96];
        attend(&q[cut * 96..(last + 1) * 96], context, shape, &mut Scratch::default(), &mut out);
        for (i, out) in out.chunks_exact(96).enumerate() {
            let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(out), bits(&packed[cut + i]), "row {i} of {last}, {cut} cached");
        }
    }
}

#[test]
fn training_and_decoding_agree_on_log_probabilities() {
    let (h, w) = (matrix(1, 60, 32), pack(&matrix(2, 90, 32)).unwrap());
    let targets: Vec<u32> = (0..60).map(|i| i * 7 % 90).collect();
    for inverse in [1.0, 0.7, 1.9] {
        let trained: Vec<f32> = log_probs(&h, &w, 90, targets.clone(), inverse).unwrap().to_vec1().unwrap();
        let logits = linear(&h, &w, 90).unwrap().to_vec2::<f32>().unwrap();
        for (row, (logits, target)) in logits.iter().zip(&targets).enumerate() {
            assert_eq!(log_prob(logits, *target, inverse).to_bits(), trained[row].to_bits());
        }
    }
}

fn fingerprint() -> String {
    let (x, w) = (matrix(1, 9, 64), pack(&matrix(2, 90, 64)).unwrap());
    let heads = Heads { heads: 4, kv_heads: 4, head_dim: 16 };
    let y = attend_sequences(&x, &x, &x, &Arc::new(vec![4, 5]), heads).unwrap();
    let y = rms_norm(&y, &Tensor::ones(64, candle_core::DType::F32, &Device::Cpu).unwrap(), 1e-5).unwrap();
    let y = swiglu(&y, &embed(&Arc::new((0..9).collect()), &w).unwrap()).unwrap();
    let p = log_probs(&y, &w, 90, (0..9).collect(), 0.9).unwrap();
    format!("{:x?}{:x?}", bits(&linear(&y, &w, 90).unwrap()), bits(&p))
}

/// Runs this test in a process of its own with narrower kernels.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    if std::env::var("TAPER_KERNELS").is_ok() {
        println!("fingerprint {}", fingerprint());
        return;
    }
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "every_instruction_set_gives_the_same_bits", "--nocapture"])
        .env("TAPER_KERNELS", "portable")
        .output()
        .unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(text.contains(&format!("fingerprint {}", fingerprint())), "portable and {} differ", kernels::variant());
}
