//! What is wrong with a workflow file, where, and what to do about it.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

/// One mistake in a workflow file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Kind of mistake, for instance `workflow::unknown_field`.
    pub code: &'static str,
    /// Where in the workflow, for instance `steps[1].group`; empty for the file as a whole.
    pub path: String,
    /// What is wrong, lower case, one line.
    pub message: String,
    /// Line of the first character to underline, from 1.
    pub line: usize,
    /// Column of the first character to underline, from 1, in characters.
    pub column: usize,
    /// Byte offset of the first character to underline.
    pub offset: usize,
    /// Bytes to underline.
    pub length: usize,
    /// What to do about it.
    pub help: Option<String>,
}

impl Problem {
    pub(crate) fn new(text: &str, code: &'static str, path: String, span: Range<usize>, message: String) -> Self {
        let (line, column) = position(text, span.start);
        Self { code, path, message, line, column, offset: span.start, length: span.len(), help: None }
    }

    pub(crate) fn with_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    /// The problem as a few lines of plain text: message, source line with an underline, help.
    #[must_use]
    pub fn render(&self, text: &str) -> String {
        let line = text.lines().nth(self.line.saturating_sub(1)).unwrap_or_default();
        let (shown, before) = window(line, self.column.saturating_sub(1));
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        let marks = "^"
            .repeat(self.underlined(text).clamp(1, (shown.chars().count() - before.min(shown.chars().count())).max(1)));
        let mut page = format!("{self}\n{margin} |\n{number} | {shown}\n{margin} | {}{marks}\n", " ".repeat(before));
        if let Some(help) = &self.help {
            page.push_str(&format!("{margin} = help: {help}\n"));
        }
        page
    }

    fn underlined(&self, text: &str) -> usize {
        let end = self.offset.saturating_add(self.length);
        text.get(self.offset..end).map_or(1, |part| part.lines().next().unwrap_or_default().chars().count())
    }
}

/// At most 100 characters of a line around a column, without control characters, and the column in them.
fn window(line: &str, column: usize) -> (String, usize) {
    let first = if column > 80 { column - 40 } else { 0 };
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    (line.chars().skip(first).take(100).map(plain).collect(), column - first)
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {}: ", self.line, self.column, self.code)?;
        if self.path.is_empty() { write!(f, "{}", self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for Problem {}

/// Line and column of a byte offset, both from 1; the column counts characters.
pub(crate) fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(offset)];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Byte offset of a line and a column, both from 1; the end of the text if there is no such place.
pub(crate) fn offset(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let rest = &text[start.min(text.len())..];
    start + rest.char_indices().nth(column.saturating_sub(1)).map_or(rest.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_offsets_are_inverse() {
        let text = "ab\nçd\n\nx";
        for (at, _) in text.char_indices() {
            let (line, column) = position(text, at);
            assert_eq!(offset(text, line, column), at);
        }
        assert_eq!(position(text, 5), (2, 2));
        assert_eq!(offset(text, 9, 9), text.len());
    }
}
