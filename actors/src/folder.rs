//! The folder of a run: the journal, and checkpoints that appear whole or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use models::drafter::buffer::Buffer;
use models::drafter::eagle;
use models::load::Config;
use models::load::export::{Kind, Precision, replaceable, write_tensors};
use models::load::load_part;
use models::optim::AdamW;
use models::{RawWeights, Weights, sha};
use serde::Serialize;
use state::plan::{DrafterShape, Plan, Step};
use state::run::{CHECKPOINTS, JOURNAL};

use crate::error::{Error, Result};
use crate::experience::{Experience, Habits};
use crate::speculator::Published;

/// Stage of a checkpoint, and steps of that stage that it holds; what names of checkpoints are made of.
pub(crate) type Place = (u64, u64);

/// What a run needs to go on.
pub(crate) struct Checkpoint {
    pub(crate) weights: Arc<Weights>,
    pub(crate) adam: Arc<AdamW>,
    pub(crate) experience: Experience,
}

/// Names of the parts and the hashes of their files.
const MANIFEST: &str = "manifest.json";
/// What the controller has measured, and the like.
const HABITS: &str = "speculation.json";
/// End of the names of checkpoints that are being written.
const PARTIAL: &str = ".partial";

#[derive(Debug, Clone)]
pub(crate) struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: if dir.as_os_str().is_empty() { ".".into() } else { dir.into() } }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.dir.join(JOURNAL)
    }

    fn checkpoints(&self) -> PathBuf {
        self.dir.join(CHECKPOINTS)
    }

    /// Writes a checkpoint beside its place, then moves it there.
    pub(crate) fn write(&self, name: &str, checkpoint: &Checkpoint) -> Result<()> {
        let (place, partial) = (self.checkpoints().join(name), self.checkpoints().join(format!("{name}{PARTIAL}")));
        remove(&partial)?;
        let is_first = !self.checkpoints().is_dir();
        fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        let written = self.write_parts(&partial, checkpoint);
        if written.is_err() {
            // A full disk gets its room back.
            let _ = fs::remove_dir_all(&partial);
        }
        written?;
        remove(&place)?;
        fs::rename(&partial, &place).map_err(Error::io("create", &place))?;
        sync(&self.checkpoints())?;
        if is_first { sync(&self.dir) } else { Ok(()) }
    }

    fn write_parts(&self, folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
        let Experience { published, learner, habits, buffer } = &checkpoint.experience;
        let mut hashes = BTreeMap::new();
        // One after the other, because each is a copy of what it holds.
        let mut write = |name: &'static str, raw: &RawWeights| {
            let path = folder.join(format!("{name}.safetensors"));
            write_tensors(&path, raw, Precision::F32)?;
            sync(&path)?;
            hashes.insert(name, sha::of_file(&path)?);
            Ok::<_, Error>(())
        };
        write("weights", &checkpoint.weights.to_raw())?;
        write("moments", &checkpoint.adam.to_raw())?;
        if let Some(drafter) = published {
            let mut raw = drafter.weights.to_raw();
            raw.tensors.insert("version".into(), (vec![1], vec![drafter.version as f32]));
            write("drafter", &raw)?;
        }
        if let Some(learner) = learner {
            write("learner", learner)?;
        }
        if let Some(examples) = buffer.to_raw() {
            write("examples", &examples)?;
        }
        if let Some(habits) = habits {
            let path = folder.join(HABITS);
            write_json(&path, habits)?;
            hashes.insert(HABITS, sha::of_file(&path)?);
        }
        write_json(&folder.join(MANIFEST), &hashes)?;
        sync(folder)
    }

    /// Reads a checkpoint; `like` has the layout of its weights. What speculation had learned is a part of its own, [`Self::experience`].
    pub(crate) fn read(&self, name: &str, like: &Weights) -> Result<Checkpoint> {
        let weights = self.weights(name, like)?;
        let adam = AdamW::from_raw(&weights, &self.part(name, "moments")?.unwrap_or_default())?;
        Ok(Checkpoint { weights, adam: Arc::new(adam), experience: Experience::default() })
    }

    /// The weights of a checkpoint alone.
    pub(crate) fn weights(&self, name: &str, like: &Weights) -> Result<Arc<Weights>> {
        let raw = self.part(name, "weights")?.unwrap_or_default();
        Ok(Arc::new(Weights::with_layout(like.layout().to_vec(), like.storage(), &raw)?))
    }

    /// Reads what speculation had learned, and what is wrong with the parts that cannot be used, for a drafter of this shape.
    pub(crate) fn experience(
        &self,
        name: &str,
        target: &Config,
        drafter: Option<DrafterShape>,
    ) -> (Experience, Vec<Error>) {
        let (mut experience, mut errors) = (Experience::default(), Vec::new());
        if let Some(shape) = drafter {
            experience.published = usable(self.drafter(name, target, shape), &mut errors);
            experience.learner = usable(self.learner(name, target, shape), &mut errors).map(Arc::new);
            let width = eagle::reads(shape).width(target);
            experience.buffer = usable(self.buffer(name, width), &mut errors).unwrap_or_default();
        }
        experience.habits = usable(self.habits(name), &mut errors);
        if experience.published.is_none() && experience.learner.is_none() {
            experience.habits = experience.habits.map(Habits::without_drafter);
        }
        // Drafter and learner of another shape are wrong in the same way.
        errors.dedup_by_key(|error| error.to_string());
        (experience, errors)
    }

    /// Reads the habits of a checkpoint, if it has any.
    pub(crate) fn habits(&self, name: &str) -> Result<Option<Habits>> {
        let hashes = self.hashes(name)?;
        let Some(hash) = hashes.get(HABITS) else { return Ok(None) };
        let path = self.checkpoint(name).join(HABITS);
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        if sha::of_bytes(&bytes) != *hash {
            return Err(models::Error::Altered { path }.into());
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|source| Error::Manifest { path, source })
    }

    /// Reads the drafter of a checkpoint, if it has one.
    pub(crate) fn drafter(&self, name: &str, target: &Config, shape: DrafterShape) -> Result<Option<Published>> {
        let Some(raw) = self.part(name, "drafter")? else { return Ok(None) };
        let version = raw.tensors.get("version").and_then(|v| v.1.first()).map_or(0, |v| *v as u64);
        Ok(Some(Published::new(version, &eagle::weights(target, shape, &raw)?)))
    }

    fn learner(&self, name: &str, target: &Config, shape: DrafterShape) -> Result<Option<RawWeights>> {
        let Some(raw) = self.part(name, "learner")? else { return Ok(None) };
        eagle::weights(target, shape, &raw)?;
        Ok(Some(raw))
    }

    /// What the drafter learned from, if it had so many numbers a token.
    fn buffer(&self, name: &str, width: usize) -> Result<Option<Buffer>> {
        let buffer = self.part(name, "examples")?.as_ref().and_then(Buffer::from_raw);
        match buffer.as_ref().and_then(Buffer::width) {
            Some(found) if found != width => Err(Error::Examples { found, expected: width }),
            _ => Ok(buffer),
        }
    }

    fn part(&self, name: &str, part: &str) -> Result<Option<RawWeights>> {
        let hashes = self.hashes(name)?;
        let Some(hash) = hashes.get(part) else { return Ok(None) };
        Ok(Some(load_part(&self.checkpoint(name).join(format!("{part}.safetensors")), hash)?))
    }

    fn hashes(&self, name: &str) -> Result<BTreeMap<String, String>> {
        let path = self.checkpoint(name).join(MANIFEST);
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| Error::Manifest { path, source })
    }

    /// Folder of a checkpoint.
    pub(crate) fn checkpoint(&self, name: &str) -> PathBuf {
        self.checkpoints().join(name)
    }

    /// Name of the checkpoint that is furthest in the run.
    pub(crate) fn newest(&self) -> Option<String> {
        let whole = self.entries().into_iter().filter(|(_, name)| !name.ends_with(PARTIAL));
        whole.max().map(|(_, name)| name)
    }

    /// How far it is.
    pub(crate) fn newest_place(&self) -> Option<Place> {
        self.newest().as_deref().and_then(place)
    }

    /// Folders of checkpoints, half-written ones included; whatever else is there is not the run's.
    fn entries(&self) -> Vec<(Place, String)> {
        let Ok(entries) = fs::read_dir(self.checkpoints()) else { return Vec::new() };
        let folders = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        let names = folders.filter_map(|e| e.file_name().into_string().ok());
        names.filter_map(|name| Some((place(&name)?, name))).collect()
    }

    /// Removes all but the `keep` newest checkpoints up to `newest`, which has just been written and stays. What is
    /// further is of a journal that has lost its end: it is written again when the run comes there.
    pub(crate) fn prune(&self, newest: &str, keep: usize) -> Result<()> {
        let Some(at) = place(newest) else { return Ok(()) };
        let (partial, mut older): (Vec<_>, Vec<_>) = self
            .entries()
            .into_iter()
            .filter(|(place, name)| *place <= at && name != newest)
            .partition(|(_, name)| name.ends_with(PARTIAL));
        older.sort();
        older.truncate((older.len() + 1).saturating_sub(keep.max(1)));
        partial.iter().chain(&older).try_for_each(|(_, name)| remove(&self.checkpoint(name)))
    }

    /// Removes checkpoints, and the exports of a plan; other files stay.
    pub(crate) fn clear(&self, plan: &Plan) -> Result<()> {
        for (_, name) in self.entries() {
            remove(&self.checkpoint(&name))?;
        }
        // Fails, as it should, if there is something else in it.
        let _ = fs::remove_dir(self.checkpoints());
        plan.steps.iter().filter_map(|step| self.exported(step)).try_for_each(|folder| remove(&folder))
    }

    /// The folder of an export of this run, if the step has written one inside the run's folder.
    fn exported(&self, step: &Step) -> Option<PathBuf> {
        let Step::Export(export) = step else { return None };
        let own = [self.dir.clone(), self.journal(), self.checkpoints()];
        let folder = self.dir.join(&export.to);
        let is_model = folder.is_dir() && replaceable(&folder, Kind::Model).is_ok();
        // Links are followed to see where it is.
        let (dir, real) = (self.dir.canonicalize().ok()?, folder.canonicalize().ok()?);
        let is_inside =
            real.starts_with(dir) && !own.iter().any(|o| o.canonicalize().is_ok_and(|o| o.starts_with(&real)));
        (is_model && is_inside).then_some(folder)
    }
}

/// The numbers in the name of a checkpoint, `STAGE-STEPS`.
fn place(name: &str) -> Option<Place> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
    let (stage, steps) = name.strip_suffix(PARTIAL).unwrap_or(name).split_once('-')?;
    Some((number(stage)?, number(steps)?))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(e)),
        _ => Ok(()),
    }
}

fn usable<T>(part: Result<Option<T>>, errors: &mut Vec<Error>) -> Option<T> {
    part.unwrap_or_else(|error| {
        errors.push(error);
        None
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|e| Error::Runtime { reason: e.to_string() })?;
    fs::write(path, text).map_err(Error::io("write", path))?;
    sync(path)
}

fn sync(path: &Path) -> Result<()> {
    fs::File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests;
