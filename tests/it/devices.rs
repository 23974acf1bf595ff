//! A device that panics or hangs is started again, and the step goes on.

use std::path::Path;
use std::sync::{Arc, Mutex};

use taper::{Ended, Failing, Fault, Moment, Options, Progress, parse};

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
    use Failing::{Hangs, Panics};
    use Moment::{Cycle, MicroBatch};
    let moments = [
        (1, Cycle(40), Panics),
        (0, Cycle(120), Panics),
        (1, Cycle(60), Hangs),
        (0, Cycle(90), Hangs),
        (1, MicroBatch(15), Hangs),
    ];
    is_as_without(&super::WORKFLOW.replace("\\#", "#"), &moments);
}

#[test]
fn a_device_lost_in_training_costs_time_only() {
    // Idle time is for learning alone.
    let learning = "speculation: (training: (publish_every: 1), lending: false),\n    devices:";
    let text = super::with_idle_time(super::WORKFLOW.replace("\\#", "#")).replace("devices:", learning);
    let moments = [
        (0, Moment::MicroBatch(50), Failing::Panics),
        (1, Moment::Look(40), Failing::Panics),
        (0, Moment::Look(30), Failing::Hangs),
    ];
    is_as_without(&text, &moments);
}

#[test]
fn a_run_that_is_given_up_keeps_its_last_step() {
    let folder = tempfile::tempdir().unwrap();
    let text = super::WORKFLOW.replace("\\#", "#").replace("steps: 10", "steps: 60");
    let mut plan = parse(&text, Path::new("/")).unwrap();
    (plan.supervision.restarts_max, plan.checkpoint.every) = (0, 1000);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let run = |name: &str, fault| {
        let options = Options { dir: folder.path().join(name), fault, ..Options::default() };
        runtime.block_on(taper::run(&plan, options, |_| {}, std::future::pending()))
    };
    // More than it may have in all steps of SFT, and no more than the one of each step that it has at least.
    let fault = Fault { device: 1, moment: Moment::MicroBatch(40), how: Failing::Panics };
    let error = run("run", Some(fault)).unwrap_err().to_string();
    assert!(error.contains("restarts_max 0"), "{error}");
    let state = taper::inspect(&folder.path().join("run")).unwrap();
    let grpo = state.history.iter().filter(|step| step.stage == 2).count();
    assert!(grpo > 0 && state.checkpoint == Some(format!("002-{grpo:06}")), "{grpo}: {:?}", state.checkpoint);
    assert_eq!([run("run", None), run("whole", None)].map(Result::unwrap), [Ended::Complete; 2]);
    let [one, other] = ["run", "whole"].map(|name| taper::inspect(&folder.path().join(name)).unwrap().weights_blake3);
    assert_eq!(one, other);
}

/// Its folder is free once that is noted, and it goes on there.
#[test]
fn a_run_that_nobody_waits_for_is_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let text = super::WORKFLOW.replace("\\#", "#").replace("steps: 10", "steps: 60");
    let plan = parse(&text, Path::new("/")).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let options = |name: &str| Options { dir: folder.path().join(name), ..Options::default() };
    let run = |name: &str| runtime.block_on(taper::run(&plan, options(name), |_| {}, std::future::pending()));
    runtime.block_on(async {
        let (learns, begun) = tokio::sync::oneshot::channel();
        let learns = Mutex::new(Some(learns));
        let observer = move |progress| {
            if matches!(progress, Progress::StepDone(metrics) if metrics.kind == "grpo") {
                learns.lock().unwrap().take().map(|learns| learns.send(()));
            }
        };
        tokio::select! {
            ended = taper::run(&plan, options("run"), observer, std::future::pending()) => panic!("{ended:?}"),
            _ = begun => {}
        }
    });
    let again = loop {
        match run("run") {
            Err(error) if error.to_string().contains("is using") => std::thread::yield_now(),
            ended => break ended,
        }
    };
    assert_eq!([again, run("whole")].map(Result::unwrap), [Ended::Complete; 2]);
    let [one, other] = ["run", "whole"].map(|name| taper::inspect(&folder.path().join(name)).unwrap());
    assert_eq!((one.sessions, one.weights_blake3), (2, other.weights_blake3));
}

/// Runs a workflow as it is, and with a device that fails at each of these moments, by hanging or by a panic.
fn is_as_without(text: &str, moments: &[(usize, Moment, Failing)]) {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = parse(text, Path::new("/")).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let faults = moments.iter().map(|&(device, moment, how)| Some(Fault { device, moment, how }));
    let mut hashes = Vec::new();
    for fault in std::iter::once(None).chain(faults) {
        let dir = folder.path().join(format!("{}", hashes.len()));
        plan.supervision.silent_s = if fault.is_some_and(|fault| fault.how == Failing::Hangs) { 4.0 } else { 0.0 };
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
        let (lost, state) = (*lost.lock().unwrap(), taper::inspect(&dir).unwrap());
        assert_eq!(lost, state.restarts);
        // One that only waits for its turn on a busy machine may be taken for silent, too.
        let hangs = fault.is_some_and(|fault| fault.how == Failing::Hangs);
        assert!(lost == usize::from(fault.is_some()) || (hangs && lost > 1), "{lost} lost: {fault:?}");
        hashes.push(state.weights_blake3);
    }
    assert!(hashes.iter().all(|h| *h == hashes[0]), "{hashes:?}");
}
