#!/usr/bin/env bash
# Runs the independent Python scripts anew and compares what they write with the golden files in the repository:
# byte for byte, but for logits, which NumPy may sum in another order on another CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=target/goldens-venv
if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv"; fi
"$venv/bin/pip" install --quiet numpy tokenizers "mlx[cpu]==0.32.4"

goldens=(crates/codec/tests/golden crates/quant/tests/golden crates/runtime/tests/golden)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The scripts write beside themselves, so they run in a copy of the tree's relevant part.
mkdir -p "$scratch/crates"/{codec,quant,runtime}/tests/golden
cp -r tools "$scratch/tools"
python="$PWD/$venv/bin/python"
for script in golden_codec golden_quant make_tiny_models; do
  "$python" "$scratch/tools/$script.py" >/dev/null
done

"$python" - "$scratch" "${goldens[@]}" <<'PY'
import sys
from pathlib import Path

import numpy as np

scratch, compared = Path(sys.argv[1]), 0
for folder in sys.argv[2:]:
    committed = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    written = sorted(p for p in (scratch / folder).rglob("*") if p.is_file())
    names = [str(p) for p in committed]
    assert names == [str(p.relative_to(scratch)) for p in written], f"{folder}: other files than the scripts write"
    for path in committed:
        compared += 1
        if path.suffix == ".f32":
            a, b = np.fromfile(path, "<f4"), np.fromfile(scratch / path, "<f4")
            assert a.shape == b.shape and np.abs(a - b).max() < 2e-5, f"{path}: logits differ"
        else:
            assert path.read_bytes() == (scratch / path).read_bytes(), f"{path}: differs from what its script writes"
assert compared > 0
print(f"{compared} golden files are what the scripts write")
PY
