//! From prompt to text.
