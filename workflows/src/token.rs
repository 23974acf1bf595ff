//! Words, text and brackets of a workflow file, with their places.
//!
//! RON's own parser decides what a value means; this scanner only knows where things are, and says more kindly
//! what is wrong with the punctuation.

use std::ops::Range;

/// A piece of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) span: Range<usize>,
}

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Open(char),
    Close(char),
    Comma,
    Colon,
    /// A name or a number.
    Word,
    /// Text in quotes.
    Text,
}

/// A mistake in the punctuation: nothing after it can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) span: Range<usize>,
    pub(crate) message: String,
    pub(crate) help: Option<String>,
}

impl Fault {
    pub(crate) fn new(span: Range<usize>, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { span, message: message.into(), help: Some(help.into()) }
    }
}

/// All tokens of a text.
pub(crate) fn tokens(text: &str) -> Result<Vec<Token>, Fault> {
    let mut tokens = Vec::new();
    scan(text, &mut tokens).map_err(|fault| run_on(text, &tokens).unwrap_or(fault))?;
    Ok(tokens)
}

fn scan(text: &str, tokens: &mut Vec<Token>) -> Result<(), Fault> {
    let mut at = blank_prefix(text);
    while let Some(c) = text[at..].chars().next() {
        let (kind, end) = match c {
            ' ' | '\t' | '\r' | '\n' => (None, at + 1),
            '/' => (None, comment_end(text, at)?),
            '(' | '[' => (Some(Kind::Open(c)), at + 1),
            ')' | ']' => (Some(Kind::Close(c)), at + 1),
            ',' => (Some(Kind::Comma), at + 1),
            ':' => (Some(Kind::Colon), at + 1),
            '"' => (Some(Kind::Text), text_end(text, at)?),
            'r' if is_raw(&text[at..]) => (Some(Kind::Text), raw_end(text, at)?),
            _ if is_word(c) => (Some(Kind::Word), word_end(text, at)?),
            _ => return Err(stray(c, at)),
        };
        tokens.extend(kind.map(|kind| Token { kind, span: at..end }));
        at = end;
    }
    Ok(())
}

/// A text that seems to have lost its closing quotes: it goes on after what looks like the end of a field.
pub(crate) fn run_on(text: &str, tokens: &[Token]) -> Option<Fault> {
    let line = |token: &Token| token.span.start..line_end(text, token.span.start);
    let is_run_on = |token: &&Token| {
        let first = text[line(token)].trim_end();
        token.kind == Kind::Text
            && token.span.end > line(token).end
            && first.starts_with('"')
            && first.ends_with([',', ')', ']'])
    };
    let token = tokens.iter().find(is_run_on)?;
    Some(Fault::new(line(token), "this text goes on over several lines", "its closing `\"` is probably missing"))
}

/// Bytes of the byte order mark and of RON's `#![enable(…)]` line at the start.
fn blank_prefix(text: &str) -> usize {
    let mark = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    if !text[mark..].starts_with("#![") {
        return mark;
    }
    text[mark..].find(']').map_or(mark, |at| mark + at + 1)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.')
}

fn word_end(text: &str, at: usize) -> Result<usize, Fault> {
    let end = text[at..].find(|c| !is_word(c)).map_or(text.len(), |length| at + length);
    if end - at > 64 {
        return Err(Fault::new(
            at..end,
            format!("a word of {} characters", end - at),
            "no name or number is this long",
        ));
    }
    Ok(end)
}

fn comment_end(text: &str, at: usize) -> Result<usize, Fault> {
    match text.as_bytes().get(at + 1) {
        Some(b'/') => Ok(text[at..].find('\n').map_or(text.len(), |length| at + length)),
        Some(b'*') => block_end(text, at),
        _ => Err(stray('/', at)),
    }
}

