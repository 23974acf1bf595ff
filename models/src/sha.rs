//! SHA-256 of files and bytes, as lower-case hex.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// SHA-256 of bytes, lower-case hex.
#[must_use]
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::new_with_prefix(bytes))
}

/// SHA-256 of a file, lower-case hex. Reads it in pieces.
///
/// # Errors
/// If the file cannot be read.
pub fn of_file(path: &Path) -> Result<String> {
    let io = |source| Error::Io { path: path.into(), source };
    let mut file = File::open(path).map_err(io)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => return Ok(hex(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Compares a hash with the one asked for; case does not matter.
///
/// # Errors
/// If they differ.
pub fn expect(path: &Path, found: String, expected: &str) -> Result<()> {
    match found.eq_ignore_ascii_case(expected.trim()) {
        true => Ok(()),
        false => Err(Error::Sha256 { path: path.into(), found, expected: expected.into() }),
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_the_published_ones() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_bytes(b"abc"), abc);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        assert_eq!(of_file(file.path()).unwrap(), abc);
        assert!(expect(file.path(), abc.into(), &abc.to_uppercase()).is_ok());
        assert!(matches!(expect(file.path(), abc.into(), "00"), Err(Error::Sha256 { .. })));
    }
}
