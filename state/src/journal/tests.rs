//! The journal against damage: of records, of files, of the process.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::plan;

fn plan() -> Plan {
    Plan {
        name: "tiny".into(),
        seed: 7,
        model: plan::Model::HuggingFace(PathBuf::from("models/ä model")),
        compute: plan::Compute::F32,
        data: plan::Data {
            source: plan::Source::Jsonl(PathBuf::from("data/train.jsonl"), None),
            template: "{question}".into(),
            chat: false,
            heldout: 10,
        },
        steps: vec![
            plan::Step::Evaluate(plan::Evaluate { problems: 10, temperature: 0.0 }),
            plan::Step::Export(plan::Export { to: PathBuf::from("out"), precision: plan::Precision::F32 }),
        ],
        sampling: plan::Sampling { temperature: 1.0, top_p: 0.9, tokens_max: 64, stop: vec!["\n".into()] },
        rewards: vec![plan::WeightedReward { reward: plan::Reward::Numeric { marker: "#".into() }, weight: 1.0 }],
        devices: plan::Devices { cpu: 2, threads: 1, slots_max: 8, cache_tokens_max: 4096 },
        speculation: plan::Speculation {
            drafters: vec![plan::Drafter::Suffix { match_min: 2, match_max: 8 }],
            controller: plan::Controller::Off,
            training: None,
            lending: true,
        },
        supervision: plan::Supervision { restarts_max: 3, period_s: 60.0, backoff_ms: 100, silent_s: 300.0 },
        checkpoint: plan::Checkpoint { every: 1, keep: 2 },
    }
}

/// Plans that name everything a plan can hold, which [`plan`] does not.
fn other_plans() -> [Plan; 4] {
    let shape = plan::TinyShape { hidden: 8, layers: 2, heads: 2, kv_heads: 1, ffn: 16, positions_max: 32 };
    let chains = plan::Chains {
        terms_min: 2,
        terms_mean: 3.5,
        terms_max: 9,
        tail: 0.25,
        tail_min: 5,
        check: 0.125,
        checks_max: 3,
        check_steps: 2,
        solution_max: 99,
    };
    let optimizer = plan::Optimizer {
        lr: 0.5,
        betas: (0.75, 0.875),
        weight_decay: 0.25,
        clip_norm: 1.5,
        warmup: 3,
        schedule: plan::Schedule::Cosine,
    };
    let grpo = plan::Grpo {
        steps: 4,
        prompts: 3,
        group: 2,
        micro_batch: 1,
        clip: (0.25, 0.5),
        kl: 0.125,
        normalize: true,
        optimizer: optimizer.clone(),
        part: plan::Part { begun: 2, of: 9 },
    };
    let sft = plan::Sft { steps: 5, batch: 4, micro_batch: 2, optimizer, part: plan::Part::whole(5) };
    let marked = |reward: fn(String) -> plan::Reward| plan::WeightedReward { reward: reward("#".into()), weight: 0.5 };
    let strategy = plan::Strategy::tree(1, 3, 2, 5).with_suffix(7).with_chance_min(0.125).with_budget_all(24);
    let tiny = Plan {
        model: plan::Model::Tiny { shape, weights: Some(PathBuf::from("w")), sha256: Some("ef".into()) },
        compute: plan::Compute::Bf16,
        data: plan::Data { source: plan::Source::Chains(chains), ..plan().data },
        steps: vec![plan::Step::Sft(sft), plan::Step::Grpo(grpo)],
        rewards: vec![
            marked(|marker| plan::Reward::Exact { marker }),
            marked(|marker| plan::Reward::Format { marker }),
            marked(|separator| plan::Reward::Steps { separator }),
            marked(|_| plan::Reward::Length),
        ],
        speculation: plan::Speculation {
            drafters: vec![plan::Drafter::Learned { shape: plan::DrafterShape::eagle3(7), weights: Some("w".into()) }],
            controller: plan::Controller::Bandit { strategies: vec![strategy], epsilon: 0.25, window: 9 },
            training: Some(plan::DrafterTraining {
                lr: Some(0.5),
                tokens_max: 6,
                levels: 3,
                publish_every: 5,
                buffer_tokens_max: 4,
                buffer_bytes_max: 1 << 30,
            }),
            lending: false,
        },
        ..plan()
    };
    let speculation = plan::Speculation { controller: plan::Controller::Fixed(strategy), ..plan().speculation };
    let gguf = Plan { model: plan::Model::Gguf(PathBuf::from("m.gguf")), speculation, ..plan() };
    let row = |batch_max, strategy| plan::TableRow { batch_max, strategy };
    let rows = vec![row(2, Some(strategy)), row(3, None)];
    let speculation = plan::Speculation { controller: plan::Controller::Table(rows), ..plan().speculation };
    [plan(), tiny, gguf, Plan { speculation, ..plan() }]
}

