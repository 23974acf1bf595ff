//! Choices of a run's controller as JSON lines, and the same choices made again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use actors::Progress;
use serde::Serialize;
use state::plan::Strategy;
use state::speculation::Decision;
use state::speculation::controller::{batch_sizes, bucket};
use state::speculation::decision::Again;

use crate::commands::Result;
use crate::failure::Failure;
use crate::output;
use crate::show::together;

/// A file that decisions are added to, as they are made.
pub(crate) struct Decisions {
    path: PathBuf,
    /// Gone once it could not be written.
    file: Mutex<Option<BufWriter<File>>>,
}

impl Decisions {
    /// Adds to the file, or begins it. What a run that was killed has left ends in the middle of a line.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let unwritable = |source| Failure::Unwritable { path: path.into(), source };
        let mut file = File::options().create(true).read(true).append(true).open(path).map_err(unwritable)?;
        let mut last = [b'\n'];
        if file.metadata().map_err(unwritable)?.len() > 0 {
            file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).map_err(unwritable)?;
        }
        if last != [b'\n'] {
            file.write_all(b"\n").map_err(unwritable)?;
        }
        Ok(Self { path: path.into(), file: Mutex::new(Some(BufWriter::new(file))) })
    }

    /// Takes in what a run tells. What is written is whole lines, at the latest once a step is done.
    pub(crate) fn tell(&self, progress: &Progress) {
        match progress {
            Progress::Decided(decision) => {
                // Nothing in it could fail.
                let line = serde_json::to_string(decision).unwrap_or_default() + "\n";
                let is_first = matches!(**decision, Decision::Began(_));
                self.write(|file| {
                    file.write_all(line.as_bytes())?;
                    if is_first { file.flush() } else { Ok(()) }
                });
            }
            Progress::StepDone(_) => self.flush(),
            _ => {}
        }
    }

    /// Writes what was told so far.
    pub(crate) fn flush(&self) {
        self.write(BufWriter::flush);
    }

    fn write(&self, what: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = file.as_mut().map(what) {
            // A training goes on when nobody can look at it.
            output::note(&format!("warning: decisions are not written any more to {}: {error}", self.path.display()));
            *file = None;
        }
    }
}

/// Keys of the JSON form.
#[derive(Debug, Default, Serialize)]
struct Replayed {
    /// Times that a controller went on from what an earlier one had left.
    sessions: usize,
    /// Choices, and those that were other ones when they were made again.
    choices: usize,
    differences: usize,
    /// Lines that end in the middle, where a session was killed.
    cut: usize,
    /// By requests decoded together and by how they were drafted for.
    ways: Vec<Way>,
}

/// What came of one way to draft at about one batch size.
#[derive(Debug, Serialize)]
struct Way {
    batch_min: usize,
    /// None: plain decoding.
    strategy: Option<Strategy>,
    cycles: usize,
    seconds: f64,
    tokens: u64,
    tokens_per_s: f64,
    /// Times as many as plain decoding had there.
    ratio: Option<f64>,
}

/// Has the controller of a run choose again.
pub(crate) fn decisions(path: &Path, json: bool) -> Result<ExitCode> {
    let file = File::open(path).map_err(Failure::file(path))?;
    let replayed = Replayed::of(path, BufReader::new(file))?;
    output::measured(json, &replayed, &replayed.text(), replayed.differences == 0)
}

