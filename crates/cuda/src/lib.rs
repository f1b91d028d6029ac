//! Weights on a CUDA device: the layouts that its kernels read.
//!
//! [`layout`] turns a matrix of symbols into the arrays of a device layout, coded (`quad`) or decoded (`plain`), and back; it is pure safe
//! Rust and needs no GPU.

pub mod layout;
