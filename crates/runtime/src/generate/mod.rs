//! From prompt to text.

pub mod sampler;
pub mod session;
pub mod tokenizer;
