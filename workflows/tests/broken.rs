//! What a user reads who has made a mistake: every file in `broken/` beside its page of problems.
//!
//! `TAPER_BLESS=1` writes the pages anew; read every one that changes: is it clear what to do?

use std::fs;
use std::path::{Path, PathBuf};

fn corpus() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/broken");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "ron")).collect();
    files.sort();
    files
}

fn page(path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    let problems =
        workflows::parse(&text, Path::new("")).expect_err(&format!("{} is no broken workflow", path.display()));
    problems.iter().map(|problem| problem.render(&text)).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_broken_file_is_explained() {
    let files = corpus();
    assert!(files.len() >= 36, "{} broken files", files.len());
    let bless = std::env::var_os("TAPER_BLESS").is_some();
    let mut changed = Vec::new();
    for path in files {
        let (page, snapshot) = (page(&path), path.with_extension("txt"));
        if bless {
            fs::write(&snapshot, page).unwrap();
        } else if fs::read_to_string(&snapshot).unwrap_or_default() != page {
            changed.push(format!("{}\n{page}", path.display()));
        }
    }
    assert!(changed.is_empty(), "pages that changed:\n{}", changed.join("\n"));
}
