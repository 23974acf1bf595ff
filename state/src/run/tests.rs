use super::*;
use crate::plan::{
    Chains, Checkpoint, Controller, Data, Devices, Evaluate, Grpo, Model, Optimizer, Part, Sampling, Source,
    Speculation, Supervision,
};

fn plan() -> Plan {
    let optimizer = Optimizer {
        lr: 1.0,
        betas: (0.9, 0.95),
        weight_decay: 0.0,
        clip_norm: 1.0,
        warmup: 0,
        schedule: crate::plan::Schedule::Constant,
    };
    let grpo = Grpo {
        steps: 4,
        prompts: 1,
        group: 2,
        micro_batch: 1,
        clip: (0.2, 0.2),
        kl: 0.0,
        normalize: true,
        optimizer,
        part: Part::whole(4),
    };
    let chains = Chains {
        terms_min: 2,
        terms_mean: 3.0,
        terms_max: 4,
        tail: 0.0,
        tail_min: 4,
        check: 0.0,
        checks_max: 1,
        check_steps: 2,
        solution_max: 1_000,
    };
    Plan {
        name: "x".into(),
        seed: 0,
        model: Model::Gguf("m".into()),
        compute: crate::plan::Compute::F32,
        data: Data { source: Source::Chains(chains), template: "{question}".into(), chat: false, heldout: 1 },
        steps: vec![
            Step::Evaluate(Evaluate { problems: 1, temperature: 0.0 }),
            Step::Grpo(grpo),
            Step::Evaluate(Evaluate { problems: 1, temperature: 0.0 }),
        ],
        sampling: Sampling { temperature: 1.0, top_p: 1.0, tokens_max: 8, stop: Vec::new() },
        rewards: Vec::new(),
        devices: Devices { cpu: 1, threads: 1, slots_max: 1, cache_tokens_max: 0 },
        speculation: Speculation { drafters: Vec::new(), controller: Controller::Off, training: None, lending: false },
        supervision: Supervision { restarts_max: 1, period_s: 1.0, backoff_ms: 1, silent_s: 0.0 },
        checkpoint: Checkpoint { every: 2, keep: 2 },
    }
}

fn committed(stage: usize, step: usize, checkpoint: Option<&str>) -> Event {
    let kind = if stage == 1 { "grpo" } else { "evaluate" };
    let (of, accuracy) = (if stage == 1 { 4 } else { 1 }, stage as f64 / 10.0);
    let metrics = StepMetrics { stage, step, of, kind: kind.into(), wall_s: 1.0, accuracy, ..StepMetrics::default() };
    Event::StepCommitted {
        metrics: Box::new(metrics),
        weights_blake3: format!("{stage}.{step}"),
        checkpoint: checkpoint.map(Into::into),
    }
}

fn session(n: u32) -> Event {
    Event::SessionStarted { n, devices: vec!["cpu0".into()], kernels: "portable".into(), plan: None }
}

fn started() -> Event {
    let (plan, plan_sha256) = (Box::new(plan()), "p".into());
    Event::RunStarted { plan, plan_sha256, noise_version: 1, inputs: Inputs::default() }
}

#[test]
fn the_plan_is_that_of_the_newest_session() {
    let with = |n: u32, cpu: usize| {
        let Event::SessionStarted { devices, kernels, .. } = session(n) else { unreachable!() };
        let plan = Plan { devices: Devices { cpu, ..plan().devices }, ..plan() };
        Event::SessionStarted { n, devices, kernels, plan: Some(Box::new(plan)) }
    };
    let mut events = vec![started(), session(0)];
    let cpu = |events: &[Event]| RunState::replay(events).plan.map(|plan| plan.devices.cpu);
    assert_eq!(cpu(&events), Some(1));
    events.extend([committed(0, 0, None), committed(1, 0, Some("a")), with(1, 3)]);
    assert_eq!(cpu(&events), Some(3), "RUN-3");
    events.push(session(2));
    assert_eq!(cpu(&events), Some(3), "RUN-3");
    events.push(with(3, 2));
    let state = RunState::replay(&events);
    assert_eq!((state.plan.unwrap().devices.cpu, state.plan_sha256.as_str(), state.sessions), (2, "p", 4), "RUN-3");
    assert_eq!((state.next, state.checkpoint.as_deref()), (Position { stage: 1, step: 1 }, Some("a")));
}

