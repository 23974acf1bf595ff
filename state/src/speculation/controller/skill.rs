//! How well a drafter guesses, and what that lets a strategy hope for that has not drafted with it.

use serde::{Deserialize, Serialize};

use crate::plan::Strategy;

/// Of what a guess still lacks, the share that another shape of the drafts may find.
const MORE: f64 = 0.25;
/// Tokens of a level from which on an exam counts them.
const WIDE: f64 = 3.0;

/// What an exam says of a drafter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Skill {
    /// Chance of each level's first choice to be right, if those above it are; deeper ones are as the last.
    pub levels: Vec<f64>,
    /// Share of the tokens that a first choice misses which the next two choices are.
    pub runners_up: f64,
}

/// Chances that a strategy hopes for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Hoped {
    levels: Vec<f64>,
    more: f64,
}

impl Skill {
    /// With the drafts of this strategy: it may look at more than first choices, or at what was said before.
    pub(super) fn hoped(&self, strategy: &Strategy) -> Option<Hoped> {
        let wide = self.runners_up * ((strategy.width as f64 - 1.0) / (WIDE - 1.0)).min(1.0);
        let more = if strategy.suffix > 0 { wide.max(MORE) } else { wide };
        (!self.levels.is_empty()).then(|| Hoped { levels: self.levels.clone(), more })
    }
}

impl Hoped {
    /// Where another shape of drafts had this chance on every level.
    pub(super) fn like(chance: f64) -> Self {
        Self { levels: vec![chance], more: MORE }
    }

    fn chance(&self, level: usize) -> f64 {
        self.levels[level.min(self.levels.len() - 1)]
    }

    /// Tokens accepted of a draft of so many levels.
    pub(super) fn accepted(&self, levels: f64) -> f64 {
        accepted(levels, |level| {
            let chance = self.chance(level);
            chance + self.more * (1.0 - chance)
        })
    }
}

/// Tokens accepted of a draft of so many levels, each right with its chance after those above it.
pub(super) fn accepted(levels: f64, chance: impl Fn(usize) -> f64) -> f64 {
    let mut path = 1.0;
    let level = |level: usize| {
        path *= chance(level);
        path * (levels - level as f64).min(1.0)
    };
    (0..levels.ceil() as usize).map(level).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_accepted_one_after_the_other() {
        assert!((accepted(1.5, |_| 0.5) - 0.625).abs() < 1e-12);
        assert!((accepted(3.0, |level| [0.5, 0.4, 0.1][level]) - 0.72).abs() < 1e-12);
        assert_eq!(accepted(0.0, |_| 1.0), 0.0);
    }

    #[test]
    fn a_strategy_hopes_for_what_its_drafter_was_found_to_guess() {
        let skill = Skill { levels: vec![0.5, 0.4], runners_up: 0.4 };
        let accepted = |strategy: Strategy| skill.hoped(&strategy).unwrap().accepted(strategy.depth as f64);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(accepted(Strategy::chain(0, 2)), 0.7), "first choices alone");
        assert!(near(accepted(Strategy::chain(0, 3)), 0.78), "deeper levels are as the last");
        assert!(near(accepted(Strategy::tree(0, 1, 3, 3)), 0.7) && near(accepted(Strategy::tree(0, 1, 8, 8)), 0.7));
        assert!(near(accepted(Strategy::tree(0, 1, 2, 2)), 0.6), "one of the runners-up");
        assert!(near(accepted(Strategy::chain(0, 1).with_suffix(4)), 0.625), "what was said may help");
        assert_eq!(Skill { levels: vec![], ..skill.clone() }.hoped(&Strategy::chain(0, 2)), None);
        assert!(near(Hoped::like(0.6).accepted(1.0), 0.7));
    }
}
