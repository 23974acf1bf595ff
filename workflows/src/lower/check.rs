//! Collects what is wrong, each with its place in the file.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use crate::problem::Problem;
use crate::tree::{Tree, short};

/// Problems reported at once, at most.
const PROBLEMS_MAX: usize = 50;

/// The file, and what is wrong with it so far.
pub(super) struct Check<'t> {
    text: &'t str,
    tree: &'t Tree,
    problems: Vec<Problem>,
}

impl<'t> Check<'t> {
    pub(super) fn new(text: &'t str, tree: &'t Tree) -> Self {
        Self { text, tree, problems: Vec::new() }
    }

    /// `value` if nothing was wrong.
    pub(super) fn finish<T>(self, value: T) -> Result<T, Vec<Problem>> {
        if self.problems.is_empty() { Ok(value) } else { Err(self.problems) }
    }

    /// Notes a problem with the value at a path.
    pub(super) fn wrong(
        &mut self,
        code: &'static str,
        path: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if self.is_open() {
            let span = self.tree.span(self.text, path);
            self.wrong_at(code, path, span, message.into(), help.into());
        }
    }

    /// Notes a problem with a part of the text at a path, or with all of it if the part is not spelled out.
    pub(super) fn wrong_part(&mut self, code: &'static str, path: &str, part: &str, message: String, help: String) {
        if self.is_open() {
            let span = self.tree.span(self.text, path);
            let inside = self.text[span.clone()].find(part).map(|at| span.start + at..span.start + at + part.len());
            self.wrong_at(code, path, inside.unwrap_or(span), message, help);
        }
    }

    fn wrong_at(&mut self, code: &'static str, path: &str, span: Range<usize>, message: String, help: String) {
        let problem = Problem::new(self.text, code, path.to_owned(), span, message);
        self.problems.push(problem.with_help(Some(help)));
    }

    fn is_open(&self) -> bool {
        self.problems.len() < PROBLEMS_MAX
    }

    /// Whether the file spells out a value, so that a problem can point to it.
    pub(super) fn is_given(&self, path: &str) -> bool {
        self.tree.find(self.text, path).is_some()
    }

    /// A number as the file spells it.
    fn spelled(&self, path: &str) -> Option<&'t str> {
        let node = self.tree.find(self.text, path).filter(|node| self.tree.is_leaf(*node))?;
        Some(short(&self.text[self.tree.underline(self.text, node)]))
    }

    /// Notes a value outside its range. Returns whether it is in it.
    pub(super) fn range(&mut self, path: &str, value: impl Display, is_good: bool, wanted: &str, help: &str) -> bool {
        if !is_good {
            let spelled = self.spelled(path).map_or_else(|| value.to_string(), str::to_owned);
            let message = format!("`{}` must be {wanted}, not {spelled}", field(path));
            self.wrong("workflow::out_of_range", path, message, help);
        }
        is_good
    }

    /// A whole number from `min` to `max`.
    pub(super) fn count(&mut self, path: &str, value: usize, min: usize, max: usize) -> bool {
        let (wanted, near) = if value < min { ("at least", min) } else { ("at most", max) };
        let help = format!("write `{}: {near}`{}", field(path), if value < min { " or more" } else { " or less" });
        self.range(path, value, (min..=max).contains(&value), &format!("{wanted} {near}"), &help)
    }

    /// A number above 0.
    pub(super) fn positive(&mut self, path: &str, value: f64) -> bool {
        let help = format!("write a number such as `{}: 1.0`", field(path));
        self.range(path, value, value > 0.0 && value.is_finite(), "a number above 0", &help)
    }

    /// One that weights survive: a step of `AdamW` moves each of them by about as much.
    pub(super) fn learning_rate(&mut self, path: &str, value: f64) {
        let is_good = value > 0.0 && value <= 1.0;
        self.range(path, value, is_good, "a number above 0 and at most 1", "write a number such as `lr: 0.001`");
    }

    /// A number from 0 up.
    pub(super) fn at_least_zero(&mut self, path: &str, value: f64) -> bool {
        let opposite = self.spelled(path).and_then(|word| word.strip_prefix('-')).filter(|_| value > -100.0);
        let help = format!("write `{}: {}`", field(path), opposite.unwrap_or("1.0"));
        self.range(path, value, value >= 0.0 && value.is_finite(), "a number from 0 up", &help)
    }

    /// A number from 0 to 1.
    pub(super) fn probability(&mut self, path: &str, value: f64) -> bool {
        let near = if (2.0..=100.0).contains(&value) { value / 100.0 } else { 0.1 };
        let help = format!("write a share such as `{}: {near}`", field(path));
        self.range(path, value, (0.0..=1.0).contains(&value), "from 0 to 1", &help)
    }

    /// A path that is not empty.
    pub(super) fn path(&mut self, path: &str, value: &Path) -> bool {
        let is_good = !value.as_os_str().is_empty();
        if !is_good {
            self.wrong("workflow::path", path, "the path is empty", "write the path of a file or folder");
        }
        is_good
    }
}

/// `steps[1].group` → `group`, `betas.0` → `betas`.
fn field(path: &str) -> &str {
    let name = |part: &&str| part.starts_with(|c: char| c.is_ascii_alphabetic());
    path.rsplit(['.', '[']).find(name).unwrap_or(path)
}
