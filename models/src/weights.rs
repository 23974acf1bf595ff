//! Parameters in memory: packed for the kernels, in the order of their layout.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::{Matrix, NoiseKey, Storage, pack, unpack};

use crate::error::{Error, Result};
use crate::layout::{Parameter, ParameterShape, count, parameters};
use crate::load::{Config, RawWeights, dims};

/// One version of a model's parameters: f32 masters, and matrices to compute with. Never written in place: an update makes
/// a new version. Clones share memory.
#[derive(Debug, Clone)]
pub struct Weights {
    layout: Arc<Vec<Parameter>>,
    storage: Storage,
    /// Packed where a parameter is a matrix.
    masters: Vec<Arc<Vec<f32>>>,
    matrices: Vec<Option<Matrix>>,
}

/// From so many numbers on, caches do not keep a drafter's weights from one forward of the target to the next.
const STREAMED_MIN: usize = 1 << 20;

/// What so many numbers are stored as to draft with, where the target's are stored like this.
pub(crate) fn storage_to_draft(count: usize, storage: Storage) -> Storage {
    if count < STREAMED_MIN { storage_to_learn(storage) } else { Storage::Bf16 }
}

/// What a drafter learns with, where the target's numbers are stored like this: what is quickest. No answer depends on a drafter's
/// last bits, and learning in bf16 is as good.
pub(crate) fn storage_to_learn(storage: Storage) -> Storage {
    if kernels::multiplies_pairs() { Storage::Bf16 } else { storage }
}

/// A parameter as a model uses it.
#[derive(Debug, Clone)]
pub(crate) enum Loaded {
    Vector(Arc<Vec<f32>>),
    Matrix(Matrix),
}

impl Weights {
    /// A target's parameters from what a file held.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn from_raw(config: &Config, raw: &RawWeights) -> Result<Self> {
        Self::with_layout(parameters(config), config.storage, raw)
    }

    /// Parameters of any layout.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn with_layout(layout: Vec<Parameter>, storage: Storage, raw: &RawWeights) -> Result<Self> {
        let masters = layout.iter().map(|p| packed(p, raw).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        Ok(Self::of_masters(Arc::new(layout), storage, masters))
    }

    fn of_masters(layout: Arc<Vec<Parameter>>, storage: Storage, masters: Vec<Arc<Vec<f32>>>) -> Self {
        let matrix = |(parameter, master): (&Parameter, &Arc<Vec<f32>>)| match parameter.shape {
            ParameterShape::Vector(_) => None,
            ParameterShape::Matrix(n, k) => Some(Matrix::new(master, n, k, storage)),
        };
        let matrices = layout.iter().zip(&masters).map(matrix).collect();
        Self { layout, storage, masters, matrices }
    }

    /// Keyed random parameters: normal with deviation `0.02` (output projections smaller with depth), norms one.
    ///
    /// # Errors
    /// Never: every parameter of the layout is made.
    pub fn random(config: &Config, seed: u64) -> Result<Self> {
        Self::random_layout(parameters(config), config.storage, seed, config.layers)
    }

    /// Keyed random parameters of any layout.
    ///
    /// # Errors
    /// Never: every parameter of the layout is made.
    pub fn random_layout(layout: Vec<Parameter>, storage: Storage, seed: u64, layers: usize) -> Result<Self> {
        let tensors =
            layout.iter().enumerate().map(|(i, p)| (p.name.clone(), random_values(p, i, seed, layers))).collect();
        Self::with_layout(layout, storage, &RawWeights { tensors })
    }

    /// The masters as a file holds them: unpacked, by name.
    #[must_use]
    pub fn to_raw(&self) -> RawWeights {
        self.to_raw_of(|_| true)
    }

    /// The same of those whose name is wanted; others are not copied.
    #[must_use]
    pub fn to_raw_of(&self, is_wanted: impl Fn(&str) -> bool) -> RawWeights {
        let mut tensors = BTreeMap::new();
        for (parameter, master) in self.layout.iter().zip(&self.masters).filter(|(p, _)| is_wanted(&p.name)) {
            tensors.insert(parameter.name.clone(), plain(parameter, master));
        }
        RawWeights { tensors }
    }

    /// The same, to draft with: rounded where that is quicker. No answer depends on a drafter's last bits.
    #[must_use]
    pub fn to_draft(&self) -> Self {
        if storage_to_draft(self.count(), self.storage) == self.storage { self.clone() } else { self.rounded() }
    }

    /// The same layout with other masters, packed.
    pub(crate) fn with_masters(&self, masters: Vec<Arc<Vec<f32>>>) -> Self {
        Self::of_masters(self.layout.clone(), self.storage, masters)
    }

    /// The same with matrices of bf16, half as many bytes.
    #[must_use]
    pub fn rounded(&self) -> Self {
        Self::of_masters(self.layout.clone(), Storage::Bf16, self.masters.clone())
    }

    /// BLAKE3 over names, shapes and master values, lower-case hex: they are hashed after every step, beside what devices do.
    #[must_use]
    pub fn blake3(&self) -> String {
        let mut order: Vec<usize> = (0..self.layout.len()).collect();
        order.sort_by_key(|i| &self.layout[*i].name);
        let mut hash = blake3::Hasher::new();
        for i in order {
            let (shape, values) = plain(&self.layout[i], &self.masters[i]);
            hash.update(self.layout[i].name.as_bytes());
            for n in shape {
                hash.update(&(n as u64).to_le_bytes());
            }
            hash.update(bytemuck::cast_slice(&values));
        }
        hash.finalize().to_string()
    }

    /// Whether all of them are finite.
    #[must_use]
    pub fn are_finite(&self) -> bool {
        // Not ended at the first that is not, so that many are looked at together.
        self.masters.iter().all(|master| master.iter().fold(true, |are, value| are & value.is_finite()))
    }

    /// Number of parameters.
    #[must_use]
    pub fn count(&self) -> usize {
        count(&self.layout)
    }

    /// The layout.
    #[must_use]
    pub fn layout(&self) -> &[Parameter] {
        &self.layout
    }

    /// What matrices are computed with.
    #[must_use]
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// All parameters in the order of the layout, as models use them.
    pub(crate) fn loaded(&self) -> impl Iterator<Item = Loaded> + '_ {
        self.masters.iter().zip(&self.matrices).map(|(master, matrix)| match matrix {
            Some(matrix) => Loaded::Matrix(matrix.clone()),
            None => Loaded::Vector(master.clone()),
        })
    }

    /// The masters, packed.
    pub(crate) fn masters(&self) -> &[Arc<Vec<f32>>] {
        &self.masters
    }

    /// Input features of parameter `i`, if it is a matrix.
    pub(crate) fn features(&self, i: usize) -> Option<usize> {
        self.matrices[i].as_ref().map(Matrix::k)
    }

    /// The same layout with other masters, and what they round to where matrices are bf16.
    pub(crate) fn replaced(&self, masters: Vec<Vec<f32>>, rounded: Vec<Vec<u16>>) -> Self {
        let masters: Vec<Arc<Vec<f32>>> = masters.into_iter().map(Arc::new).collect();
        let matrix = |((parameter, master), rounded): ((&Parameter, &Arc<Vec<f32>>), Vec<u16>)| {
            let ParameterShape::Matrix(n, k) = parameter.shape else { return None };
            Some(match self.storage {
                Storage::F32 => Matrix::new(master, n, k, Storage::F32),
                Storage::Bf16 => Matrix::of_bf16(Arc::new(rounded), n, k),
            })
        };
        let matrices = self.layout.iter().zip(&masters).zip(rounded).map(matrix).collect();
        Self { layout: self.layout.clone(), storage: self.storage, masters, matrices }
    }

    /// Gradients of a loss that depends on nothing.
    #[must_use]
    pub fn zeros(&self) -> Vec<Vec<f32>> {
        self.masters.iter().map(|m| vec![0.0; m.len()]).collect()
    }

    /// The same, in memory that is not needed any more if it has that shape.
    #[must_use]
    pub fn zeros_in(&self, spare: Option<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        let fits =
            |spare: &Vec<Vec<f32>>| spare.iter().map(Vec::len).eq(self.masters().iter().map(|master| master.len()));
        let Some(mut spare) = spare.filter(fits) else { return self.zeros() };
        spare.iter_mut().for_each(|gradient| gradient.fill(0.0));
        spare
    }
}

