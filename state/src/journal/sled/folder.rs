//! The folder of a journal: lock, copy, fsync, and the files beside sled's.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Error;
use crate::journal::has_ended;

/// Attempts to lock a folder, and the time between them: whoever looks whether it is locked holds it for a moment.
const ATTEMPTS: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(10);

/// Makes the folder and the ones above it.
pub(super) fn create(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(Error::io("create the folder", dir))
}

/// Whether a file of a journal is one that taper or sled made.
fn is_own(name: &str) -> bool {
    let names = ["lock", "conf", "db", "db.tmp", "count", "count.tmp", "blobs"];
    names.contains(&name) || name.starts_with("snap.") || name.starts_with("aside-")
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Fails if the folder holds files, and none of a journal.
pub(super) fn require_own(dir: &Path) -> Result<(), Error> {
    let files = if dir.exists() { list(dir)? } else { Vec::new() };
    let is_own = files.is_empty() || files.iter().any(|file| is_own(&name_of(file)));
    if is_own { Ok(()) } else { Err(Error::Foreign { dir: dir.into() }) }
}

/// Removes the files of a journal but for its lock, which the caller holds, and nothing else.
pub(super) fn clear(dir: &Path) -> Result<(), Error> {
    for path in list(dir)? {
        let name = name_of(&path);
        if is_own(&name) && name != "lock" {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Locks the folder for this process and this journal until the file is dropped.
pub(super) fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(Error::io("open the lock", &path))?;
    for _ in 1..ATTEMPTS {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(BETWEEN),
            other => return locked(dir, &path, other).map(|()| file),
        }
    }
    locked(dir, &path, file.try_lock()).map(|()| file)
}

fn locked(dir: &Path, path: &Path, result: Result<(), TryLockError>) -> Result<(), Error> {
    match result {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { dir: dir.into() }),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", path)(source)),
    }
}

/// Whether a process holds the lock.
pub(super) fn is_locked(dir: &Path) -> bool {
    // Shared, so that two who look do not take each other for a writer.
    let shared = File::open(dir.join("lock")).map(|file| file.try_lock_shared());
    matches!(shared, Ok(Err(TryLockError::WouldBlock)))
}

/// Brings the folder's list of files, and its own entry, to the disk.
pub(super) fn sync(dir: &Path) -> Result<(), Error> {
    sync_path(dir)?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_path(parent),
        _ => Ok(()),
    }
}

/// Brings sled's files to the disk: the log, and the records too large for it. Those are written once, so that it needs no more than that.
pub(super) fn sync_store(dir: &Path, synced: &mut BTreeSet<PathBuf>) -> Result<(), Error> {
    sync_path(&dir.join("db"))?;
    let blobs = dir.join("blobs");
    let there: BTreeSet<PathBuf> = list(&blobs)?.into_iter().collect();
    there.difference(synced).try_for_each(|blob| sync_path(blob))?;
    *synced = there;
    sync_path(&blobs)
}

fn sync_path(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("bring to disk", path))
}

/// Remembers how many events are durable.
pub(super) fn write_count(dir: &Path, count: u64) -> Result<(), Error> {
    let (path, fresh) = (dir.join("count"), dir.join("count.tmp"));
    let mut bytes = count.to_le_bytes().to_vec();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let write = || {
        let mut file = File::create(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)
    };
    write().map_err(Error::io("write", &path))
}

/// The number remembered, if it can be read.
pub(super) fn read_count(dir: &Path) -> Option<u64> {
    let bytes = fs::read(dir.join("count")).ok()?;
    let (count, checksum) = bytes.split_at_checked(8)?;
    (crc32fast::hash(count).to_le_bytes() == checksum).then(|| count.try_into().map(u64::from_le_bytes).ok())?
}

