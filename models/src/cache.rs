//! Keys and values outside the model: rows of a request, and rows that the requests of a group share.

use std::sync::Arc;

use kernels::{KeyRun, push_key};

/// Keys and values of consecutive positions in every layer.
#[derive(Debug, Clone)]
pub(crate) struct KvRows {
    width: usize,
    /// Keys in panels, values by rows.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl KvRows {
    pub(crate) fn new(layers: usize, width: usize) -> Self {
        Self { width, layers: vec![(Vec::new(), Vec::new()); layers] }
    }

    pub(crate) fn rows(&self) -> usize {
        self.layers[0].1.len() / self.width
    }

    pub(crate) fn run(&self, layer: usize) -> KeyRun<'_> {
        let (keys, values) = &self.layers[layer];
        KeyRun { keys, values }
    }

    /// Appends row `row` of a batch's keys and values, each `(r, width)`.
    pub(crate) fn push(&mut self, layer: usize, keys: &[f32], values: &[f32], row: usize) {
        let at = row * self.width..(row + 1) * self.width;
        let (stored_keys, stored_values) = &mut self.layers[layer];
        push_key(stored_keys, stored_values.len() / self.width, &keys[at.clone()]);
        stored_values.extend_from_slice(&values[at]);
    }
}

/// What a request's next row attends to, beside the rows of the same batch.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    /// The prompt without its last token, shared by the group.
    pub(crate) prefix: Arc<KvRows>,
    pub(crate) own: KvRows,
}

impl Cache {
    pub(crate) fn runs(&self, layer: usize) -> [KeyRun<'_>; 2] {
        [self.prefix.run(layer), self.own.run(layer)]
    }
}
