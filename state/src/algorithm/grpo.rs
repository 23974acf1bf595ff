//! Group-relative policy optimisation.
//!
//! * The group baseline: Shao et al. 2024, "DeepSeekMath", section 4.1.
//! * Without the division by the standard deviation: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO).
//! * The clipped ratio: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7.
//! * Separate bounds below and above, and the mean over all tokens of a step: Yu et al. 2025, "DAPO", 3.1 and 3.3.
//! * The k3 estimate of KL(policy, reference): Schulman 2020, "Approximating KL Divergence".
//!
//! Sums and exponentials are taken in f64 and rounded once, so that a result does not depend on the order in which
//! a compiler or a mathematics library would round.

use super::Outcome;
use crate::plan;

/// Added to the standard deviation of a group.
const STD_EPS: f64 = 1e-6;
/// Largest difference of two log-probabilities that is told from a larger one; keeps exponentials finite.
const LOG_RATIO_MAX: f64 = 20.0;

/// Credit of each answer of one group: its score minus the group's mean, divided by the group's (population) standard
/// deviation if `normalize`.
///
/// Only scored answers enter the baseline; one without a finite score gets `None`. A group with fewer than two scored
/// answers, or with equal scores, teaches nothing: all its advantages are zero.
#[must_use]
pub fn advantages(scores: &[Outcome], normalize: bool) -> Vec<Option<f32>> {
    let scored: Vec<f64> = scores.iter().filter_map(Outcome::score).map(f64::from).collect();
    let Some(baseline) = Baseline::of(&scored, normalize) else {
        return scores.iter().map(|outcome| outcome.score().map(|_| 0.0)).collect();
    };
    scores.iter().map(|outcome| outcome.score().map(|score| baseline.advantage(f64::from(score)))).collect()
}

/// Centre and scale of a group.
struct Baseline {
    mean: f64,
    scale: f64,
}

impl Baseline {
    /// `None` if the group tells nothing.
    fn of(scored: &[f64], normalize: bool) -> Option<Self> {
        let first = *scored.first()?;
        // Compared exactly: the mean of equal numbers can be off by a rounding, which the scale would blow up.
        if scored.iter().all(|&score| score == first) {
            return None;
        }
        let count = scored.len() as f64;
        let mean = scored.iter().sum::<f64>() / count;
        let variance = scored.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / count;
        Some(Self { mean, scale: if normalize { variance.sqrt() + STD_EPS } else { 1.0 } })
    }

    fn advantage(&self, score: f64) -> f32 {
        ((score - self.mean) / self.scale) as f32
    }
}

/// Loss of one sampled token and its derivative by `logprob_new`.
///
/// `logprob_old` was recorded when the token was sampled, `logprob_ref` is the reference's (needed if `config.kl` is
/// not 0). The loss of a step is the mean over all its tokens: the caller divides both numbers by their count.
/// Differences of log-probabilities beyond 20 count as 20, with zero slope.
///
/// # Panics
/// If `config.kl` is not 0 and there is no `logprob_ref`.
#[must_use]
pub fn token_signal(
    config: &plan::Grpo,
    logprob_new: f32,
    logprob_old: f32,
    logprob_ref: Option<f32>,
    advantage: f32,
) -> (f32, f32) {
    let (policy_loss, policy_slope) = clipped(config.clip, logprob_new, logprob_old, advantage);
    if config.kl == 0.0 {
        return (policy_loss as f32, policy_slope as f32);
    }
    let logprob_ref = logprob_ref.expect("a loss with a KL term needs the reference's log-probability");
    let (k3, k3_slope) = k3(logprob_new, logprob_ref);
    let weight = f64::from(config.kl);
    ((policy_loss + weight * k3) as f32, (policy_slope + weight * k3_slope) as f32)
}

/// `-min(ratio A, clip(ratio) A)` and its slope.
fn clipped((low, high): (f32, f32), logprob_new: f32, logprob_old: f32, advantage: f32) -> (f64, f64) {
    let (log_ratio, inside) = difference(logprob_new, logprob_old);
    let (ratio, advantage) = (log_ratio.exp(), f64::from(advantage));
    let bounded = ratio.clamp(1.0 - f64::from(low), 1.0 + f64::from(high));
    if ratio * advantage <= bounded * advantage {
        (-ratio * advantage, -ratio * advantage * inside)
    } else {
        (-bounded * advantage, 0.0)
    }
}

/// Estimate of the KL divergence of the policy from the reference at one sampled token (k3).
#[must_use]
pub fn divergence(logprob_new: f32, logprob_ref: f32) -> f64 {
    k3(logprob_new, logprob_ref).0
}

/// `exp(ref - new) - (ref - new) - 1`, which is never negative, and its slope by `new`.
fn k3(logprob_new: f32, logprob_ref: f32) -> (f64, f64) {
    let (log_ratio, inside) = difference(logprob_ref, logprob_new);
    (log_ratio.exp_m1() - log_ratio, -log_ratio.exp_m1() * inside)
}

