//! Figures and tables of "Taming the Long Tail" (Hu et al. 2025), measured here on one's own model: data as CSV, pictures as SVG.

#[path = "paper/chart.rs"]
mod chart;
#[path = "paper/rows.rs"]
mod rows;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use actors::Decoded;
use clap::ValueEnum;
use serde::Serialize;
use state::plan::{Controller, Strategy};

use super::race::{Race, SLOTS, Way};
use crate::commands::Result;
use crate::failure::Failure;
use crate::number;
use crate::output;
use chart::{Heat, Line, Lines};
use rows::{Row, rows};

/// Levels of a draft, and tokens of it that are verified.
const DEPTHS: [usize; 5] = [1, 2, 4, 6, 8];
const BUDGETS: [usize; 5] = [2, 4, 8, 16, 32];
/// Tokens looked at on each level.
const WIDTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// Requests decoded together.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Nodes of a level of the grid's trees, unless fewer levels are to hold as many as are verified.
const WIDTH: usize = 4;
/// Drafts of the other figures.
const DEPTH: usize = 6;
const BUDGET: usize = 16;
/// Levels whose guesses are followed, and the part of its time after which the drafter is looked at first.
const LEVELS: usize = 8;
const EARLY: f64 = 1.0 / 16.0;
/// Guesses of a level that tell its chance.
const GUESSES_MIN: u64 = 30;

/// What is measured.
#[derive(clap::Args)]
pub(crate) struct Paper {
    /// A workflow with a drafter that learns, or the folder of a run with a trained one.
    model: PathBuf,
    /// Which ones. Default: all.
    #[arg(long, value_enum)]
    figure: Vec<Figure>,
    /// Folder for the CSV and SVG files.
    #[arg(long, default_value = "docs")]
    to: PathBuf,
    /// Threads of the device.
    #[arg(long, default_value_t = 1, value_parser = number::threads)]
    threads: usize,
    /// Answers decoded by each way of the grids.
    #[arg(long, default_value_t = 32, value_parser = number::at_least_one)]
    answers: usize,
    /// Answers of the rollout with a long tail.
    #[arg(long, default_value_t = 128, value_parser = number::at_least_one)]
    requests: usize,
    /// Longest answer, in tokens. Default: the workflow's.
    #[arg(long, value_parser = number::at_least_one)]
    tokens: Option<usize>,
    /// Answers that the drafter learns from before it is measured.
    #[arg(long, default_value_t = 128)]
    learn_from: usize,
    /// Seconds that it learns for, at most.
    #[arg(long, default_value_t = 60, value_parser = number::seconds)]
    learn_s: u64,
    /// For machines: one JSON object, beside the files.
    #[arg(long)]
    json: bool,
}

/// Keys of the JSON form.
#[derive(Default, Serialize)]
struct Measured {
    /// Answers that were compared with those of plain decoding, and those that differ.
    compared: usize,
    differences: usize,
    /// Rows of each figure's CSV.
    #[serde(flatten)]
    figures: BTreeMap<&'static str, Vec<Row>>,
}

/// A figure or table of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// Per-position acceptance (figure 16), early and late in the drafter's training.
    Levels,
    /// Draft depth by tokens to verify (figure 13): accept length and speed of a single request.
    Grid,
    /// Tokens looked at on each level (table 1).
    Width,
    /// Tokens to verify by batch size (table 4).
    Batch,
    /// Running requests over time (figure 14), and when drafting begins.
    Running,
}

/// A chart and the numbers behind it.
struct Drawn {
    name: &'static str,
    csv: String,
    svg: String,
}

struct Bench<'a> {
    args: &'a Paper,
    race: Race,
    learned: usize,
    measured: Measured,
}

pub(crate) fn paper(args: &Paper) -> Result<ExitCode> {
    let race = Race::open(&args.model, args.threads, args.tokens)?;
    let Some(learned) = race.solo.plan().speculation.learned() else {
        return Err(Failure::NothingToDraft { path: args.model.clone() });
    };
    std::fs::create_dir_all(&args.to).map_err(|source| Failure::Unwritable { path: args.to.clone(), source })?;
    let mut bench = Bench { args, race, learned, measured: Measured::default() };
    let wanted = |figure: Figure| args.figure.is_empty() || args.figure.contains(&figure);
    let early = args.learn_s as f64 * EARLY;
    let lessons = bench.race.lessons(args.learn_from)?;
    // A drafter that came with the model has no early days to show.
    let is_new = !bench.race.solo.has_drafter() && !lessons.is_empty();
    let mut levels = None;
    if !lessons.is_empty() {
        output::note(&format!("the drafter learns from {} answers for {} s", lessons.len(), args.learn_s));
        bench.race.solo.train(&lessons, early)?;
        if is_new && wanted(Figure::Levels) {
            levels = Some(bench.levels()?);
        }
        bench.race.solo.train(&[], args.learn_s as f64 - early)?;
    }
    bench.race.needs_drafter(&args.model)?;
    if wanted(Figure::Levels) {
        let late = bench.levels()?;
        bench.save(&levels_drawn(levels.as_deref(), &late)?)?;
    }
    for figure in [Figure::Grid, Figure::Width, Figure::Batch, Figure::Running].into_iter().filter(|f| wanted(*f)) {
        let drawn = match figure {
            Figure::Levels => continue,
            Figure::Grid => bench.grid()?,
            Figure::Width => bench.width()?,
            Figure::Batch => bench.batch()?,
            Figure::Running => bench.running()?,
        };
        bench.save(&drawn)?;
    }
    let (compared, differences) = (bench.race.compared, bench.race.differences);
    output::note(&format!("{compared} answers compared with plain decoding, {differences} differ"));
    output::measured(args.json, &Measured { compared, differences, ..bench.measured }, "", differences == 0)
}

