//! Strategies: who holds which weights decoded, and when they are decoded.

pub mod dense;
