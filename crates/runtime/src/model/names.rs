//! Names and shapes of the tensors of a Hugging Face Llama-family checkpoint.

use super::config::Config;
use super::weights::{LinearId, LinearKind};

/// Name of the final norm's weight, `(hidden,)`.
pub const FINAL_NORM: &str = "model.norm.weight";

/// One matrix of the model: where it is found and how large it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearInfo {
    /// Which matrix.
    pub id: LinearId,
    /// Name of its tensor in the checkpoint, ending in `.weight`.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// Name of the matrix's tensor in the checkpoint, ending in `.weight`. A tied head has the embedding's name.
#[must_use]
pub fn linear(config: &Config, id: LinearId) -> String {
    let part = match id.kind {
        LinearKind::Embed => return "model.embed_tokens.weight".to_owned(),
        LinearKind::Head if config.tied => return "model.embed_tokens.weight".to_owned(),
        LinearKind::Head => return "lm_head.weight".to_owned(),
        LinearKind::Q => "self_attn.q_proj",
        LinearKind::K => "self_attn.k_proj",
        LinearKind::V => "self_attn.v_proj",
        LinearKind::O => "self_attn.o_proj",
        LinearKind::Gate => "mlp.gate_proj",
        LinearKind::Up => "mlp.up_proj",
        LinearKind::Down => "mlp.down_proj",
    };
    in_layer(id.layer.into(), &format!("{part}.weight"))
}

/// Name of a tensor of one layer: `model.layers.{layer}.{part}`.
#[must_use]
pub fn in_layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// Rows and columns of a matrix.
#[must_use]
pub fn shape(config: &Config, id: LinearId) -> (usize, usize) {
    let (hidden, queries, keys) = (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim);
    match id.kind {
        LinearKind::Embed | LinearKind::Head => (config.vocab, hidden),
        LinearKind::Q => (queries, hidden),
        LinearKind::K | LinearKind::V => (keys, hidden),
        LinearKind::O => (hidden, queries),
        LinearKind::Gate | LinearKind::Up => (config.ffn, hidden),
        LinearKind::Down => (hidden, config.ffn),
    }
}

/// Every matrix of the model in order of use: embedding, layers, head. A tied head is left out, as it is the embedding.
#[must_use]
pub fn linears(config: &Config) -> Vec<LinearInfo> {
    let mut ids = vec![LinearId::EMBED];
    for layer in 0..config.layers {
        let layer = u16::try_from(layer).expect("Config limits the number of layers");
        ids.extend(LinearKind::IN_LAYER.map(|kind| LinearId::new(layer, kind)));
    }
    if !config.tied {
        ids.push(LinearId::HEAD);
    }
    let info = |id| {
        let (rows, cols) = shape(config, id);
        LinearInfo { id, name: linear(config, id), rows, cols }
    };
    ids.into_iter().map(info).collect()
}
