#!/bin/bash
# Builds, checks and times everything in this folder and prints one table. Needs nvcc (or a prebuilt ./quadlut), an sm_90 GPU, PyTorch.
set -u; cd "$(dirname "$0")"; O=${OUT:-/tmp}
[ -x ./quadlut ] && [ ./quadlut -nt ./quadlut.cu ] || nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o quadlut quadlut.cu || exit 1
timeout 60 ./quadlut smoke || exit 1
{ timeout 90 python3 torch_ref.py; timeout 200 ./quadlut all; } 2>&1 | tee "$O/table.txt"
