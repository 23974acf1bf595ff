//! The bytes of one event: `TPR1` | format u16 | length u32 | bincode | CRC-32 of all before; numbers little-endian.
//!
//! bincode is not self-describing, so the format number stands for the shape of every persisted type.

use super::Event;
use crate::error::Error;

/// Format of the records. Raised whenever an event, a plan or a metric changes its fields, or the same plan comes to mean other numbers.
pub const VERSION: u16 = 19;

const MAGIC: [u8; 4] = *b"TPR1";
/// Bytes before the payload.
const HEADER: usize = 10;
/// Bytes after it.
const TRAILER: usize = 4;
/// Largest payload, in bytes; also guards the decoder's allocations.
const PAYLOAD_MAX: usize = 16 << 20;

/// Why a record is not an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is intact, but of another format.
    Version(u16),
    /// It is not what was written.
    Damaged(String),
}

/// The record of an event.
pub(super) fn encode(event: &Event) -> Result<Vec<u8>, Error> {
    let payload = bincode::serde::encode_to_vec(event, bincode::config::standard())
        .map_err(|error| Error::Encode { reason: error.to_string() })?;
    if payload.len() > PAYLOAD_MAX {
        return Err(Error::Encode { reason: format!("{} bytes exceed {PAYLOAD_MAX}", payload.len()) });
    }
    let mut record = MAGIC.to_vec();
    record.extend(VERSION.to_le_bytes());
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend(payload);
    record.extend(crc32fast::hash(&record).to_le_bytes());
    Ok(record)
}

/// The event of a record.
pub(super) fn decode(record: &[u8]) -> Result<Event, Fault> {
    let payload = check(record)?;
    let config = bincode::config::standard().with_limit::<PAYLOAD_MAX>();
    let (event, read) =
        bincode::serde::decode_from_slice(payload, config).map_err(|error| Fault::Damaged(error.to_string()))?;
    if read == payload.len() { Ok(event) } else { Err(damaged("bytes follow the event")) }
}

/// The payload, once everything around it is as it should be. The checksum comes before the format, so that a flipped
/// bit is not taken for another version of taper.
fn check(record: &[u8]) -> Result<&[u8], Fault> {
    let Some(end) = record.len().checked_sub(TRAILER).filter(|&end| end >= HEADER) else {
        return Err(Fault::Damaged(format!("only {} bytes long", record.len())));
    };
    let (content, checksum) = record.split_at(end);
    if content[..4] != MAGIC {
        return Err(damaged("does not begin with TPR1"));
    }
    if crc32fast::hash(content).to_le_bytes() != checksum {
        return Err(damaged("its checksum does not match"));
    }
    let version = u16::from_le_bytes([content[4], content[5]]);
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    let length = u32::from_le_bytes([content[6], content[7], content[8], content[9]]) as usize;
    if length == end - HEADER { Ok(&content[HEADER..]) } else { Err(damaged("its length does not match")) }
}

fn damaged(reason: &str) -> Fault {
    Fault::Damaged(reason.into())
}