impl Replayed {
    fn of(path: &Path, lines: impl BufRead) -> Result<Self> {
        let (mut replayed, mut again, mut sums) = (Self::default(), Again::default(), Vec::new());
        let mut lines = lines.lines().enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            let line = line.map_err(Failure::file(path))?;
            let decision: Decision = match serde_json::from_str(&line) {
                Ok(decision) => decision,
                // A session that was killed has left the half of one.
                Err(_) if lines.peek().map_or(number > 0, |(_, next)| begins(next)) => {
                    replayed.cut += 1;
                    continue;
                }
                Err(source) => return Err(Failure::Decision { path: path.into(), line: number + 1, source }),
            };
            let chosen = again.take(&decision);
            match &decision {
                Decision::Began(_) => replayed.sessions += 1,
                Decision::Chose { strategy, .. } => {
                    replayed.choices += 1;
                    replayed.differences += usize::from(chosen != Some(*strategy));
                }
                Decision::Measured { batch, strategy, measured } => add(&mut sums, bucket(*batch), *strategy, measured),
                Decision::Probed(_) | Decision::Examined { .. } => {}
            }
        }
        if replayed.sessions == 0 {
            return Err(Failure::NoDecisions { path: path.into() });
        }
        replayed.ways = ways(sums);
        Ok(replayed)
    }

    fn text(&self) -> String {
        let sessions = output::count(self.sessions as u64, "session");
        let choices = output::count(self.choices as u64, "choice");
        let mut text = format!("\n{choices} in {sessions}, made again: {} differ\n", self.differences);
        if self.cut > 0 {
            text += &format!("  {} cut where a session was killed\n", output::count(self.cut as u64, "line"));
        }
        text += "\n  of cycles that prompts took no part in; drafters counted from 0, as the workflow lists them:\n    together  drafter depth width nodes suffix    cycles   of the time   tokens/s   ratio\n";
        let total_s: f64 = self.ways.iter().map(|way| way.seconds).sum();
        for way in &self.ways {
            let sizes = together(way.batch_min);
            let how = way.strategy.map_or_else(
                || format!("{:<32}", "plain"),
                |s| format!("{:>7} {:>5} {:>5} {:>5} {:>6}", s.drafter, s.depth, s.width, s.budget, s.suffix),
            );
            let ratio = way.ratio.map_or(String::new(), |ratio| format!("{ratio:>6.2}x"));
            let share = 100.0 * way.seconds / total_s.max(1e-9);
            text += &format!(
                "  {sizes:>10}  {how}  {:>8}  {share:>10.1} %  {:>9.1}  {ratio}\n",
                way.cycles, way.tokens_per_s
            );
        }
        text
    }
}

/// Whether a session begins with this line.
fn begins(line: &std::io::Result<String>) -> bool {
    line.as_ref().is_ok_and(|line| line.starts_with("{\"Began\""))
}

type Sum = ((usize, Option<Strategy>), (usize, f64, u64));

fn add(sums: &mut Vec<Sum>, bucket: usize, strategy: Option<Strategy>, measured: &state::speculation::Measured) {
    let of = (bucket, strategy);
    let at = sums.iter().position(|(other, _)| *other == of).unwrap_or_else(|| {
        sums.push((of, (0, 0.0, 0)));
        sums.len() - 1
    });
    let (cycles, seconds, tokens) = &mut sums[at].1;
    (*cycles, *seconds, *tokens) = (*cycles + 1, *seconds + measured.seconds, *tokens + measured.tokens);
}

/// By batch size, plain decoding first, then what took the most time.
fn ways(mut sums: Vec<Sum>) -> Vec<Way> {
    sums.sort_by(|((a, one), x), ((b, other), y)| {
        a.cmp(b).then(one.is_some().cmp(&other.is_some())).then(y.1.total_cmp(&x.1))
    });
    let rate = |(_, seconds, tokens): (usize, f64, u64)| tokens as f64 / seconds.max(1e-9);
    let plain: BTreeMap<usize, f64> =
        sums.iter().filter(|((_, way), _)| way.is_none()).map(|((bucket, _), sum)| (*bucket, rate(*sum))).collect();
    let way = |((bucket, strategy), sum): Sum| {
        let (cycles, seconds, tokens) = sum;
        let ratio = plain.get(&bucket).map(|plain| rate(sum) / plain);
        Way { batch_min: batch_sizes(bucket).0, strategy, cycles, seconds, tokens, tokens_per_s: rate(sum), ratio }
    };
    sums.into_iter().map(way).collect()
}

