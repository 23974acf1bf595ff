//! Memory of the process.

/// Gives memory that is free back to the system. What threads freed, glibc keeps for them, also when they are gone: after a run it
/// would be missed by the next.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: it takes a number, and touches no memory in use.
        unsafe { malloc_trim(0) };
    }
}
