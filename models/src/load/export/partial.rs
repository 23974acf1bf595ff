//! An export on its way: a hidden folder beside the one that it will be, so that there is a whole one or none.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use state::journal::has_ended;

use super::{Kind, io, real, replaceable, sync};
use crate::error::Result;

/// An empty folder to write an export into, beside the one that is to be made or replaced: removed with what is in it unless it is
/// [published](Partial::publish).
pub(in crate::load) struct Partial {
    path: PathBuf,
    /// Where what is replaced goes meanwhile.
    old: PathBuf,
    folder: PathBuf,
}

/// Folders that this process writes exports to, or moves replaced ones to.
static IN_USE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn in_use() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    IN_USE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Partial {
    /// Also removes what exports to this folder that did not end have left.
    pub(in crate::load) fn begin(folder: &Path, kind: Kind) -> Result<Self> {
        let folder = &match folder.file_name() {
            Some(name) => real(parent(folder)).join(name),
            None => real(folder),
        };
        let mut in_use = in_use();
        remove_left_behind(folder, &in_use)?;
        replaceable(folder, kind)?;
        let [path, old] = ["partial", "old"].map(|what| beside(folder, what));
        io(&path, fs::create_dir_all(parent(folder)).and_then(|()| fs::create_dir(&path)))?;
        in_use.extend([path.clone(), old.clone()]);
        Ok(Self { path, old, folder: folder.clone() })
    }

    /// Where to write.
    pub(in crate::load) fn join(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    /// Makes the files durable, then visible under their name.
    pub(in crate::load) fn publish(self) -> Result<()> {
        let Self { path, old, folder } = &self;
        for entry in io(path, fs::read_dir(path))? {
            sync(&io(path, entry)?.path())?;
        }
        sync(path)?;
        let mut attempts = 0;
        while let Err(error) = self.move_in() {
            // Another export to the same place came between: the last one stays.
            let is_taken = matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty);
            attempts += 1;
            if !is_taken || attempts == ATTEMPTS {
                return io(folder, Err(error));
            }
        }
        sync(parent(folder))?;
        remove(old)
    }

    /// What is there already moves away first, and back if the place cannot be taken.
    fn move_in(&self) -> std::io::Result<()> {
        let Self { path, old, folder } = self;
        match fs::rename(folder, old) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::rename(path, folder).inspect_err(|_| {
            // Where it cannot go back, because somebody else was faster, it is of no more use.
            if old.exists() && fs::rename(old, folder).is_err() && folder.exists() {
                let _ = fs::remove_dir_all(old);
            }
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // A full disk gets its room back.
        let _ = fs::remove_dir_all(&self.path);
        let mut in_use = in_use();
        in_use.remove(&self.path);
        in_use.remove(&self.old);
    }
}

/// Attempts to put an export into its place.
const ATTEMPTS: u32 = 10;

/// Removes what exports to this folder have left beside it whose process on this machine is gone, as far as the system tells; or had
/// the number of this one. What one has moved away goes back if nothing has taken its place.
fn remove_left_behind(folder: &Path, in_use: &BTreeSet<PathBuf>) -> Result<()> {
    let (own, begins) = (std::process::id().to_string(), format!("{}-", host()));
    let Ok(entries) = fs::read_dir(parent(folder)) else { return Ok(()) };
    let hidden = format!(".{}.taper-", folder.file_name().unwrap_or_default().display());
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let place = name.strip_prefix(&hidden);
        let place = place.and_then(|place| place.strip_prefix("partial-").or_else(|| place.strip_prefix("old-")));
        let process = place.and_then(|place| place.strip_prefix(&begins)).and_then(|place| place.split_once('-'));
        let is_left = process.is_some_and(|(process, _)| process == own || has_ended(process));
        let path = parent(folder).join(&name);
        if !is_left || in_use.contains(&path) {
            continue;
        }
        let was_moved = name.starts_with(&format!("{hidden}old-"));
        if !was_moved || folder.exists() || fs::rename(&path, folder).is_err() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn parent(folder: &Path) -> &Path {
    folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Name of the machine, or of the container, as far as it is known: processes are numbered in each.
pub(super) fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(32).collect()
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => io(folder, removed),
    }
}

/// A folder of its own in the same place, `.<folder>.taper-<what>-<host>-<process>-<number>`: `<folder>.old` may be somebody's copy.
fn beside(folder: &Path, what: &str) -> PathBuf {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(".");
    name.push(folder.file_name().unwrap_or_default());
    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".taper-{what}-{}-{}-{number}", host(), std::process::id()));
    folder.with_file_name(name)
}
