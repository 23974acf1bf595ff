//! An answer that is shown while it grows.

use models::Stop;

/// What of a growing answer is still to be shown.
pub(super) struct Stream<'a, D> {
    /// Text of tokens.
    decode: D,
    /// Tokens from `from` on say what is still to be shown, and `shown` tokens of that were.
    from: usize,
    shown: usize,
    stop: Option<&'a Stop>,
    /// Text that may yet become one that ends the answer.
    held: String,
}

impl<'a, D: Fn(&[u32]) -> String> Stream<'a, D> {
    /// Of an answer behind so many tokens of its prompt.
    pub(super) fn new(decode: D, stop: Option<&'a Stop>, prompt: usize) -> Self {
        Self { decode, from: prompt, shown: prompt, stop, held: String::new() }
    }

    /// The text that can be shown now that there are these tokens, those of the prompt and those shown before among them.
    pub(super) fn grow(&mut self, tokens: &[u32]) -> String {
        let [before, all] = self.texts(tokens);
        // Half a character may be there, whose other half comes with the next token; or a token that says nothing by itself.
        let is_whole = |new: &&str| !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER);
        let Some(new) = all.strip_prefix(&before).filter(is_whole) else { return String::new() };
        self.held += new;
        (self.from, self.shown) = (self.shown, tokens.len());
        let settled = self.stop.map_or(self.held.len(), |stop| stop.settled(&self.held).len());
        self.held.drain(..settled).collect()
    }

    /// The rest, when there are all tokens: no other half comes.
    pub(super) fn end(mut self, tokens: &[u32]) -> String {
        let [before, all] = self.texts(tokens);
        self.held += &all[alike(&before, &all)..];
        let rest = self.stop.map_or(self.held.len(), |stop| stop.before(&self.held).len());
        self.held.truncate(rest);
        self.held
    }

    /// Text of single tokens depends on those before: the last ones that were shown are read again, alone and with the new ones.
    fn texts(&self, tokens: &[u32]) -> [String; 2] {
        [&tokens[self.from..self.shown], &tokens[self.from..]].map(&self.decode)
    }
}

/// Bytes at the beginning of two texts that are the same, in whole characters.
fn alike(one: &str, other: &str) -> usize {
    one.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use models::tokenizer::Tokenizer;

    use super::*;

    /// A token a byte, as tokenizers spell what they have no other token for.
    fn bytes(tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().map(|token| *token as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What is shown of an answer that grows by so many tokens at a time, as it grows and at its end.
    fn shown(answer: &[u8], step: usize, stop: Option<&Stop>) -> (String, String) {
        let tokens: Vec<u32> = b"?".iter().chain(answer).map(|byte| u32::from(*byte)).collect();
        let mut stream = Stream::new(bytes, stop, 1);
        let grown = (1..=tokens.len()).step_by(step).map(|length| stream.grow(&tokens[..length])).collect();
        (grown, stream.end(&tokens))
    }

    #[test]
    fn characters_of_several_tokens_are_shown_whole() {
        let text = "a€😀b é";
        for step in 1..=text.len() + 1 {
            let (grown, rest) = shown(text.as_bytes(), step, None);
            assert!(!grown.contains(char::REPLACEMENT_CHARACTER), "{grown}");
            assert_eq!(grown + &rest, text, "{step} tokens at a time");
        }
    }

    #[test]
    fn an_answer_that_ends_inside_a_character_is_shown_to_its_end() {
        // Cut within a character, behind text that came with it; and a character that says of itself that it is none.
        for answer in [&b"one \xe2\x82"[..], b"\xf0\x9f", b"", "it is \u{fffd}".as_bytes(), b"a\xc3b\xc3"] {
            for step in 1..=answer.len() + 1 {
                let (grown, rest) = shown(answer, step, None);
                assert_eq!(grown + &rest, String::from_utf8_lossy(answer), "{step} tokens at a time");
            }
        }
        assert_eq!(shown(b"one \xe2\x82", 1, None), ("one ".into(), "\u{fffd}".into()));
    }

    #[test]
    fn what_a_token_says_only_with_the_next_one_is_shown_once() {
        let trimmed = |tokens: &[u32]| bytes(tokens).trim_end().to_owned();
        let tokens: Vec<u32> = b"?ab  c ".iter().map(|byte| u32::from(*byte)).collect();
        let mut stream = Stream::new(trimmed, None, 1);
        let grown: String = (1..=tokens.len()).map(|length| stream.grow(&tokens[..length])).collect();
        assert_eq!(grown + &stream.end(&tokens), "ab  c");
    }

    #[test]
    fn a_text_that_ends_the_answer_is_not_shown() {
        let stop = Stop::new(&["\n\n".into()], &Arc::new(Tokenizer::chars())).unwrap();
        assert_eq!(shown(b"one\ntwo\n\nthree", 1, Some(&stop)), ("one\ntwo".into(), String::new()));
        assert_eq!(shown(b"one\n\xe2\x82", 1, Some(&stop)), ("one".into(), "\n\u{fffd}".into()));
        assert_eq!(shown(b"one\n\n\xe2\x82", 4, Some(&stop)).0, "one");
    }
}