impl Bench<'_> {
    fn save(&mut self, drawn: &Drawn) -> Result<()> {
        for (ending, text) in [("csv", &drawn.csv), ("svg", &drawn.svg)] {
            let path = self.args.to.join(format!("{}.{ending}", drawn.name));
            std::fs::write(&path, text).map_err(|source| Failure::Unwritable { path: path.clone(), source })?;
            output::note(&format!("wrote {}", path.display()));
        }
        self.measured.figures.insert(drawn.name, rows(&drawn.csv));
        Ok(())
    }

    fn tree(&self, depth: usize, width: usize, budget: usize) -> Way {
        (String::new(), Controller::Fixed(Strategy::tree(self.learned, depth, width, budget)))
    }

    /// The narrowest tree of so many levels that has so many tokens.
    fn tree_of(&self, depth: usize, budget: usize) -> Way {
        self.tree(depth, WIDTH.max(budget.div_ceil(depth)), budget)
    }

    /// Accept length, and speed against plain decoding, of each strategy.
    fn compared(&mut self, ways: &[Way], requests: usize, slots: usize) -> Result<Vec<(f64, f64)>> {
        let all: Vec<Way> = std::iter::once(Race::plain()).chain(ways.iter().cloned()).collect();
        let decoded = self.race.run(&all, requests, slots, self.race.tokens_max)?;
        let plain = decoded[0].1.rate();
        Ok(decoded[1..].iter().map(|(_, d)| (d.accept_length(), d.rate() / plain)).collect())
    }

    /// Chance of each level's guesses where those above were right, of chains.
    fn levels(&mut self) -> Result<Vec<f64>> {
        if !self.race.solo.has_drafter() {
            return Ok(Vec::new());
        }
        output::note("chances of the drafter's guesses by level");
        let chain = self.tree(LEVELS, 1, LEVELS);
        let decoded = self.race.run(&[Race::plain(), chain], self.args.answers, SLOTS, self.race.tokens_max)?;
        let known = decoded[1].1.levels.iter().take_while(|(guessed, _)| *guessed >= GUESSES_MIN);
        Ok(known.map(|(guessed, right)| *right as f64 / *guessed as f64).collect())
    }

    fn grid(&mut self) -> Result<Drawn> {
        output::note("draft depth by tokens to verify, one request at a time");
        let shapes: Vec<[usize; 2]> = DEPTHS.iter().flat_map(|d| BUDGETS.map(|b| [*d, b])).collect();
        let ways: Vec<Way> = shapes.iter().map(|[depth, budget]| self.tree_of(*depth, *budget)).collect();
        let measured = self.compared(&ways, self.args.answers, 1)?;
        let title = "Speed against plain decoding, and (accept length): one request";
        Ok(Drawn {
            name: "grid",
            csv: table("depth,budget,accept_length,ratio", shapes.iter().zip(&measured)),
            svg: heat(title, ("tokens to verify", &BUDGETS), ("draft depth", &DEPTHS), &measured)?,
        })
    }

    fn width(&mut self) -> Result<Drawn> {
        output::note("tokens looked at on each level, one request at a time");
        let ways: Vec<Way> = WIDTHS.iter().map(|width| self.tree(DEPTH, *width, BUDGET)).collect();
        let measured = self.compared(&ways, self.args.answers, 1)?;
        let line = |name: &str, f: fn(&(f64, f64)) -> f64| Line {
            name: name.into(),
            points: WIDTHS.iter().zip(&measured).map(|(width, m)| ((*width as f64).log2(), f(m))).collect(),
        };
        let title = format!("Width of drafts: depth {DEPTH}, {BUDGET} tokens to verify, one request");
        let chart = Lines {
            title: &title,
            x: "tokens looked at on each level, as a power of two",
            y: "accept length; times plain speed",
            lines: &[line("accept length", |m| m.0), line("speed", |m| m.1)],
            marks: &[],
        };
        let shapes: Vec<[usize; 1]> = WIDTHS.map(|width| [width]).to_vec();
        let csv = table("width,accept_length,ratio", shapes.iter().zip(&measured));
        Ok(Drawn { name: "width", csv, svg: chart.draw()? })
    }

    fn batch(&mut self) -> Result<Drawn> {
        output::note("tokens to verify by batch size");
        let ways: Vec<Way> = BUDGETS.iter().map(|budget| self.tree_of(DEPTH, *budget)).collect();
        let (mut shapes, mut measured) = (Vec::new(), Vec::new());
        for batch in BATCHES {
            // As many answers for each request of the batch, so that it is full most of the time.
            let requests = self.args.answers.max(3 * batch);
            measured.extend(self.compared(&ways, requests, batch)?);
            shapes.extend(BUDGETS.map(|budget| [batch, budget]));
        }
        let all = Strategy::tree(self.learned, DEPTH, WIDTH, BUDGET).drafted_max();
        let title =
            format!("Speed against plain decoding, and (accept length): depth {DEPTH}, at most {all} drafted together");
        Ok(Drawn {
            name: "batch",
            csv: table("batch,budget,accept_length,ratio", shapes.iter().zip(&measured)),
            svg: heat(&title, ("tokens to verify", &BUDGETS), ("requests together", &BATCHES), &measured)?,
        })
    }

    fn running(&mut self) -> Result<Drawn> {
        output::note(&format!("running requests over time, {} together", self.args.requests));
        let requests = self.args.requests;
        let ways = [Race::plain(), self.race.adaptive()];
        let decoded = self.race.run(&ways, requests, requests, self.race.tokens_max)?;
        let mut csv = String::from("way,seconds,running,drafted\n");
        for (name, d) in &decoded {
            d.cycles.iter().for_each(|c| csv += &format!("{name},{:.6},{},{}\n", c.at_s, c.requests, c.drafted.0));
        }
        let line = |(name, d): &(String, Decoded)| Line {
            name: format!("{name}: {:.2} s", d.seconds),
            points: d.cycles.iter().map(|c| (c.at_s - c.seconds, c.requests as f64)).collect(),
        };
        let switched = switch(&decoded[1].1);
        let title = format!("A rollout of {requests} requests on one device");
        let chart = Lines {
            title: &title,
            x: "seconds",
            y: "running requests",
            lines: &[line(&decoded[0]), line(&decoded[1])],
            marks: &switched.map(|at_s| (at_s, "drafting begins")).into_iter().collect::<Vec<_>>(),
        };
        Ok(Drawn { name: "running", csv, svg: chart.draw()? })
    }
}

