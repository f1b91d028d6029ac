//! From prompt to text.

pub mod chat;
pub mod sampler;
pub mod session;
pub mod tokenizer;
