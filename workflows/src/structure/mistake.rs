//! What RON says, said to the user.

use ron::error::Error;

use crate::nearest::nearest;

/// One mistake, without its place.
pub(super) struct Mistake {
    pub(super) code: &'static str,
    /// What to underline.
    pub(super) on: On,
    pub(super) message: String,
    pub(super) help: String,
}

/// A part of a value.
pub(super) enum On {
    Value,
    /// `Tiny` of `Tiny(…)`.
    Name,
    /// The field's name.
    Key,
}

/// The field that a misspelt one was meant to be.
pub(super) fn meant(error: &Error) -> Option<&'static str> {
    match error {
        Error::NoSuchStructField { expected, found, .. } => known(found, expected),
        _ => None,
    }
}

/// The one of these fields that a name is meant for: it is misspelt, or what others call it.
fn known(found: &str, fields: &[&'static str]) -> Option<&'static str> {
    let ours = match found {
        "learning_rate" => "lr",
        "batch_size" => "batch",
        "iterations" | "max_steps" | "num_steps" => "steps",
        "max_tokens" | "max_new_tokens" | "max_length" | "max_completion_length" => "tokens_max",
        "kl_coef" | "kl_weight" | "beta" => "kl",
        "max_grad_norm" | "grad_clip" | "clip_grad_norm" => "clip_norm",
        "group_size" | "num_generations" | "samples" => "group",
        "evaluate_every" | "eval_every" | "eval_steps" | "eval" => "evaluate",
        "hidden_size" => "hidden",
        "num_layers" | "num_hidden_layers" => "layers",
        "num_attention_heads" => "heads",
        "num_key_value_heads" => "kv_heads",
        "intermediate_size" => "ffn",
        "file" => "path",
        _ => found,
    };
    fields.iter().copied().find(|field| *field == ours).or_else(|| nearest(found, fields))
}

/// Describes an error at `path`, where `value` stands.
pub(super) fn mistake(error: &Error, path: &str, value: &str) -> Mistake {
    match error {
        Error::NoSuchStructField { expected, found, .. } => unknown_field(found, expected, path),
        Error::DuplicateStructField { field, .. } => duplicate(field),
        Error::NoSuchEnumVariant { expected, found, outer } => unknown_variant(found, expected, outer.as_deref()),
        Error::ExpectedDifferentStructName { expected, found } => unknown_variant(found, &[expected], None),
        Error::IntegerOutOfBounds => out_of_bounds(value),
        Error::InvalidEscape(_) => escape(),
        _ => wrong_kind(error, path, value),
    }
}

fn unknown_field(found: &str, expected: &[&'static str], path: &str) -> Mistake {
    let misspelt = known(found, expected).map(|name| format!("did you mean `{name}`?"));
    let (moved, fields) = (home(found, path), format!("the fields here are {}", list(expected)));
    let help = misspelt.or(moved).unwrap_or(fields);
    Mistake { code: "workflow::unknown_field", on: On::Key, message: format!("there is no field `{found}` here"), help }
}

/// Where a known field belongs that stands somewhere else.
fn home(found: &str, path: &str) -> Option<String> {
    let home = match found {
        "heldout" | "template" | "chat" => "`data`",
        "temperature" | "tokens_max" => "`sampling`",
        "slots_max" | "cpu" | "threads" | "cache_tokens_max" => "`devices`",
        "drafters" | "controller" | "training" | "lending" => "`speculation`",
        "lr" | "betas" | "weight_decay" | "clip_norm" | "warmup" | "schedule" => "the `optimizer` of a step",
        "weights" | "sha256" | "positions_max" => "a `Tiny` model",
        "prompts" | "group" | "clip" | "kl" | "normalize" => "a `Grpo` step",
        "evaluate" => "a `Grpo` or `Sft` step",
        "seed" | "rewards" | "sampling" | "devices" | "speculation" | "supervision" | "checkpoint" => {
            "the `Workflow` itself"
        }
        _ => return None,
    };
    let is_there = path.starts_with(home.trim_matches('`'));
    (!is_there).then(|| format!("`{found}` belongs to {home}"))
}

fn duplicate(field: &str) -> Mistake {
    let message = format!("`{field}` is given a second time");
    Mistake { code: "workflow::duplicate_field", on: On::Key, message, help: "remove one of the two".into() }
}

fn unknown_variant(found: &str, expected: &[&str], outer: Option<&str>) -> Mistake {
    let noun = match outer {
        Some("Model") => "a model",
        Some("Data") => "a source of data",
        Some("Step") => "a step",
        Some("Reward") => "a reward",
        Some("Drafter") => "a drafter",
        Some("Controller") => "a controller",
        Some("Schedule") => "a schedule",
        Some("Precision") => "a precision",
        Some("Compute") => "a number format",
        _ => "known here",
    };
    let meant = nearest(found, expected).map(|name| format!("did you mean `{name}`?"));
    let help = meant.unwrap_or_else(|| format!("write {}", choices(expected)));
    Mistake { code: "workflow::unknown_name", on: On::Name, message: format!("`{found}` is not {noun}"), help }
}

fn out_of_bounds(value: &str) -> Mistake {
    let help = if value.starts_with('-') { "write 0 or a positive number" } else { "write a smaller number" };
    let message = format!("`{value}` is out of range for a whole number");
    Mistake { code: "workflow::out_of_range", on: On::Value, message, help: help.into() }
}

fn escape() -> Mistake {
    let help = "write a backslash as `\\\\`, or put an r before the quotes: r\"C:\\models\"";
    let message = "this text has a backslash that means nothing".to_owned();
    Mistake { code: "workflow::syntax", on: On::Value, message, help: help.into() }
}

fn wrong_kind(error: &Error, path: &str, value: &str) -> Mistake {
    let wanted = match error {
        Error::ExpectedInteger | Error::InvalidIntegerDigit { .. } => "a whole number",
        Error::ExpectedComma if is_number(value) => "a whole number",
        Error::ExpectedFloat | Error::FloatUnderscore | Error::UnderscoreAtBeginning => "a number",
        Error::ExpectedBoolean => "`true` or `false`",
        Error::ExpectedString | Error::ExpectedStringEnd => "a text in quotes",
        Error::ExpectedArray => "a list in `[` and `]`",
        Error::ExpectedDifferentLength { .. } | Error::ExpectedStructLikeEnd => "two numbers in `(` and `)`",
        Error::ExpectedStructLike if is_pair(path) => "two numbers in `(` and `)`",
        Error::ExpectedNamedStructLike(_) => "fields in `(` and `)`",
        Error::ExpectedStructLike => "a name with `(` and `)`",
        Error::ExpectedComma => "a name without `(` and `)`",
        Error::ExpectedIdentifier if !names(path).is_empty() => return unnamed(path, value),
        Error::ExpectedIdentifier | Error::SuggestRawIdentifier(_) => "fields with names",
        _ => return other(error, value),
    };
    let message = format!("expected {wanted}, found `{value}`");
    Mistake { code: "workflow::wrong_kind", on: On::Value, message, help: correction(wanted, path, value) }
}

/// A value where one of a few names should stand.
fn unnamed(path: &str, value: &str) -> Mistake {
    let (names, bare) = (names(path), value.trim_matches('"'));
    let help = match nearest(bare, names) {
        Some(name) if bare != value => format!("write {name} without quotes"),
        _ if value.starts_with('(') => format!("write the name before the bracket, for instance `{}(…)`", names[0]),
        _ => format!("for instance `{}`", example(crate::tree::parent(path), last(path))),
    };
    let message = format!("expected {}, found `{value}`", choices(names));
    Mistake { code: "workflow::wrong_kind", on: On::Value, message, help }
}

/// Names that may stand at a path.
fn names(path: &str) -> &'static [&'static str] {
    match (last(path), path.ends_with(']')) {
        ("model", _) => &["Tiny", "HuggingFace", "Gguf"],
        ("data", _) => &["Chains", "Jsonl"],
        ("steps", true) => &["Sft", "Grpo", "Evaluate", "Export"],
        ("rewards", true) => &["Exact", "Numeric", "Format", "Steps", "Length"],
        ("drafters", true) | ("drafter", _) => &["Eagle", "Eagle3", "Suffix"],
        ("controller", _) => &["Off", "Fixed", "Bandit", "Table", "Threshold"],
        ("schedule", _) => &["Constant", "Cosine"],
        ("precision", _) => &["F32", "F16"],
        ("compute", _) => &["F32", "Bf16"],
        _ => &[],
    }
}

fn correction(wanted: &str, path: &str, value: &str) -> String {
    let field = last(path);
    let bare = value.trim_matches('"');
    match wanted {
        "a text in quotes" if !value.contains(['(', '[']) => format!("write \"{bare}\""),
        "a list in `[` and `]`" if !value.starts_with('(') => format!("write `{field}: [{value}]`"),
        "a list in `[` and `]`" => "use `[` and `]` for a list".to_owned(),
        "a name with `(` and `)`" => format!("write `{value}(…)`, or `{value}()` if all its fields have defaults"),
        "a name without `(` and `)`" => format!("write `{}`", bare.split('(').next().unwrap_or(bare)),
        "a whole number" | "a number" if bare != value && is_number(bare) => format!("write {bare} without quotes"),
        "a whole number" if is_number(value) => whole(value),
        "`true` or `false`" if matches!(bare, "true" | "false") => format!("write {bare} without quotes"),
        "`true` or `false`" if matches!(value, "True" | "False" | "TRUE" | "FALSE") => {
            format!("write {}", value.to_lowercase())
        }
        _ => format!("for instance `{}`", example(crate::tree::parent(path), field)),
    }
}

/// A whole number for one with a fraction, an exponent or letters.
fn whole(value: &str) -> String {
    match value.parse::<f64>() {
        Ok(number) if (0.0..1e15).contains(&number) => format!("write {}", number.round()),
        _ => "write it with digits only".to_owned(),
    }
}

fn other(error: &Error, value: &str) -> Mistake {
    let text = error.to_string();
    let mut letters = text.chars();
    let first: String = letters.next().map(char::to_lowercase).into_iter().flatten().collect();
    let message = format!("{first}{} at `{value}`", letters.as_str());
    Mistake { code: "workflow::syntax", on: On::Value, message, help: "compare with the shipped quickstart.ron".into() }
}

fn is_number(value: &str) -> bool {
    value.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'))
}

fn is_pair(path: &str) -> bool {
    matches!(last(path), "betas" | "clip")
}

/// `steps[1].clip.0` → `clip`, `steps[1]` → `steps`.
fn last(path: &str) -> &str {
    let name = |part: &&str| part.starts_with(|c: char| c.is_ascii_alphabetic());
    path.rsplit(['.', '[']).find(name).unwrap_or(path)
}

/// Fields that have no default.
pub(super) fn required(outer: &str) -> &'static [&'static str] {
    match outer {
        "Workflow" => &["name", "model", "data", "steps"],
        "Tiny" => &["hidden", "layers", "heads", "ffn"],
        "Jsonl" => &["path"],
        "Sft" => &["steps", "batch", "optimizer"],
        "Grpo" => &["steps", "prompts", "group", "optimizer"],
        "Meanwhile" => &["every", "problems"],
        "Fixed" | "Strategy" => &["drafter", "depth"],
        "Threshold" | "TableRow" => &["batch_max", "strategy"],
        _ => &[],
    }
}

/// A field of the value at `path` with a value that works.
pub(super) fn example(path: &str, field: &str) -> String {
    let value = match field {
        "name" => "\"quickstart\"",
        "model" => "Gguf(\"model.gguf\")",
        "data" => "Chains(heldout: 100)",
        "steps" if path.is_empty() => "[Evaluate(problems: 100)]",
        "rewards" => "[Exact(marker: \"#\")]",
        "hidden" => "128",
        "layers" | "heads" | "kv_heads" => "4",
        "ffn" => "352",
        "positions_max" => "512",
        "weights" => "\"model.safetensors\"",
        "path" => "\"problems.jsonl\"",
        "template" => "\"{question}\"",
        "chat" | "normalize" => "true",
        "optimizer" | "training" => "(lr: 0.001)",
        "lr" => "0.001",
        "betas" => "(0.9, 0.95)",
        "clip" => "(0.2, 0.2)",
        "schedule" => "Cosine",
        "evaluate" => "(every: 50, problems: 100)",
        "to" => "\"model\"",
        "marker" => "\"#\"",
        "sampling" => "(temperature: 1.0)",
        "devices" => "(slots_max: 16)",
        "speculation" => "(controller: Off)",
        "controller" => "Off",
        "drafters" => "[Eagle(), Suffix()]",
        "strategies" => "[(drafter: Eagle, depth: 4)]",
        "strategy" => "(drafter: Eagle, depth: 4)",
        "batch_max" => "4",
        "drafter" => "Eagle",
        "supervision" => "(restarts_max: 5)",
        "checkpoint" => "(every: 1, keep: 2)",
        "temperature" | "weight" | "clip_norm" => "1.0",
        "kl" | "epsilon" | "tail" | "weight_decay" => "0.05",
        "terms_mean" => "5.0",
        "period_s" => "60.0",
        "sha256" => "\"64 hexadecimal digits\"",
        "group" | "prompts" | "batch" | "micro_batch" | "depth" => "8",
        _ => "100",
    };
    format!("{field}: {value}")
}

/// `a`, `b` and `c`.
pub(super) fn list(names: &[&str]) -> String {
    joined(names, "and")
}

/// `a`, `b` or `c`.
fn choices(names: &[&str]) -> String {
    joined(names, "or")
}

fn joined(names: &[&str], word: &str) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} {word} {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}
