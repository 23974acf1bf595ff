//! Whether answers stay the same, token for token and bit for bit, in every way to decode them that there is.

use std::path::PathBuf;
use std::process::ExitCode;

use actors::{Asked, DecodeOptions, Decoded, Session, Solo};
use models::Answer;
use serde::Serialize;
use state::plan::{Controller, Drafter, DrafterShape, NetworkKind, Strategy, TableRow};

use super::race::{Prompts, Race, SLOTS, differences};
use crate::commands::Result;
use crate::failure::Failure;
use crate::number;
use crate::output;

/// Requests decoded together.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Cycles after which requests move between two decoders.
const CYCLES: usize = 5;
/// The drafter of plain decoding.
const NONE: &str = "none";
/// The controller that may find that nothing pays.
const BANDIT: &str = "bandit";

/// What is compared.
#[derive(clap::Args)]
pub(crate) struct Lossless {
    /// A workflow, or the folder of a run with its trained drafter.
    model: PathBuf,
    /// Answers of each way to decode.
    #[arg(long, default_value_t = 1000, value_parser = number::at_least_one)]
    requests: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long, value_parser = number::at_least_one)]
    tokens: Option<usize>,
    /// Threads of the device.
    #[arg(long, default_value_t = 2, value_parser = number::threads)]
    threads: usize,
    /// Answers that each drafter learns from beforehand.
    #[arg(long, default_value_t = 256)]
    learn_from: usize,
    /// Seconds that each learns for, at most.
    #[arg(long, default_value_t = 20, value_parser = number::seconds)]
    learn_s: u64,
    /// For machines: one JSON object.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Serialize)]
struct Compared {
    temperature: f32,
    requests: usize,
    /// All answers that were compared with those of plain decoding one at a time, their tokens, and those that differ.
    answers: usize,
    tokens: usize,
    differences: usize,
    ways: Vec<Line>,
}

/// One drafter under one controller.
#[derive(Serialize)]
struct Line {
    drafter: String,
    controller: String,
    /// Tokens drafted, in all batch sizes.
    drafted: usize,
    /// For each batch size, then for two decoders between which requests move.
    differences: Vec<usize>,
    /// The largest of these.
    accept_length: f64,
}

pub(crate) fn lossless(args: &Lossless) -> Result<ExitCode> {
    let race = Race::open(&args.model, args.threads, args.tokens)?;
    let mut bench = Bench { args, plain: Vec::new(), compared: Compared::new(&race, args) };
    bench.measure(race)?;
    let Bench { compared, .. } = bench;
    let code = output::measured(args.json, &compared, &compared.text(), compared.differences == 0)?;
    match compared.silent() {
        Some(ways) if compared.differences == 0 => Err(Failure::NeverDrafted { ways }),
        _ => Ok(code),
    }
}

struct Bench<'a> {
    args: &'a Lossless,
    /// Decoded plainly, one at a time.
    plain: Vec<Answer>,
    compared: Compared,
}

impl Bench<'_> {
    fn measure(&mut self, race: Race) -> Result<()> {
        let learned = race.solo.plan().speculation.learned();
        let races = self.networks(race)?;
        // First, because without a drafter the rest is not worth its time.
        for race in &races {
            race.learn(self.args.learn_from, self.args.learn_s as f64)?;
            if learned.is_some() {
                race.needs_drafter(&self.args.model)?;
            }
        }
        let Some(race) = races.first() else { return Ok(()) };
        let asked = race.measured(self.args.requests, race.group())?;
        output::note(&format!("{} answers, decoded plainly one at a time", asked.len()));
        self.plain = race.solo.decode(&asked, &race.options(&Controller::Off, 1, race.tokens_max))?.answers;
        self.compare(race, &asked, (NONE, "off", &Controller::Off))?;
        let suffix = race.solo.plan().speculation.suffix();
        if let Some(suffix) = suffix {
            self.controllers(race, &asked, "suffix", &[Strategy::chain(suffix, 8)])?;
        }
        let Some(learned) = learned else { return Ok(()) };
        for race in &races {
            let name = race.network();
            let tree = Strategy::tree(learned, 4, 3, 12);
            let ways = [Strategy::chain(learned, 4), tree, tree.with_chance_min(0.1).with_budget_all(24)];
            self.controllers(race, &asked, name, &ways)?;
            if suffix.is_some() {
                let hybrid = ways.map(|strategy| strategy.with_suffix(8));
                self.controllers(race, &asked, &format!("{name} + suffix"), &hybrid)?;
            }
        }
        Ok(())
    }

    /// The model with each network that learns; of a run only with its own.
    fn networks(&self, race: Race) -> Result<Vec<Race>> {
        let plan = race.solo.plan();
        let Some(shape) = plan.speculation.shape().filter(|_| !self.args.model.is_dir()) else { return Ok(vec![race]) };
        let other = match shape.network {
            NetworkKind::Eagle => DrafterShape::eagle3(shape.ffn),
            NetworkKind::Eagle3 => DrafterShape::eagle(shape.ffn),
        };
        let mut plan = plan.clone();
        for drafter in &mut plan.speculation.drafters {
            if let Drafter::Learned { shape, weights } = drafter {
                (*shape, *weights) = (other, None);
            }
        }
        let solo = Solo::load(&plan, self.args.threads)?;
        let other = Race { solo, prompts: Prompts::default(), ..race };
        Ok(vec![race, other])
    }

    /// Each strategy alone, in a table, and in the hands of a bandit that explores a lot.
    fn controllers(&mut self, race: &Race, asked: &[Asked], drafter: &str, strategies: &[Strategy]) -> Result<()> {
        for strategy in strategies {
            let name = format!("fixed: {}", race.name(strategy));
            self.compare(race, asked, (drafter, &name, &Controller::Fixed(*strategy)))?;
        }
        let row = |(batch_max, strategy): (usize, &Strategy)| TableRow { batch_max, strategy: Some(*strategy) };
        let table = [2, 6, 20].into_iter().zip(strategies.iter().cycle()).map(row).collect();
        self.compare(race, asked, (drafter, "table", &Controller::Table(table)))?;
        let bandit = Controller::Bandit { strategies: strategies.to_vec(), epsilon: 0.2, window: 32 };
        self.compare(race, asked, (drafter, BANDIT, &bandit))
    }

    fn compare(&mut self, race: &Race, asked: &[Asked], way: (&str, &str, &Controller)) -> Result<()> {
        let (drafter, name, controller) = way;
        output::note(&format!("{drafter}, {name}"));
        let (drafted, differences, accept_length) = Default::default();
        let mut line = Line { drafter: drafter.into(), controller: name.into(), drafted, differences, accept_length };
        for slots in BATCHES {
            let decoded = race.solo.decode(asked, &race.options(controller, slots, race.tokens_max))?;
            self.count(&mut line, &decoded);
        }
        // With room for some of them only, so that others wait, too.
        let cache_tokens_max = SLOTS / 4 * race.tokens_max;
        let options = DecodeOptions { cache_tokens_max, ..race.options(controller, SLOTS, race.tokens_max) };
        let moved = moving([race.solo.begin(asked, &options)?, race.solo.begin(&[], &options)?])?;
        self.count(&mut line, &moved);
        self.compared.ways.push(line);
        Ok(())
    }

    fn count(&mut self, line: &mut Line, decoded: &Decoded) {
        let differences = differences(&self.plain, &decoded.answers);
        line.differences.push(differences);
        line.drafted += decoded.cycles.iter().map(|m| m.rows - m.requests - m.prefilled).sum::<usize>();
        line.accept_length = line.accept_length.max(decoded.accept_length());
        self.compared.differences += differences;
        self.compared.answers += self.plain.len();
        self.compared.tokens += decoded.tokens();
    }
}

