//! One-digit sums with worked steps: `3+5-2?` and `3+5=8;8-2=6#6`. Every running value stays a digit. A solution may check
//! itself: after `?` its last steps and its answer stand again, once or several times. What counts is what stands before the
//! first check.
//!
//! A question belongs to the held-out part if a hash of its text says so, whatever the seed; the number of terms is
//! drawn first and kept, so that both parts have the same lengths.

use std::fmt::Write;

use kernels::NoiseKey;
use state::plan::Chains;

use super::Problem;
use crate::error::{Error, Result};

/// Streams of noise: training and held-out problems.
const TRAINING: u32 = 0x6368_0001;
const HELDOUT: u32 = 0x6368_0002;

/// Makes problems.
#[derive(Debug, Clone)]
pub(super) struct Generator {
    chains: Chains,
    seed: u64,
}

impl Generator {
    /// Refuses parameters that make no sense.
    pub(super) fn new(chains: &Chains, seed: u64) -> Result<Self> {
        let wrong = |field, value: String, expected: &str| Err(Error::Data { field, value, expected: expected.into() });
        let Chains { terms_min, terms_mean, terms_max, tail, tail_min, check, checks_max, check_steps, solution_max } =
            *chains;
        if terms_min < 2 {
            return wrong("terms_min", terms_min.to_string(), "2 or more");
        }
        if terms_max < terms_min || terms_max > 1 << 20 {
            return wrong("terms_max", terms_max.to_string(), "between `terms_min` and 1048576");
        }
        if !(terms_mean >= terms_min as f64 && terms_mean <= terms_max as f64) {
            return wrong("terms_mean", terms_mean.to_string(), "between `terms_min` and `terms_max`");
        }
        if !(0.0..=1.0).contains(&tail) {
            return wrong("tail", tail.to_string(), "between 0 and 1");
        }
        if tail > 0.0 && !(terms_min..=terms_max).contains(&tail_min) {
            return wrong("tail_min", tail_min.to_string(), "between `terms_min` and `terms_max`");
        }
        if !(0.0..=1.0).contains(&check) {
            return wrong("check", check.to_string(), "between 0 and 1");
        }
        if !(1..=1000).contains(&checks_max) {
            return wrong("checks_max", checks_max.to_string(), "between 1 and 1000");
        }
        if check_steps == 0 {
            return wrong("check_steps", check_steps.to_string(), "1 or more");
        }
        if solution_max == 0 {
            return wrong("solution_max", solution_max.to_string(), "1 or more");
        }
        Ok(Self { chains: chains.clone(), seed })
    }

    pub(super) fn problem(&self, index: u64) -> Problem {
        self.draw(self.seed, TRAINING, index)
    }

    /// The same for every seed, so that runs can be compared.
    pub(super) fn heldout(&self, index: u64) -> Problem {
        self.draw(0, HELDOUT, index)
    }

    fn draw(&self, seed: u64, stream: u32, index: u64) -> Problem {
        let key = NoiseKey::new(seed, stream, 0, index as u32, (index >> 32) as u32);
        let (terms, checks) = (self.terms(&key), self.checks(&key));
        // A quarter of all questions is held out, so this ends soon; the bound only guards against a mistake here.
        (1..10_000)
            .map(|attempt| sum(&key, attempt, terms, checks, &self.chains))
            .find(|problem| is_heldout(&problem.question) == (stream == HELDOUT))
            .unwrap_or_else(|| unreachable!("10,000 sums of {terms} terms all belong to the other part"))
    }

    /// The number of terms, from position 0 of the noise.
    fn terms(&self, key: &NoiseKey) -> usize {
        let Chains { terms_min, terms_mean, terms_max, tail, tail_min, .. } = self.chains;
        let u = key.uniform(0, 1);
        if key.uniform(0, 0) < tail {
            return tail_min + (u * (terms_max - tail_min + 1) as f64) as usize;
        }
        // Geometric with mean m: P(at least k) = q^k with q = m / (1 + m). Products only: the same bits everywhere.
        let mean = terms_mean - terms_min as f64;
        let q = mean / (1.0 + mean);
        let (mut more, mut at_least) = (0, q);
        while u < at_least && terms_min + more < terms_max {
            more += 1;
            at_least *= q;
        }
        terms_min + more
    }

