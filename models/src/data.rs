//! Problems to train on and held-out ones to measure with.
//!
//! Both are pure functions of an index: asking in another order, or again after a crash, gives the same problem.

mod chains;
mod jsonl;

use state::plan::{Data, Source};

use crate::chat::ChatTemplate;
use crate::error::{Error, Result};

/// A question and what is known of its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The question.
    pub question: String,
    /// The reference's final answer.
    pub answer: String,
    /// Worked text to fine-tune on: the steps and the final answer, as the model should write them.
    pub solution: Option<String>,
}

/// Where problems come from, and how they become prompts.
#[derive(Debug, Clone)]
pub struct Dataset {
    problems: Problems,
    template: String,
    chat: bool,
}

#[derive(Debug, Clone)]
enum Problems {
    Chains(chains::Generator),
    Jsonl(jsonl::Lines),
}

impl Dataset {
    /// Opens the data of a plan. `seed` decides the order of training problems, and which ones a generator makes.
    ///
    /// # Errors
    /// If a file is missing, empty or has a bad line, or a parameter makes no sense.
    pub fn open(data: &Data, seed: u64) -> Result<Self> {
        if !data.template.is_empty() && !data.template.contains(QUESTION) {
            let expected = format!("a text with `{QUESTION}` in it");
            return Err(Error::Data { field: "template", value: format!("`{}`", data.template), expected });
        }
        let problems = match &data.source {
            Source::Chains(chains) => Problems::Chains(chains::Generator::new(chains, seed)?),
            Source::Jsonl(path, fields) => {
                Problems::Jsonl(jsonl::Lines::open(path, fields.as_ref(), data.heldout, seed)?)
            }
        };
        Ok(Self { problems, template: data.template.clone(), chat: data.chat })
    }

    /// Training problem `index`. A file's problems come in another order in every pass.
    #[must_use]
    pub fn problem(&self, index: u64) -> Problem {
        match &self.problems {
            Problems::Chains(chains) => chains.problem(index),
            Problems::Jsonl(lines) => lines.problem(index).clone(),
        }
    }

    /// Held-out problem `index`: never one of [`Dataset::problem`], and the same for every seed.
    ///
    /// # Panics
    /// If a file's held-out part has no such problem.
    #[must_use]
    pub fn heldout(&self, index: u64) -> Problem {
        match &self.problems {
            Problems::Chains(chains) => chains.heldout(index),
            Problems::Jsonl(lines) => lines.heldout(index).clone(),
        }
    }

    /// Training problems in one pass; a generator has no end.
    #[must_use]
    pub fn len(&self) -> Option<u64> {
        match &self.problems {
            Problems::Chains(_) => None,
            Problems::Jsonl(lines) => Some(lines.training() as u64),
        }
    }

    /// Whether there is nothing to train on; an opened dataset always has something.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// What rewards compare of an answer or a solution: of a generated sum what stands before its first check.
    #[must_use]
    pub fn attempt<'a>(&self, text: &'a str) -> &'a str {
        match &self.problems {
            Problems::Chains(_) => text.split('?').next().unwrap_or_default(),
            Problems::Jsonl(_) => text,
        }
    }

    /// Every problem of a file with its line, from 1, the held-out ones first; none of a generator, whose problems all look alike.
    pub fn listed(&self) -> impl Iterator<Item = (usize, &Problem)> {
        let lines = if let Problems::Jsonl(lines) = &self.problems { Some(lines.all()) } else { None };
        lines.into_iter().flatten()
    }

    /// The prompt of a problem: the question in the template, in the model's chat template if the plan says so.
    ///
    /// # Errors
    /// If a chat is asked for and `chat` is absent or fails.
    pub fn prompt(&self, problem: &Problem, chat: Option<&ChatTemplate>) -> Result<String> {
        let text = match self.template.is_empty() {
            true => problem.question.clone(),
            false => self.template.replace(QUESTION, &problem.question),
        };
        match self.chat {
            true => chat.ok_or(Error::NoChatTemplate)?.prompt(&text),
            false => Ok(text),
        }
    }
}

const QUESTION: &str = "{question}";

#[cfg(test)]
mod tests {
    use state::plan::Chains;

    use super::*;

    fn data(template: &str, chat: bool) -> Data {
        let chains = Chains {
            terms_min: 2,
            terms_mean: 3.0,
            terms_max: 9,
            tail: 0.1,
            tail_min: 7,
            check: 0.0,
            checks_max: 1,
            check_steps: 2,
            solution_max: 1_000,
        };
        Data { source: Source::Chains(chains), template: template.into(), chat, heldout: 10 }
    }

    #[test]
    fn what_stands_before_the_checks_counts() {
        let dataset = Dataset::open(&data("", false), 0).unwrap();
        assert_eq!(dataset.attempt("1+2=3#3"), "1+2=3#3");
        assert_eq!(dataset.attempt("1+2=4#4?1+2=3#3"), "1+2=4#4");
        assert_eq!(dataset.attempt("1+2=3;3+4=7#7?9?"), "1+2=3;3+4=7#7");
        assert_eq!(dataset.attempt("?1+2=3#3"), "");
        assert_eq!(dataset.attempt(""), "");
    }

    #[test]
    fn prompts_follow_template_and_chat() {
        let problem = Problem { question: "1+2?".into(), answer: "3".into(), solution: None };
        let prompt = |template, chat: bool| {
            let jinja = ChatTemplate { source: "[{{ messages[0].content }}]".into(), bos: "".into(), eos: "".into() };
            Dataset::open(&data(template, chat), 0).unwrap().prompt(&problem, Some(&jinja)).unwrap()
        };
        assert_eq!(prompt("", false), "1+2?");
        assert_eq!(prompt("Q {question} A", false), "Q 1+2? A");
        assert_eq!(prompt("Q {question}", true), "[Q 1+2?]");
        let none = Dataset::open(&data("", true), 0).unwrap().prompt(&problem, None);
        assert!(matches!(none, Err(Error::NoChatTemplate)));
        assert!(matches!(Dataset::open(&data("no place", false), 0), Err(Error::Data { .. })));
    }
}
