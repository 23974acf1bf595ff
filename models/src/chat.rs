//! Chat templates: from messages to a prompt, as Hugging Face's Jinja environment would render them.
//!
//! No clock: `strftime_now` tells a fixed date, so that a run can be repeated.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::error::{Error, Result};
use crate::load::Loaded;

/// A template with the texts of the special tokens it may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    /// Jinja source.
    pub source: String,
    /// Text of the token that begins a text; empty without one.
    pub bos: String,
    /// Text of the token that ends an answer.
    pub eos: String,
}

impl ChatTemplate {
    /// The template of a loaded model, if it has one.
    #[must_use]
    pub fn of(model: &Loaded) -> Option<Self> {
        let text = |id: Option<u32>| id.and_then(|id| model.tokenizer.token(id)).unwrap_or_default();
        let source = model.chat_template.clone()?;
        Some(Self { source, bos: text(model.config.bos), eos: text(model.config.eos.first().copied()) })
    }

    /// The prompt for one question of a user.
    ///
    /// # Errors
    /// If the template is malformed or refuses the message.
    pub fn prompt(&self, question: &str) -> Result<String> {
        render(&self.source, &[("user", question)], true, &self.bos, &self.eos)
    }
}

/// Renders messages, each a role and a content. `add_generation_prompt` opens the assistant's turn.
///
/// # Errors
/// If the template is malformed or raises an exception.
pub fn render(
    template: &str,
    messages: &[(&str, &str)],
    add_generation_prompt: bool,
    bos: &str,
    eos: &str,
) -> Result<String> {
    let messages: Vec<Value> =
        messages.iter().map(|(role, content)| context! { role => *role, content => *content }).collect();
    let context = context! { messages, add_generation_prompt, bos_token => bos, eos_token => eos };
    environment().render_str(template, context).map_err(|source| Error::ChatTemplate { source })
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<String, JinjaError> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| date(&format));
    environment
}

/// Whitespace around blocks as Hugging Face sets it.
fn syntax() -> SyntaxConfig {
    let mut builder = SyntaxConfig::builder();
    builder.trim_blocks(true).lstrip_blocks(true);
    builder.build().unwrap_or_default()
}

/// 1 January 2025, 00:00, a Wednesday.
fn date(format: &str) -> String {
    let fields = [
        ("%Y", "2025"),
        ("%m", "01"),
        ("%d", "01"),
        ("%B", "January"),
        ("%b", "Jan"),
        ("%A", "Wednesday"),
        ("%a", "Wed"),
        ("%y", "25"),
        ("%H", "00"),
        ("%M", "00"),
        ("%S", "00"),
    ];
    fields.iter().fold(format.to_owned(), |text, (field, value)| text.replace(field, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The template of SmolLM2's GGUF file.
    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn smollm2_prompts_are_chatml() {
        let template = ChatTemplate { source: CHATML.into(), bos: "<|im_start|>".into(), eos: "<|im_end|>".into() };
        let wanted = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                      <|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(template.prompt("1+1?").unwrap(), wanted);
    }

    #[test]
    fn python_habits_work() {
        let source = "{%- if messages[0].role == 'user' %}\n  {{- messages[0].content.strip().upper() }}\n{%- endif %}\n\
                      {{- bos_token }}{{ strftime_now('%d %b %Y') }}{{ eos_token }}\n";
        let text = render(source, &[("user", "  hi ")], false, "<s>", "</s>").unwrap();
        assert_eq!(text, "HI<s>01 Jan 2025</s>");
    }

    #[test]
    fn mistakes_are_errors() {
        for source in ["{{ raise_exception('no system role') }}", "{% for %}", "{{ nothing.at.all }}"] {
            assert!(matches!(render(source, &[], true, "", ""), Err(Error::ChatTemplate { .. })), "{source}");
        }
    }
}
