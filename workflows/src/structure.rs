//! Text → values of the file format: every field that is unknown, missing or of the wrong kind.
//!
//! Serde stops at the first mistake. After a mistake in one field the field is blanked out in a copy of the text, so
//! that nothing moves, and reading starts again: the user sees all mistakes at once.

use std::ops::Range;

use ron::error::{Error, SpannedError};
use ron::extensions::Extensions;

use crate::problem::{self, Problem};
use crate::spec::Workflow;
use crate::tree::{Tree, parent, short};
use mistake::{Mistake, On};

mod mistake;

/// Mistakes reported at once, at most.
const MISTAKES_MAX: usize = 20;

/// Reads the values of a text whose shape is `tree`.
pub(crate) fn read(text: &str, tree: &Tree) -> Result<Workflow, Vec<Problem>> {
    let mut copy = plain(text, tree);
    let mut reader = Reader { text, tree, blanked: Vec::new(), meant: Vec::new(), problems: Vec::new() };
    loop {
        match options().from_str::<Workflow>(&copy) {
            Ok(workflow) if reader.problems.is_empty() => return Ok(workflow),
            Ok(_) => return Err(reader.problems),
            Err(error) => {
                let blank = reader.mistake(&copy, &error);
                match blank {
                    Some(span) if reader.problems.len() < MISTAKES_MAX => blank_out(&mut copy, span),
                    _ => return Err(reader.problems),
                }
            }
        }
    }
}

fn options() -> ron::Options {
    let extensions = Extensions::IMPLICIT_SOME | Extensions::UNWRAP_VARIANT_NEWTYPES;
    ron::Options::default().with_default_extension(extensions)
}

/// The text without byte order mark and superfluous brackets, each replaced by as many spaces.
fn plain(text: &str, tree: &Tree) -> String {
    let mut copy = text.to_owned();
    if text.starts_with('\u{feff}') {
        copy.replace_range(..'\u{feff}'.len_utf8(), "   ");
    }
    for at in &tree.superfluous {
        copy.replace_range(*at..at + 1, " ");
    }
    copy
}

/// Replaces a field, and the comma after it, by spaces.
fn blank_out(copy: &mut String, span: Range<usize>) {
    let end = span.end;
    let spaces: String =
        copy[span.clone()].chars().map(|c| if c == '\n' { "\n".into() } else { " ".repeat(c.len_utf8()) }).collect();
    copy.replace_range(span, &spaces);
    if let Some(comma) = comma_after(copy, end) {
        copy.replace_range(comma..comma + 1, " ");
    }
}

/// The comma after a value; there may be comments between.
fn comma_after(copy: &str, end: usize) -> Option<usize> {
    let mut at = end;
    loop {
        let rest = &copy[at..];
        at += rest.len() - rest.trim_start().len();
        at = match copy.get(at..at + 2) {
            Some("//") => at + copy[at..].find('\n')?,
            Some("/*") => at + copy[at..].find("*/")? + 2,
            _ => return copy[at..].starts_with(',').then_some(at),
        };
    }
}

struct Reader<'t> {
    text: &'t str,
    tree: &'t Tree,
    /// Values that were blanked out.
    blanked: Vec<usize>,
    /// Paths of fields that a misspelt one was meant to be.
    meant: Vec<String>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    /// Notes what RON found; returns what to blank out before reading on, if that is possible.
    fn mistake(&mut self, copy: &str, error: &SpannedError) -> Option<Range<usize>> {
        let start = problem::offset(copy, error.span.start.line, error.span.start.col);
        let end = problem::offset(copy, error.span.end.line, error.span.end.col);
        if let Error::MissingStructField { field, outer } = &error.code {
            let node = self.tree.closing_at(end).unwrap_or_default();
            self.missing(node, field, outer.as_deref().unwrap_or_default());
            return self.removable(node);
        }
        let node = self.place(&error.code, start, end);
        self.describe(node, &error.code);
        self.removable(node)
    }

    fn describe(&mut self, node: usize, code: &Error) {
        let path = self.tree.path(self.text, node);
        let value = short(&self.text[self.tree.underline(self.text, node)]);
        if let Some(field) = mistake::meant(code) {
            self.meant.push(format!("{}.{field}", parent(&path)));
        }
        let Mistake { code, on, message, help } = mistake::mistake(code, &path, value);
        let span = match on {
            On::Value => self.tree.underline(self.text, node),
            On::Name => self.tree.name(self.text, node),
            On::Key => self.tree.key(node).unwrap_or_else(|| self.tree.name(self.text, node)),
        };
        self.problems.push(Problem::new(self.text, code, path, span, message).with_help(Some(help)));
    }

    /// The innermost field or item around a value: it can be left out.
    fn removable(&mut self, node: usize) -> Option<Range<usize>> {
        let at = self.tree.removable(node)?;
        if self.blanked.contains(&at) {
            return None;
        }
        self.blanked.push(at);
        Some(self.tree.whole(at))
    }

    /// Fields that must be there; what was blanked out before is no news.
    fn missing(&mut self, node: usize, field: &str, outer: &str) {
        let path = self.tree.path(self.text, node);
        let full = |field: &str| if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
        let is_meant = |field: &str| self.meant.contains(&format!("{path}.{field}"));
        let is_absent = |field: &&str| self.tree.child(self.text, node, field).is_none() && !is_meant(field);
        let mut fields: Vec<&str> = mistake::required(outer).iter().copied().filter(is_absent).collect();
        if fields.is_empty() && is_absent(&field) {
            fields.push(field);
        }
        let Some(first) = fields.first() else { return };
        let examples: Vec<_> = fields.iter().map(|field| mistake::example(&path, field)).collect();
        let verb = if fields.len() == 1 { "is" } else { "are" };
        let message = format!("{} {verb} missing", mistake::list(&fields));
        let span = self.tree.name(self.text, node);
        let problem = Problem::new(self.text, "workflow::missing_field", full(first), span, message);
        self.problems.push(problem.with_help(Some(format!("add `{}`", examples.join(", ")))));
    }

    /// The value that RON stumbled over: it stops before it, in it, or right after it.
    fn place(&self, code: &Error, start: usize, end: usize) -> usize {
        let (before, after) = (self.tree.at(start), self.tree.at(end));
        let is_entered = |node: &usize| self.tree.is_leaf(*node) || self.tree.starts_at(*node, end);
        let found = match code {
            Error::NoSuchStructField { .. }
            | Error::DuplicateStructField { .. }
            | Error::NoSuchEnumVariant { .. }
            | Error::ExpectedDifferentStructName { .. }
            | Error::IntegerOutOfBounds
            | Error::InvalidEscape(_) => before,
            Error::ExpectedStructLikeEnd => after.and_then(|node| self.tree.parent(node)),
            Error::ExpectedStructLike => after.filter(is_entered).or_else(|| self.tree.ending_before(end)),
            _ => after,
        };
        found.or(after).or(before).unwrap_or_default()
    }
}
