//! Signals that end a run: all of them as cleanly as Ctrl-C.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// A signal that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    fn number(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
            Self::Hangup => 129,
        }
    }

    pub(crate) fn code(self) -> ExitCode {
        ExitCode::from(self.number())
    }
}

/// Who is told of the next signal: two runs may be at work.
static WAIT: Mutex<Vec<oneshot::Sender<Signal>>> = Mutex::new(Vec::new());
/// Time within which signals of several kinds are one: a terminal that closes sends more than one.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The next signal from now on. One that nobody waits for any more ends the process: the second one of a run that is stopping, for
/// instance, but for a hangup. Nothing durable is lost by that.
pub(crate) fn next() -> std::io::Result<oneshot::Receiver<Signal>> {
    static LISTENS: Once = Once::new();
    let (tell, told) = oneshot::channel();
    wait().push(tell);
    let mut result = Ok(told);
    LISTENS.call_once(|| {
        if let Err(error) = listen() {
            result = Err(error);
        }
    });
    result
}

fn wait() -> MutexGuard<'static, Vec<oneshot::Sender<Signal>>> {
    WAIT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to listen, on a thread of its own: once it has, signals do not end the process by themselves.
fn listen() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _guard = runtime.enter();
        Signals::new()
    };
    let forever = async move {
        let mut told: Option<(Signal, Instant)> = None;
        loop {
            let signal = signals.any().await;
            // All are told, whoever still listens.
            let hears: Vec<bool> =
                std::mem::take(&mut *wait()).into_iter().map(|tell| tell.send(signal).is_ok()).collect();
            if hears.contains(&true) {
                told = Some((signal, Instant::now()));
                continue;
            }
            // A run that is stopping lives on without its terminal, which may send another one, too. The same one twice is meant.
            let is_meant = |(first, at): (Signal, Instant)| {
                !matches!(signal, Signal::Hangup) && (signal == first || at.elapsed() > AT_ONCE)
            };
            if told.is_none_or(is_meant) {
                std::process::exit(i32::from(signal.number()));
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(forever))?;
    Ok(())
}

use system::Signals;
pub(crate) use system::outlive_limits;

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
    pub(super) struct Signals(Vec<(Signal, unix::Signal)>);

    impl Signals {
        /// Within a runtime.
        pub(super) fn new() -> Self {
            let mut kinds =
                vec![(Signal::Interrupt, SignalKind::interrupt()), (Signal::Terminate, SignalKind::terminate())];
            if !ignores_hangup() {
                kinds.push((Signal::Hangup, SignalKind::hangup()));
            }
            Self(kinds.into_iter().filter_map(|(name, kind)| Some((name, signal(kind).ok()?))).collect())
        }

        /// The next one.
        pub(super) async fn any(&mut self) -> Signal {
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
    pub(super) struct Signals;

    /// There are none.
    pub(crate) fn outlive_limits() {}

    impl Signals {
        pub(super) fn new() -> Self {
            Self
        }

        /// The next one.
        pub(super) async fn any(&mut self) -> Signal {
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
            Signal::Interrupt
        }
    }
}
