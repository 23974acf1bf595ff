//! Where each value of a workflow file stands: a tolerant map from paths such as `steps[1].group` to byte spans.

use std::ops::Range;

use crate::token::{self, Fault, Kind, Token};

mod locate;

pub(crate) use locate::parent;

/// Brackets in brackets, at most. The deepest workflow has seven.
const DEPTH_MAX: usize = 32;

/// A value and its place.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    parent: Option<usize>,
    segment: Segment,
    /// `Tiny` of `Tiny(…)`.
    pub(crate) name: Option<Range<usize>>,
    /// The value, name and brackets included.
    pub(crate) value: Range<usize>,
    open: Option<char>,
    children: usize,
}

/// What leads from a value to a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    /// The whole file, or what is inside `Some(…)`: adds nothing to the path.
    None,
    Key(Range<usize>),
    Item(usize),
    Place(usize),
}

/// All values of a file.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    /// Brackets and commas that RON would refuse though their meaning is plain: `Fixed((…))`, a comma at the end.
    pub(crate) superfluous: Vec<usize>,
}

/// Reads the shape of a text.
pub(crate) fn tree(text: &str) -> Result<Tree, Fault> {
    let tokens = token::tokens(text)?;
    let mut reader = Reader { text, tokens, at: 0, tree: Tree::default(), frames: Vec::new(), closed: Vec::new() };
    reader.read()?;
    Ok(reader.tree)
}

struct Frame {
    node: usize,
    open: char,
    open_at: usize,
    keyed: bool,
}

