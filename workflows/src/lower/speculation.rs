//! Speculation: strategies name their drafter; the plan counts them.

use std::path::Path;

use state::plan::{Controller, Drafter, DrafterShape, DrafterTraining, NetworkKind, Speculation, Strategy, TableRow};

use super::check::Check;
use super::model::resolved;
use crate::spec::{self, Word};

/// Deepest draft.
const DEPTH_MAX: usize = 16;
/// Fewest measurements kept: what is expected of a strategy counts beside fewer.
const WINDOW_MIN: usize = 8;
/// Largest draft, in tokens.
const BUDGET_MAX: usize = 64;

pub(super) fn lower(check: &mut Check<'_>, speculation: &spec::Speculation, folder: &Path) -> Speculation {
    let drafters = speculation.drafters.clone().unwrap_or_else(standard_drafters);
    let words: Vec<Word> = drafters.iter().map(|drafter| drafter.word()).collect();
    duplicates(check, &words);
    let controller = match &speculation.controller {
        Some(controller) => lower_controller(check, controller, &words),
        None => standard_controller(&words),
    };
    let training = training(check, speculation.training, &words, &controller);
    let lower = |(index, drafter): (usize, &spec::Drafter)| lower_drafter(check, index, drafter, folder);
    let drafters = drafters.iter().enumerate().map(lower).collect();
    Speculation { drafters, controller, training, lending: speculation.lending }
}

/// Rows that cost little more than one where weights come from memory.
const ROWS_FREE: usize = 8;
/// Longest chain that is drafted while its guesses are likely.
const LONG: usize = DEPTH_MAX;

fn standard_drafters() -> Vec<spec::Drafter> {
    vec![spec::Drafter::Eagle(spec::Eagle::default()), spec::Drafter::Suffix(spec::Suffix::default())]
}

/// A bandit over what pays where: a short chain in larger batches; a tree of as many rows as cost little, the request's own included; a
/// chain as long as its guesses are likely; and a long chain of the cheap drafter. Where both drafters are there, the tree and the long
/// chain take in what the cheap one proposes.
fn standard_controller(words: &[Word]) -> Controller {
    let proposed = |depth| if words.contains(&Word::Suffix) { depth } else { 0 };
    let arms = |(drafter, word): (usize, &Word)| {
        let tree = Strategy::tree(drafter, ROWS_FREE - 1, 4, ROWS_FREE - 1);
        match word {
            Word::Eagle | Word::Eagle3 => vec![
                Strategy::chain(drafter, 2),
                tree.with_suffix(proposed(tree.depth)),
                Strategy::chain(drafter, LONG).with_chance_min(0.25).with_suffix(proposed(LONG)),
            ],
            Word::Suffix => vec![Strategy::chain(drafter, 8)],
        }
    };
    let strategies: Vec<Strategy> = words.iter().enumerate().flat_map(arms).collect();
    if strategies.is_empty() {
        return Controller::Off;
    }
    Controller::Bandit { strategies, epsilon: spec::Bandit::epsilon(), window: spec::Bandit::window() }
}

fn duplicates(check: &mut Check<'_>, words: &[Word]) {
    for (index, word) in words.iter().enumerate().filter(|(index, word)| words[..*index].contains(word)) {
        let path = format!("speculation.drafters[{index}]");
        let help = "remove one of the two: a strategy could not tell them apart";
        check.wrong("workflow::duplicate", &path, format!("`{word:?}` is listed a second time"), help);
    }
    let learned = |word: &Word| word.network().is_some();
    if let Some(first) = words.iter().find(|word| learned(word))
        && let Some((index, word)) = words.iter().enumerate().find(|(_, word)| learned(word) && *word != first)
    {
        let path = format!("speculation.drafters[{index}]");
        let help = format!("remove `{first:?}` or `{word:?}`: one drafter learns");
        check.wrong("workflow::two_learned", &path, format!("`{word:?}` beside `{first:?}`"), help);
    }
}

