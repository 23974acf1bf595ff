//! Text to stdout and stderr, which may be closed or full: a training goes on when no one listens.

use std::io::{ErrorKind, Write, stderr, stdout};

use crate::failure::Failure;

/// Writes a report to stdout. A reader that has gone has read enough.
pub(crate) fn report(text: &str) -> Result<(), Failure> {
    let mut out = stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Writes a value as JSON to stdout.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    report(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Writes a line to stderr, if anyone reads it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(stderr().lock(), "{text}");
}
