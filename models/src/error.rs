//! What can go wrong with models and data. A message names the thing, the value, the place and what to do.

use std::path::PathBuf;

use state::error::advice;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model or a dataset could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A prompt has no tokens or fills the model's positions.
    #[error(
        "a prompt of {tokens} tokens leaves no room for an answer in a model of {positions_max} positions; shorten the prompt"
    )]
    PromptLength {
        /// Its length.
        tokens: usize,
        /// The model's longest sequence.
        positions_max: usize,
    },
    /// A request that has as many tokens as an answer may have.
    #[error("an answer of {tokens} tokens cannot go on where answers have at most {tokens_max}")]
    AnswerLength {
        /// Its length.
        tokens: usize,
        /// The longest answer.
        tokens_max: usize,
    },
    /// An EAGLE-3 drafter whose taps an engine cannot tell apart.
    #[error(
        "engines cannot tell the layers apart that an EAGLE-3 drafter of a target of {layers} layers reads; it takes 4, or write it for Taper"
    )]
    TooFewLayers {
        /// Layers of the target.
        layers: usize,
    },
    /// A drafter was given a decoder that does not keep what it reads.
    #[error(
        "the drafter reads hidden states `{reads:?}` where the decoder keeps `{kept:?}`; set `Decoding::hidden` to what `Drafter::reads` says"
    )]
    Hidden {
        /// What the drafter reads.
        reads: crate::target::Hidden,
        /// What the decoder keeps.
        kept: crate::target::Hidden,
    },
    /// A problem of a data file cannot be used with this model.
    #[error("line {line} of {} (`{question}`): {reason}", path.display())]
    Problem {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// How its question begins.
        question: String,
        /// What is wrong with it.
        reason: Box<Error>,
    },
    /// A file that must be there is not.
    #[error("{what} `{}` does not exist; check the path", path.display())]
    FileMissing {
        /// What the file is for.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The system refused to read or write.
    #[error("cannot read or write `{}`; {}", path.display(), advice(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A `.safetensors` file is cut or damaged.
    #[error("`{}` is not a whole safetensors file; it is cut or damaged, copy it again", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// A GGUF file is cut or damaged.
    #[error("`{}` is not a whole GGUF file: {reason}; it is cut or damaged, copy it again", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the shape of the model asks for is not there.
    #[error("tensor `{name}` is missing in {place}; the configuration does not belong to these weights")]
    MissingTensor {
        /// Its name.
        name: String,
        /// Where it was looked for.
        place: String,
    },
    /// A tensor that the model has no use for: ignoring it would compute something else.
    #[error("tensor `{name}` in {place} has no place in a Llama model; this architecture is not supported")]
    UnexpectedTensor {
        /// Its name.
        name: String,
        /// Where it was found.
        place: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "tensor `{name}` in {place} has shape {found:?} instead of {expected:?}; the configuration does not belong to these weights"
    )]
    TensorShape {
        /// Its name.
        name: String,
        /// Shape in the file.
        found: Box<[usize]>,
        /// Shape by the configuration.
        expected: Box<[usize]>,
        /// Where it was found.
        place: String,
    },
    /// A tensor's numbers are stored in a form that cannot be read.
    #[error("tensor `{name}` in {place} is stored as {found}; convert it to f32, f16 or bf16")]
    TensorDtype {
        /// Its name.
        name: String,
        /// Its form.
        found: String,
        /// Where it was found.
        place: String,
    },
    /// A weight is infinite or not a number.
    #[error("weight {index} of tensor `{name}` in {place} is {value}; the weights are damaged, use an earlier copy")]
    NonFinite {
        /// The tensor's name.
        name: String,
        /// Position in it, row-major.
        index: usize,
        /// The value.
        value: f32,
        /// Where it was found.
        place: String,
    },
    /// A weight is too large for f16.
    #[error("weight {index} of tensor `{name}` is {value}, beyond the range of f16; export as f32")]
    Overflow {
        /// The tensor's name.
        name: String,
        /// Position in it, row-major.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A field of a model's configuration has a value that is not supported.
    #[error("`{field}` is {value} in `{}`; supported: {supported}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What would do.
        supported: String,
    },
    /// A JSON file cannot be parsed.
    #[error("`{}` is not valid JSON at line {line}, column {column}; correct it or copy it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A tokenizer cannot be built from what was found.
    #[error("the tokenizer of `{}` cannot be used: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A character for which the vocabulary has no token.
    #[error(
        "character {found:?} at position {position} is not in the vocabulary; reword the text or take another model"
    )]
    UnknownChar {
        /// The character.
        found: char,
        /// Its position, in characters from 0.
        position: usize,
    },
    /// A text could not be split into tokens.
    #[error("text cannot be encoded: {reason}")]
    Encode {
        /// What the tokenizer said.
        reason: String,
    },
    /// A chat was asked for and the model has no template for it.
    #[error("the model has no chat template; set `chat: false` or add `chat_template` to its tokenizer_config.json")]
    NoChatTemplate,
    /// A chat template failed.
    #[error("the model's chat template fails; correct `chat_template` in its tokenizer_config.json")]
    ChatTemplate {
        /// What is wrong, with its line.
        source: minijinja::Error,
    },
    /// A line of a dataset cannot be used.
    #[error("`{}`:{line}: {reason}", path.display())]
    DatasetLine {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What was found and what is wanted.
        reason: String,
    },
    /// A dataset without problems.
    #[error("dataset `{}` holds no problems; put one JSON object on each line", path.display())]
    DatasetEmpty {
        /// The file.
        path: PathBuf,
    },
    /// Nothing would be left to train on.
    #[error("held-out problems ({heldout}) leave none of the {problems} in `{}` for training; lower `heldout`", path.display())]
    HeldoutTooMany {
        /// The file.
        path: PathBuf,
        /// Problems asked for.
        heldout: usize,
        /// Problems there are.
        problems: usize,
    },
    /// A value of the plan's data makes no sense.
    #[error("`{field}` of the data is {value}; it must be {expected}")]
    Data {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// A file is not the one that was meant.
    #[error("`{}` has sha256 {found} instead of {expected}; use the file the workflow was written for", path.display())]
    Sha256 {
        /// The file.
        path: PathBuf,
        /// Its hash, lower-case hex.
        found: String,
        /// The hash asked for.
        expected: String,
    },
    /// A part of a checkpoint is not what was written.
    #[error("`{}` is not as it was written: it is damaged", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
    },
    /// A folder that an export would overwrite is something else.
    #[error(
        "`{}` is there and is no {kind} that Taper has exported ({because}); choose another folder, or move it away",
        path.display()
    )]
    ExportTarget {
        /// The folder.
        path: PathBuf,
        /// What was to be exported.
        kind: &'static str,
        /// What in it is something else.
        because: String,
    },
    /// Weights of another model.
    #[error("weights of {found} parameters are of another layout than the model")]
    Layout {
        /// Parameters they have.
        found: usize,
    },
    /// A tensor operation failed.
    #[error("a tensor operation failed")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn shape(
        name: impl Into<String>,
        found: &[usize],
        expected: &[usize],
        place: impl Into<String>,
    ) -> Self {
        Self::TensorShape { name: name.into(), found: found.into(), expected: expected.into(), place: place.into() }
    }
}
