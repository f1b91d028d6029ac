//! The command `tersor`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(tersor_cli::main(std::env::args_os()))
}
