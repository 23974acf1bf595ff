//! Text to tokens and back. Special tokens are recognised in text and left out when decoding; none are added by itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::load::{json as parse, read};

/// Characters of a Tiny model, in the order of their tokens, after `<eos>`. With it they make 80 tokens.
const CHARS: &str = "0123456789+-*/=?;#.,:()<> abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n";

/// A tokenizer and the ids that end an answer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Vec<u32>,
    /// The only characters it has tokens for, if it would drop others silently.
    alphabet: Option<BTreeSet<char>>,
}

/// What a GGUF file says of its tokenizer (byte-level BPE).
#[derive(Debug, Clone, Default)]
pub struct GgufParts {
    /// Tokens, in the order of their ids.
    pub tokens: Vec<String>,
    /// Kind of each token; 3 and 4 are special and user-defined.
    pub types: Vec<i64>,
    /// Merges, two tokens with a space between.
    pub merges: Vec<String>,
    /// Name of the rule that cuts text before merging.
    pub pre: String,
}

impl Tokenizer {
    /// One token a character; id 0 is `<eos>`.
    ///
    /// # Panics
    /// Never: its description is a constant.
    #[must_use]
    pub fn chars() -> Self {
        let vocab: serde_json::Map<String, Value> = std::iter::once("<eos>".into())
            .chain(CHARS.chars().map(String::from))
            .zip((0..).map(Value::from))
            .collect();
        let description =
            description(&vocab.into(), &json!([]), &[(0, "<eos>", true)], &Value::Null, &json!({"type": "Fuse"}));
        Self::from_bytes(description.to_string().as_bytes(), Path::new("chars"), &[0]).expect("constant tokenizer")
    }

    /// From a `tokenizer.json`. `eos` are the ids that end an answer.
    ///
    /// # Errors
    /// If the file is missing, not JSON, not a tokenizer, or lacks one of `eos`.
    pub fn from_file(path: &Path, eos: &[u32]) -> Result<Self> {
        let bytes = read("tokenizer", path)?;
        Self::from_bytes(&bytes, path, eos)
    }

    /// From the metadata of a GGUF file at `path`.
    ///
    /// # Errors
    /// If the rule before merging is unknown or the parts contradict each other.
    pub fn from_gguf(parts: &GgufParts, path: &Path, eos: &[u32]) -> Result<Self> {
        let broken = |reason: String| Error::Tokenizer { path: path.into(), reason };
        if parts.types.len() != parts.tokens.len() {
            return Err(broken(format!("{} tokens but {} token types", parts.tokens.len(), parts.types.len())));
        }
        let vocab: serde_json::Map<String, Value> = parts.tokens.iter().cloned().zip((0..).map(Value::from)).collect();
        if vocab.len() != parts.tokens.len() {
            return Err(broken("a token appears twice".into()));
        }
        let added: Vec<_> = (parts.types.iter().zip(&parts.tokens).zip(0..))
            .filter(|((kind, _), _)| matches!(kind, 3 | 4))
            .map(|((kind, token), id)| (id, token.as_str(), *kind == 3))
            .collect();
        let pre = pre_tokenizer(&parts.pre).ok_or_else(|| {
            broken(format!(
                "its pre-tokenizer is `{}`, supported are smollm and gpt-2; use a Hugging Face folder",
                parts.pre
            ))
        })?;
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let description = description(&vocab.into(), &json!(parts.merges), &added, &pre, &decoder);
        Self::from_bytes(description.to_string().as_bytes(), path, eos)
    }

    fn from_bytes(bytes: &[u8], path: &Path, eos: &[u32]) -> Result<Self> {
        let broken = |reason: String| Error::Tokenizer { path: path.into(), reason };
        let value = parse(path, bytes)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| broken(e.to_string()))?;
        // A stored padding or truncation would change what a prompt says.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        match eos.iter().find(|id| inner.id_to_token(**id).is_none()) {
            Some(id) => Err(broken(format!("it has no token {id}, which should end an answer"))),
            None => Ok(Self { inner, eos: eos.into(), alphabet: alphabet(&value) }),
        }
    }

    /// Itself, if a model with `vocab` tokens has a row for each of its tokens.
    pub(crate) fn fitting(self, vocab: usize, path: &Path) -> Result<Self> {
        let largest = self.inner.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        match largest < vocab {
            true => Ok(self),
            false => {
                let reason = format!("it has a token {largest}, the model only {vocab} tokens");
                Err(Error::Tokenizer { path: path.into(), reason })
            }
        }
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// If a character has no token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if let Some(alphabet) = &self.alphabet
            && let Some((position, found)) = text.chars().enumerate().find(|(_, c)| !alphabet.contains(c))
        {
            return Err(Error::UnknownChar { found, position });
        }
        self.encode_with(text, false)
    }

    /// Tokens of a text that begins a sequence: with the special tokens, such as one for the beginning, that the tokenizer
    /// puts around it.
    ///
    /// # Errors
    /// If a character has no token.
    pub fn encode_first(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.encode(text)?;
        let mut all = self.encode_with(text, true)?;
        // What it would put behind a whole text does not belong behind a prompt.
        if let Some(at) = all.windows(plain.len().max(1)).position(|w| w == plain) {
            all.truncate(at + plain.len());
        }
        Ok(all)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| Error::Encode { reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, without the special ones. Ids beyond the vocabulary say nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_else(|_| ids.iter().filter_map(|id| self.token(*id)).collect())
    }

    /// Whether a text has the name of a special token in it.
    pub(crate) fn names_special(&self, text: &str) -> bool {
        let mut added = self.inner.get_added_tokens_decoder().into_values();
        added.any(|token| token.special && !token.content.is_empty() && text.contains(&token.content))
    }

    /// Text of tokens, the special ones by their names.
    #[must_use]
    pub(crate) fn spell(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// Ids that end an answer.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The token of an id as the vocabulary spells it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens in the vocabulary, special ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Writes `tokenizer.json`; equal tokenizers give equal bytes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = self.inner.to_string(true);
        let text = text.map_err(|e| Error::Tokenizer { path: path.into(), reason: e.to_string() })?;
        std::fs::write(path, text).map_err(|source| Error::Io { path: PathBuf::from(path), source })
    }
}