/// When most cycles begin to draft: the time of the cycle before which fewer than half drafted and after which more did, so
/// that the controller's trials do not count.
fn switch(decoded: &Decoded) -> Option<f64> {
    let drafts: Vec<bool> = decoded.cycles.iter().map(|c| c.drafted.0 > 0).collect();
    let right = |at: usize| {
        drafts[..at].iter().filter(|drafts| !**drafts).count() + drafts[at..].iter().filter(|drafts| **drafts).count()
    };
    let at = (0..=drafts.len()).max_by_key(|at| (right(*at), std::cmp::Reverse(*at)))?;
    decoded.cycles.get(at).map(|c| c.at_s - c.seconds)
}

fn table<'a, const N: usize>(head: &str, rows: impl Iterator<Item = (&'a [usize; N], &'a (f64, f64))>) -> String {
    let mut text = format!("{head}\n");
    for (shape, (accept_length, ratio)) in rows {
        shape.iter().for_each(|number| text += &format!("{number},"));
        text += &format!("{accept_length:.3},{ratio:.3}\n");
    }
    text
}

/// Row by row.
fn heat(
    title: &str,
    (x, columns): (&str, &[usize]),
    (y, rows): (&str, &[usize]),
    measured: &[(f64, f64)],
) -> Result<String> {
    let cells = measured.iter().map(|(accept, ratio)| (*ratio, format!("{ratio:.2}x ({accept:.2})"))).collect();
    Heat { title, x, y, columns, rows, cells }.draw()
}

fn levels_drawn(early: Option<&[f64]>, late: &[f64]) -> Result<Drawn> {
    let mut csv = String::from("training,level,chance\n");
    let lines: Vec<Line> = early
        .map(|chances| ("early", chances))
        .into_iter()
        .chain([("late", late)])
        .map(|(name, chances)| {
            let points: Vec<(f64, f64)> =
                chances.iter().enumerate().map(|(level, chance)| (level as f64 + 1.0, *chance)).collect();
            points.iter().for_each(|(level, chance)| csv += &format!("{name},{level},{chance:.4}\n"));
            Line { name: format!("{name} in training"), points }
        })
        .collect();
    let chart = Lines {
        title: "Right guesses of the drafter, where those above were right",
        x: "level",
        y: "chance",
        lines: &lines,
        marks: &[],
    };
    Ok(Drawn { name: "levels", csv, svg: chart.draw()? })
}
