//! What the system says of processes.

use std::path::Path;

/// Whether a process, by its number, has ended, as far as the system tells: one in another container may not be seen here.
#[must_use]
pub fn has_ended(number: &str) -> bool {
    let processes = Path::new("/proc");
    let is_number = number.parse::<u32>().is_ok();
    is_number && processes.join("self").exists() && !processes.join(number).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_there() {
        assert!(!has_ended(&std::process::id().to_string()));
        assert!(!has_ended("self") && !has_ended(""));
        assert_eq!(has_ended("4294967295"), Path::new("/proc/self").exists());
    }
}