/// Requests that move to and fro in the middle of their answers, in turns with and without their keys and values.
fn moving([mut here, mut there]: [Session<'_>; 2]) -> Result<Decoded> {
    let mut turn = 0;
    while !here.is_done() || !there.is_done() {
        for _ in 0..CYCLES {
            here.cycle()?;
            there.cycle()?;
        }
        here.hand_over(&mut there, turn % 3 == 2)?;
        there.hand_over(&mut here, turn % 3 == 1)?;
        turn += 1;
    }
    let (mut here, there) = (here.finish(), there.finish());
    here.answers.extend(there.answers);
    here.cycles.extend(there.cycles);
    here.answers.sort_by_key(|answer| (answer.group, answer.sample));
    Ok(here)
}

impl Compared {
    fn new(race: &Race, args: &Lossless) -> Self {
        let temperature = race.solo.plan().sampling.temperature;
        Self { temperature, requests: args.requests, answers: 0, tokens: 0, differences: 0, ways: Vec::new() }
    }

    /// Ways that should have drafted and never did, if there are any: they show nothing.
    fn silent(&self) -> Option<String> {
        let is_silent = |line: &&Line| line.drafter != NONE && line.controller != BANDIT && line.drafted == 0;
        let name = |line: &Line| format!("{} ({})", line.drafter, line.controller);
        let ways: Vec<String> = self.ways.iter().filter(is_silent).map(name).collect();
        (!ways.is_empty()).then(|| ways.join(", "))
    }

    fn text(&self) -> String {
        let batches = BATCHES.map(|batch| format!("{batch:>5}")).join("");
        let wide = self.ways.iter().map(|line| line.controller.chars().count()).max().unwrap_or(0).max(10);
        let mut text = format!(
            "\nanswers that differ from plain decoding one at a time, of {} each, T = {}\n\n  {:<16} {:<wide$} {:>9} accept  \
             together:{batches}  moving\n",
            self.requests, self.temperature, "drafter", "controller", "drafted",
        );
        for line in &self.ways {
            let (moving, batches) = line.differences.split_last().unwrap_or((&0, &[]));
            let batches: String = batches.iter().map(|count| format!("{count:>5}")).collect();
            text += &format!(
                "  {:<16} {:<wide$} {:>9} {:>6.2}           {batches}  {moving:>6}\n",
                line.drafter, line.controller, line.drafted, line.accept_length
            );
        }
        let Self { answers, tokens, differences, .. } = self;
        text + &format!(
            "\n  {answers} answers of {tokens} tokens compared, log-probabilities by their bits; {differences} differ\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_that_never_drafted_is_told() {
        let line = |drafter: &str, drafted| Line {
            drafter: drafter.into(),
            controller: "table".into(),
            drafted,
            differences: vec![0; 4],
            accept_length: 1.0,
        };
        let compared = |ways| Compared { temperature: 1.0, requests: 9, answers: 36, tokens: 99, differences: 0, ways };
        assert_eq!(compared(vec![line(NONE, 0), line("suffix", 3), line("eagle", 1)]).silent(), None);
        let silent = compared(vec![line(NONE, 0), line("suffix", 0), line("eagle", 0), line("eagle3", 1)]).silent();
        assert_eq!(silent.as_deref(), Some("suffix (table), eagle (table)"));
    }
}