fn lower_drafter(check: &mut Check<'_>, index: usize, drafter: &spec::Drafter, folder: &Path) -> Drafter {
    let at = |field: &str| format!("speculation.drafters[{index}].{field}");
    match drafter {
        spec::Drafter::Eagle(spec::Eagle { ffn, weights }) | spec::Drafter::Eagle3(spec::Eagle { ffn, weights }) => {
            check.count(&at("ffn"), *ffn, 0, 1 << 20);
            let weights = weights.as_ref().map(|path| resolved(check, &at("weights"), path, folder));
            let network = drafter.word().network().unwrap_or(NetworkKind::Eagle);
            Drafter::Learned { shape: DrafterShape { network, ffn: *ffn }, weights }
        }
        spec::Drafter::Suffix(spec::Suffix { match_min, match_max }) => {
            let (match_min, match_max) = (*match_min, *match_max);
            let is_counted = check.count(&at("match_min"), match_min, 1, 1024);
            if check.count(&at("match_max"), match_max, 1, 1024) && is_counted && match_max < match_min {
                let message = format!("`match_max` {match_max} is below `match_min` {match_min}");
                let help = format!("write `match_max: {match_min}` or more");
                check.wrong("workflow::order", &at("match_max"), message, help);
            }
            Drafter::Suffix { match_min, match_max }
        }
    }
}

fn lower_controller(check: &mut Check<'_>, controller: &spec::Controller, words: &[Word]) -> Controller {
    let path = "speculation.controller";
    match controller {
        spec::Controller::Off => Controller::Off,
        spec::Controller::Fixed(strategy) => Controller::Fixed(lower_strategy(check, path, *strategy, words)),
        spec::Controller::Bandit(bandit) => {
            let arms = strategies(check, &format!("{path}.strategies"), &bandit.strategies, words);
            check.probability(&format!("{path}.epsilon"), bandit.epsilon);
            check.count(&format!("{path}.window"), bandit.window, WINDOW_MIN, 65_536);
            Controller::Bandit { strategies: arms, epsilon: bandit.epsilon, window: bandit.window }
        }
        spec::Controller::Table(rows) => Controller::Table(table(check, path, rows, words)),
        spec::Controller::Threshold(row) => Controller::Table(vec![table_row(check, path, row, words)]),
    }
}

/// Rows in the order of their batch sizes, so that each is reached.
fn table(check: &mut Check<'_>, path: &str, given: &[spec::TableRow], words: &[Word]) -> Vec<TableRow> {
    if given.is_empty() {
        let help = "add `(batch_max: 4, strategy: (drafter: Eagle, depth: 4))`, or write `controller: Off`";
        check.wrong("workflow::no_strategies", path, "a table without rows", help);
    }
    let rows = given.iter().enumerate();
    let rows: Vec<TableRow> = rows.map(|(i, row)| table_row(check, &format!("{path}[{i}]"), row, words)).collect();
    for (i, pair) in rows.windows(2).enumerate().filter(|(_, pair)| pair[0].batch_max >= pair[1].batch_max) {
        let (before, here) = (pair[0].batch_max, pair[1].batch_max);
        let message = format!("`batch_max` {here} after {before}: this row is never used");
        let help = "order rows by `batch_max`, the smallest first, each size once";
        check.wrong("workflow::order", &format!("{path}[{}].batch_max", i + 1), message, help);
    }
    rows
}

fn table_row(check: &mut Check<'_>, path: &str, row: &spec::TableRow, words: &[Word]) -> TableRow {
    check.count(&format!("{path}.batch_max"), row.batch_max, 1, 65_536);
    let lower = |strategy| lower_strategy(check, &format!("{path}.strategy"), strategy, words);
    let strategy = row.strategy.map(lower);
    TableRow { batch_max: row.batch_max, strategy }
}

fn strategies(check: &mut Check<'_>, path: &str, given: &[spec::Strategy], words: &[Word]) -> Vec<Strategy> {
    if given.is_empty() {
        let help = "add `(drafter: Eagle, depth: 4)`, or write `controller: Off`";
        check.wrong("workflow::no_strategies", path, "a bandit without strategies", help);
    }
    check.range(path, given.len(), given.len() <= 64, "at most 64 strategies", "keep the ones that differ most");
    let mut lowered = Vec::new();
    for (index, strategy) in given.iter().take(64).enumerate() {
        let at = format!("{path}[{index}]");
        let strategy = lower_strategy(check, &at, *strategy, words);
        if lowered.contains(&strategy) {
            check.wrong("workflow::duplicate", &at, "this strategy is listed a second time", "remove one of the two");
        }
        lowered.push(strategy);
    }
    lowered
}