struct Reader<'t> {
    text: &'t str,
    tokens: Vec<Token>,
    at: usize,
    tree: Tree,
    frames: Vec<Frame>,
    closed: Vec<(usize, usize)>,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<(), Fault> {
        self.value(Segment::None)?;
        while !self.frames.is_empty() {
            self.item()?;
        }
        match self.tokens.get(self.at) {
            None => Ok(()),
            Some(Token { kind: Kind::Comma, span }) if self.at + 1 == self.tokens.len() => {
                self.tree.superfluous.push(span.start);
                Ok(())
            }
            Some(token) => Err(self.trailing(token)),
        }
    }

    /// One item of the innermost bracket, or its end.
    fn item(&mut self) -> Result<(), Fault> {
        let Some(token) = self.tokens.get(self.at).cloned() else { return Err(self.unclosed()) };
        match token.kind {
            Kind::Close(close) => return self.close(close, &token.span),
            Kind::Comma | Kind::Colon => return Err(misplaced(self.text, &token)),
            _ => {}
        }
        let segment = self.segment(&token)?;
        self.value(segment)
    }

    /// What the next item is called.
    fn segment(&mut self, token: &Token) -> Result<Segment, Fault> {
        let keyed = matches!(self.tokens.get(self.at + 1), Some(Token { kind: Kind::Colon, .. }));
        let Some(frame) = self.frames.last_mut() else { return Ok(Segment::None) };
        let node = &mut self.tree.nodes[frame.node];
        node.children += 1;
        let first = node.children == 1;
        if keyed && token.kind == Kind::Word && frame.open == '(' && (first || frame.keyed) {
            frame.keyed = true;
            self.at += 2;
            return Ok(Segment::Key(token.span.clone()));
        }
        if keyed || frame.keyed {
            let unnamed = self.tree.nodes.get(frame.node + 1).map(|first| first.value.clone());
            let unnamed = unnamed.filter(|_| !first && frame.open == '(' && token.kind == Kind::Word && keyed);
            return Err(key_fault(self.text, token, keyed, frame.open, unnamed));
        }
        Ok(match (frame.open, &node.name) {
            ('[', _) => Segment::Item(node.children - 1),
            (_, Some(_)) => Segment::None,
            _ => Segment::Place(node.children - 1),
        })
    }

    /// A value: a word, a text, a bracket, or a word with a bracket. Brackets are entered, not finished.
    fn value(&mut self, segment: Segment) -> Result<(), Fault> {
        let end = self.text.len();
        let Some(token) = self.tokens.get(self.at).cloned() else {
            return Err(Fault::new(end..end, "the file ends where a value is expected", "write the value"));
        };
        self.at += 1;
        let next = self.tokens.get(self.at).cloned();
        match (token.kind, next) {
            (Kind::Word, Some(Token { kind: Kind::Open('('), span })) => {
                self.at += 1;
                self.enter(segment, Some(token.span), '(', span.start)
            }
            (Kind::Open(open), _) => self.enter(segment, None, open, token.span.start),
            (Kind::Word | Kind::Text, _) => {
                self.push(segment, None, token.span, None);
                self.separator()
            }
            _ => Err(no_value(self.text, &token)),
        }
    }

    fn enter(&mut self, segment: Segment, name: Option<Range<usize>>, open: char, at: usize) -> Result<(), Fault> {
        if self.frames.len() >= DEPTH_MAX {
            let message = format!("brackets in brackets, more than {DEPTH_MAX} deep");
            return Err(Fault::new(at..at + 1, message, "remove the brackets that are not needed"));
        }
        let start = name.as_ref().map_or(at, |name| name.start);
        let node = self.push(segment, name, start..at + 1, Some(open));
        self.frames.push(Frame { node, open, open_at: at, keyed: false });
        Ok(())
    }

    fn push(&mut self, segment: Segment, name: Option<Range<usize>>, value: Range<usize>, open: Option<char>) -> usize {
        let parent = self.frames.last().map(|frame| frame.node);
        self.tree.nodes.push(Node { parent, segment, name, value, open, children: 0 });
        self.tree.nodes.len() - 1
    }

    fn close(&mut self, close: char, span: &Range<usize>) -> Result<(), Fault> {
        let Some(frame) = self.frames.pop() else { return Ok(()) };
        let wanted = if frame.open == '(' { ')' } else { ']' };
        if close != wanted {
            self.frames.push(frame);
            return Err(self.mismatch(close, wanted, span));
        }
        self.at += 1;
        self.tree.nodes[frame.node].value.end = span.end;
        self.closed.push((frame.open_at, span.start));
        self.unwrap(&frame, span.start);
        self.separator()
    }

    /// Remembers `Some(` and its end, and the inner brackets of `Fixed((drafter: …))`.
    fn unwrap(&mut self, frame: &Frame, close_at: usize) {
        let node = &self.tree.nodes[frame.node];
        let is_some = |node: &Node| node.name.clone().is_some_and(|name| &self.text[name] == "Some");
        let outer = node.parent.map(|parent| &self.tree.nodes[parent]);
        let is_inner = outer.is_some_and(|outer| outer.name.is_some() && !is_some(outer));
        // A comma before the end would stand beside the one after it.
        let before = &self.tokens[self.at - 2];
        let comma = (before.kind == Kind::Comma).then_some(before.span.start);
        let brackets = [Some(frame.open_at), comma, Some(close_at)].into_iter().flatten();
        if is_some(node) {
            let word = node.name.clone().unwrap_or_default();
            self.tree.superfluous.extend(word.chain(brackets.filter(|_| !frame.keyed)));
        } else if frame.keyed && node.name.is_none() && node.segment == Segment::None && is_inner {
            self.tree.superfluous.extend(brackets);
        }
    }

    /// After a value comes a comma or the end of the bracket.
    fn separator(&mut self) -> Result<(), Fault> {
        if self.frames.is_empty() {
            return Ok(());
        }
        match self.tokens.get(self.at) {
            None => Err(self.unclosed()),
            Some(Token { kind: Kind::Comma, .. }) => {
                self.at += 1;
                Ok(())
            }
            Some(Token { kind: Kind::Close(_), .. }) => Ok(()),
            Some(next) => Err(no_comma(self.text, &self.tokens[self.at - 1], next)),
        }
    }

    /// The bracket that was most likely forgotten: the one whose end is indented less than its start.
    fn unclosed(&self) -> Fault {
        let crooked = |(open, close): &&(usize, usize)| {
            begins_line(self.text, *close) && indentation(self.text, *close) < indentation(self.text, *open)
        };
        let guess = self.closed.iter().find(crooked).map(|pair| pair.0);
        let at = guess.or(self.frames.last().map(|frame| frame.open_at)).unwrap_or_default();
        let close = if self.text[at..].starts_with('(') { ')' } else { ']' };
        let open = &self.text[at..=at];
        Fault::new(at..at + 1, format!("this `{open}` is never closed"), format!("add the missing `{close}`"))
    }

    fn mismatch(&self, close: char, wanted: char, span: &Range<usize>) -> Fault {
        let open = self.frames.last().map_or(0, |frame| frame.open_at);
        let (line, column) = crate::problem::position(self.text, open);
        let message = format!("`{close}` closes a `{}`", &self.text[open..=open]);
        Fault::new(span.clone(), message, format!("write `{wanted}` for the bracket of line {line}, column {column}"))
    }

    fn trailing(&self, token: &Token) -> Fault {
        let root = &self.tree.nodes[0];
        let (word, whole) = (short(&self.text[token.span.clone()]), root.value.clone());
        let close = whole.end.saturating_sub(1);
        if root.open.is_none() {
            let message = format!("expected `Workflow(…)`, found `{}`", short(&self.text[whole.clone()]));
            return Fault::new(
                whole,
                message,
                "the whole file is one `Workflow(name: …, model: …, data: …, steps: […])`",
            );
        }
        if matches!(token.kind, Kind::Close(_)) || begins_line(self.text, close) {
            let help = match token.kind {
                Kind::Close(_) => "remove it, or add the bracket that it should close",
                _ => "a file holds one `Workflow(…)`; move this inside its brackets",
            };
            return Fault::new(token.span.clone(), format!("`{word}` after the end of the workflow"), help);
        }
        let message = format!("this bracket ends the workflow, but `{word}` follows");
        Fault::new(close..whole.end, message, "remove the bracket if it is one too many")
    }
}

