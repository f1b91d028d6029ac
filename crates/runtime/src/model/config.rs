//! `config.json` of a Llama-family model, checked.
//!
//! Keys and defaults are those of the classes `LlamaConfig`, `MistralConfig`, `Qwen2Config` and `Qwen3Config` of
//! transformers. A key that would change the arithmetic in a way that is not implemented is refused by its name, never
//! ignored.

use super::ModelError;
use serde_json::Value;
use std::path::Path;

/// Largest hidden size, feed-forward size and number of query rows. Keeps every product of two sizes inside `u64`.
const SIZE_MAX: u64 = 1 << 20;
/// Largest vocabulary: rows of a tensor are limited to this by the file format.
const VOCAB_MAX: u64 = 1 << 24;
/// Largest number of layers.
const LAYERS_MAX: u64 = 1 << 12;
/// Largest number of attention heads.
const HEADS_MAX: u64 = 1 << 12;
/// Longest context.
const CONTEXT_MAX: u64 = 1 << 24;

/// The model families that are implemented.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Llama 2 and 3, SmolLM, and the many models that use their layout.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3: Llama with RMS norms on each head of q and k.
    Qwen3,
}

/// How rotary frequencies differ from `theta^(-2i / head_dim)`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a linear blend between them.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` count as low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` count as high frequencies.
        high_freq_factor: f64,
        /// Context length before the scaling, in tokens.
        original_context: f64,
    },
}

/// Everything that the forward pass needs to know, in numbers that have been checked.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// The family.
    pub family: Family,
    /// Length of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Length of one head; even.
    pub head_dim: usize,
    /// Length of the feed-forward block's middle.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest context that the model was made for, in tokens.
    pub context_max: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// The head is the embedding.
    pub tied: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The attention output has a bias.
    pub o_bias: bool,
    /// Each head of q and k passes an RMS norm before rotation.
    pub qk_norm: bool,
    /// For each layer, how many positions, its own included, a token attends to; `None`: all.
    pub windows: Vec<Option<usize>>,
    /// Tokens that end generation.
    pub eos: Vec<u32>,
    /// The repetition penalty that the model's makers advise, from `generation_config.json`.
    pub repetition_penalty: Option<f32>,
}

impl Config {
    /// Reads and checks a parsed `config.json`; `generation` is a parsed `generation_config.json`, if the directory has one.
    ///
    /// `dir` is named in errors only.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for a family, activation, rope type or option that is not implemented,
    /// [`ModelError::BadKey`] for keys that are missing, malformed or contradict one another.
    pub fn from_json(dir: &Path, config: &Value, generation: Option<&Value>) -> Result<Self, ModelError> {
        let keys = Keys { file: &dir.join("config.json"), prefix: "", object: config };
        keys.read_config(dir, generation)
    }

    /// Rotary frequencies in radians per position, `(head_dim / 2,)`.
    ///
    /// Formulas as in `modeling_rope_utils.py` of transformers, in f64.
    #[must_use]
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let frequency = |i: usize| {
            let base = self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
            match self.rope_scaling {
                RopeScaling::None => base,
                RopeScaling::Linear { factor } => base / factor,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                    let wavelength = 2.0 * std::f64::consts::PI / base;
                    if wavelength > original_context / low_freq_factor {
                        base / factor
                    } else if wavelength < original_context / high_freq_factor {
                        base
                    } else {
                        let blend = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - blend) * base / factor + blend * base
                    }
                }
            }
        };
        (0..self.head_dim / 2).map(frequency).collect()
    }
}

/// A JSON object with what is needed to name its keys in errors.
struct Keys<'a> {
    file: &'a Path,
    /// Path of the object from the root, ending in a dot; empty for the root.
    prefix: &'a str,
    object: &'a Value,
}

