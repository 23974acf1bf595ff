//! Keys and values outside the model: rows of a request, and rows that the requests of a group share.

use std::sync::Arc;

use kernels::{Heads, KeyValues};

/// Keys and values of consecutive positions in every layer.
pub(crate) type Layers = Vec<KeyValues>;

pub(crate) fn no_rows(layers: usize, shape: Heads) -> Layers {
    (0..layers).map(|_| KeyValues::new(shape)).collect()
}

/// What a request's next row attends to, beside the rows of the same batch.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    /// The prompt without its last token, shared by the group.
    pub(crate) prefix: Arc<Layers>,
    pub(crate) own: Layers,
}
