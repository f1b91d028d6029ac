//! Runs Llama-family language models whose weights may be entropy coded.
//!
//! - [`model`] is the forward pass. It asks a [`model::weights::Weights`] for every matrix product and does not know in
//!   which form the weights are held.
//! - [`residency`] holds the strategies: the implementations of that trait, one file each.
//! - [`device`] chooses who computes: the CPU under these strategies, or a backend that runs the whole forward pass on a device.
//! - [`generate`] turns prompts into text: tokenizer, sampler, sessions.
//! - [`eval`] measures perplexity and the divergence from a reference model.
#![forbid(unsafe_code)]

pub mod device;
pub mod eval;
pub mod generate;
pub mod machine;
pub mod model;
pub mod residency;