fn plain(parameter: &Parameter, master: &[f32]) -> (Vec<usize>, Vec<f32>) {
    match parameter.shape {
        ParameterShape::Vector(k) => (vec![k], master.to_vec()),
        ParameterShape::Matrix(n, k) => (vec![n, k], unpack(master, n, k)),
    }
}

const WEIGHTS: &str = "the weights";

fn packed(parameter: &Parameter, raw: &RawWeights) -> Result<Vec<f32>> {
    let name = &parameter.name;
    let (shape, values) =
        raw.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.clone(), place: WEIGHTS.into() })?;
    let expected = dims(parameter.shape);
    if *shape != expected || values.len() != parameter.shape.len() {
        return Err(Error::shape(name, shape, &expected, WEIGHTS));
    }
    Ok(match parameter.shape {
        ParameterShape::Vector(_) => values.clone(),
        ParameterShape::Matrix(n, k) => pack(values, n, k),
    })
}

fn random_values(parameter: &Parameter, index: usize, seed: u64, layers: usize) -> (Vec<usize>, Vec<f32>) {
    let ParameterShape::Matrix(n, k) = parameter.shape else {
        return (vec![parameter.shape.len()], vec![1.0; parameter.shape.len()]);
    };
    let residual = parameter.name.contains("o_proj") || parameter.name.contains("down_proj");
    let deviation = if residual { 0.02 / (2.0 * layers as f64).sqrt() } else { 0.02 };
    let key = NoiseKey::new(seed, 7, u32::try_from(index).unwrap_or(u32::MAX), 0, 0);
    (vec![n, k], (0..n * k).map(|i| (normal(&key, i) * deviation) as f32).collect())
}

/// The sum of twelve uniform numbers, centred: close to normal, and exact arithmetic everywhere.
fn normal(key: &NoiseKey, i: usize) -> f64 {
    (0..12).map(|j| key.uniform(u32::try_from(i).unwrap_or(u32::MAX), j)).sum::<f64>() - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_parameters_is_as_in_all_of_them() {
        let parameter = |name: &str, shape| Parameter { name: name.into(), shape };
        let layout = vec![
            parameter("embed", ParameterShape::Matrix(5, 3)),
            parameter("norm", ParameterShape::Vector(3)),
            parameter("head", ParameterShape::Matrix(5, 3)),
        ];
        let weights = Weights::random_layout(layout, Storage::F32, 7, 1).unwrap();
        let (all, part) = (weights.to_raw(), weights.to_raw_of(|name| name != "embed"));
        assert_eq!(part.tensors.keys().collect::<Vec<_>>(), ["head", "norm"]);
        assert!(part.tensors.iter().all(|(name, tensor)| all.tensors[name] == *tensor));
        assert_eq!(all.tensors.len(), 3);
    }
}