    /// How often the solution checks itself, from position 0 of the noise.
    fn checks(&self, key: &NoiseKey) -> usize {
        if key.uniform(0, 2) >= self.chains.check {
            return 0;
        }
        1 + (key.uniform(0, 3) * self.chains.checks_max as f64) as usize
    }
}

/// One sum; all its draws are at position `attempt`.
fn sum(key: &NoiseKey, attempt: u32, terms: usize, checks: usize, chains: &Chains) -> Problem {
    let draw = |term: usize, n: u32| (key.uniform(attempt, term as u32) * f64::from(n)) as u32;
    let mut value = draw(0, 10);
    let (mut question, mut solution) = (value.to_string(), String::new());
    for term in 1..terms {
        let (operator, operand, result) = step(value, draw(term, 11));
        let separator = if term > 1 { ";" } else { "" };
        let _ = write!(question, "{operator}{operand}");
        let _ = write!(solution, "{separator}{value}{operator}{operand}={result}");
        value = result;
    }
    let _ = write!(solution, "#{value}");
    let steps: Vec<&str> = solution.split(';').collect();
    let check = format!("?{}", steps[steps.len().saturating_sub(chains.check_steps)..].join(";"));
    let fitting = chains.solution_max.saturating_sub(solution.len()) / check.len();
    let solution = format!("{solution}{}", check.repeat(checks.min(fitting)));
    Problem { question: question + "?", answer: value.to_string(), solution: Some(solution) }
}

/// From every value there are eleven steps that stay within 0 to 9: choice 0 to 10 picks one.
fn step(value: u32, choice: u32) -> (char, u32, u32) {
    match choice.checked_sub(10 - value) {
        None => ('+', choice, value + choice),
        Some(operand) => ('-', operand, value - operand),
    }
}

