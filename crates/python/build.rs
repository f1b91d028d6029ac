//! Lets the linker leave Python's symbols open on systems where it must be told so (macOS); maturin does the same.

fn main() {
    pyo3_build_config::add_extension_module_link_args();
}