fn step(step: usize) -> Event {
    let metrics = StepMetrics {
        step,
        kind: "grpo".into(),
        loss: f64::from(step as u32) / 3.0,
        by_batch: vec![crate::metrics::BatchMetrics { batch_min: 3, busy_s: 0.5, rated_s: 0.25, ..Default::default() }],
        timeline: vec![vec![crate::metrics::PhaseSpan {
            phase: crate::device::Phase::Rollout,
            start_s: 0.0,
            end_s: 1.5,
        }]],
        ..StepMetrics::default()
    };
    Event::StepCommitted {
        metrics: Box::new(metrics),
        weights_blake3: format!("{step:064x}"),
        checkpoint: (step % 2 == 1).then(|| format!("step-{step}")),
    }
}

fn started(plan: plan::Plan, sha256: &str) -> Event {
    let (plan, plan_sha256) = (Box::new(plan), sha256.into());
    Event::RunStarted { plan, plan_sha256, noise_version: 1, inputs: Inputs::default() }
}

/// One of every kind.
fn every_event() -> Vec<Event> {
    vec![
        started(plan(), "ab"),
        Event::SessionStarted { n: 0, devices: vec!["cpu 0".into()], kernels: "avx2".into(), plan: None },
        step(0),
        Event::DeviceRestarted { device: 1, stage: 0, step: 1, reason: "panic".into() },
        step(1),
        Event::Interrupted { checkpoint: None },
        Event::SessionStarted { n: 1, devices: Vec::new(), kernels: "avx2".into(), plan: Some(Box::new(plan())) },
        Event::Interrupted { checkpoint: Some("001-000003".into()) },
        Event::RunCompleted { weights_blake3: "cd".into() },
    ]
}

/// A closed journal of `count` events, every one committed, in `dir`.
fn write(dir: &Path, count: usize) -> Vec<Event> {
    let events: Vec<Event> = every_event().into_iter().cycle().take(count).collect();
    let mut journal = SledJournal::open(dir).unwrap();
    for event in &events {
        journal.append(event).unwrap();
        journal.commit().unwrap();
    }
    events
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Changes the store behind the journal's back.
fn tamper(dir: &Path, change: impl FnOnce(&::sled::Db)) {
    // Without a thread of sled's that would hold the files for a moment longer; others may.
    let config = ::sled::Config::new().path(dir).flush_every_ms(None);
    let again = |_| std::thread::sleep(std::time::Duration::from_millis(10));
    let db = (0..200).find_map(|_| config.open().map_err(again).ok()).unwrap();
    change(&db);
    db.flush().unwrap();
}

#[test]
fn every_event_survives() {
    for event in every_event() {
        assert_eq!(record::decode(&record::encode(&event).unwrap()), Ok(event));
    }
    let dir = tempfile::tempdir().unwrap();
    let events = write(dir.path(), 7);
    let journal = SledJournal::open(dir.path()).unwrap();
    assert_eq!(journal.events().unwrap(), events);
    assert_eq!(journal.recovery(), &Recovery { records: 7, ..Recovery::default() });
}

#[test]
fn the_shape_of_records_is_that_of_this_version() {
    let events = every_event().into_iter().chain(other_plans().map(|plan| started(plan, "ab")));
    // Without their checksums: that of bytes that end in their own says nothing but how many there are.
    let bytes = |event| record::encode(&event).unwrap().split_last_chunk::<4>().unwrap().0.to_vec();
    let bytes: Vec<u8> = events.flat_map(bytes).collect();
    let hint = "a persisted type changed its fields: raise journal::VERSION and update this number";
    assert_eq!((VERSION, crc32fast::hash(&bytes)), (19, 1_538_214_626), "{hint}");
}

#[test]
fn the_twin_in_memory_forgets_what_was_not_committed() {
    let mut journal = MemoryJournal::new();
    journal.append(&step(0)).unwrap();
    journal.commit().unwrap();
    journal.append(&step(1)).unwrap();
    assert_eq!(journal.events().unwrap(), vec![step(0), step(1)]);
    assert_eq!(journal.after_crash().events().unwrap(), vec![step(0)]);
}

#[test]
fn appending_goes_on_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut events = write(dir.path(), 3);
    let mut journal = SledJournal::open(dir.path()).unwrap();
    journal.append(&step(9)).unwrap();
    journal.commit().unwrap();
    drop(journal);
    events.push(step(9));
    assert_eq!(SledJournal::open(dir.path()).unwrap().events().unwrap(), events);
}

