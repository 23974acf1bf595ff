//! House rules that a compiler does not check.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

const SKIPPED: [&str; 4] = ["target", ".git", "runs", "node_modules"];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !SKIPPED.contains(&name.as_str()) {
            files(&path, found);
        } else if path.is_file() {
            found.push(path);
        }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    files(root(), &mut found);
    found.retain(|p| p.extension().is_some_and(|e| e == "rs"));
    found.into_iter().map(|p| (p.clone(), fs::read_to_string(p).unwrap())).collect()
}

/// Arrows between crates point down only.
#[test]
fn dependencies_point_down() {
    let allowed: [(&str, &[&str]); 5] = [
        ("state", &[]),
        ("kernels", &[]),
        ("workflows", &["state"]),
        ("models", &["kernels", "state"]),
        ("actors", &["kernels", "models", "state"]),
    ];
    for (folder, below) in allowed {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        for (other, _) in allowed {
            let depends = manifest
                .lines()
                .any(|l| l.starts_with(&format!("{other}.workspace")) || l.starts_with(&format!("{other} =")));
            assert!(!depends || below.contains(&other), "{folder} must not depend on {other}");
        }
    }
}

#[test]
fn state_is_pure() {
    for (path, text) in sources() {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        if name.starts_with("state/src") && !name.contains("journal") {
            for word in ["std::time", "std::fs", "std::thread", "Instant", "HashMap", "rand::"] {
                assert!(!text.contains(word), "{name} uses {word}");
            }
        }
    }
}

#[test]
fn modules_and_unsafe_are_where_they_belong() {
    for (path, text) in sources() {
        assert_ne!(path.file_name().unwrap(), "mod.rs", "{}", path.display());
        let is_kernel = path.starts_with(root().join("kernels"));
        let blocks = text.lines().filter(|l| l.contains(concat!("unsafe", " {")) && !l.trim_start().starts_with("//"));
        assert!(is_kernel || blocks.count() == 0, "{} has unsafe code", path.display());
        // Hash maps have no order: nothing that decides what is learned may walk one.
        let walks = ["models/src", "actors/src", "kernels/src"].iter().any(|f| path.starts_with(root().join(f)));
        assert!(!walks || !text.contains("HashMap"), "{} uses a HashMap", path.display());
    }
}

#[test]
fn files_stay_readable() {
    for (path, text) in sources() {
        assert!(text.lines().count() <= 500, "{} has more than 500 lines", path.display());
        let first = text.lines().next().unwrap_or_default();
        let is_tests = path.file_name().is_some_and(|n| n == "tests.rs");
        assert!(is_tests || first.starts_with("//!"), "{} does not begin by saying what it is", path.display());
    }
}

#[test]
fn documents_name_files_that_exist() {
    for document in ["README.md", "ARCHITECTURE.md", "STYLE.md", "LOG.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for word in text.split(['`', '(', ')', ' ', '\n']) {
            let word = word.trim_end_matches([',', '.', ':', ';']);
            let is_path =
                word.contains('/') && [".rs", ".ron", ".md"].iter().any(|e| word.ends_with(e)) && !word.contains('*');
            assert!(!is_path || word.starts_with("runs/") || root().join(word).exists(), "{document} names {word}");
        }
    }
}
