//! Embedding lookup in a packed weight, so that a tied output head needs no second copy.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::linear::PANEL;
use crate::tensor::{copied, output, tensor, values};

/// Rows `ids` of a packed weight `(p, k, PANEL)`, as `(r, k)`. Differentiable in the weight.
///
/// # Errors
/// If an id is outside the table.
pub fn embed(ids: &Arc<Vec<u32>>, packed: &Tensor) -> Result<Tensor> {
    packed.apply_op1(Embed { ids: ids.clone() })
}

struct Embed {
    ids: Arc<Vec<u32>>,
}

fn base(id: u32, k: usize) -> usize {
    id as usize / PANEL * k * PANEL + id as usize % PANEL
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (panels, k, _) = l.shape().dims3()?;
        let table = values(s, l, "embed")?;
        let mut y = Vec::with_capacity(self.ids.len() * k);
        for &id in self.ids.iter() {
            if id as usize >= panels * PANEL {
                bail!("embed: token {id} is outside a table of {}", panels * PANEL);
            }
            y.extend((0..k).map(|i| table[base(id, k) + i * PANEL]));
        }
        Ok(output(y, (self.ids.len(), k)))
    }

    fn bwd(&self, packed: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let k = packed.dim(1)?;
        let mut dw = vec![0.0; packed.elem_count()];
        for (&id, row) in self.ids.iter().zip(copied(grad)?.chunks_exact(k)) {
            for (i, g) in row.iter().enumerate() {
                dw[base(id, k) + i * PANEL] += g;
            }
        }
        Ok(Some(tensor(dw, packed.shape())?))
    }
}
