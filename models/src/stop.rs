//! Texts that end an answer. Whether one has come depends on the answer's tokens alone, so that drafts change nothing.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Tokens that are read beside those which a text can be spread over: a tokenizer may treat the first one it reads differently.
const BESIDE: usize = 4;

/// Texts that end an answer, and what reads them.
#[derive(Debug, Clone)]
pub struct Stop {
    texts: Vec<String>,
    /// Those of them that name a special token, which is no part of an answer's text.
    named: Vec<String>,
    tokenizer: Arc<Tokenizer>,
    /// Last tokens that hold a text, however it is cut: each token says a byte at least.
    window: usize,
}

impl PartialEq for Stop {
    fn eq(&self, other: &Self) -> bool {
        self.texts == other.texts
    }
}

impl Stop {
    /// None if no text ends an answer; empty texts are not counted.
    #[must_use]
    pub fn new(texts: &[String], tokenizer: &Arc<Tokenizer>) -> Option<Self> {
        let texts: Vec<String> = texts.iter().filter(|text| !text.is_empty()).cloned().collect();
        let window = texts.iter().map(String::len).max()? + BESIDE;
        let named = texts.iter().filter(|text| tokenizer.names_special(text)).cloned().collect();
        Some(Self { texts, named, tokenizer: tokenizer.clone(), window })
    }

    /// Whether an answer's last token completes one of the texts; it is asked after each token.
    #[must_use]
    pub fn ends(&self, answer: &[u32]) -> bool {
        let last = &answer[answer.len().saturating_sub(self.window)..];
        let is_in = |texts: &[String], text: String| texts.iter().any(|stop| text.contains(stop));
        is_in(&self.texts, self.tokenizer.decode(last))
            || (!self.named.is_empty() && is_in(&self.named, self.tokenizer.spell(last)))
    }

    /// The text before the first of them.
    #[must_use]
    pub fn before<'a>(&self, text: &'a str) -> &'a str {
        let first = self.texts.iter().filter_map(|stop| text.find(stop)).min();
        &text[..first.unwrap_or(text.len())]
    }

    /// The part of a text that can no longer become one of them, whatever follows: what a reader can be shown.
    #[must_use]
    pub fn settled<'a>(&self, text: &'a str) -> &'a str {
        let text = self.before(text);
        let is_begun = |at: &usize| self.texts.iter().any(|stop| stop.starts_with(&text[*at..]));
        let mut ends = text.char_indices().map(|(at, _)| at);
        &text[..ends.find(is_begun).unwrap_or(text.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stop(texts: &[&str]) -> (Option<Stop>, Arc<Tokenizer>) {
        let tokenizer = Arc::new(Tokenizer::chars());
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        (Stop::new(&texts, &tokenizer), tokenizer)
    }

    #[test]
    fn an_answer_ends_with_the_first_text_that_is_complete() {
        let (stop, tokenizer) = stop(&["ab", "b;c", ""]);
        let (stop, answer) = (stop.unwrap(), tokenizer.encode("aab;cab").unwrap());
        let ends: Vec<usize> = (1..=answer.len()).filter(|length| stop.ends(&answer[..*length])).collect();
        assert_eq!(ends[0], 3);
        assert!(!stop.ends(&tokenizer.encode("a;b;a;b;ba").unwrap()));
        assert_eq!(["aab;cab", "b;c", "xyz", ""].map(|text| stop.before(text)), ["a", "", "xyz", ""]);
        assert!(self::stop(&[]).0.is_none() && self::stop(&[""]).0.is_none());
    }

    #[test]
    fn a_special_token_may_be_asked_for_by_its_name() {
        let ends = |texts: &[&str]| {
            let (stop, tokenizer) = stop(texts);
            let answer = tokenizer.encode("a;").unwrap();
            let with = [&answer[..], tokenizer.eos()].concat();
            [&answer, &with].map(|answer| stop.as_ref().unwrap().ends(answer))
        };
        assert_eq!([ends(&["<eos>", "ab"]), ends(&["ab", "<"])], [[false, true], [false, false]]);
    }

    #[test]
    fn what_may_become_a_text_is_held_back() {
        let stop = stop(&["\n\n", "stop"]).0.unwrap();
        let settled = ["one", "one\n", "one\ntwo", "one st", "one sto", "one stay", "a stop b", "\n\n"];
        let shown = ["one", "one", "one\ntwo", "one ", "one ", "one stay", "a ", ""];
        assert_eq!(settled.map(|text| stop.settled(text)), shown);
    }
}
