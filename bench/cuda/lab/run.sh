#!/bin/bash
# Builds, checks and times everything in this folder and prints one table, ratios last. Needs nvcc (or a prebuilt ./quadlut), one
# sm_90 GPU and PyTorch. Every kernel is compared with the CPU exactly (int64), on fresh random inputs, outputs poisoned first.
set -u; cd "$(dirname "$0")"; O=${OUT:-/tmp}
[ -x ./quadlut ] && [ ./quadlut -nt ./quadlut.cu ] || nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o quadlut quadlut.cu || exit 1
timeout 60 ./quadlut smoke > "$O/smoke.txt" || { cat "$O/smoke.txt"; exit 1; }
timeout 60 compute-sanitizer ./quadlut smoke 2>&1 | tail -1 > "$O/sanitizer.txt"; cat "$O/sanitizer.txt"
{ timeout 90 python3 torch_ref.py; timeout 200 ./quadlut all; } > "$O/table.txt" 2>&1; r=$?; cat "$O/table.txt"
python3 ratios.py "$O/table.txt"; exit $r
