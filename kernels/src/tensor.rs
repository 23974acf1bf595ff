//! Small helpers around candle's storage.

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Tensor, bail};

/// The values of a contiguous f32 operand.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{op}: operand of shape {:?} is not contiguous", layout.shape()),
    }
}

/// The values of a contiguous f32 tensor, copied.
pub(crate) fn copied(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all()?.to_vec1()
}

pub(crate) fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

pub(crate) fn output(data: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(data), shape.into())
}
