//! Kernels against the machine's limits, measured in the same run, and against candle's matmul.
//!
//!     cargo bench -p taper-kernels [-- forward backward attention decoding small]
//!
//! Prints a table and writes it to target/bench/kernels.json: name, rows, threads, dtype, ms, the ratio of the time to the
//! floor (bytes over bandwidth or flops over peak, whichever is longer), and the times of peers over ours: candle's matmul, and
//! torch's where it is installed:
//!
//!     python3 -m venv target/peers && target/peers/bin/pip install torch

#![expect(clippy::print_stdout, reason = "a bench reports")]

use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write as _};
use std::num::NonZero;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use candle_core::{Device, Tensor};
use kernels::{
    Context, Heads, KeyValues, Matrix, NoiseKey, Pool, SequencesGradient, Storage, Turned, attend_requests,
    input_gradient, linear, weight_gradient,
};

/// Shape and number of the weights: together larger than any cache.
const SHAPE: [usize; 2] = [4864, 896];
const COUNT: usize = 24;
/// How numbers are stored, and what the table calls it.
const STORAGES: [(Storage, &str); 2] = [(Storage::F32, "f32"), (Storage::Bf16, "bf16")];

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wants = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    #[cfg(target_arch = "x86_64")]
    assert!(std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma"), "the bench needs AVX2");
    let mut table = Table::default();
    for threads in [1, 2] {
        let pool = Pool::new(threads).unwrap();
        println!(
            "{threads} thread(s), {}: streaming {:.1} GB/s, multiply-add peak {:.1} GFLOP/s",
            kernels::variant(),
            bandwidth(&pool) / 1e9,
            peak(&pool) / 1e9
        );
        let all: [(&str, Part); 5] = [
            ("forward", forward),
            ("backward", backward),
            ("attention", attention),
            ("decoding", decoding),
            ("small", small),
        ];
        for (name, part) in all {
            if wants(name) {
                part(&pool, &mut table);
            }
        }
    }
    table.write();
}

/// Measures some of the kernels.
type Part = fn(&Pool, &mut Table);

/// Best of several runs, and what the machine would need at least for so many bytes and flops: measured just before and just
/// after, because other work on the machine comes and goes within seconds.
fn beside_floor(pool: &Pool, [bytes, flops]: [f64; 2], runs: usize, f: impl FnMut()) -> [f64; 2] {
    let least = || {
        let streaming = if bytes > 0.0 { bytes / bandwidth(pool) } else { 0.0 };
        streaming.max(flops / peak(pool))
    };
    let before = least();
    let seconds = time(runs, f);
    [seconds, before.midpoint(least())]
}

/// Best of several runs, in seconds.
fn time(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let one = |_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    };
    (0..runs).map(one).fold(f64::INFINITY, f64::min)
}

/// Reads 512 MB and adds them up.
fn bandwidth(pool: &Pool) -> f64 {
    static DATA: OnceLock<Vec<f32>> = OnceLock::new();
    let data = DATA.get_or_init(|| vec![1.0_f32; 128 << 20]);
    let seconds = time(5, || {
        pool.split(data.len(), 1 << 16, |range| {
            black_box(sum(&data[range]));
        });
    });
    (data.len() * 4) as f64 / seconds
}

#[cfg(target_arch = "x86_64")]
fn sum(data: &[f32]) -> [f32; 32] {
    #[target_feature(enable = "avx2,fma")]
    fn inner(data: &[f32]) -> [f32; 32] {
        plain_sum(data)
    }
    // SAFETY: `main` has asked for the instruction sets.
    unsafe { inner(data) }
}

#[cfg(not(target_arch = "x86_64"))]
fn sum(data: &[f32]) -> [f32; 32] {
    plain_sum(data)
}

#[inline(always)]
fn plain_sum(data: &[f32]) -> [f32; 32] {
    // Four streams at once, as the hardware likes it.
    let quarter = data.len() / 4;
    let streams: [&[[f32; 8]]; 4] = std::array::from_fn(|i| data[i * quarter..(i + 1) * quarter].as_chunks().0);
    let mut sums = [0.0_f32; 32];
    for i in 0..streams[0].len() {
        for (stream, sums) in streams.iter().zip(sums.as_chunks_mut::<8>().0) {
            for (sum, value) in sums.iter_mut().zip(&stream[i]) {
                *sum += value;
            }
        }
    }
    sums
}

