//! Names, shapes and order of a target's parameters. The order is fixed: gradients, moments and hashes follow it.

use crate::load::Config;

/// One parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in Hugging Face's Llama.
    pub name: String,
    /// Its shape.
    pub shape: ParameterShape,
}

/// Shape of a parameter, as files store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterShape {
    /// `(k)`.
    Vector(usize),
    /// `(n, k)`: n output features, k input features.
    Matrix(usize, usize),
}

impl ParameterShape {
    /// Numbers in it.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::Vector(k) => k,
            Self::Matrix(n, k) => n * k,
        }
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Parameters of one decoder layer, under `prefix`.
pub(crate) fn layer(config: &Config, prefix: &str) -> Vec<Parameter> {
    let shape = ParameterShape::Vector(config.hidden);
    let mut all = vec![Parameter { name: format!("{prefix}input_layernorm.weight"), shape }];
    all.extend(layer_reading(config, config.hidden, prefix));
    all
}

/// The same without the norms before its attention, which reads so many features.
pub(crate) fn layer_reading(config: &Config, width: usize, prefix: &str) -> Vec<Parameter> {
    let Config { hidden, ffn, head_dim, .. } = *config;
    let (queries, keys) = (config.heads * head_dim, config.kv_heads * head_dim);
    let matrix =
        |name: &str, n, k| Parameter { name: format!("{prefix}{name}.weight"), shape: ParameterShape::Matrix(n, k) };
    let vector =
        |name: &str| Parameter { name: format!("{prefix}{name}.weight"), shape: ParameterShape::Vector(hidden) };
    vec![
        matrix("self_attn.q_proj", queries, width),
        matrix("self_attn.k_proj", keys, width),
        matrix("self_attn.v_proj", keys, width),
        matrix("self_attn.o_proj", hidden, queries),
        vector("post_attention_layernorm"),
        matrix("mlp.gate_proj", ffn, hidden),
        matrix("mlp.up_proj", ffn, hidden),
        matrix("mlp.down_proj", hidden, ffn),
    ]
}

/// Numbers in these parameters.
pub(crate) fn count(parameters: &[Parameter]) -> usize {
    parameters.iter().map(|parameter| parameter.shape.len()).sum()
}

/// All parameters of a target: embedding, layers, final norm, and the head unless it is tied to the embedding.
#[must_use]
pub fn parameters(config: &Config) -> Vec<Parameter> {
    let table = ParameterShape::Matrix(config.vocab, config.hidden);
    let mut all = vec![Parameter { name: "model.embed_tokens.weight".into(), shape: table }];
    for i in 0..config.layers {
        all.extend(layer(config, &format!("model.layers.{i}.")));
    }
    all.push(Parameter { name: "model.norm.weight".into(), shape: ParameterShape::Vector(config.hidden) });
    if !config.tied {
        all.push(Parameter { name: "lm_head.weight".into(), shape: table });
    }
    all
}
