//! What can go wrong outside: the files of the journal.

use std::io;
use std::path::{Path, PathBuf};

/// What to do where the system refused to read or write.
#[must_use]
pub fn advice(error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => "check the path",
        Kind::PermissionDenied => "check permissions",
        Kind::AlreadyExists | Kind::NotADirectory => {
            "a file is where a folder is wanted: name another path, or move it"
        }
        Kind::IsADirectory => "it is a folder: name a file",
        Kind::ReadOnlyFilesystem => "nothing can be written there: name another path",
        Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => "make room, then run the command again",
        Kind::OutOfMemory => "give the process more memory, then run the command again",
        Kind::WouldBlock => "run the command again",
        _ if is_of_system(error) => "raise the limit of open files (`ulimit -n`), then run the command again",
        _ => "check permissions and free space",
    }
}

/// Whether the system refused what may be possible another time, or for somebody else: that says nothing of what is in a file.
#[must_use]
pub fn is_of_system(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    // No handle is free, in the process and in the system.
    const HANDLES: [i32; 2] = [24, 23];
    let kinds = [
        Kind::PermissionDenied,
        Kind::ReadOnlyFilesystem,
        Kind::StorageFull,
        Kind::QuotaExceeded,
        Kind::FileTooLarge,
        Kind::OutOfMemory,
        Kind::WouldBlock,
    ];
    kinds.contains(&error.kind()) || (cfg!(unix) && error.raw_os_error().is_some_and(|code| HANDLES.contains(&code)))
}

/// Whether the path is to blame, and trying again would not help.
#[must_use]
pub fn is_of_path(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::ReadOnlyFilesystem
            | Kind::InvalidInput
            | Kind::InvalidFilename
    )
}

/// A failure of the journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder is locked.
    #[error("another taper process is using {}: wait for it or stop it", dir.display())]
    InUse {
        /// Folder of the journal.
        dir: PathBuf,
    },
    /// The folder is no journal's.
    #[error("{} holds files, but none of a taper run's journal: move them, or name another folder with --out", dir.display())]
    Foreign {
        /// The folder.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}; {}", path.display(), advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A record is damaged, and later ones are not.
    #[error("record {record} of {} is damaged ({reason}): restore the folder from a backup", file.display())]
    Damaged {
        /// File of the store.
        file: PathBuf,
        /// Number of the record, from 0.
        record: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A record was written by another version of taper.
    #[error(
        "record {record} of {} has format {found}, this taper reads format {supported}: use the taper that wrote it",
        file.display()
    )]
    Version {
        /// File of the store.
        file: PathBuf,
        /// Number of the record, from 0.
        record: u64,
        /// Format of the record.
        found: u16,
        /// Format of this program.
        supported: u16,
    },
    /// The store cannot be read, not even without what it can rebuild.
    #[error("cannot read the journal in {} ({reason}): restore the folder from a backup", dir.display())]
    Unreadable {
        /// Folder of the journal.
        dir: PathBuf,
        /// What the store said.
        reason: String,
    },
    /// The store failed while in use; the journal takes no more events until it is opened again.
    #[error("the journal in {} failed ({reason}): check the disk, then resume the run", dir.display())]
    Store {
        /// Folder of the journal.
        dir: PathBuf,
        /// What the store said.
        reason: String,
    },
    /// An event cannot be written, for instance because of a path that is not UTF-8.
    #[error("cannot write an event ({reason})")]
    Encode {
        /// What the encoder said.
        reason: String,
    },
    /// The journal was opened for reading.
    #[error("the journal in {} was opened for reading only: open it for writing", dir.display())]
    ReadOnly {
        /// Folder of the journal.
        dir: PathBuf,
    },
}

impl Error {
    /// Adds what was tried on `path` to an error of the operating system.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
