//! One file per command: its arguments, its work, its report.

pub mod bench;
pub mod chat;
pub mod encode;
pub mod eval;
pub mod export;
pub mod generate;
pub mod info;
pub mod inspect;
pub mod kernels;
pub mod quantize;
pub mod serve;
pub mod verify;
