//! Whether tokens are drawn as they are to be: chi-square of many draws against softmax, and against its nucleus.

use std::process::ExitCode;

use kernels::{Draws, NoiseKey, Pick, Pool, draw};
use serde::Serialize;

use crate::commands::Result;
use crate::number;
use crate::output;

/// Sizes of vocabularies, and how far logits are spread: from nearly flat to nearly certain.
const VOCABULARIES: [usize; 3] = [8, 80, 400];
const SPREADS: [f32; 2] = [0.5, 3.0];
const DRAWS: [Draws; 4] = [
    Draws { temperature: 1.0, top_p: 1.0 },
    Draws { temperature: 0.6, top_p: 1.0 },
    Draws { temperature: 1.3, top_p: 0.95 },
    Draws { temperature: 1.0, top_p: 0.8 },
];
/// Rows drawn in one go.
const ROWS: usize = 500;
/// Answers to a prompt, and tokens of an answer: noise is keyed by all of them.
const SAMPLES: usize = 8;
const POSITIONS: usize = 125;
/// Tokens that are expected less often are counted together: of few chi-square tells nothing (Cochran 1954).
const EXPECTED_MIN: f64 = 5.0;
/// Below this it is no luck.
const P_MIN: f64 = 0.01;
/// Streams of noise.
const LOGITS: u32 = 0x6c61_0001;
const STREAM: u32 = 0x6c61_0002;

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Sampler {
    /// Tokens drawn from each distribution.
    #[arg(long, default_value_t = 1_000_000, value_parser = number::at_least_one)]
    draws: usize,
    /// Key of the noise.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads of the device.
    #[arg(long, default_value_t = 1, value_parser = number::threads)]
    threads: usize,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Measured {
    draws: usize,
    laws: Vec<Law>,
    p_min: f64,
}

/// One distribution.
#[derive(Serialize)]
struct Law {
    vocabulary: usize,
    spread: f32,
    temperature: f32,
    top_p: f32,
    /// Tokens that can be drawn, and draws of others.
    nucleus: usize,
    outside: u64,
    chi_square: f64,
    degrees: usize,
    p: f64,
}

pub(crate) fn sampler(args: &Sampler) -> Result<ExitCode> {
    let pool = Pool::new(args.threads).map_err(actors::Error::from)?;
    let all = VOCABULARIES.iter().flat_map(|size| SPREADS.map(|spread| (*size, spread)));
    let all = all.flat_map(|(size, spread)| DRAWS.map(|draws| (size, spread, draws)));
    let laws: Vec<Law> = all.map(|(size, spread, draws)| law(args, &pool, (size, spread), draws)).collect();
    let p_min = laws.iter().map(|law| law.p).fold(1.0, f64::min);
    let is_lawful = laws.iter().all(|law| law.outside == 0) && p_min > by_luck(laws.len());
    let measured = Measured { draws: args.draws, laws, p_min };
    output::measured(args.json, &measured, &measured.text(), is_lawful)
}

/// What the smallest p of so many laws is below by luck as seldom as a single one is below [`P_MIN`].
fn by_luck(laws: usize) -> f64 {
    P_MIN / laws as f64
}

/// Draws from one distribution and compares.
fn law(args: &Sampler, pool: &Pool, (size, spread): (usize, f32), draws: Draws) -> Law {
    let logits = logits(args.seed, size, spread);
    output::note(&format!("{size} tokens, spread {spread}, T = {}, top-p {}", draws.temperature, draws.top_p));
    let (counts, chances) = (counts(args, pool, &logits, draws), chances(&logits, draws));
    let outside = counts.iter().zip(&chances).filter(|(_, chance)| **chance == 0.0).map(|(count, _)| count).sum();
    let (chi_square, degrees) = chi_square(&counts, &chances);
    Law {
        vocabulary: size,
        spread,
        temperature: draws.temperature,
        top_p: draws.top_p,
        nucleus: chances.iter().filter(|chance| **chance > 0.0).count(),
        outside,
        chi_square,
        degrees,
        p: p_value(chi_square, degrees),
    }
}

fn logits(seed: u64, size: usize, spread: f32) -> Vec<f32> {
    let key = NoiseKey::new(seed, LOGITS, 0, 0, 0);
    (0..size as u32).map(|token| spread * key.gumbel(0, token)).collect()
}

/// How often each token is drawn.
fn counts(args: &Sampler, pool: &Pool, logits: &[f32], draws: Draws) -> Vec<u64> {
    let (size, rows, mut picks) = (logits.len(), logits.repeat(ROWS), Vec::<Pick>::new());
    let mut counts = vec![0; size];
    for first in (0..args.draws).step_by(ROWS) {
        let end = args.draws.min(first + ROWS);
        let places: Vec<_> = (first..end).map(|i| place(args.seed, i)).collect();
        draw(pool, (&rows[..places.len() * size], size), draws, &places, &mut picks);
        picks.iter().for_each(|pick| counts[pick.token as usize] += 1);
    }
    counts
}

/// As a run keys them: answers to many prompts, token after token.
fn place(seed: u64, i: usize) -> (NoiseKey, u32) {
    let [i, position] = [i / POSITIONS, i % POSITIONS];
    let [prompt, sample] = [i / SAMPLES, i % SAMPLES].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    (NoiseKey::new(seed, STREAM, prompt / 64, prompt % 64, sample), position as u32)
}

/// Softmax at T, and 0 outside the likeliest tokens that have together `top_p`.
fn chances(logits: &[f32], draws: Draws) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|logit| f64::from(*logit) / f64::from(draws.temperature)).collect();
    let most = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scaled.iter().map(|logit| (logit - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let (mut chances, mut inside) = (vec![0.0; weights.len()], 0.0);
    for token in order {
        chances[token] = weights[token];
        inside += weights[token];
        if inside >= f64::from(draws.top_p) * total {
            break;
        }
    }
    chances.iter().map(|weight| weight / inside).collect()
}

/// Chi-square of counts, and its degrees of freedom.
fn chi_square(counts: &[u64], chances: &[f64]) -> (f64, usize) {
    let draws = counts.iter().sum::<u64>() as f64;
    let (mut rare, mut cells) = ((0.0, 0.0), Vec::new());
    for (count, chance) in counts.iter().zip(chances).filter(|(_, chance)| **chance > 0.0) {
        let (found, expected) = (*count as f64, chance * draws);
        if expected < EXPECTED_MIN { rare = (rare.0 + found, rare.1 + expected) } else { cells.push((found, expected)) }
    }
    match cells.iter_mut().min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some(least) if rare.1 < EXPECTED_MIN => *least = (least.0 + rare.0, least.1 + rare.1),
        _ => cells.push(rare),
    }
    let sum = cells.iter().map(|(found, expected)| (found - expected).powi(2) / expected).sum();
    (sum, cells.len().saturating_sub(1))
}