/// Moves what sled can rebuild to a new `aside-N/`, with a copy of the log, and puts the log into a fresh file: a store
/// that failed to open may still hold the old one open, and locked. Returns the new folder.
pub(super) fn set_aside(dir: &Path) -> Result<PathBuf, Error> {
    let aside = (0u32..).map(|n| dir.join(format!("aside-{n}"))).find(|path| !path.exists());
    let aside = aside.expect("a free number is found");
    create(&aside)?;
    for file in list(dir)? {
        let name = name_of(&file);
        if name.starts_with("snap.") || name == "conf" {
            fs::rename(&file, aside.join(&name)).map_err(Error::io("move aside", &file))?;
        }
    }
    let (db, fresh) = (dir.join("db"), dir.join("db.tmp"));
    if db.exists() {
        fs::copy(&db, aside.join("db")).map_err(Error::io("copy", &db))?;
        fs::copy(&db, &fresh).and_then(|_| fs::rename(&fresh, &db)).map_err(Error::io("replace", &db))?;
    }
    Ok(aside)
}

/// Paths in a folder; none if there is no such folder.
fn list(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("list", dir))?,
    };
    let paths: Result<Vec<PathBuf>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    paths.map_err(Error::io("list", dir))
}

/// A copy of a journal's files in the folder for temporary files; removed when dropped.
#[derive(Debug)]
pub(super) struct Copy {
    path: PathBuf,
}

impl Copy {
    /// Copies sled's files. The original may be in use: what vanishes meanwhile is left out, and what is torn is found
    /// when the copy is opened.
    pub(super) fn of(dir: &Path) -> Result<Self, Error> {
        fs::metadata(dir).map_err(Error::io("read the folder", dir))?;
        let copy = Self { path: fresh_folder()? };
        create(&copy.path.join("blobs"))?;
        let mut files = list(dir)?;
        files.retain(|file| is_own(&name_of(file)));
        files.extend(list(&dir.join("blobs"))?);
        // The number of events first: a writer at work must not look like one that lost some.
        files.sort_by_key(|file| name_of(file) != "count");
        for file in files {
            let to = copy.path.join(file.strip_prefix(dir).unwrap_or(&file));
            if file.is_file() && file.file_name().is_some_and(|name| name != "lock") {
                copy_if_there(&file, &to)?;
            }
        }
        Ok(copy)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// What is in it, not who may write it: a journal may be kept where nobody may.
fn copy_if_there(from: &Path, to: &Path) -> Result<(), Error> {
    let mut source = match File::open(from) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        file => file.map_err(Error::io("read", from))?,
    };
    let mut copy = File::create(to).map_err(Error::io("create", to))?;
    std::io::copy(&mut source, &mut copy).map(drop).map_err(Error::io("write a copy for reading at", to))
}

/// Begins the names of copies; a process and a number follow.
const COPY: &str = "taper-journal-";

/// An empty folder of its own, which others may not look into. Those that killed processes have left are removed.
fn fresh_folder() -> Result<PathBuf, Error> {
    static COPIES: AtomicU64 = AtomicU64::new(0);
    if COPIES.load(Ordering::Relaxed) == 0 {
        remove_left_behind();
    }
    let mut folder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut folder, 0o700);
    loop {
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{COPY}{}-{number}", std::process::id()));
        match folder.create(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => return created.map(|()| path.clone()).map_err(Error::io("copy the journal to", &path)),
        }
    }
}

/// Seconds after which a copy is no longer read: a process in another container may not be seen here.
const READ_S: u64 = 600;

/// Removes old copies of processes that are gone, as far as the system tells which there are.
fn remove_left_behind() {
    for path in list(&std::env::temp_dir()).unwrap_or_default() {
        let name = name_of(&path);
        let process = name.strip_prefix(COPY).and_then(|rest| rest.split_once('-')).map(|(process, _)| process);
        let is_gone = process.is_some_and(has_ended);
        let age = fs::metadata(&path).and_then(|data| data.modified()).ok().and_then(|at| at.elapsed().ok());
        if is_gone && age.is_some_and(|age| age.as_secs() > READ_S) {
            // Another one may do the same, and somebody else's cannot be.
            let _ = fs::remove_dir_all(&path);
        }
    }
}
