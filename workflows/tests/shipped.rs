//! Every workflow in this folder, and what a reader may do to it.

use std::fs;
use std::path::{Path, PathBuf};

use state::plan::{Controller, Drafter, DrafterShape, Model, Plan, Reward, Source, Step, Strategy};

const QUICKSTART: &str = include_str!("../quickstart.ron");

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn plan(text: &str) -> Plan {
    workflows::parse(text, Path::new("/here")).unwrap_or_else(|problems| panic!("{}", page(&problems, text)))
}

fn page(problems: &[workflows::Problem], text: &str) -> String {
    problems.iter().map(|problem| problem.render(text)).collect()
}

fn shipped() -> Vec<PathBuf> {
    let files = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "ron")).collect()
}

#[test]
fn every_shipped_workflow_is_good() {
    assert!(shipped().len() >= 3);
    for path in shipped() {
        let text = fs::read_to_string(&path).unwrap();
        let plan = plan(&text);
        assert_eq!(Some(plan.name.as_str()), path.file_stem().and_then(|stem| stem.to_str()));
        assert!(workflows::describe(&plan).to_string().contains(&plan.name));
    }
}

#[test]
fn evaluations_divide_a_training() {
    let with = |evaluate: &str| {
        let text = QUICKSTART.replace("kl: 0.0, ", &format!("kl: 0.0, evaluate: {evaluate},"));
        plan(&text).steps
    };
    let parts = |steps: &[Step]| -> Vec<_> {
        let counts = steps.iter().filter_map(|step| if let Step::Grpo(grpo) = step { Some(grpo.steps) } else { None });
        counts.zip(steps.iter().filter_map(|step| Some(step.part()?.begun))).collect()
    };
    let steps = with("(every: 400, problems: 50, temperature: 1.2)");
    assert_eq!(parts(&steps), [(400, 0), (400, 400), (200, 800)]);
    assert!(matches!(&steps[2], Step::Evaluate(e) if (e.problems, e.temperature) == (50, 1.2)));
    assert_eq!(steps.len(), plan(QUICKSTART).steps.len() + 4);
    for every in [1000, 5000] {
        assert_eq!(with(&format!("(every: {every}, problems: 50)")), plan(QUICKSTART).steps, "there is one after it");
    }
}

