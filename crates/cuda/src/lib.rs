//! Weights on NVIDIA GPUs: the layouts that kernels read, the kernels, and their launches.
//!
//! [`layout`] turns a matrix of symbols into the arrays of a device layout, coded (`quad`) or decoded (`plain`), and back; it is pure safe
//! Rust and needs no GPU. [`Device`] opens a GPU through its driver, which is loaded at run time: nothing is linked, and a machine without one gets
//! a [`CudaError`] of one line. [`Kernels`] compiles the `.cu` files of `kernels/`, [`Queue`] launches them in the order of a forward pass.
//!
//! All unsafe code is in `driver.rs`, `compile.rs` (foreign functions) and the launches of `kernels.rs` and `rans.rs`.

pub mod layout;

mod abi;
mod compile;
mod driver;
mod error;
mod kernels;
mod matrix;
mod rans;
mod step;

pub use abi::Place;
pub use compile::{SOURCES, Source as KernelSource};
pub use driver::{Buffer, Device, Event, Graph, Pinned, Plain as PlainData, Properties, Stream, device_count};
pub use error::CudaError;
pub use kernels::{Activations, AttentionAt, HEAD_DIM_MAX, Heads, Input, Kernels, Mixed, Prepared, Queue, SumsAt};
pub use matrix::{Form, PlainAt, PlainMatrix, QuadAt, QuadPlaces, nibble_bytes};
pub use rans::{RansDecoder, RansPart, RansTable};
pub use step::{Step, StepInput, StepLayer, StepMatrix, StepModel};
