#!/usr/bin/env bash
# Builds the Python package's wheel for this platform into a folder (target/wheels unless given): one for all Pythons from 3.10 on (abi3).
# On Linux it is a manylinux wheel: maturin's auditwheel refuses it if it needs newer symbols than the named policy has.
# Needs a Rust toolchain and Python 3; maturin comes from PyPI, and ziglang where the system's own glibc is newer than the policy's.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/wheels}
tools=${TERSOR_VENV:-target/wheel-venv}
policy=manylinux_2_28

[ -x "$tools/bin/python" ] || python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check 'maturin>=1.9,<2' ziglang

flags=()
# The linker of zig knows the symbol versions of every glibc, so the build does not depend on the machine's.
[ "$(uname -s)" = Linux ] && flags+=(--compatibility "$policy" --zig)
PATH="$PWD/$tools/bin:$PATH" "$tools/bin/maturin" build --release --locked --out "$out" "${flags[@]}"
ls -l "$out"/tersor-*.whl
