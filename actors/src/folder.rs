//! The folder of a run: the journal, and checkpoints that appear whole or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::load::export::{Precision, write_tensors};
use models::load::load_part;
use models::optim::AdamW;
use models::{RawWeights, Weights, sha};

use crate::error::{Error, Result};
use crate::speculator::Published;

/// What a run needs to go on.
pub(crate) struct Checkpoint {
    pub(crate) weights: Arc<Weights>,
    pub(crate) adam: Arc<AdamW>,
    pub(crate) drafter: Option<Published>,
}

/// Names of the parts and the hashes of their files.
const MANIFEST: &str = "manifest.json";

#[derive(Debug, Clone)]
pub(crate) struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }

    fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// Writes a checkpoint beside its place, then moves it there.
    pub(crate) fn write(&self, name: &str, checkpoint: &Checkpoint) -> Result<()> {
        let (place, partial) = (self.checkpoints().join(name), self.checkpoints().join(format!("{name}.partial")));
        remove(&partial)?;
        fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        let written = self.write_parts(&partial, checkpoint);
        if written.is_err() {
            // A full disk gets its room back.
            let _ = fs::remove_dir_all(&partial);
        }
        written?;
        remove(&place)?;
        fs::rename(&partial, &place).map_err(Error::io("create", &place))?;
        sync(&self.checkpoints())
    }

    fn write_parts(&self, folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
        let mut parts = vec![("weights", checkpoint.weights.to_raw()), ("moments", checkpoint.adam.to_raw())];
        if let Some(drafter) = &checkpoint.drafter {
            let mut raw = drafter.weights.to_raw();
            raw.tensors.insert("version".into(), (vec![1], vec![drafter.version as f32]));
            parts.push(("drafter", raw));
        }
        let mut hashes = BTreeMap::new();
        for (name, raw) in parts {
            let path = folder.join(format!("{name}.safetensors"));
            write_tensors(&path, &raw, Precision::F32)?;
            sync(&path)?;
            hashes.insert(name, sha::of_file(&path)?);
        }
        let manifest = folder.join(MANIFEST);
        let text = serde_json::to_string_pretty(&hashes).map_err(|e| Error::Runtime { reason: e.to_string() })?;
        fs::write(&manifest, text).map_err(Error::io("write", &manifest))?;
        sync(&manifest)?;
        sync(folder)
    }

    /// Reads a checkpoint; `like` has the layout of its weights, `drafter` that of its drafter.
    pub(crate) fn read(&self, name: &str, like: &Weights, drafter: Option<&Weights>) -> Result<Checkpoint> {
        let folder = self.checkpoints().join(name);
        let manifest = folder.join(MANIFEST);
        let text = fs::read_to_string(&manifest).map_err(Error::io("read", &manifest))?;
        let damaged =
            |e: serde_json::Error| Error::Runtime { reason: format!("{} is damaged: {e}", manifest.display()) };
        let hashes: BTreeMap<String, String> = serde_json::from_str(&text).map_err(damaged)?;
        let part = |name: &str| -> Result<Option<RawWeights>> {
            let Some(hash) = hashes.get(name) else { return Ok(None) };
            Ok(Some(load_part(&folder.join(format!("{name}.safetensors")), hash)?))
        };
        let need = |name: &str| Ok::<_, Error>(part(name)?.unwrap_or_default());
        let weights = Weights::with_layout(like.layout().to_vec(), like.storage(), &need("weights")?)?;
        let adam = AdamW::from_raw(&weights, &need("moments")?)?;
        let drafter = match (part("drafter")?, drafter) {
            (Some(raw), Some(like)) => {
                let version = raw.tensors.get("version").map_or(0, |v| v.1[0] as u64);
                let weights = Arc::new(Weights::with_layout(like.layout().to_vec(), like.storage(), &raw)?);
                Some(Published { version, weights })
            }
            _ => None,
        };
        Ok(Checkpoint { weights: Arc::new(weights), adam: Arc::new(adam), drafter })
    }

    /// Removes all but the `keep` newest checkpoints; names sort by age.
    pub(crate) fn prune(&self, keep: usize) -> Result<()> {
        let folder = self.checkpoints();
        let entries = fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
        let mut names: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        names.sort();
        let old = names.len().saturating_sub(keep);
        names[..old].iter().try_for_each(|path| remove(path))
    }
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(e)),
        _ => Ok(()),
    }
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("write", path))
}
