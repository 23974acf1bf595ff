//! Workflow files: RON text in, a validated [`state::plan::Plan`] out, or everything that is wrong with it.
//!
//! Nothing here reads a file, a clock or the machine: the same text and folder always give the same plan.
//!
//! ```
//! use std::path::Path;
//!
//! let text = r#"Workflow(
//!     name: "sums",
//!     model: Tiny(hidden: 64, layers: 2, heads: 4, ffn: 176),
//!     data: Chains(heldout: 100),
//!     steps: [Grpo(steps: 10, prompts: 4, group: 8, optimizer: (lr: 1e-4)), Evaluate(problems: 100)],
//! )"#;
//! let plan = workflows::parse(text, Path::new("/runs")).expect("a good workflow");
//! assert_eq!(workflows::describe(&plan).rollouts, 320);
//!
//! let problems = workflows::parse(&text.replace("group: 8", "groop: 8"), Path::new("/runs")).unwrap_err();
//! assert_eq!(problems[0].help.as_deref(), Some("did you mean `group`?"));
//! ```

mod lower;
mod nearest;
mod problem;
mod spec;
mod structure;
mod summary;
mod token;
mod tree;

use std::path::Path;

use state::plan::Plan;

pub use problem::Problem;
pub use summary::{Summary, describe};

/// Longest file that is read, in bytes.
pub const LENGTH_MAX: usize = 256 * 1024;

/// Reads a workflow file. Relative paths in it are taken from `folder`.
///
/// # Errors
/// All problems of the file, in the order of their places: first those of its form; if there are none, those of
/// its values.
pub fn parse(text: &str, folder: &Path) -> Result<Plan, Vec<Problem>> {
    if let Some(problem) = unreadable(text) {
        return Err(vec![problem]);
    }
    let tree = tree::tree(text).map_err(|fault| vec![syntax(text, fault)])?;
    let plan = structure::read(text, &tree).and_then(|workflow| lower::lower(&workflow, text, &tree, folder));
    plan.map_err(|mut problems| {
        problems.sort_by(|a, b| (a.offset, &a.path).cmp(&(b.offset, &b.path)));
        problems
    })
}

/// A text that is no workflow at all.
fn unreadable(text: &str) -> Option<Problem> {
    let problem = |code, message: String, help: &str| {
        Some(Problem::new(text, code, String::new(), 0..0, message).with_help(Some(help.into())))
    };
    // What holds no text is told as that.
    if text.len() > LENGTH_MAX && !text.contains('\0') {
        let message = format!("the file has more than {LENGTH_MAX} bytes");
        return problem("workflow::too_large", message, "keep data in files of its own, named by `Jsonl(path: …)`");
    }
    if token::tokens(text).is_ok_and(|tokens| tokens.is_empty()) {
        let help = "write `Workflow(name: …, model: …, data: …, steps: […])`; quickstart.ron shows how";
        return problem("workflow::empty", "the file holds no workflow".into(), help);
    }
    None
}

fn syntax(text: &str, fault: token::Fault) -> Problem {
    Problem::new(text, "workflow::syntax", String::new(), fault.span, fault.message).with_help(fault.help)
}
