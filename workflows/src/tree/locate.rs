//! Paths to places and back.

use std::ops::Range;

use super::{Node, Segment, Tree};

impl Tree {
    /// The path of a value, for instance `steps[1].clip.0`.
    pub(crate) fn path(&self, text: &str, node: usize) -> String {
        let mut segments = Vec::new();
        let mut next = Some(node);
        while let Some(at) = next {
            segments.push(self.nodes[at].segment.text(text));
            next = self.nodes[at].parent;
        }
        segments.reverse();
        segments.concat().trim_start_matches('.').to_owned()
    }

    /// What to underline for a path; if the file does not spell it out, the nearest thing around it.
    pub(crate) fn span(&self, text: &str, path: &str) -> Range<usize> {
        let mut rest = path;
        loop {
            if let Some(node) = self.find(text, rest) {
                return if rest == path { self.underline(text, node) } else { self.name(text, node) };
            }
            rest = parent(rest);
        }
    }

    /// Whether the file spells out the value of a path.
    pub(crate) fn find(&self, text: &str, path: &str) -> Option<usize> {
        let mut at = self.innermost(0);
        for segment in segments(path) {
            let found = self
                .children(at)
                .find(|child| self.nodes[*child].segment.text(text).trim_start_matches('.') == segment)?;
            at = self.innermost(found);
        }
        (!self.nodes.is_empty()).then_some(at)
    }

    /// The innermost value that holds an offset.
    pub(crate) fn at(&self, offset: usize) -> Option<usize> {
        let holds = |node: &Node| node.whole().start <= offset && offset < node.value.end;
        self.nodes.iter().rposition(holds)
    }

    /// The value whose text ends last before an offset.
    pub(crate) fn ending_before(&self, offset: usize) -> Option<usize> {
        let ends = |at: &usize| self.nodes[*at].value.end <= offset;
        (0..self.nodes.len()).filter(ends).max_by_key(|at| (self.nodes[*at].value.end, std::cmp::Reverse(*at)))
    }

    /// The innermost bracket that ends at an offset, or holds it.
    pub(crate) fn closing_at(&self, offset: usize) -> Option<usize> {
        let closes = |node: &Node| node.open.is_some() && node.value.end == offset + 1;
        self.nodes.iter().position(closes).or_else(|| self.at(offset))
    }

    /// The field's name and value, or the value alone.
    pub(crate) fn whole(&self, node: usize) -> Range<usize> {
        self.nodes[node].whole()
    }

    /// The field's name.
    pub(crate) fn key(&self, node: usize) -> Option<Range<usize>> {
        match &self.nodes[node].segment {
            Segment::Key(span) => Some(span.clone()),
            _ => None,
        }
    }

    /// `Tiny` of `Tiny(…)`, or what [`Tree::underline`] gives.
    pub(crate) fn name(&self, text: &str, node: usize) -> Range<usize> {
        self.nodes[node].name.clone().unwrap_or_else(|| self.underline(text, node))
    }

    /// The innermost field or item of a list around a value.
    pub(crate) fn removable(&self, node: usize) -> Option<usize> {
        let mut at = node;
        while !matches!(self.nodes[at].segment, Segment::Key(_) | Segment::Item(_)) {
            at = self.nodes[at].parent?;
        }
        Some(at)
    }

    /// The field `name` in the brackets of a value.
    pub(crate) fn child(&self, text: &str, node: usize, name: &str) -> Option<usize> {
        let inner = self.innermost(node);
        self.children(inner).find(|child| self.key(*child).is_some_and(|key| &text[key] == name))
    }

    pub(crate) fn is_leaf(&self, node: usize) -> bool {
        self.nodes[node].open.is_none()
    }

    pub(crate) fn starts_at(&self, node: usize, offset: usize) -> bool {
        self.nodes[node].value.start == offset
    }

    pub(crate) fn parent(&self, node: usize) -> Option<usize> {
        self.nodes[node].parent
    }

    /// A value on one line whole, of a longer one its name.
    pub(crate) fn underline(&self, text: &str, node: usize) -> Range<usize> {
        let value = self.nodes[node].value.clone();
        if !text[value.clone()].contains('\n') {
            return value;
        }
        let name = self.nodes[node].name.clone().or_else(|| self.key(node));
        name.unwrap_or(value.start..value.start + 1)
    }

    /// `x` of `Some(x)`.
    fn innermost(&self, node: usize) -> usize {
        let mut at = node;
        while let Some(child) = self.children(at).find(|child| self.nodes[*child].segment == Segment::None) {
            at = child;
        }
        at
    }

    fn children(&self, node: usize) -> impl Iterator<Item = usize> {
        let later = self.nodes.iter().enumerate().skip(node + 1);
        later.filter(move |(_, child)| child.parent == Some(node)).map(|(at, _)| at)
    }
}

impl Node {
    fn whole(&self) -> Range<usize> {
        match &self.segment {
            Segment::Key(key) => key.start..self.value.end,
            _ => self.value.clone(),
        }
    }
}

impl Segment {
    fn text(&self, text: &str) -> String {
        match self {
            Self::None => String::new(),
            Self::Key(span) => format!(".{}", &text[span.clone()]),
            Self::Item(index) => format!("[{index}]"),
            Self::Place(index) => format!(".{index}"),
        }
    }
}

/// `steps[1].group` → `steps`, `[1]`, `group`.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    let parts = path.split('.').flat_map(|part| {
        let bracket = part.find('[').unwrap_or(part.len());
        let (name, item) = part.split_at(bracket);
        [name, item]
    });
    parts.filter(|part| !part.is_empty())
}

/// `steps[1].group` → `steps[1]` → `steps` → ``.
pub(crate) fn parent(path: &str) -> &str {
    path.rfind(['.', '[']).map_or("", |at| &path[..at])
}

#[cfg(test)]
mod tests {
    use crate::tree::tree;

    const TEXT: &str =
        "Workflow( // (\n  name: \"a)\", /* [ */ model: Some(Tiny(\n hidden: 1)),\n steps: [A(), B(clip: (1, 2))])";

    #[track_caller]
    fn check(path: &str, underlined: &str) {
        let tree = tree(TEXT).unwrap();
        assert_eq!(&TEXT[tree.span(TEXT, path)], underlined);
    }

    #[test]
    fn paths_lead_to_places() {
        check("name", "\"a)\"");
        check("model", "Tiny");
        check("model.hidden", "1");
        check("model.layers", "Tiny");
        check("steps", "[A(), B(clip: (1, 2))]");
        check("steps[0]", "A()");
        check("steps[1].clip", "(1, 2)");
        check("steps[1].clip.1", "2");
        check("data.heldout", "Workflow");
    }

    #[test]
    fn places_lead_to_paths() {
        let tree = tree(TEXT).unwrap();
        let at = |word: &str| tree.path(TEXT, tree.at(TEXT.find(word).unwrap()).unwrap());
        assert_eq!(at("hidden"), "model.hidden");
        assert_eq!(at("2)"), "steps[1].clip.1");
    }
}