/// Chance of so large a chi-square or a larger one: its cube root is nearly normal (Wilson and Hilferty 1931).
fn p_value(chi_square: f64, degrees: usize) -> f64 {
    if degrees == 0 {
        return 1.0;
    }
    let variance = 2.0 / (9.0 * degrees as f64);
    let deviation = ((chi_square / degrees as f64).cbrt() - (1.0 - variance)) / variance.sqrt();
    0.5 * libm::erfc(deviation / std::f64::consts::SQRT_2)
}

impl Measured {
    fn text(&self) -> String {
        let mut text = format!(
            "\n{} draws each\n  vocabulary  spread    T  top-p  can be drawn  outside  chi-square of  degrees      p\n",
            self.draws
        );
        for law in &self.laws {
            text += &format!(
                "  {:>10}  {:>6.1}  {:>3.1}  {:>5.2}  {:>12}  {:>7}  {:>13.1}  {:>7}  {:>5.3}\n",
                law.vocabulary,
                law.spread,
                law.temperature,
                law.top_p,
                law.nucleus,
                law.outside,
                law.chi_square,
                law.degrees,
                law.p
            );
        }
        let by_luck = by_luck(self.laws.len());
        text + &format!(
            "  smallest p {:.4}; of {} laws the smallest is below {by_luck:.4} in one of a hundred seeds by luck\n",
            self.p_min,
            self.laws.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_are_those_of_the_tables() {
        for (chi_square, degrees, p) in
            [(11.345, 3, 0.01), (3.841, 1, 0.05), (124.342, 100, 0.05), (67.328, 100, 0.995)]
        {
            let found = p_value(chi_square, degrees);
            assert!((found / p - 1.0).abs() < 0.06, "{chi_square} of {degrees}: {found}, wanted {p}");
        }
        assert_eq!(p_value(0.0, 0), 1.0);
    }

    #[test]
    fn another_law_is_found_out() {
        let args = Sampler { draws: 400_000, seed: 3, threads: 1, json: false };
        let draws = Draws { temperature: 1.0, top_p: 1.0 };
        let logits = logits(3, 80, 0.5);
        let counts = counts(&args, &Pool::new(1).unwrap(), &logits, draws);
        assert_eq!(counts.iter().sum::<u64>(), 400_000);
        let p = |temperature| {
            let (chi_square, degrees) = chi_square(&counts, &chances(&logits, Draws { temperature, ..draws }));
            p_value(chi_square, degrees)
        };
        assert!(p(1.0) > P_MIN && p(1.04) < 1e-3, "{} and {}", p(1.0), p(1.04));
    }

    #[test]
    fn keys_differ() {
        let places: std::collections::BTreeSet<_> =
            (0..100_000).map(|i| place(1, i)).map(|(key, at)| (key.to_words(), at)).collect();
        assert_eq!(places.len(), 100_000);
    }
}
