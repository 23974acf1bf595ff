//! Parameters in memory: matrices packed for the kernels, in the order of their layout.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use kernels::NoiseKey;

use crate::error::{Error, Result};
use crate::layout::{Parameter, ParameterShape, parameters};
use crate::load::{Config, RawWeights};

/// One version of a model's parameters. Never written in place: an update makes a new one.
#[derive(Debug, Clone)]
pub struct Weights {
    layout: Vec<Parameter>,
    vars: Vec<Var>,
}

impl Weights {
    /// A target's parameters from what a file held.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn from_raw(config: &Config, raw: &RawWeights) -> Result<Self> {
        Self::with_layout(parameters(config), raw)
    }

    /// Parameters of any layout.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn with_layout(layout: Vec<Parameter>, raw: &RawWeights) -> Result<Self> {
        let vars = layout.iter().map(|p| packed_var(p, raw)).collect::<Result<_>>()?;
        Ok(Self { layout, vars })
    }

    /// Keyed random parameters: normal with deviation `0.02` (output projections smaller with depth), norms one.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn random(config: &Config, seed: u64) -> Result<Self> {
        Self::random_layout(parameters(config), seed, config.layers)
    }

    /// Keyed random parameters of any layout.
    ///
    /// # Errors
    /// If memory for a tensor cannot be had.
    pub fn random_layout(layout: Vec<Parameter>, seed: u64, layers: usize) -> Result<Self> {
        let tensors =
            layout.iter().enumerate().map(|(i, p)| (p.name.clone(), random_values(p, i, seed, layers))).collect();
        Self::with_layout(layout, &RawWeights { tensors })
    }

    /// As a file holds them: unpacked, by name.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn to_raw(&self) -> Result<RawWeights> {
        let mut tensors = BTreeMap::new();
        for (parameter, var) in self.layout.iter().zip(&self.vars) {
            let (shape, plain) = match parameter.shape {
                ParameterShape::Vector(k) => (vec![k], var.as_detached_tensor()),
                ParameterShape::Matrix(n, k) => (vec![n, k], kernels::unpack(var.as_tensor(), n)?.detach()),
            };
            tensors.insert(parameter.name.clone(), (shape, plain.flatten_all()?.to_vec1()?));
        }
        Ok(RawWeights { tensors })
    }

    /// SHA-256 over names, shapes and values.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn sha256(&self) -> Result<String> {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        for (name, (shape, values)) in self.to_raw()?.tensors {
            hash.update(name.as_bytes());
            shape.iter().for_each(|n| hash.update((*n as u64).to_le_bytes()));
            values.iter().for_each(|v| hash.update(v.to_le_bytes()));
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Number of parameters.
    #[must_use]
    pub fn count(&self) -> usize {
        self.layout.iter().map(|p| p.shape.len()).sum()
    }

    /// The layout.
    #[must_use]
    pub fn layout(&self) -> &[Parameter] {
        &self.layout
    }

    /// Tensors that record operations on them, for training.
    #[must_use]
    pub fn tracked(&self) -> Vec<Tensor> {
        self.vars.iter().map(|v| v.as_tensor().clone()).collect()
    }

    /// Tensors that do not, for decoding; they share memory with [`Weights::tracked`].
    #[must_use]
    pub fn plain(&self) -> Vec<Tensor> {
        self.vars.iter().map(Var::as_detached_tensor).collect()
    }

    /// Lengths of the packed parameters.
    pub(crate) fn packed_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.vars.iter().map(|v| v.elem_count())
    }

    /// Which parameters are matrices.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = bool> + '_ {
        self.layout.iter().map(|p| matches!(p.shape, ParameterShape::Matrix(..)))
    }

    /// Packed values of all parameters.
    pub(crate) fn packed_values(&self) -> Result<Vec<Vec<f32>>> {
        self.vars.iter().map(|v| Ok(v.as_detached_tensor().flatten_all()?.to_vec1()?)).collect()
    }

    /// The same layout with other packed values.
    pub(crate) fn replaced(&self, values: Vec<Vec<f32>>) -> Result<Self> {
        let var = |(var, values): (&Var, Vec<f32>)| Ok(Var::from_vec(values, var.shape(), &Device::Cpu)?);
        let vars = self.vars.iter().zip(values).map(var).collect::<Result<_>>()?;
        Ok(Self { layout: self.layout.clone(), vars })
    }

    /// Gradients of a loss that depends on nothing.
    #[must_use]
    pub fn zeros(&self) -> Vec<Vec<f32>> {
        self.packed_lengths().map(|n| vec![0.0; n]).collect()
    }

    /// Gradients of all parameters; zero where the loss does not depend on one.
    pub(crate) fn gradients(&self, store: &candle_core::backprop::GradStore) -> Result<Vec<Vec<f32>>> {
        let gradient = |var: &Var| match store.get(var) {
            Some(gradient) => Ok(gradient.detach().flatten_all()?.to_vec1()?),
            None => Ok(vec![0.0; var.elem_count()]),
        };
        self.vars.iter().map(gradient).collect()
    }
}

fn packed_var(parameter: &Parameter, raw: &RawWeights) -> Result<Var> {
    let name = &parameter.name;
    let (shape, values) = raw
        .tensors
        .get(name)
        .ok_or_else(|| Error::MissingTensor { name: name.clone(), place: "the weights".into() })?;
    let expected = match parameter.shape {
        ParameterShape::Vector(k) => vec![k],
        ParameterShape::Matrix(n, k) => vec![n, k],
    };
    if *shape != expected {
        return Err(Error::TensorShape { name: name.clone(), found: shape.clone(), expected });
    }
    let plain = Tensor::from_slice(values, expected, &Device::Cpu)?;
    Ok(match parameter.shape {
        ParameterShape::Vector(_) => Var::from_tensor(&plain)?,
        ParameterShape::Matrix(..) => Var::from_tensor(&kernels::pack(&plain)?)?,
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