fn misplaced(text: &str, token: &Token) -> Fault {
    let word = &text[token.span.clone()];
    let help =
        if token.kind == Kind::Comma { "remove one of the commas" } else { "write the name of a field before `:`" };
    Fault::new(token.span.clone(), format!("unexpected `{word}`"), help)
}

fn no_value(text: &str, token: &Token) -> Fault {
    let word = &text[token.span.clone()];
    Fault::new(
        token.span.clone(),
        format!("expected a value, found `{}`", short(word)),
        "write the value, or remove the field",
    )
}

fn no_comma(text: &str, before: &Token, next: &Token) -> Fault {
    let (value, word) = (&text[before.span.clone()], short(&text[next.span.clone()]));
    if let Some(fault) = token::run_on(text, std::slice::from_ref(before)) {
        return fault;
    }
    if next.kind == Kind::Colon {
        return Fault::new(
            next.span.clone(),
            "unexpected `:`",
            "write names and numbers without spaces, and `,` between fields",
        );
    }
    let end = before.span.end;
    let start = value.char_indices().next_back().map_or(end, |(at, _)| before.span.start + at);
    Fault::new(start..end, format!("`,` is missing before `{word}`"), "add `,` after this value")
}

/// `unnamed` is a value without a name before a field with one.
fn key_fault(text: &str, token: &Token, keyed: bool, open: char, unnamed: Option<Range<usize>>) -> Fault {
    if let Some(span) = unnamed {
        let message = format!("`{}` has no field name", short(&text[span.clone()]));
        return Fault::new(span, message, "write it as `field: value`");
    }
    let word = short(&text[token.span.clone()]).to_owned();
    let (message, help) = match (keyed, open) {
        (true, '[') => (format!("field `{word}` in a list"), "write the items of a list without names".to_owned()),
        (true, _) => {
            let name = word.trim_matches('"');
            (format!("the name of a field is in quotes: {word}"), format!("write `{name}: …`"))
        }
        _ => (format!("`{word}` has no field name"), "write it as `field: value`".to_owned()),
    };
    Fault::new(token.span.clone(), message, help)
}

/// The first 40 characters of a word.
pub(crate) fn short(word: &str) -> &str {
    let end = word.char_indices().nth(40).map_or(word.len(), |(at, _)| at);
    word[..end].lines().next().unwrap_or_default()
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

fn begins_line(text: &str, at: usize) -> bool {
    text[line_start(text, at)..at].trim().is_empty()
}

fn indentation(text: &str, at: usize) -> usize {
    text[line_start(text, at)..].chars().take_while(|c| *c == ' ' || *c == '\t').count()
}