#[test]
fn a_second_writer_is_refused_and_a_reader_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SledJournal::open(dir.path()).unwrap();
    writer.append(&step(0)).unwrap();
    writer.commit().unwrap();
    let error = SledJournal::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert!(error.to_string().starts_with("another taper process is using "), "{error}");
    let mut reader = SledJournal::open_read_only(dir.path()).unwrap();
    assert_eq!(reader.events().unwrap(), vec![step(0)]);
    assert!(matches!(reader.append(&step(1)), Err(Error::ReadOnly { .. })));
    assert!(matches!(reader.commit(), Err(Error::ReadOnly { .. })));
    writer.append(&step(1)).unwrap();
}

#[test]
fn a_journal_in_use_is_seen_and_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!SledJournal::is_in_use(dir.path()));
    write(dir.path(), 3);
    assert!(!SledJournal::is_in_use(dir.path()));
    let writer = SledJournal::open(dir.path()).unwrap();
    assert!(SledJournal::is_in_use(dir.path()));
    assert!(matches!(SledJournal::begin_anew(dir.path(), || Ok::<_, Error>(())), Err(Error::InUse { .. })));
    assert_eq!(writer.events().unwrap().len(), 3);
}

#[test]
fn beginning_anew_removes_events_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 5);
    fs::write(dir.path().join("notes"), "mine").unwrap();
    let journal = SledJournal::begin_anew(dir.path(), || Ok::<_, Error>(())).unwrap();
    assert_eq!(journal.events().unwrap(), vec![]);
    assert_eq!(journal.recovery(), &Recovery::default());
    assert_eq!(fs::read_to_string(dir.path().join("notes")).unwrap(), "mine");
}

#[test]
fn a_folder_of_something_else_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("monday.txt"), "dear diary").unwrap();
    for result in [SledJournal::open(dir.path()), SledJournal::begin_anew(dir.path(), || Ok::<_, Error>(()))] {
        assert!(matches!(result, Err(Error::Foreign { .. })));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn reading_a_folder_that_is_not_there_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = SledJournal::open_read_only(&dir.path().join("none")).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the folder "), "{error}");
}

#[test]
fn a_store_that_is_being_closed_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let events = write(dir.path(), 3);
    let held = fs::File::open(dir.path().join("db")).unwrap();
    while held.try_lock().is_err() {}
    let later = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        drop(held);
    });
    let journal = SledJournal::open(dir.path()).unwrap();
    assert_eq!((journal.events().unwrap(), &journal.recovery().aside), (events, &None));
    later.join().unwrap();
}

#[test]
fn a_torn_tail_is_dropped_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut events = write(dir.path(), 6);
    tamper(dir.path(), |db| {
        for number in 4u64..6 {
            let record = db.get(number.to_be_bytes()).unwrap().unwrap();
            db.insert(number.to_be_bytes(), &record[..record.len() - 3]).unwrap();
        }
    });
    let mut journal = SledJournal::open(dir.path()).unwrap();
    assert_eq!(journal.recovery(), &Recovery { records: 4, dropped: 2, lost: 2, aside: None });
    events.truncate(4);
    assert_eq!(journal.events().unwrap(), events);
    journal.append(&step(7)).unwrap();
    journal.commit().unwrap();
    drop(journal);
    events.push(step(7));
    let journal = SledJournal::open(dir.path()).unwrap();
    assert_eq!(journal.events().unwrap(), events);
    assert_eq!(journal.recovery(), &Recovery { records: 5, ..Recovery::default() });
}

#[test]
fn damage_in_the_middle_names_the_record_and_the_file() {
    let check = |change: fn(&::sled::Db), part: &str| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 6);
        tamper(dir.path(), change);
        let error = SledJournal::open(dir.path()).unwrap_err();
        let Error::Damaged { file, record: 3, reason } = &error else { panic!("{error}") };
        assert_eq!(file, &dir.path().join("db"));
        assert!(reason.contains(part), "{error}");
    };
    check(|db| drop(db.insert(3u64.to_be_bytes(), &b"TPR1"[..]).unwrap()), "only 4 bytes");
    check(|db| drop(db.insert(3u64.to_be_bytes(), &[0u8; 40][..]).unwrap()), "TPR1");
    check(|db| drop(db.remove(3u64.to_be_bytes()).unwrap()), "missing");
    let flip = |db: &::sled::Db| {
        let mut record = db.get(3u64.to_be_bytes()).unwrap().unwrap().to_vec();
        record[20] ^= 1;
        db.insert(3u64.to_be_bytes(), record).unwrap();
    };
    check(flip, "checksum");
}

#[test]
fn another_format_is_told_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 3);
    tamper(dir.path(), |db| {
        let mut record = db.get(1u64.to_be_bytes()).unwrap().unwrap().to_vec();
        record[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
        let end = record.len() - 4;
        let checksum = crc32fast::hash(&record[..end]).to_le_bytes();
        record[end..].copy_from_slice(&checksum);
        db.insert(1u64.to_be_bytes(), record).unwrap();
    });
    let error = SledJournal::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, Error::Version { record: 1, found, supported: VERSION, .. } if found == VERSION + 1),
        "{error}"
    );
}

