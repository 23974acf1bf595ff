//! The kernels of one decoding cycle of one request, called one after another on memory that is already there.

use std::sync::Arc;
use std::time::Instant;

use kernels::{
    Context, Heads, KeyValues, Matrix, NoiseKey, Pool, RopeTable, Storage, Turn, add, attend_requests, embed, linear,
    log_prob, noise, rms_norm, rope, swiglu,
};
use models::Config;

/// Keys before the row: what the decoder of the bench has half way.
const CONTEXT: usize = 130;

pub(crate) struct Cycle {
    config: Config,
    heads: Heads,
    embedding: Matrix,
    /// q, k, v, o, gate, up, down of each layer.
    layers: Vec<[Matrix; 7]>,
    cache: Vec<KeyValues>,
    rope: RopeTable,
}

impl Cycle {
    pub(crate) fn new(config: &Config) -> Self {
        let Config { hidden, heads, kv_heads, head_dim, ffn, vocab, .. } = *config;
        let matrix = |stream: usize, n: usize, k: usize| {
            let key = NoiseKey::new(1, stream as u32, 0, 0, 0);
            let values: Vec<f32> = (0..n * k).map(|i| (key.uniform(0, i as u32) as f32 - 0.5) * 0.1).collect();
            Matrix::new(&Arc::new(kernels::pack(&values, n, k)), n, k, Storage::F32)
        };
        let shapes = [
            [heads * head_dim, hidden],
            [kv_heads * head_dim, hidden],
            [kv_heads * head_dim, hidden],
            [hidden, heads * head_dim],
            [ffn, hidden],
            [ffn, hidden],
            [hidden, ffn],
        ];
        let layer = |l: usize| std::array::from_fn(|i| matrix(l * 7 + i, shapes[i][0], shapes[i][1]));
        let heads = Heads { heads, kv_heads, head_dim, storage: Storage::F32 };
        let mut rows = KeyValues::new(heads);
        let some = vec![0.1; heads.kv_width()];
        (0..CONTEXT).for_each(|_| rows.push(&some, &some));
        Self {
            config: config.clone(),
            heads,
            embedding: matrix(999, vocab, hidden),
            layers: (0..config.layers).map(layer).collect(),
            cache: vec![rows; config.layers],
            rope: RopeTable::new(head_dim, config.rope_theta, config.positions_max),
        }
    }

    /// Median seconds of a cycle.
    pub(crate) fn median(&self, pool: &Pool, cycles: usize) -> f64 {
        let Self { config, heads, embedding, layers, cache, rope: table } = self;
        let (width, kv_width) = (heads.width(), heads.kv_width());
        let ones = vec![1.0; config.hidden];
        let zeros = |len: usize| vec![0.0_f32; len];
        let (mut x, mut normed, mut out) = (Vec::new(), zeros(config.hidden), zeros(config.hidden));
        let (mut q, mut k, mut v, mut mixed) = (zeros(width), zeros(kv_width), zeros(kv_width), zeros(width));
        let (mut gate, mut up, mut gated) = (zeros(config.ffn), zeros(config.ffn), zeros(config.ffn));
        let (mut logits, mut scratch, mut fresh) = (zeros(config.vocab), Vec::new(), KeyValues::new(*heads));
        let key = NoiseKey::new(2, 0, 0, 0, 0);
        let mut times = Vec::new();
        for i in 0..cycles {
            let began = Instant::now();
            embed(&[1 + i as u32 % 19], embedding, &mut x);
            for ([wq, wk, wv, wo, wgate, wup, wdown], cache) in layers.iter().zip(cache) {
                rms_norm(pool, &x, &ones, config.eps, &mut normed);
                linear(pool, &normed, wq, &mut q);
                linear(pool, &normed, wk, &mut k);
                linear(pool, &normed, wv, &mut v);
                rope(&mut q, width, &[CONTEXT as u32], table, Turn::Forth);
                rope(&mut k, kv_width, &[CONTEXT as u32], table, Turn::Forth);
                fresh.clear();
                fresh.push(&k, &v);
                let context = Context { shared: &[cache], fresh: &fresh, paths: &[&[0]] };
                attend_requests(pool, &q, &[context], *heads, &mut scratch, &mut mixed);
                linear(pool, &mixed, wo, &mut out);
                add(&mut x, &out);
                rms_norm(pool, &x, &ones, config.eps, &mut normed);
                linear(pool, &normed, wgate, &mut gate);
                linear(pool, &normed, wup, &mut up);
                swiglu(pool, &gate, &up, &mut gated);
                linear(pool, &gated, wdown, &mut out);
                add(&mut x, &out);
            }
            rms_norm(pool, &x, &ones, config.eps, &mut normed);
            linear(pool, &normed, embedding, &mut logits);
            let token = noise::sample(&logits, 1.0, &key, i as u32);
            std::hint::black_box(log_prob(&logits, token, 1.0));
            times.push(began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }
}