#[test]
fn word_problems_have_answers() {
    let text = fs::read_to_string(folder().join("word_problems.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 40);
    assert!(text.lines().all(|line| line.starts_with("{\"question\": ") && line.contains("\\n#### ")));
}

#[test]
fn the_quickstart_is_what_it_says() {
    let plan = plan(QUICKSTART);
    let Model::Tiny { shape, weights, sha256 } = &plan.model else { panic!("{:?}", plan.model) };
    assert_eq!((shape.hidden, shape.layers, shape.heads, shape.positions_max), (128, 10, 4, 768));
    assert_eq!(weights.as_deref(), Some(Path::new("/here/quickstart.safetensors")));
    assert_eq!(*sha256, None);
    let Step::Grpo(grpo) = &plan.steps[1] else { panic!("{:?}", plan.steps) };
    assert_eq!((grpo.prompts, grpo.group, grpo.micro_batch, grpo.clip), (4, 4, 2, (0.2, 0.2)));
    let Controller::Bandit { strategies, .. } = &plan.speculation.controller else { panic!() };
    let shapes: Vec<_> = strategies.iter().map(|s| (s.drafter, s.depth, s.width, s.budget)).collect();
    assert_eq!(shapes, [(0, 2, 1, 2), (0, 4, 1, 4), (0, 6, 1, 6), (0, 3, 1, 3), (1, 8, 1, 8)]);
    let summary = workflows::describe(&plan);
    assert_eq!((summary.rollouts, summary.evaluations, summary.optimizer_steps), (16_000, 2000, 1000));
    assert_eq!(summary.tokens_max, (16_000 + 2000) * 704);
}

const SHORT: &str =
    r#"Workflow(name: "x", model: Gguf("a/b.gguf"), data: Jsonl(path: "/d.jsonl"), steps: [Export(to: "m")])"#;

#[test]
fn what_is_left_out_has_a_default() {
    let plan = plan(SHORT);
    assert_eq!(plan.model, Model::Gguf("/here/a/b.gguf".into()));
    assert_eq!(plan.data.source, Source::Jsonl("/d.jsonl".into(), None));
    assert_eq!(plan.data.template, "{question}");
    assert_eq!(plan.rewards[0].reward, Reward::Numeric { marker: "####".into() });
    assert_eq!(
        plan.speculation.drafters,
        [
            Drafter::Learned { shape: DrafterShape::eagle(0), weights: None },
            Drafter::Suffix { match_min: 4, match_max: 24 }
        ]
    );
    let Controller::Bandit { strategies, epsilon, window } = &plan.speculation.controller else { panic!() };
    assert_eq!((*epsilon, *window), (0.05, 64));
    let long = |suffix| Strategy::chain(0, 16).with_chance_min(0.25).with_suffix(suffix);
    let tree = Strategy::tree(0, 7, 4, 7);
    assert_eq!(*strategies, [Strategy::chain(0, 2), tree.with_suffix(7), long(16), Strategy::chain(1, 8)]);
    // What is standard could be written; and nobody is asked who is not there.
    let written = "(controller: Bandit(strategies: [(drafter: Eagle, depth: 2), (drafter: Eagle, depth: 7, width: 4, budget: 7), \
                   (drafter: Eagle, depth: 16, chance_min: 0.25)]), drafters: [Eagle()])";
    assert_eq!(with(written), with("(drafters: [Eagle()])"));
    let quickstart = workflows::parse(QUICKSTART, Path::new("")).unwrap();
    assert_eq!(plan.speculation.training, quickstart.speculation.training);
    assert_eq!((plan.sampling.temperature, plan.sampling.tokens_max), (1.0, 256));
    assert_eq!(plan.devices, quickstart.devices);
    assert_eq!((plan.supervision, plan.checkpoint.every, plan.checkpoint.keep), (quickstart.supervision, 1, 2));
}

fn with(speculation: &str) -> Plan {
    plan(&SHORT.replace(", steps", &format!(", speculation: {speculation}, steps")))
}

#[test]
fn spellings_that_mean_the_same_give_the_same_plan() {
    let fixed = with("(controller: Fixed(drafter: Suffix, depth: 6))");
    for same in [
        "(controller: Fixed((drafter: Suffix, depth: 6, width: 1, budget: 6)))",
        "(controller: Some(Fixed((drafter: Suffix, depth: 6, width: 1, budget: Some(6),),),),)",
        "Speculation(drafters: [Eagle(ffn: 0), Suffix()], controller: Fixed(drafter: Suffix, depth: 6,))",
    ] {
        assert_eq!(with(same), fixed, "{same}");
    }
    let table = with("(controller: Table([(batch_max: 4, strategy: (drafter: Suffix, depth: 6))]))");
    assert_eq!(with("(controller: Threshold(batch_max: 4, strategy: (drafter: Suffix, depth: 6)))"), table);
    assert_eq!(with("(controller: Threshold(batch_max: 4, strategy: Some((drafter: Suffix, depth: 6))))"), table);
    let training = with("(training: (lr: 0.5))").speculation.training;
    assert_eq!(with("(training: Some((lr: 0.5)))").speculation.training, training);
    assert_eq!(with("(training: Some(lr: 0.5))").speculation.training, training);
    assert_eq!(with("(training: None)").speculation.training, None);
    assert_eq!(with("(controller: Off)").speculation.training, None);
    assert_eq!(with("(drafters: [Suffix()])").speculation.training, None);
    assert_eq!(with("(drafters: [])").speculation.controller, Controller::Off);
    assert!(with("(drafters: [])").speculation.lending && !with("(lending: false)").speculation.lending);
    assert_eq!(plan(&format!("\u{feff}#![enable(implicit_some)]\r\n{SHORT},\r\n")), plan(SHORT));
    assert_eq!(plan(&SHORT.replace("Workflow(", "(")), plan(SHORT));
}

#[test]
fn a_row_of_a_table_may_be_plain_decoding() {
    let rows = "(batch_max: 2, strategy: None), (batch_max: 4, strategy: (drafter: Suffix, depth: 6))";
    let Controller::Table(rows) = with(&format!("(controller: Table([{rows}]))")).speculation.controller else {
        panic!()
    };
    let depths = rows.iter().map(|row| (row.batch_max, row.strategy.map(|strategy| strategy.depth)));
    assert_eq!(depths.collect::<Vec<_>>(), [(2, None), (4, Some(6))]);
}

#[test]
fn short_chains_need_no_further_numbers() {
    let chains = plan(&SHORT.replace("Jsonl(path: \"/d.jsonl\")", "Chains(terms_max: 4)")).data.source;
    let Source::Chains(chains) = chains else { panic!() };
    assert_eq!((chains.terms_min, chains.terms_mean, chains.terms_max, chains.tail_min), (2, 4.0, 4, 4));
}