/// `a - b` bounded to [`LOG_RATIO_MAX`], and 1 where it is not cut, else 0.
fn difference(a: f32, b: f32) -> (f64, f64) {
    let difference = f64::from(a) - f64::from(b);
    let bounded = difference.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
    (bounded, if bounded == difference { 1.0 } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(clip: (f32, f32), kl: f32) -> plan::Grpo {
        let optimizer = plan::Optimizer {
            lr: 1e-3,
            betas: (0.9, 0.95),
            weight_decay: 0.0,
            clip_norm: 1.0,
            warmup: 0,
            schedule: plan::Schedule::Constant,
        };
        plan::Grpo {
            steps: 1,
            prompts: 1,
            group: 2,
            micro_batch: 1,
            clip,
            kl,
            normalize: true,
            optimizer,
            part: plan::Part::whole(1),
        }
    }

    fn scored(scores: &[f32]) -> Vec<Outcome> {
        scores.iter().map(|&score| Outcome::Scored(score)).collect()
    }

    #[test]
    fn the_mean_is_taken_away_and_the_deviation_divides() {
        assert_eq!(advantages(&scored(&[1.0, 0.0]), false), vec![Some(0.5), Some(-0.5)]);
        let normalized = advantages(&scored(&[1.0, 0.0, 0.0, 1.0]), true);
        for (found, expected) in normalized.iter().zip([1.0, -1.0, -1.0, 1.0]) {
            assert!((found.unwrap() - expected).abs() < 1e-5, "{normalized:?}");
        }
    }

    #[test]
    fn answers_without_a_score_do_not_enter_the_baseline() {
        let group = [Outcome::Scored(1.0), Outcome::Failed("timed out".into()), Outcome::Scored(0.0)];
        assert_eq!(advantages(&group, false), vec![Some(0.5), None, Some(-0.5)]);
        let group = [Outcome::Scored(1.0), Outcome::Scored(f32::NAN), Outcome::Scored(0.0)];
        assert_eq!(advantages(&group, false), vec![Some(0.5), None, Some(-0.5)]);
    }

    #[test]
    fn groups_that_tell_nothing_have_zero_advantage() {
        assert_eq!(advantages(&[], true), vec![]);
        assert_eq!(advantages(&scored(&[0.7]), true), vec![Some(0.0)]);
        assert_eq!(advantages(&scored(&[0.1; 7]), true), vec![Some(0.0); 7]);
        let group = [Outcome::Scored(1.0), Outcome::Failed("timed out".into())];
        assert_eq!(advantages(&group, true), vec![Some(0.0), None]);
    }

    #[test]
    fn on_policy_the_slope_is_minus_the_advantage() {
        let (loss, slope) = token_signal(&config((0.2, 0.2), 0.0), -1.5, -1.5, None, 0.75);
        assert_eq!((loss, slope), (-0.75, -0.75));
    }

    #[test]
    fn a_ratio_beyond_the_clip_has_no_slope_where_that_would_reward_it() {
        let config = config((0.2, 0.28), 0.0);
        let check = |log_ratio: f32, advantage: f32, loss: f32, is_flat: bool| {
            let found = token_signal(&config, log_ratio - 1.0, -1.0, None, advantage);
            assert!((found.0 - loss).abs() < 1e-5, "{log_ratio} {advantage}: {found:?}");
            assert_eq!(found.1 == 0.0, is_flat, "{log_ratio} {advantage}: {found:?}");
        };
        check(0.5, 1.0, -1.28, true);
        check(0.24, 1.0, -(0.24f32.exp()), false);
        check(-0.5, -1.0, 0.8, true);
        check(0.5, -1.0, 0.5f32.exp(), false);
        check(-0.5, 1.0, -(-0.5f32).exp(), false);
    }

    #[test]
    fn far_log_probabilities_stay_finite() {
        let config = config((0.2, 0.2), 0.1);
        for (new, old, reference) in [(0.0, -900.0, -900.0), (-900.0, 0.0, 0.0), (-900.0, -900.0, 0.0)] {
            for advantage in [-1.0, 0.0, 1.0] {
                let (loss, slope) = token_signal(&config, new, old, Some(reference), advantage);
                assert!(loss.is_finite() && slope.is_finite(), "{new} {old} {reference} {advantage}");
            }
        }
    }

    #[test]
    fn k3_is_zero_at_the_reference_and_never_negative() {
        assert_eq!(k3(-2.0, -2.0), (0.0, 0.0));
        for new in [-9.0, -2.1, -1.9, -0.1] {
            assert!(k3(new, -2.0).0 > 0.0);
        }
    }

    proptest! {
        #[test]
        fn the_slope_is_the_difference_quotient(
            new in -6.0f32..0.0, old in -6.0f32..0.0, reference in -6.0f32..0.0,
            advantage in -3.0f32..3.0, kl in prop_oneof![Just(0.0f32), 0.001f32..0.5],
        ) {
            const H: f64 = 1e-5;
            let config = config((0.2, 0.28), kl);
            let at = |new: f64| {
                // The same formula on f64, for a difference quotient that is not lost in f32.
                let ratio = (new - f64::from(old)).exp();
                let a = f64::from(advantage);
                let bounded = ratio.clamp(1.0 - f64::from(0.2f32), 1.0 + f64::from(0.28f32));
                let r = f64::from(reference) - new;
                -(ratio * a).min(bounded * a) + f64::from(kl) * (r.exp() - r - 1.0)
            };
            let new64 = f64::from(new);
            let ratio = (new64 - f64::from(old)).exp();
            // No derivative exists at the two kinks.
            prop_assume!((ratio - 0.8).abs() > 1e-3 && (ratio - 1.28).abs() > 1e-3);
            let (loss, slope) = token_signal(&config, new, old, Some(reference), advantage);
            let quotient = (at(new64 + H) - at(new64 - H)) / (2.0 * H);
            let scale = 1.0 + quotient.abs();
            prop_assert!((f64::from(loss) - at(new64)).abs() < 1e-4 * (1.0 + at(new64).abs()));
            prop_assert!((f64::from(slope) - quotient).abs() < 1e-4 * scale, "{slope} {quotient}");
        }

        #[test]
        fn advantages_sum_to_zero(scores in prop::collection::vec(-5.0f32..5.0, 2..12), normalize: bool) {
            let sum: f32 = advantages(&scored(&scores), normalize).into_iter().flatten().sum();
            prop_assert!(sum.abs() < 1e-3, "{sum}");
        }
    }
}
