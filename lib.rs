//! Taper for embedders: parse a workflow, run it, read its report.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let text = std::fs::read_to_string("workflows/quickstart.ron")?;
//! let plan = taper::parse(&text, std::path::Path::new("workflows")).map_err(|problems| format!("{problems:?}"))?;
//! let options = taper::Options { dir: "runs/mine".into(), ..Default::default() };
//! taper::run(&plan, options, |progress| eprintln!("{progress:?}"), std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```

pub use actors::{
    Asked, CycleStats, DecodeOptions, Decoded, Ended, Error, Failing, Fault, Layout, Moment, Options, OwnReward, Past,
    Precision, Progress, Result, ScoredAnswer, ScoredGroup, Session, Solo, check_inputs, inspect, look, run,
};
pub use kernels;
pub use models;
pub use state;
pub use state::metrics::{Report, StepMetrics};
pub use state::plan::{self, Plan};
pub use state::report::report;
pub use workflows::{Problem, Summary, describe, parse};
