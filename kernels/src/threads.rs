//! Threads of the process.

use std::sync::{Arc, Mutex};
use std::thread::Builder;

/// Whether this process may start so many threads more, now.
///
/// # Errors
/// With what the system said.
pub fn may_start(threads: usize) -> std::io::Result<()> {
    // Each waits until all have been tried.
    let (gate, mut started, mut result) = (Arc::new(Mutex::new(())), Vec::new(), Ok(()));
    let closed = gate.lock();
    while started.len() < threads && result.is_ok() {
        let gate = gate.clone();
        match Builder::new().stack_size(STACK).spawn(move || drop(gate.lock())) {
            Ok(thread) => started.push(thread),
            Err(error) => result = Err(error),
        }
    }
    drop(closed);
    started.into_iter().for_each(|thread| drop(thread.join()));
    result
}

/// Bytes of a thread that does nothing.
const STACK: usize = 1 << 16;

#[cfg(test)]
mod tests {
    #[test]
    fn some_threads_may_be_started() {
        super::may_start(20).unwrap();
    }
}
