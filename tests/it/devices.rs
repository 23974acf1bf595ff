//! A device that panics or hangs is started again, and the step goes on.

use std::path::Path;
use std::sync::{Arc, Mutex};

use taper::{Ended, Fault, Options, Progress, parse};

#[test]
fn a_runtime_of_one_thread_is_refused() {
    let plan = parse(&super::WORKFLOW.replace("\\#", "#"), Path::new("/")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = Options { dir: folder.path().join("run"), ..Options::default() };
    let error = runtime.block_on(taper::run(&plan, options, |_| {}, std::future::pending())).unwrap_err();
    assert!(error.to_string().contains("new_multi_thread"), "{error}");
    assert!(!folder.path().join("run").exists());
}

#[test]
fn a_lost_device_costs_time_only() {
    let folder = tempfile::tempdir().unwrap();
    let text = super::WORKFLOW.replace("\\#", "#");
    let mut plan = parse(&text, Path::new("/")).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut hashes = Vec::new();
    let fault = |device, cycle, hangs| Some(Fault { device, cycle, hangs });
    for fault in [None, fault(1, 40, false), fault(0, 120, false), fault(1, 60, true), fault(0, 90, true)] {
        let dir = folder.path().join(format!("{}", hashes.len()));
        plan.supervision.silent_s = if fault.is_some_and(|fault| fault.hangs) { 4.0 } else { 0.0 };
        let lost = Arc::new(Mutex::new(0));
        let seen = lost.clone();
        let observer = move |progress| {
            if matches!(progress, Progress::DeviceLost { .. }) {
                *seen.lock().unwrap() += 1;
            }
        };
        let options = Options { dir: dir.clone(), fault, ..Options::default() };
        let ended = runtime.block_on(taper::run(&plan, options, observer, std::future::pending())).unwrap();
        assert_eq!(ended, Ended::Complete);
        assert_eq!(*lost.lock().unwrap(), usize::from(fault.is_some()));
        let state = taper::inspect(&dir).unwrap();
        assert_eq!(state.restarts, usize::from(fault.is_some()));
        hashes.push(state.weights_sha256);
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}
