//! Signals that end a run: all of them as cleanly as Ctrl-C.

use std::process::ExitCode;

/// A signal that was received.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// What `kill` and service managers send.
    #[cfg_attr(not(unix), expect(dead_code, reason = "not known there"))]
    Terminate,
    /// The terminal is gone.
    #[cfg_attr(not(unix), expect(dead_code, reason = "not known there"))]
    Hangup,
}

impl Signal {
    /// 128 and the signal's number, as shells have it.
    pub(crate) fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
            Self::Hangup => 129,
        })
    }
}

pub(crate) use system::{Signals, outlive_limits};

#[cfg(unix)]
mod system {
    use std::task::Poll;

    use tokio::signal::unix::{self, SignalKind, signal};

    use super::Signal;

    /// SIGXFSZ, as Linux and macOS number it.
    const FILE_TOO_LARGE: i32 = 25;

    /// From now on a file that grows beyond `ulimit -f` is what it is on a full disk: an error that names it. A signal that is
    /// listened to does not end the process, not even when nobody listens any more.
    pub(crate) fn outlive_limits() {
        if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() {
            let _guard = runtime.enter();
            drop(signal(SignalKind::from_raw(FILE_TOO_LARGE)));
        }
    }

    /// Signals from when it was made; those that come before someone waits are kept.
    pub(crate) struct Signals(Vec<(Signal, unix::Signal)>);

    impl Signals {
        /// Within a runtime.
        pub(crate) fn new() -> Self {
            let mut kinds =
                vec![(Signal::Interrupt, SignalKind::interrupt()), (Signal::Terminate, SignalKind::terminate())];
            if !ignores_hangup() {
                kinds.push((Signal::Hangup, SignalKind::hangup()));
            }
            Self(kinds.into_iter().filter_map(|(name, kind)| Some((name, signal(kind).ok()?))).collect())
        }

        /// The next one.
        pub(crate) async fn any(mut self) -> Signal {
            std::future::poll_fn(|cx| {
                let ready = self.0.iter_mut().find_map(|(name, s)| s.poll_recv(cx).is_ready().then_some(*name));
                ready.map_or(Poll::Pending, Poll::Ready)
            })
            .await
        }
    }

    /// Whether the process was started to outlive its terminal, as by `nohup`.
    fn ignores_hangup() -> bool {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
    }
}

#[cfg(not(unix))]
mod system {
    use super::Signal;

    /// Ctrl-C alone.
    pub(crate) struct Signals;

    /// There are none.
    pub(crate) fn outlive_limits() {}

    impl Signals {
        pub(crate) fn new() -> Self {
            Self
        }

        /// The next one.
        pub(crate) async fn any(self) -> Signal {
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            Signal::Interrupt
        }
    }
}