#[test]
fn a_killed_run_goes_on_from_its_checkpoint() {
    let mut events = vec![started(), session(0)];
    let next = |events: &[Event]| RunState::replay(events).next;
    assert_eq!(next(&events), Position { stage: 0, step: 0 });
    events.extend([committed(0, 0, None), committed(1, 0, None)]);
    assert_eq!(next(&events), Position { stage: 1, step: 0 }, "RUN-1");
    events.push(committed(1, 1, Some("b")));
    assert_eq!(next(&events), Position { stage: 1, step: 2 });
    events.extend([committed(1, 2, None), session(1), committed(1, 2, None), committed(1, 3, Some("d"))]);
    assert_eq!(next(&events), Position { stage: 2, step: 0 });
    events.extend([committed(2, 0, None), Event::RunCompleted { weights_blake3: "end".into() }]);
    let state = RunState::replay(&events);
    assert_eq!((state.next.stage, state.checkpoint.as_deref(), state.is_complete), (3, Some("d"), true));
    assert_eq!(state.history.len(), 6, "RUN-2");
    let report = crate::report::report(&state, false);
    assert_eq!((report.steps, report.wall_s, report.status.as_str()), (4, 6.0, "complete"));
    assert_eq!((report.accuracy_before, report.accuracy_after), (Some(0.0), Some(0.2)));
    // One in between is neither.
    let accuracies = |history: &[StepMetrics]| {
        let report = crate::report::report(&RunState { history: history.to_vec(), ..RunState::default() }, false);
        (report.accuracy_before, report.accuracy_after)
    };
    let between = StepMetrics { accuracy: 0.15, ..state.history[0].clone() };
    let parted = [&state.history[..3], std::slice::from_ref(&between), &state.history[3..]].concat();
    assert_eq!(accuracies(&parted), (Some(0.0), Some(0.2)));
    assert_eq!(accuracies(&parted[..4]), (Some(0.0), None), "it goes on");
    assert_eq!(accuracies(&parted[1..]), (None, Some(0.2)));
    assert_eq!(accuracies(&state.history[..1]), (Some(0.0), None));
}

#[test]
fn what_drafters_guess_is_told_by_step() {
    let shares = |step: usize| StepMetrics {
        kind: "grpo".into(),
        step,
        drafter_held_out: Some(0.5),
        drafter_held_out_top3: Some(0.75),
        // Nothing was in use before the first step.
        drafter_held_out_before: (step > 0).then_some(0.25),
        drafter_held_out_before_top3: (step > 0).then_some(0.375),
        ..StepMetrics::default()
    };
    let history = vec![shares(0), StepMetrics { drafter_held_out: None, ..shares(1) }];
    let report = crate::report::report(&RunState { history, ..RunState::default() }, false);
    assert_eq!(report.drafter_held_out, [(0, 0.5)]);
    assert_eq!(report.drafter_held_out_top3, [(0, 0.75), (1, 0.75)]);
    assert_eq!(
        (report.drafter_held_out_before, report.drafter_held_out_before_top3),
        (vec![(1, 0.25)], vec![(1, 0.375)])
    );
}

#[test]
fn a_run_that_was_stopped_goes_on_after_its_last_step() {
    let mut events = vec![
        started(),
        session(0),
        committed(0, 0, None),
        committed(1, 0, None),
        Event::Interrupted { checkpoint: Some("a".into()) },
    ];
    let place = |events: &[Event]| (RunState::replay(events).next, RunState::replay(events).checkpoint);
    let after_the_first = (Position { stage: 1, step: 1 }, Some("a".into()));
    assert_eq!(place(&events), after_the_first);
    // Killed, and then stopped before its first step was done.
    events.extend([session(1), session(2), Event::Interrupted { checkpoint: None }]);
    assert_eq!(place(&events), after_the_first);
    events.extend([session(3), committed(1, 1, Some("b"))]);
    assert_eq!(place(&events), (Position { stage: 1, step: 2 }, Some("b".into())));
}

#[test]
fn steps_done_again_from_an_older_checkpoint_do_not_pull_the_newer_one_back() {
    let events = [
        started(),
        session(0),
        committed(0, 0, None),
        committed(1, 3, Some("d")),
        // "d" could not be read: all before it is done again.
        session(1),
        committed(0, 0, None),
    ];
    let state = RunState::replay(&events);
    assert_eq!((state.next, state.checkpoint.as_deref()), (Position { stage: 2, step: 0 }, Some("d")), "RUN-1");
}
