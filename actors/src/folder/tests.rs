use models::drafter::learn::Learner;
use models::drafter::{Calibration, eagle};
use state::drafter::{Duel, Publication};
use state::plan::DrafterShape;
use state::watchdog::{PutOff, Watchdog, Watched};

use super::*;

/// A folder with these folders of checkpoints, and files that are not the run's.
fn folder(names: &[&str]) -> (tempfile::TempDir, RunFolder) {
    let dir = tempfile::tempdir().unwrap();
    let folder = RunFolder::new(dir.path());
    for name in names {
        fs::create_dir_all(folder.checkpoint(name)).unwrap();
    }
    fs::create_dir_all(folder.checkpoint("mine")).unwrap();
    fs::write(folder.checkpoint(".DS_Store"), "").unwrap();
    fs::write(folder.checkpoint("001-000001"), "a file").unwrap();
    (dir, folder)
}

fn names(folder: &RunFolder) -> Vec<String> {
    let mut entries = folder.entries();
    entries.sort();
    entries.into_iter().map(|(_, name)| name).collect()
}

#[test]
fn the_newest_are_kept_by_number() {
    let (_dir, folder) = folder(&["000-999999", "000-1000000", "000-1000002", "999-000001", "1000-000001"]);
    assert_eq!(folder.newest().unwrap(), "1000-000001");
    folder.prune("000-1000002", 2).unwrap();
    assert_eq!(names(&folder), ["000-1000000", "000-1000002", "999-000001", "1000-000001"]);
    assert!(folder.checkpoint("mine").is_dir() && folder.checkpoint(".DS_Store").is_file());
    folder.prune("1000-000001", 1).unwrap();
    assert_eq!(names(&folder), ["1000-000001"]);
}

#[test]
fn what_was_just_written_stays() {
    let (_dir, folder) = folder(&["000-000002", "000-000004", "000-000008", "000-000010", "000-000003.partial"]);
    // The journal has lost the steps after 2.
    folder.prune("000-000004", 2).unwrap();
    assert_eq!(names(&folder), ["000-000002", "000-000004", "000-000008", "000-000010"]);
    folder.prune("000-000004", 0).unwrap();
    assert_eq!(names(&folder), ["000-000004", "000-000008", "000-000010"]);
}

/// A small target.
fn config() -> models::Config {
    let shape = state::plan::TinyShape { hidden: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 16, positions_max: 32 };
    models::Config::tiny(&shape).unwrap()
}

/// Four tokens to learn from, with so many numbers each.
fn examples(width: usize) -> RawWeights {
    let numbers = vec![4.0, 1.0, 0.0, 6.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0];
    let hidden = vec![0.5; 3 * width];
    let tensors = [("examples", 12, numbers), ("tokens", 1, vec![5.0; 4]), ("hidden", width, hidden)];
    let tensor =
        |(name, width, values): (&str, usize, Vec<f32>)| (name.to_owned(), (vec![values.len() / width, width], values));
    RawWeights { tensors: tensors.into_iter().map(tensor).collect() }
}

/// A folder with a checkpoint of this experience.
fn kept(experience: Experience) -> (tempfile::TempDir, RunFolder) {
    let weights = Weights::random(&config(), 1).unwrap();
    let (dir, folder) = folder(&[]);
    let checkpoint = Checkpoint { adam: Arc::new(AdamW::new(&weights)), weights: Arc::new(weights), experience };
    folder.write("000-000001", &checkpoint).unwrap();
    (dir, folder)
}

fn drafter(shape: DrafterShape) -> Weights {
    eagle::random(&config(), shape, 0).unwrap()
}

#[test]
fn what_a_drafter_learns_from_is_kept() {
    let raw = examples(16);
    let experience = Experience { buffer: Buffer::from_raw(&raw).unwrap(), ..Experience::default() };
    assert_eq!(experience.buffer.tokens(), 4);
    let (_dir, folder) = kept(experience);
    let (again, errors) = folder.experience("000-000001", &config(), Some(DrafterShape::eagle(0)));
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(again.buffer.to_raw(), Some(raw));
}

#[test]
fn another_drafter_goes_on_with_nothing_of_the_one_before() {
    for [before, now] in
        [[DrafterShape::eagle(24), DrafterShape::eagle3(24)], [DrafterShape::eagle3(24), DrafterShape::eagle(24)]]
    {
        let (config, weights) = (config(), drafter(before));
        let (mut publication, mut calibration) = (Publication::default(), Calibration::default());
        let _ = publication.judge(Duel { guesses: 100, right: 50, only: (50, 0), is_alone: false });
        calibration.observe(0, 1.0, true);
        let habits = Habits::new(&state::plan::Controller::Off, vec![7]);
        let mut watchdog = Watchdog::default();
        watchdog.observe(3, Watched { batch: 1, guessed: (600, 0), timed: None });
        let habits = Habits { publication: publication.clone(), calibration, watchdog, ..habits };
        let (_dir, folder) = kept(Experience {
            published: Some(Published::new(3, &weights)),
            learner: Some(Arc::new(Learner::new(&config, before, weights.clone(), 1e-3).to_raw())),
            habits: Some(habits),
            buffer: Buffer::from_raw(&examples(eagle::reads(before).width(&config))).unwrap(),
        });
        let (same, errors) = folder.experience("000-000001", &config, Some(before));
        assert!(errors.is_empty() && same.learner.is_some(), "{errors:?}");
        let storage = same.published.map(|published| published.weights.storage());
        assert_eq!(storage, Some(weights.storage()), "what goes on learning learns as before");
        let habits = same.habits.unwrap();
        assert_eq!((same.buffer.tokens(), habits.publication), (4, publication));
        assert_eq!(habits.watchdog.put_off(3, 1), Some(PutOff::GuessesNothing), "it is as useless as before");
        let (other, errors) = folder.experience("000-000001", &config, Some(now));
        assert_eq!(errors.len(), 2, "drafter and learner are of one shape: {errors:?}");
        assert!(other.published.is_none() && other.learner.is_none() && other.buffer.tokens() == 0);
        let habits = other.habits.unwrap();
        assert_eq!((habits.publication, habits.calibration, habits.watchdog), Default::default());
        assert_eq!(habits.seen, [7], "what was seen is true of any");
        let (none, errors) = folder.experience("000-000001", &config, None);
        assert!(errors.is_empty() && none.habits.unwrap().publication == Publication::default(), "{errors:?}");
    }
}
