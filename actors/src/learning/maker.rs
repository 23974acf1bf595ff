//! Who makes the learner: a thread of its own, because millions of random numbers, or moments of a checkpoint, take longer than a device
//! may take to obey an order. Devices look for orders meanwhile; a maker that nobody waits for any more goes on.

use std::sync::Arc;
use std::thread::JoinHandle;

use models::RawWeights;
use state::drafter::Publication;

use super::{Learning, Shared};
use crate::error::{Error, Result};

/// What an earlier learner left, from which another one goes on: its state, and how its versions did.
pub(crate) type Left = (Option<Arc<RawWeights>>, Publication);

/// A learner that is made once it is asked for.
pub(crate) enum Maker {
    /// Nobody has asked for it yet.
    Waits(Left),
    Makes(Left, JoinHandle<Result<Learning>>),
    Made(Arc<Shared>),
}

impl Maker {
    /// The learner, once it is made; whoever asks first has it made, as `make` tells. What goes wrong is told once, and whoever asks
    /// next has it made again.
    pub(crate) fn get<M>(&mut self, make: impl FnOnce() -> M) -> Result<Option<Arc<Shared>>>
    where
        M: FnOnce(Left) -> Result<Learning> + Send + 'static,
    {
        let left = match self {
            Self::Made(learning) => return Ok(Some(learning.clone())),
            Self::Makes(_, thread) if !thread.is_finished() => return Ok(None),
            Self::Waits(left) | Self::Makes(left, _) => left.clone(),
        };
        let Self::Makes(_, thread) = std::mem::replace(self, Self::Waits(left.clone())) else {
            let (make, given) = (make(), left.clone());
            let thread = std::thread::Builder::new().name("learner".into()).spawn(move || make(given));
            let refused = |e| Error::Runtime { reason: format!("no thread for the drafter's learner: {e}") };
            *self = Self::Makes(left, thread.map_err(refused)?);
            return Ok(None);
        };
        let learning = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let learning = Arc::new(Shared::new(learning));
        *self = Self::Made(learning.clone());
        Ok(Some(learning))
    }

    /// The learner, if it is made.
    pub(crate) fn made(&self) -> Option<Arc<Shared>> {
        match self {
            Self::Made(learning) => Some(learning.clone()),
            Self::Waits(_) | Self::Makes(..) => None,
        }
    }

    /// What is left of an earlier one, as long as no other is made.
    pub(crate) fn left(&self) -> Option<Left> {
        match self {
            Self::Made(_) => None,
            Self::Waits(left) | Self::Makes(left, _) => Some(left.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn wrong<T>(reason: &str) -> Result<T> {
        Err(Error::Runtime { reason: reason.into() })
    }

    #[test]
    fn nothing_is_lost_while_it_makes_nor_when_it_fails() {
        let mut raw = RawWeights::default();
        raw.tensors.insert("learned".into(), (vec![1], vec![7.0]));
        let mut maker = Maker::Waits((Some(Arc::new(raw)), Publication::default()));
        let before = maker.left();
        for attempt in ["first", "second"] {
            let (go_on, waits) = channel::<()>();
            let make = || {
                move |left: Left| {
                    assert_eq!(left.0.map(|raw| raw.tensors["learned"].1[0]), Some(7.0));
                    let _ = waits.recv_timeout(Duration::from_secs(60));
                    wrong(attempt)
                }
            };
            assert!(maker.get(make).unwrap().is_none());
            // Who asks again has nothing made beside it, and a checkpoint keeps what there was.
            assert!(maker.get(|| |_| wrong("twice")).unwrap().is_none());
            assert_eq!((maker.left(), maker.made().is_some()), (before.clone(), false));
            drop(go_on);
            let told = loop {
                match maker.get(|| |_| wrong("twice")) {
                    Ok(none) => assert!(none.is_none()),
                    Err(error) => break error.to_string(),
                }
            };
            assert!(told.contains(attempt), "{told}");
            assert_eq!(maker.left(), before);
        }
    }

    #[test]
    fn a_panic_is_that_of_who_asks() {
        let mut maker = Maker::Waits(Left::default());
        let panics = |maker: &mut Maker| -> Option<Arc<Shared>> {
            loop {
                maker.get(|| |_| -> Result<Learning> { panic!("made wrongly") }).unwrap();
            }
        };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| panics(&mut maker)));
        assert!(caught.is_err() && maker.left().is_some());
    }
}