/// A product whose operands stay in the first-level cache, at the width of the variant in use.
fn peak(pool: &Pool) -> f64 {
    let rounds = 40_000;
    let one = || {
        // Twelve independent chains hide the latency of the multiply-adds.
        let mut sums = black_box([[0.1_f32; 16]; 12]);
        let factor = black_box([0.999_f32; 16]);
        chains(&mut sums, &factor, rounds);
        black_box(sums);
    };
    let seconds = time(5, || pool.run(pool.threads(), &|_| one()));
    let lanes = if kernels::variant().starts_with("avx512") { 16 } else { 8 };
    (rounds * CHAIN * 12 * lanes * 2 * pool.threads()) as f64 / seconds
}

/// Flops of f32 that take as long as so many in this storage: of bf16, where two products are added at once, half as many.
fn as_f32(storage: Storage, flops: usize) -> f64 {
    if storage == Storage::Bf16 && kernels::multiplies_pairs() { flops as f64 / 2.0 } else { flops as f64 }
}

/// Multiply-adds of a chain in a round.
const CHAIN: usize = 16;

#[cfg(target_arch = "x86_64")]
fn chains(sums: &mut [[f32; 16]; 12], factor: &[f32; 16], rounds: usize) {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_loadu_ps, _mm256_storeu_ps};
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_loadu_ps, _mm512_storeu_ps};
    macro_rules! chains {
        ($name:ident, $features:literal, $load:ident, $multiply:ident, $store:ident) => {
            #[target_feature(enable = $features)]
            fn $name(sums: &mut [[f32; 16]; 12], factor: &[f32; 16], rounds: usize) {
                // SAFETY: sixteen floats stand at each place.
                unsafe {
                    let f = $load(factor.as_ptr());
                    let mut acc: [_; 12] = std::array::from_fn(|i| $load(sums[i].as_ptr()));
                    for _ in 0..rounds {
                        for _ in 0..CHAIN {
                            for a in &mut acc {
                                *a = $multiply(*a, f, f);
                            }
                        }
                    }
                    for (a, s) in acc.iter().zip(sums) {
                        $store(s.as_mut_ptr(), *a);
                    }
                }
            }
        };
    }
    chains!(half, "avx2,fma", _mm256_loadu_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
    chains!(whole, "avx512f", _mm512_loadu_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
    match kernels::variant() {
        // SAFETY: the variant is chosen by what the processor has.
        "avx512" | "avx512bf16" => unsafe { whole(sums, factor, rounds) },
        // SAFETY: `main` has asked for the instruction sets.
        _ => unsafe { half(sums, factor, rounds) },
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn chains(sums: &mut [[f32; 16]; 12], factor: &[f32; 16], rounds: usize) {
    for _ in 0..rounds * CHAIN {
        for sum in &mut *sums {
            for i in 0..8 {
                sum[i] = sum[i].mul_add(factor[i], factor[i]);
            }
        }
    }
}

fn values(stream: u32, len: usize) -> Vec<f32> {
    let key = NoiseKey::new(3, stream, 0, 0, 0);
    // A stretch of noise again and again: what the numbers are does not matter, but denormals would.
    let some: Vec<f32> = (0..4096).map(|i| key.uniform(0, i) as f32 - 0.5).collect();
    some.iter().cycle().take(len).copied().collect()
}

fn weights(storage: Storage) -> Vec<Matrix> {
    let [n, k] = SHAPE;
    (0..COUNT).map(|i| Matrix::new(&Arc::new(values(i as u32, kernels::packed_len(n, k))), n, k, storage)).collect()
}

/// torch beside us, if it is installed.
struct Torch {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Torch {
    fn start(threads: usize) -> Option<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let numbers = [threads, SHAPE[0], SHAPE[1], COUNT].map(|number| number.to_string());
        let mut process = Command::new(here.join("../target/peers/bin/python"))
            .arg(here.join("benches/torch_linear.py"))
            .args(numbers)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut torch = Self { answers: BufReader::new(process.stdout.take().unwrap()), process };
        let mut ready = String::new();
        torch.answers.read_line(&mut ready).unwrap();
        (ready.trim() == "ready").then_some(torch)
    }

    /// Best seconds for so many rows.
    fn seconds(&mut self, rows: usize) -> f64 {
        let mut answer = String::new();
        writeln!(self.process.stdin.as_mut().unwrap(), "{rows}").unwrap();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse().expect("seconds")
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

fn forward(pool: &Pool, table: &mut Table) {
    let [n, k] = SHAPE;
    let mut torch = Torch::start(pool.threads());
    // As many threads as candle uses.
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let peer: Vec<Tensor> =
        (0..COUNT).map(|i| Tensor::from_vec(values(i as u32, n * k), (n, k), &Device::Cpu).unwrap()).collect();
    for (storage, dtype) in STORAGES {
        let weights = weights(storage);
        let mut one_row = 0.0;
        for rows in [1, 4, 8, 16, 64, 256] {
            let x = values(99, rows * k);
            let mut y = vec![0.0; rows * n];
            let runs = 7;
            let bytes: usize = weights.iter().map(Matrix::bytes).sum();
            let work = [bytes as f64, as_f32(storage, 2 * rows * n * k * COUNT)];
            let [seconds, least] =
                beside_floor(pool, work, runs, || weights.iter().for_each(|w| linear(pool, &x, w, &mut y)));
            let candle = (pool.threads() == cores && storage == Storage::F32).then(|| {
                let x = Tensor::from_vec(x.clone(), (rows, k), &Device::Cpu).unwrap();
                time(runs, || peer.iter().for_each(|w| drop(black_box(x.matmul(&w.t().unwrap()).unwrap()))))
            });
            let torch = torch.as_mut().filter(|_| storage == Storage::F32).map(|torch| torch.seconds(rows));
            if rows == 1 {
                one_row = seconds;
            }
            let peers = [candle, torch];
            let row = Row::new("linear", (pool, rows, dtype), [seconds, least]);
            table.add(Row { one_row: Some(one_row), peers, ..row });
        }
    }
}

fn backward(pool: &Pool, table: &mut Table) {
    let [n, k] = SHAPE;
    for (storage, dtype) in STORAGES {
        let weight = &weights(storage)[0];
        for rows in [256, 1024] {
            let (x, g) = (values(1, rows * k), values(2, rows * n));
            let (mut dx, mut dw) = (vec![0.0; rows * k], vec![0.0; kernels::packed_len(n, k)]);
            let work = [0.0, as_f32(storage, 2 * rows * n * k)];
            let mut turned = Turned::default();
            let input = beside_floor(pool, work, 7, || input_gradient(pool, &g, weight, &mut dx, false, &mut turned));
            table.add(Row::new("input gradient", (pool, rows, dtype), input));
            let own = beside_floor(pool, work, 7, || weight_gradient(pool, &x, &g, weight, &mut dw, &mut turned));
            table.add(Row::new("weight gradient", (pool, rows, dtype), own));
        }
    }
}

/// Matrices of the quickstart's model: few features, many rows.
fn small(pool: &Pool, table: &mut Table) {
    for ([n, k], names) in [
        ([352, 128], ["wide linear", "wide input gradient", "wide weight gradient"]),
        ([128, 352], ["narrow linear", "narrow input gradient", "narrow weight gradient"]),
    ] {
        let weight = Matrix::new(&Arc::new(values(5, kernels::packed_len(n, k))), n, k, Storage::F32);
        for rows in [4, 8, 16, 1536] {
            let (x, g) = (values(1, rows * k), values(2, rows * n));
            let (mut y, mut dx, mut dw) = (g.clone(), x.clone(), vec![0.0; kernels::packed_len(n, k)]);
            // What one call does is too short to time.
            let calls = 1536 / rows;
            let work = [0.0, (2 * rows * n * k * calls) as f64];
            let many = |f: &mut dyn FnMut()| beside_floor(pool, work, 7, || (0..calls).for_each(|_| f()));
            let forth = many(&mut || linear(pool, &x, &weight, &mut y));
            table.add(Row::new(names[0], (pool, rows, "f32"), forth));
            if rows > 16 {
                let mut turned = Turned::default();
                let by_input = many(&mut || input_gradient(pool, &g, &weight, &mut dx, false, &mut turned));
                table.add(Row::new(names[1], (pool, rows, "f32"), by_input));
                let seconds = many(&mut || weight_gradient(pool, &x, &g, &weight, &mut dw, &mut turned));
                table.add(Row::new(names[2], (pool, rows, "f32"), seconds));
            }
        }
    }
}

/// Attention's heads in SmolLM2, and the name of what they store.
fn heads() -> [(Heads, &'static str); 2] {
    STORAGES.map(|(storage, dtype)| (Heads { heads: 9, kv_heads: 3, head_dim: 64, storage }, dtype))
}

fn attention(pool: &Pool, table: &mut Table) {
    heads().into_iter().for_each(|heads| attention_of(pool, table, heads));
}

fn decoding(pool: &Pool, table: &mut Table) {
    heads().into_iter().for_each(|heads| decoding_of(pool, table, heads));
}

fn attention_of(pool: &Pool, table: &mut Table, (shape, dtype): (Heads, &'static str)) {
    let lengths = [256; 8];
    let rows = 2048;
    let (q, kv, g) = (values(1, rows * 576), values(2, rows * 192), values(3, rows * 576));
    let mut y = vec![0.0; q.len()];
    // Half of all pairs, two products forward, five backward, which is computed in f32.
    let flops = lengths.len() * 256 * 256 / 2 * 576 * 2;
    let work = [0.0, as_f32(shape.storage, flops * 2)];
    let forward =
        beside_floor(pool, work, 7, || kernels::attend_sequences(pool, [&q, &kv, &kv], &lengths, shape, &mut y));
    table.add(Row::new("attention", (pool, rows, dtype), forward));
    let (mut dq, mut dk, mut dv) = (y.clone(), kv.clone(), kv.clone());
    let backward = beside_floor(pool, [0.0, (flops * 5) as f64], 7, || {
        let to = SequencesGradient { dq: &mut dq, dk: &mut dk, dv: &mut dv, ahead: &mut [] };
        kernels::attend_ahead_gradient(pool, [&q, &kv, &kv], &[], &lengths, shape, &g, to);
    });
    table.add(Row::new("attention backward", (pool, rows, dtype), backward));
}

/// A row, or a draft tree, of each of 128 requests in the middle of answers of 512 tokens, in pages as a cache has them.
fn decoding_of(pool: &Pool, table: &mut Table, (shape, dtype): (Heads, &'static str)) {
    const REQUESTS: usize = 128;
    const PAGE: usize = 64;
    let kv = values(2, PAGE * shape.kv_width());
    let mut page = KeyValues::new(shape);
    page.extend(&kv, &kv);
    let pages = vec![page; REQUESTS * 512 / PAGE];
    let pages: Vec<&KeyValues> = pages.iter().collect();
    let bytes = REQUESTS * 512 * 2 * shape.kv_width() * if shape.storage == Storage::F32 { 4 } else { 2 };
    for each in [1, 8] {
        let mut fresh = KeyValues::new(shape);
        let tree = each * shape.kv_width();
        fresh.extend(&kv[..tree], &kv[..tree]);
        let order: Vec<usize> = (0..each).collect();
        let paths: Vec<&[usize]> = (1..=each).map(|rows| &order[..rows]).collect();
        let requests: Vec<Context<'_>> =
            pages.chunks(512 / PAGE).map(|shared| Context { shared, fresh: &fresh, paths: &paths }).collect();
        let q = values(1, REQUESTS * each * shape.width());
        let (mut y, mut scratch) = (vec![0.0; q.len()], Vec::new());
        let flops = as_f32(shape.storage, REQUESTS * each * 512 * shape.width() * 4);
        let name = if each == 1 { "128 requests" } else { "128 trees of 8" };
        let seconds = beside_floor(pool, [bytes as f64, flops], 7, || {
            attend_requests(pool, &q, &requests, shape, &mut scratch, &mut y);
        });
        table.add(Row::new(name, (pool, REQUESTS * each, dtype), seconds));
    }
}

struct Row {
    name: &'static str,
    rows: usize,
    threads: usize,
    dtype: &'static str,
    seconds: f64,
    least: f64,
    /// Seconds of one row.
    one_row: Option<f64>,
    /// Seconds of candle and of torch.
    peers: [Option<f64>; 2],
}

impl Row {
    fn new(name: &'static str, (pool, rows, dtype): (&Pool, usize, &'static str), [seconds, least]: [f64; 2]) -> Self {
        Self { name, rows, threads: pool.threads(), dtype, seconds, least, one_row: None, peers: [None; 2] }
    }
}

#[derive(Default)]
struct Table {
    rows: Vec<serde_json::Value>,
}

impl Table {
    fn add(&mut self, row: Row) {
        let Row { name, rows, threads, dtype, seconds, least, one_row, peers } = row;
        let ms = seconds * 1e3;
        if self.rows.is_empty() {
            println!(
                "{:<22} {:>5} {:>7} {:>5} {:>9} {:>8} {:>7} {:>9} {:>9}",
                "", "rows", "threads", "", "ms", "of floor", "to 1", "to candle", "to torch"
            );
        }
        let times = |t: Option<f64>| t.map_or(String::new(), |t| format!("{t:.2}x"));
        let to_one = one_row.map(|one_row| seconds / one_row);
        let [to_candle, to_torch] = peers.map(|peer| peer.map(|peer| peer / seconds));
        println!(
            "{name:<22} {rows:>5} {threads:>7} {dtype:>5} {ms:>9.2} {:>7.0}% {:>7} {:>9} {:>9}",
            least / seconds * 100.0,
            times(to_one),
            times(to_candle),
            times(to_torch)
        );
        self.rows.push(serde_json::json!({
            "name": name, "rows": rows, "threads": threads, "dtype": dtype, "ms": ms,
            "floor_ratio": seconds / least, "one_row_ratio": to_one, "candle_ratio": to_candle, "torch_ratio": to_torch,
        }));
    }

    fn write(&self) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
        std::fs::create_dir_all(&folder).unwrap();
        let text = serde_json::to_string_pretty(&self.rows).unwrap();
        std::fs::write(folder.join("kernels.json"), text).unwrap();
    }
}