/// A `tokenizer.json` of a BPE tokenizer.
fn description(vocab: &Value, merges: &Value, added: &[(u32, &str, bool)], pre: &Value, decoder: &Value) -> Value {
    let added: Vec<Value> = added
        .iter()
        .map(|(id, content, special)| {
            json!({"id": id, "content": content, "special": special,
                   "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": pre, "post_processor": null, "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

fn pre_tokenizer(name: &str) -> Option<Value> {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    match name {
        "smollm" => Some(json!({"type": "Sequence", "pretokenizers": [digits, byte_level]})),
        "gpt-2" => Some(byte_level),
        _ => None,
    }
}

/// Characters of a BPE vocabulary with neither bytes nor an unknown token: others would vanish without a word.
fn alphabet(description: &Value) -> Option<BTreeSet<char>> {
    let model = description.get("model")?;
    let bytes = description.get("pre_tokenizer").is_some_and(|p| p.to_string().contains("ByteLevel"))
        || model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false);
    let unknown = model.get("unk_token").is_some_and(|t| !t.is_null());
    let normal = description.get("normalizer").is_none_or(Value::is_null);
    if bytes || unknown || !normal || model.get("type")? != "BPE" {
        return None;
    }
    let single = |token: &String| (token.chars().count() == 1).then(|| token.chars().next()).flatten();
    Some(model.get("vocab")?.as_object()?.keys().filter_map(single).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chars_round_trip_through_a_file() {
        let tokenizer = Tokenizer::chars();
        assert_eq!(tokenizer.vocab_size(), 80);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path).unwrap();
        for again in [tokenizer, Tokenizer::from_file(&path, &[0]).unwrap()] {
            let ids = again.encode(CHARS).unwrap();
            assert_eq!(ids, (1..80).collect::<Vec<u32>>());
            assert_eq!(again.decode(&ids), CHARS);
            assert_eq!(again.decode(&[1, 0, 2, 4_000_000]), "01");
            let error = again.encode("3+é?").unwrap_err();
            assert!(matches!(error, Error::UnknownChar { found: 'é', position: 2 }), "{error}");
        }
    }

    #[test]
    fn saved_bytes_are_the_same_every_time() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<_> = (0..3)
            .map(|i| {
                let path = folder.path().join(i.to_string());
                Tokenizer::chars().save(&path).unwrap();
                std::fs::read(path).unwrap()
            })
            .collect();
        assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2]);
    }

    #[test]
    fn broken_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(Tokenizer::from_file(&path, &[]), Err(Error::FileMissing { .. })));
        Tokenizer::chars().save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert!(matches!(Tokenizer::from_file(&path, &[99]), Err(Error::Tokenizer { .. })));
        assert!(matches!(Tokenizer::chars().fitting(79, &path), Err(Error::Tokenizer { .. })));
        for cut in (0..whole.len() - 1).step_by(97) {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(Tokenizer::from_file(&path, &[]), Err(Error::Json { .. })), "cut at {cut}");
        }
        std::fs::write(&path, b"{}").unwrap();
        assert!(matches!(Tokenizer::from_file(&path, &[]), Err(Error::Tokenizer { .. })));
    }

    #[test]
    fn gguf_parts_must_agree() {
        let parts =
            GgufParts { tokens: vec!["a".into(), "b".into()], types: vec![1], merges: vec![], pre: "smollm".into() };
        assert!(matches!(Tokenizer::from_gguf(&parts, Path::new("x"), &[]), Err(Error::Tokenizer { .. })));
        let unknown = GgufParts { types: vec![1, 1], pre: "tekken".into(), ..parts };
        assert!(matches!(Tokenizer::from_gguf(&unknown, Path::new("x"), &[]), Err(Error::Tokenizer { .. })));
    }

    #[test]
    fn a_sequence_begins_as_the_tokenizer_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        Tokenizer::chars().save(&path).unwrap();
        assert_eq!(Tokenizer::chars().encode_first("1+2").unwrap(), Tokenizer::chars().encode("1+2").unwrap());
        let mut description: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let special = json!({"SpecialToken": {"id": "<eos>", "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        description["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [special, text("A"), special],
            "pair": [special, text("A"), text("B"), special],
            "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}},
        });
        std::fs::write(&path, description.to_string()).unwrap();
        let tokenizer = Tokenizer::from_file(&path, &[0]).unwrap();
        assert_eq!(tokenizer.encode("1+2").unwrap(), [2, 11, 3]);
        // The token at the end would end the prompt.
        assert_eq!(tokenizer.encode_first("1+2").unwrap(), [0, 2, 11, 3]);
    }
}
