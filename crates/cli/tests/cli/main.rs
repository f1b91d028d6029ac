//! Tests of the built binary. One test program, so that it is linked once.

mod bad_input;
mod common;
mod contract;
mod serve;