fn lower_strategy(check: &mut Check<'_>, path: &str, strategy: spec::Strategy, words: &[Word]) -> Strategy {
    let spec::Strategy { drafter: word, depth, width, suffix, chance_min, budget_all, .. } = strategy;
    let drafter = words.iter().position(|listed| *listed == word);
    if drafter.is_none() {
        let message = format!("`{word:?}` is not among the drafters");
        check.wrong("workflow::drafter_not_listed", &format!("{path}.drafter"), message, listing(word, words));
    }
    check.count(&format!("{path}.depth"), depth, 1, DEPTH_MAX);
    check.count(&format!("{path}.width"), width, 1, BUDGET_MAX);
    let budget = strategy.budget.unwrap_or(depth.saturating_mul(width).min(BUDGET_MAX));
    if strategy.budget.is_some() {
        check.count(&format!("{path}.budget"), budget, 1, BUDGET_MAX);
    }
    if suffix > 0 {
        check_suffix(check, &format!("{path}.suffix"), suffix, word, words);
    }
    check.probability(&format!("{path}.chance_min"), f64::from(chance_min));
    if chance_min > 0.0 && word == Word::Suffix {
        let help = "leave `chance_min` out, or write `drafter: Eagle`";
        let path = format!("{path}.chance_min");
        check.wrong("workflow::no_chances", &path, "the suffix drafter knows no chances", help);
    }
    check.count(&format!("{path}.budget_all"), budget_all, 0, 1 << 20);
    if budget_all > 0 && word == Word::Suffix {
        let help = "leave `budget_all` out, or write `drafter: Eagle`";
        let path = format!("{path}.budget_all");
        check.wrong("workflow::no_chances", &path, "the suffix drafter knows no chances to share by", help);
    }
    Strategy { suffix, chance_min, budget_all, ..Strategy::tree(drafter.unwrap_or_default(), depth, width, budget) }
}

/// The chain of the suffix drafter within another drafter's strategy.
fn check_suffix(check: &mut Check<'_>, path: &str, depth: usize, word: Word, words: &[Word]) {
    check.count(path, depth, 1, DEPTH_MAX);
    if word == Word::Suffix {
        let help = "write `depth`, or `drafter: Eagle` to have both";
        check.wrong("workflow::suffix_twice", path, "`suffix` adds the suffix drafter to another one", help);
    } else if !words.contains(&Word::Suffix) {
        let help = "add `Suffix()` to `speculation.drafters`, or leave `suffix` out";
        check.wrong("workflow::drafter_not_listed", path, "`Suffix` is not among the drafters", help);
    }
}

fn listing(word: Word, words: &[Word]) -> String {
    let add = format!("add `{word:?}()` to `speculation.drafters`");
    match words.first() {
        Some(listed) => format!("write `drafter: {listed:?}`, or {add}"),
        None => add,
    }
}

/// The training of the learned drafter; on by default if it drafts.
fn training(
    check: &mut Check<'_>,
    given: Option<Option<spec::Training>>,
    words: &[Word],
    controller: &Controller,
) -> Option<DrafterTraining> {
    let learns = words.iter().any(|word| word.network().is_some());
    let is_on = learns && !matches!(controller, Controller::Off);
    let training = given.unwrap_or(is_on.then(spec::Training::default))?;
    if !learns {
        let help = "add `Eagle()` or `Eagle3()` to `drafters`, or write `training: None`";
        let message = "`training` is for a drafter that learns, and none is listed";
        check.wrong("workflow::drafter_not_listed", "speculation.training", message, help);
    }
    Some(lower_training(check, training))
}

fn lower_training(check: &mut Check<'_>, training: spec::Training) -> DrafterTraining {
    let spec::Training { lr, tokens_max, levels, publish_every, buffer_tokens_max, buffer_bytes_max } = training;
    let at = |field: &str| format!("speculation.training.{field}");
    lr.iter().for_each(|lr| check.learning_rate(&at("lr"), *lr));
    check.count(&at("levels"), levels, 1, DEPTH_MAX);
    check.count(&at("publish_every"), publish_every, 1, 1_000_000);
    let is_counted = check.count(&at("tokens_max"), tokens_max, 2, 1 << 20);
    let is_kept = check.count(&at("buffer_tokens_max"), buffer_tokens_max, 2, 1 << 30);
    if is_counted && is_kept && buffer_tokens_max < tokens_max {
        let message =
            format!("a buffer of {buffer_tokens_max} tokens holds no micro-batch of `tokens_max` {tokens_max}");
        let help = format!("write `buffer_tokens_max: {tokens_max}` or more");
        check.wrong("workflow::order", &at("buffer_tokens_max"), message, help);
    }
    check.count(&at("buffer_bytes_max"), buffer_bytes_max, 1 << 20, 1 << 44);
    DrafterTraining { lr, tokens_max, levels, publish_every, buffer_tokens_max, buffer_bytes_max }
}