impl Keys<'_> {
    fn read_config(&self, dir: &Path, generation: Option<&Value>) -> Result<Config, ModelError> {
        if !self.object.is_object() {
            return Err(ModelError::File { file: self.file.to_owned(), cause: "not a JSON object".to_owned() });
        }
        let family = self.family()?;
        self.refuse_what_changes_arithmetic()?;
        let hidden = self.size("hidden_size", None, SIZE_MAX)?;
        let layers = self.size("num_hidden_layers", None, LAYERS_MAX)?;
        let heads = self.size("num_attention_heads", None, HEADS_MAX)?;
        let kv_heads_default = match family {
            Family::Llama => heads as u64,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        };
        let kv_heads = self.size("num_key_value_heads", Some(kv_heads_default), HEADS_MAX)?;
        if !heads.is_multiple_of(kv_heads) {
            let cause = format!("{kv_heads} does not divide num_attention_heads {heads}");
            return Err(self.bad("num_key_value_heads", cause));
        }
        let head_dim = self.head_dim(family, hidden, heads)?;
        let ffn = self.size("intermediate_size", None, SIZE_MAX)?;
        let vocab = self.size("vocab_size", None, VOCAB_MAX)?;
        let context_default = match family {
            Family::Llama => 2048,
            Family::Mistral => 131_072,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        };
        let context_max = self.size("max_position_embeddings", Some(context_default), CONTEXT_MAX)?;
        let rms_eps = self.number("rms_norm_eps", Some(1e-6))?;
        if !(0.0..=1.0).contains(&rms_eps) {
            return Err(self.bad("rms_norm_eps", format!("{rms_eps} is outside 0..=1")));
        }
        let (rope_theta, rope_scaling) = self.rope(context_max)?;
        let attention_bias = self.flag("attention_bias", false)?;
        let windows = self.windows(family, layers)?;
        let eos = self.eos(dir, generation, vocab)?;
        let repetition_penalty = repetition_penalty(dir, generation)?;
        Ok(Config {
            family,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
            context_max,
            rms_eps: rms_eps as f32,
            rope_theta,
            rope_scaling,
            tied: self.flag("tie_word_embeddings", false)?,
            qkv_bias: family == Family::Qwen2 || (family != Family::Mistral && attention_bias),
            o_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            qk_norm: family == Family::Qwen3,
            windows,
            eos,
            repetition_penalty,
        })
    }

    fn family(&self) -> Result<Family, ModelError> {
        let model_type = self.text("model_type")?.ok_or_else(|| self.bad("model_type", "missing".to_owned()))?;
        let (family, architecture) = match model_type {
            "llama" => (Family::Llama, "LlamaForCausalLM"),
            "mistral" => (Family::Mistral, "MistralForCausalLM"),
            "qwen2" => (Family::Qwen2, "Qwen2ForCausalLM"),
            "qwen3" => (Family::Qwen3, "Qwen3ForCausalLM"),
            other => return Err(self.unsupported("model_type", other)),
        };
        let named = self.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        match named {
            Some(other) if other != architecture => Err(self.unsupported("architectures", other)),
            _ => Ok(family),
        }
    }

    fn refuse_what_changes_arithmetic(&self) -> Result<(), ModelError> {
        match self.text("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(self.unsupported("hidden_act", other)),
        }
        if self.flag("mlp_bias", false)? {
            return Err(self.unsupported("mlp_bias", "true"));
        }
        if self.number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.unsupported("partial_rotary_factor", &self.shown("partial_rotary_factor")));
        }
        if let Some(quantization) = self.get("quantization_config") {
            let keys = Keys { file: self.file, prefix: "quantization_config.", object: quantization };
            match keys.text("quant_method")? {
                Some("tersor") => {}
                other => return Err(keys.unsupported("quant_method", other.unwrap_or("(none)"))),
            }
        }
        Ok(())
    }

    fn head_dim(&self, family: Family, hidden: usize, heads: usize) -> Result<usize, ModelError> {
        let default = match family {
            Family::Qwen3 => 128,
            _ if self.get("head_dim").is_some() => 1,
            _ if hidden.is_multiple_of(heads) => (hidden / heads) as u64,
            _ => {
                let cause = format!("{heads} does not divide hidden_size {hidden}, and there is no head_dim");
                return Err(self.bad("num_attention_heads", cause));
            }
        };
        let head_dim = self.size("head_dim", Some(default), SIZE_MAX)?;
        if !head_dim.is_multiple_of(2) {
            return Err(self.bad("head_dim", format!("{head_dim} is odd, so positions cannot be rotated")));
        }
        if (heads * head_dim) as u64 > SIZE_MAX {
            return Err(self.bad("head_dim", format!("{heads} heads of {head_dim} are more than {SIZE_MAX} rows")));
        }
        Ok(head_dim)
    }

    fn rope(&self, context_max: usize) -> Result<(f64, RopeScaling), ModelError> {
        // transformers 5 moved theta and scaling into one object; older files have two keys.
        let (prefix, object) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(object), _) => ("rope_parameters.", object),
            (None, Some(object)) => ("rope_scaling.", object),
            (None, None) => ("", &Value::Null),
        };
        let keys = Keys { file: self.file, prefix, object };
        if !prefix.is_empty() && !object.is_object() {
            return Err(self.bad(prefix.trim_end_matches('.'), "is not an object".to_owned()));
        }
        let theta_outside = self.number("rope_theta", Some(10_000.0))?;
        let theta = keys.number("rope_theta", Some(theta_outside))?;
        if !(1.0..=1e15).contains(&theta) {
            return Err(self.bad("rope_theta", format!("{theta} is outside 1..=1e15")));
        }
        if keys.number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(keys.unsupported("partial_rotary_factor", &keys.shown("partial_rotary_factor")));
        }
        let kind_key = if keys.get("rope_type").is_some() { "rope_type" } else { "type" };
        let scaling = match keys.text(kind_key)? {
            // Some fine-tunes leave an object with nothing to scale; one with a factor but no type is ambiguous.
            None if keys.get("factor").is_none() && keys.values_are_scalars() => RopeScaling::None,
            None => return Err(keys.bad("rope_type", "missing".to_owned())),
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: keys.positive("factor", None)? },
            Some("llama3") => {
                let low_freq_factor = keys.positive("low_freq_factor", None)?;
                let high_freq_factor = keys.positive("high_freq_factor", None)?;
                if high_freq_factor <= low_freq_factor {
                    let cause = format!("{high_freq_factor} is not above low_freq_factor {low_freq_factor}");
                    return Err(keys.bad("high_freq_factor", cause));
                }
                RopeScaling::Llama3 {
                    factor: keys.positive("factor", None)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: keys.positive("original_max_position_embeddings", Some(context_max as f64))?,
                }
            }
            Some(other) => return Err(keys.unsupported(kind_key, other)),
        };
        Ok((theta, scaling))
    }

    /// The window of every layer. A window counts the token itself: position i sees j with i - window < j <= i.
    fn windows(&self, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
        let window_default = (family == Family::Mistral && !self.has("sliding_window")).then_some(4096);
        let window = match self.get("sliding_window") {
            Some(_) => Some(self.size("sliding_window", None, CONTEXT_MAX)?),
            None => window_default,
        };
        match family {
            Family::Llama => Ok(vec![None; layers]),
            Family::Mistral => Ok(vec![window; layers]),
            Family::Qwen2 | Family::Qwen3 => {
                if !self.flag("use_sliding_window", false)? {
                    return Ok(vec![None; layers]);
                }
                let window = window.or(Some(4096));
                if let Some(types) = self.get("layer_types") {
                    return self.windows_by_type(types, layers, window);
                }
                let full_layers = self.count("max_window_layers", 28)?;
                Ok((0..layers).map(|layer| window.filter(|_| layer as u64 >= full_layers)).collect())
            }
        }
    }

    fn windows_by_type(&self, types: &Value, layers: usize, window: Option<usize>) -> Result<Vec<Option<usize>>, ModelError> {
        let types = types.as_array().filter(|types| types.len() == layers);
        let types = types.ok_or_else(|| self.bad("layer_types", format!("is not a list of {layers} names")))?;
        let window_of = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(window),
            _ => Err(self.unsupported("layer_types", &kind.to_string())),
        };
        types.iter().map(window_of).collect()
    }

    /// `generation_config.json` has the last word on end tokens, as in transformers' `generate`.
    fn eos(&self, dir: &Path, generation: Option<&Value>, vocab: usize) -> Result<Vec<u32>, ModelError> {
        let file = dir.join("generation_config.json");
        let generation = generation.map(|object| Keys { file: &file, prefix: "", object });
        let keys = match &generation {
            Some(keys) if keys.get("eos_token_id").is_some() => keys,
            _ => self,
        };
        let id = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab as u64).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| keys.bad("eos_token_id", format!("{value} is not a token of a vocabulary of {vocab}")))
        };
        match keys.get("eos_token_id") {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    /// The key's value; `null` counts as absent, as in transformers.
    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The key is there, even as `null`.
    fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some()
    }

    fn values_are_scalars(&self) -> bool {
        self.object.as_object().is_none_or(|map| map.values().all(|value| !value.is_object()))
    }

    fn shown(&self, key: &str) -> String {
        self.get(key).map_or_else(|| "null".to_owned(), Value::to_string)
    }

    fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.bad(key, format!("{} is not a string", shortened(other)))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.bad(key, format!("{} is not true or false", shortened(other)))),
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match (self.get(key), default) {
            (Some(value), _) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(number),
                None => Err(self.bad(key, format!("{} is not a number", shortened(value)))),
            },
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.bad(key, "missing".to_owned())),
        }
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        let number = self.number(key, default)?;
        if number > 0.0 { Ok(number) } else { Err(self.bad(key, format!("{number} is not above 0"))) }
    }

    fn count(&self, key: &str, default: u64) -> Result<u64, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_u64().ok_or_else(|| self.bad(key, format!("{} is not a whole number from 0", shortened(value)))),
        }
    }

    /// A count in `1..=max`.
    fn size(&self, key: &str, default: Option<u64>, max: u64) -> Result<usize, ModelError> {
        let size = match (self.get(key), default) {
            (None, None) => return Err(self.bad(key, "missing".to_owned())),
            (None, Some(default)) => default,
            (Some(_), _) => self.count(key, 0)?,
        };
        if !(1..=max).contains(&size) {
            return Err(self.bad(key, format!("{size} is outside 1..={max}")));
        }
        usize::try_from(size).map_err(|_| self.bad(key, format!("{size} does not fit this machine's words")))
    }

    fn bad(&self, key: &str, cause: String) -> ModelError {
        ModelError::BadKey { file: self.file.to_owned(), key: format!("{}{key}", self.prefix), cause }
    }

    fn unsupported(&self, key: &str, value: &str) -> ModelError {
        let value = value.chars().take(80).collect();
        ModelError::Unsupported { file: self.file.to_owned(), key: format!("{}{key}", self.prefix), value }
    }
}

/// A value as it can stand in a one-line message, however large it is.
fn shortened(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        scalar => scalar.to_string().chars().take(40).collect(),
    }
}

/// `repetition_penalty` of `generation_config.json`.
fn repetition_penalty(dir: &Path, generation: Option<&Value>) -> Result<Option<f32>, ModelError> {
    let Some(object) = generation else { return Ok(None) };
    let file = dir.join("generation_config.json");
    let keys = Keys { file: &file, prefix: "", object };
    match keys.get("repetition_penalty") {
        None => Ok(None),
        Some(_) => keys.positive("repetition_penalty", None).map(|penalty| Some(penalty as f32)),
    }
}
