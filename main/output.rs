//! Text to stdout and stderr, which may be closed or full: a training goes on when no one listens.

use std::io::{ErrorKind, Write, stderr, stdout};
use std::process::ExitCode;

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

/// Writes what was measured to stdout, as JSON or as text; whether it is as it must be is the exit code.
pub(crate) fn measured(
    json: bool,
    value: &impl serde::Serialize,
    text: &str,
    is_good: bool,
) -> Result<ExitCode, Failure> {
    if json {
        self::json(value)?
    } else {
        report(text)?
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// So many of something that is more than one with an s.
pub(crate) fn count(count: u64, of: &str) -> String {
    if count == 1 { format!("1 {of}") } else { format!("{count} {of}s") }
}

/// A time that may be short.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        // What rounds to a thousand is told in the next unit.
        ..0.0009995 => format!("{:.0} µs", seconds * 1e6),
        ..0.00995 => format!("{:.1} ms", seconds * 1e3),
        ..0.9995 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

/// Writes a line to stderr, if anyone reads it.
pub(crate) fn note(text: &str) {
    let _ = writeln!(stderr().lock(), "{text}");
}
