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

#[test]
fn what_a_drafter_learns_from_is_kept() {
    let shape = state::plan::TinyShape { hidden: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 16, positions_max: 32 };
    let config = models::Config::tiny(&shape).unwrap();
    let weights = Weights::random(&config, 1).unwrap();
    let numbers = vec![4.0, 1.0, 0.0, 6.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0];
    let tensors = [("examples", 12, numbers), ("tokens", 1, vec![5.0; 4]), ("hidden", 16, vec![0.5; 48])];
    let tensor =
        |(name, width, values): (&str, usize, Vec<f32>)| (name.to_owned(), (vec![values.len() / width, width], values));
    let raw = RawWeights { tensors: tensors.into_iter().map(tensor).collect() };
    let experience = Experience { buffer: Buffer::from_raw(&raw).unwrap(), ..Experience::default() };
    assert_eq!(experience.buffer.tokens(), 4);
    let (_dir, folder) = folder(&[]);
    let checkpoint = Checkpoint { adam: Arc::new(AdamW::new(&weights)), weights: Arc::new(weights), experience };
    folder.write("000-000001", &checkpoint).unwrap();
    let (again, errors) = folder.experience("000-000001", Some(&checkpoint.weights));
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(again.buffer.to_raw(), Some(raw));
}