/// End of a block comment; they nest.
fn block_end(text: &str, at: usize) -> Result<usize, Fault> {
    let (bytes, mut depth, mut end) = (text.as_bytes(), 1_usize, at + 2);
    while depth > 0 {
        match bytes.get(end..end + 2) {
            Some(b"/*") => (depth, end) = (depth + 1, end + 2),
            Some(b"*/") => (depth, end) = (depth - 1, end + 2),
            Some(_) => end += 1,
            None => return Err(Fault::new(at..at + 2, "this comment is never closed", "end it with `*/`")),
        }
    }
    Ok(end)
}

fn text_end(text: &str, at: usize) -> Result<usize, Fault> {
    let (bytes, mut end) = (text.as_bytes(), at + 1);
    while let Some(byte) = bytes.get(end) {
        match byte {
            b'"' => return Ok(end + 1),
            b'\\' => end += 2,
            _ => end += 1,
        }
    }
    Err(Fault::new(at..line_end(text, at), "this text is never closed", "end it with `\"`"))
}

fn is_raw(rest: &str) -> bool {
    rest[1..].trim_start_matches('#').starts_with('"')
}

/// End of `r"…"`, `r#"…"#` and so on.
fn raw_end(text: &str, at: usize) -> Result<usize, Fault> {
    let hashes = text[at + 1..].bytes().take_while(|byte| *byte == b'#').count();
    let close = format!("\"{}", "#".repeat(hashes));
    let inside = at + 2 + hashes;
    let found = text[inside..].find(&close).map(|length| inside + length + close.len());
    found.ok_or_else(|| Fault::new(at..inside, "this raw text is never closed", format!("end it with `{close}`")))
}

pub(crate) fn line_end(text: &str, at: usize) -> usize {
    text[at..].find(['\n', '\r']).map_or(text.len(), |length| at + length)
}

fn stray(c: char, at: usize) -> Fault {
    let help = match c {
        '=' => "write `:` between a field and its value, for instance `seed: 7`",
        ';' => "write `,` between fields",
        '{' | '}' => "write `(` and `)` around fields",
        '\'' | '`' | '\u{2018}'..='\u{201f}' | '«' | '»' => {
            "write text in straight double quotes, for instance \"quickstart\""
        }
        '#' => "write comments as `// …`",
        '/' => "write comments as `// …` or `/* … */`",
        '\u{a0}' | '\u{2000}'..='\u{200b}' | '\u{3000}' => {
            "put an ordinary space here; this one was probably pasted from a web page"
        }
        '\u{fffd}' | '\0'..='\u{1f}' => "this does not look like a text file in UTF-8",
        '<' | '>' | '?' | '$' => "replace this placeholder by a value",
        '%' => "write a share as a number from 0 to 1, for instance `0.1` for 10 %",
        c if !c.is_ascii() => "only comments and text in quotes may have letters outside ASCII",
        _ => "remove it, or put it in quotes if it is part of a text",
    };
    Fault::new(at..at + c.len_utf8(), format!("unexpected {}", named(c)), help)
}

fn named(c: char) -> String {
    let code = c as u32;
    match c {
        '\u{fffd}' => "bytes that are not UTF-8".to_owned(),
        '\u{a0}' => "no-break space (U+00A0)".to_owned(),
        _ if c.is_control() || c.is_whitespace() || code == 0x200b => format!("character U+{code:04X}"),
        _ if c.is_ascii() => format!("`{c}`"),
        _ => format!("`{c}` (U+{code:04X})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_text_are_skipped_whole() {
        let text = "a /* ( /* \" */ */ : \"x\\\")\" , r#\"\"]\"# // (";
        let kinds: Vec<_> = tokens(text).unwrap().into_iter().map(|token| token.kind).collect();
        assert_eq!(kinds, [Kind::Word, Kind::Colon, Kind::Text, Kind::Comma, Kind::Text]);
    }

    #[test]
    fn faults_are_found_at_their_place() {
        for (text, at) in [("a = 1", 2), ("ab /* x", 3), ("(\"x", 1), ("“x”", 0), ("a\u{a0}b", 1), ("r#\"x\"", 0)] {
            assert_eq!(tokens(text).unwrap_err().span.start, at, "{text}");
        }
    }
}