#[test]
fn a_kill_between_commits_loses_nothing_committed() {
    let dir = tempfile::tempdir().unwrap();
    let events: Vec<Event> = (0..40).map(step).collect();
    let mut journal = SledJournal::open(dir.path()).unwrap();
    for (number, event) in events.iter().enumerate() {
        journal.append(event).unwrap();
        if number % 3 == 0 {
            journal.commit().unwrap();
        }
        // What the disk holds now is what a killed process leaves.
        let killed = tempfile::tempdir().unwrap();
        copy(dir.path(), killed.path());
        let found = SledJournal::open(killed.path()).unwrap().events().unwrap();
        assert!(found.len() > number - number % 3, "{} of {}", found.len(), number + 1);
        assert_eq!(found[..], events[..found.len()]);
    }
}

#[test]
fn large_events_survive() {
    let dir = tempfile::tempdir().unwrap();
    let large = Event::DeviceRestarted { device: 0, stage: 0, step: 0, reason: "x".repeat(400_000) };
    let mut journal = SledJournal::open(dir.path()).unwrap();
    for _ in 0..3 {
        journal.append(&large).unwrap();
        journal.commit().unwrap();
    }
    let killed = tempfile::tempdir().unwrap();
    copy(dir.path(), killed.path());
    assert_eq!(SledJournal::open(killed.path()).unwrap().events().unwrap(), vec![large; 3]);
}

#[cfg(unix)]
#[test]
fn a_path_that_is_not_text_is_an_error() {
    use std::os::unix::ffi::OsStrExt;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"\xff"));
    let plan = Plan { model: plan::Model::Gguf(path), ..plan() };
    let event = started(plan, "");
    assert!(matches!(MemoryJournal::new().append(&event), Err(Error::Encode { .. })));
}

/// Damage to one of the files.
#[derive(Debug, Clone)]
enum Damage {
    Truncate(f64),
    Zero(f64, usize),
    Flip(f64, u8),
    Remove,
}

fn any_damage() -> impl Strategy<Value = (prop::sample::Index, Damage)> {
    let damage = prop_oneof![
        (0.0f64..1.0).prop_map(Damage::Truncate),
        (0.0f64..1.0, 1usize..70_000).prop_map(|(at, length)| Damage::Zero(at, length)),
        (0.0f64..1.0, 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        Just(Damage::Remove),
    ];
    (any::<prop::sample::Index>(), damage)
}

fn inflict(dir: &Path, file: prop::sample::Index, damage: &Damage) {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    let path = &files[file.index(files.len())];
    let mut bytes = fs::read(path).unwrap();
    // Mostly zeroes follow the content, and damage there proves little.
    let content = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let place = |at: f64| (at * content as f64) as usize;
    match *damage {
        Damage::Truncate(at) => bytes.truncate(place(at)),
        Damage::Zero(at, length) => {
            let from = place(at);
            let to = bytes.len().min(from + length);
            bytes[from..to].fill(0);
        }
        Damage::Flip(at, bit) => {
            if let Some(byte) = bytes.get_mut(place(at)) {
                *byte ^= 1 << bit;
            }
        }
        Damage::Remove => return fs::remove_file(path).unwrap(),
    }
    fs::write(path, bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn journal_2_and_3(count in 0usize..60, damages in prop::collection::vec(any_damage(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let events = write(dir.path(), count);
        for (file, damage) in &damages {
            inflict(dir.path(), *file, damage);
        }
        let read_only = SledJournal::open_read_only(dir.path()).map(|journal| journal.events().unwrap());
        match SledJournal::open(dir.path()) {
            Ok(mut journal) => {
                let mut found = journal.events().unwrap();
                prop_assert!(found.len() <= events.len());
                prop_assert_eq!(&found[..], &events[..found.len()]);
                prop_assert_eq!(&read_only.unwrap(), &found);
                let lost = journal.recovery().lost;
                prop_assert!(lost == 0 || lost as usize == events.len() - found.len());
                // What was recovered can be built upon.
                journal.append(&step(77)).unwrap();
                journal.commit().unwrap();
                drop(journal);
                found.push(step(77));
                prop_assert_eq!(SledJournal::open(dir.path()).unwrap().events().unwrap(), found);
            }
            Err(error) => prop_assert!(!matches!(error, Error::InUse { .. } | Error::Io { .. }), "{error:?}"),
        }
    }

    #[test]
    fn damaged_records_are_never_events(flips in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4)) {
        let intact = record::encode(&step(3)).unwrap();
        let mut record = intact.clone();
        for (at, bit) in flips {
            let at = at.index(record.len());
            record[at] ^= 1 << (bit % 8);
        }
        prop_assume!(record != intact);
        prop_assert!(record::decode(&record).is_err());
    }
}
