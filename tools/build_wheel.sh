#!/usr/bin/env bash
# Builds the Python package's wheel: one for all Pythons from 3.10 on (abi3), into target/wheels.
#
#   tools/build_wheel.sh              manylinux of this machine's glibc: maturin names the oldest policy that the symbols allow
#   tools/build_wheel.sh --portable   manylinux_2_28, linked by zig, which knows every glibc's symbols; compiles everything once more
#
# Needs a Rust toolchain and Python 3; maturin and zig come from PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/wheel-venv
packages=('maturin>=1.9,<2')
flags=()
if [ "${1-}" = --portable ]; then
    packages+=(ziglang)
    flags+=(--zig --compatibility manylinux_2_28)
fi
[ -x "$tools/bin/python" ] || python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
PATH="$PWD/$tools/bin:$PATH" maturin build --release --locked --out target/wheels "${flags[@]}"