/// A quarter of all questions, by FNV-1a and a finishing shuffle of its bits.
fn is_heldout(question: &str) -> bool {
    let fnv = question.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed >> 62 == 0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CHAINS: Chains = Chains {
        terms_min: 2,
        terms_mean: 4.0,
        terms_max: 40,
        tail: 0.1,
        tail_min: 20,
        check: 0.25,
        checks_max: 3,
        check_steps: 4,
        solution_max: 2_000,
    };

    fn generator(seed: u64) -> Generator {
        Generator::new(&CHAINS, seed).unwrap()
    }

    fn terms(problem: &Problem) -> usize {
        problem.question.len() / 2
    }

    /// Evaluates question and steps by other means than the generator's.
    fn evaluate(problem: &Problem) {
        let text: Vec<char> = problem.question.trim_end_matches('?').chars().collect();
        let mut value = text[0].to_digit(10).unwrap() as i32;
        let mut steps = Vec::new();
        for pair in text[1..].chunks_exact(2) {
            let operand = pair[1].to_digit(10).unwrap() as i32;
            let result = if pair[0] == '+' { value + operand } else { value - operand };
            assert!((0..=9).contains(&result), "{problem:?}");
            steps.push(format!("{value}{}{operand}={result}", pair[0]));
            value = result;
        }
        assert_eq!(problem.answer, value.to_string());
        let worked = format!("{}#{value}", steps.join(";"));
        let last = format!("{}#{value}", steps[steps.len().saturating_sub(4)..].join(";"));
        let mut passes = problem.solution.as_deref().unwrap().split('?');
        assert!(passes.next() == Some(&worked) && passes.all(|pass| pass == last), "{problem:?}");
    }

    #[test]
    fn answers_and_steps_are_right() {
        let generator = generator(3);
        (0..2_000).for_each(|i| {
            evaluate(&generator.problem(i));
            evaluate(&generator.heldout(i));
        });
    }

    #[test]
    fn two_terms_read_as_documented() {
        let chains = Chains { terms_mean: 2.0, terms_max: 2, tail: 0.0, check: 0.0, ..CHAINS };
        let problem = Generator::new(&chains, 1).unwrap().problem(7);
        let solution = problem.solution.unwrap();
        assert_eq!(solution, format!("{}={1}#{1}", problem.question.trim_end_matches('?'), problem.answer));
    }

    #[test]
    fn lengths_are_as_documented_in_both_parts() {
        let n = 40_000;
        let generator = generator(5);
        let draws: [Box<dyn Fn(u64) -> Problem>; 2] =
            [Box::new(|i| generator.problem(i)), Box::new(|i| generator.heldout(i))];
        for draw in draws {
            let lengths: Vec<usize> = (0..n).map(|i| terms(&draw(i))).collect();
            let tail: Vec<f64> = lengths.iter().filter(|t| **t >= 20).map(|t| *t as f64).collect();
            let body: Vec<f64> = lengths.iter().filter(|t| **t < 20).map(|t| *t as f64).collect();
            // Ordinary problems reach 20 terms with chance (2/3)^18 = 0.0007.
            let share = tail.len() as f64 / n as f64;
            assert!((share - 0.1006).abs() < 0.006, "tail {share}");
            let checks = |i: u64| draw(i).solution.unwrap().matches('?').count();
            let mut checked = [0.0; 4];
            (0..n).for_each(|i| checked[checks(i)] += 1.0 / n as f64);
            assert!(checked[1..].iter().all(|share| (share - 0.25 / 3.0).abs() < 0.006), "checks {checked:?}");
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            assert!((mean(&tail) - 30.0).abs() < 0.5, "tail mean {}", mean(&tail));
            assert!((mean(&body) - 4.0).abs() < 0.06, "mean {}", mean(&body));
        }
    }

    #[test]
    fn checks_that_do_not_fit_are_left_out() {
        let generator = Generator::new(&Chains { check: 1.0, checks_max: 50, solution_max: 300, ..CHAINS }, 1).unwrap();
        let solutions: Vec<String> = (0..500).filter_map(|i| generator.problem(i).solution).collect();
        assert!(solutions.iter().all(|s| s.len() <= 300));
        assert!(solutions.iter().any(|s| s.len() > 280));
    }

    #[test]
    fn training_never_shows_a_heldout_question() {
        let generators = [generator(1), generator(2)];
        let heldout: BTreeSet<String> = (0..5_000).map(|i| generators[0].heldout(i).question).collect();
        assert_eq!(generators[0].heldout(9), generators[1].heldout(9));
        for generator in &generators {
            assert!((0..20_000).all(|i| !heldout.contains(&generator.problem(i).question)));
        }
    }

    #[test]
    fn seed_and_index_decide() {
        assert_eq!(generator(1).problem(u64::MAX), generator(1).problem(u64::MAX));
        let differing = (0..100).filter(|i| generator(1).problem(*i) != generator(2).problem(*i)).count();
        assert!(differing > 90);
        assert_ne!(generator(1).problem(1 << 32), generator(1).problem(0));
    }

    #[test]
    fn senseless_parameters_are_refused() {
        let bad = [
            Chains { terms_min: 1, ..CHAINS },
            Chains { terms_max: 1, ..CHAINS },
            Chains { terms_mean: f64::NAN, ..CHAINS },
            Chains { terms_mean: 1.0, ..CHAINS },
            Chains { tail: 1.5, ..CHAINS },
            Chains { tail_min: 41, ..CHAINS },
            Chains { check: -0.1, ..CHAINS },
            Chains { checks_max: 0, ..CHAINS },
            Chains { check_steps: 0, ..CHAINS },
            Chains { solution_max: 0, ..CHAINS },
        ];
        for chains in bad {
            assert!(matches!(Generator::new(&chains, 0), Err(Error::Data { .. })), "{chains:?}");
        }
    }
}
