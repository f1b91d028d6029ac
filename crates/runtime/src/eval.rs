//! Perplexity, and divergence from a reference model.