#[cfg(test)]
mod tests {
    use state::plan;
    use state::speculation::{Controller, Measured};

    use super::*;

    /// Lines of a controller that two strategies are given to.
    fn recorded() -> Vec<String> {
        let strategies = vec![Strategy::chain(0, 2), Strategy::tree(0, 3, 2, 6)];
        let mut controller = Controller::new(&plan::Controller::Bandit { strategies, epsilon: 0.3, window: 16 });
        let mut decisions = vec![Decision::Began(Box::new(controller.clone()))];
        let key = kernels::NoiseKey::new(5, 0, 0, 0, 0);
        for i in 0..400_u32 {
            let (batch, draws) = (1 + i as usize / 100, [key.uniform(i, 0), key.uniform(i, 1)]);
            let strategy = controller.choose(batch, draws, &|_| true);
            decisions.push(Decision::Chose { batch, draws, ready: vec![true], strategy });
            let tokens = batch as u64 * strategy.map_or(1, |s| if s.width > 1 { 3 } else { 2 });
            let seconds = 1e-3 * (1.0 + key.uniform(i, 2)) + 1e-4;
            let (catch_up_s, draft_s, requests, rows) = (0.0, 1e-4, batch, batch);
            let measured = Measured { tokens, promised: None, requests, rows, seconds, catch_up_s, draft_s };
            controller.observe(batch, strategy, measured);
            decisions.push(Decision::Measured { batch, strategy, measured });
        }
        decisions.iter().map(|decision| serde_json::to_string(decision).unwrap()).collect()
    }

    fn replayed(lines: &[String]) -> Result<Replayed> {
        Replayed::of(Path::new("decisions.jsonl"), lines.join("\n").as_bytes())
    }

    #[test]
    fn what_was_chosen_is_chosen_again() {
        let mut lines = recorded();
        let all = replayed(&lines).unwrap();
        assert_eq!((all.sessions, all.choices, all.differences, all.cut), (1, 400, 0, 0));
        assert_eq!(all.ways.iter().map(|way| way.cycles).sum::<usize>(), 400);
        assert!(all.ways.iter().any(|way| way.strategy.is_some_and(|s| s.width > 1) && way.ratio > Some(2.0)));
        assert!(all.text().contains("400 choices in 1 session, made again: 0 differ"), "{}", all.text());
        // From here on another session would have known nothing.
        lines.insert(401, lines[0].clone());
        let other = replayed(&lines).unwrap();
        assert!(other.sessions == 2 && other.differences > 0, "{other:?}");
    }

    #[test]
    fn a_line_that_is_none_is_named_and_the_last_one_may_be_cut() {
        let mut lines = recorded();
        let last = lines.len() - 1;
        lines[last].truncate(20);
        assert_eq!(replayed(&lines).unwrap().cut, 1);
        let (folder, all) = (tempfile::tempdir().unwrap(), lines.join("\n"));
        let path = folder.path().join("decisions.jsonl");
        std::fs::write(&path, &all).unwrap();
        Decisions::open(&path).unwrap().tell(&Progress::Decided(Box::new(serde_json::from_str(&lines[0]).unwrap())));
        let again = Replayed::of(&path, BufReader::new(File::open(&path).unwrap())).unwrap();
        assert_eq!((again.sessions, again.cut), (2, 1), "another session goes on behind it");
        lines[7] = "{}".into();
        let error = replayed(&lines).unwrap_err().to_string();
        assert!(error.contains("line 8") && error.contains("--decisions"), "{error}");
        assert!(replayed(&["no".to_owned()]).is_err() && replayed(&[]).is_err(), "nothing of it is a decision");
        let cut = ["{\"Began".to_owned(), recorded()[0].clone()];
        assert_eq!(replayed(&cut).unwrap().cut, 1, "it was killed as it began");
    }
}
