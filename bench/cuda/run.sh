#!/usr/bin/env bash
# Checks and times everything of the CUDA backend on a machine with an NVIDIA GPU, CUDA and PyTorch, but without Rust, in five to seven minutes.
#
# usage: bench/cuda/run.sh BIN OUT
#
# BIN holds, stripped, what was built elsewhere:
#   tersor      cargo build --release -p tersor-cli
#   gpu_test    cargo test --release -p tersor-cuda --test gpu --no-run (target/release/deps/gpu-*)
#   runners     cargo test --release -p tersor-runtime --test runners --no-run (target/release/deps/runners-*)
#   books       books-52m, quantized: tersor quantize ../shared/data/books-52m -o BIN/books --bpw 3.75
#   text.txt    a text to predict
# OUT gets one file for each measurement; the table, printed last, is made of them by bench/cuda/report.py.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# = 2 ] || { sed -n 2,13p "$0"; exit 2; }
bin=$(realpath "$1") out=$(realpath -m "$2") tersor=$(realpath "$1")/tersor
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export TERSOR_REQUIRE=cuda XDG_CACHE_HOME=$work/cache
failed=0
# step NAME SECONDS COMMAND...: output to NAME.json, messages to NAME.err
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.json" 2>"$out/$name.err"; then
    echo "ok      $name ($((SECONDS - begin)) s)"
  else
    echo "FAILED  $name (exit $?): $(tail -n 1 "$out/$name.err" | cut -c 1-300)"
    failed=1
  fi
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"

# Every kernel against the CPU oracle: fresh random inputs, poisoned outputs. Then again under compute-sanitizer.
step kernels_are_exact 150 "$bin/gpu_test"
# Whole small models: strategies, slices of a prompt, several sequences in a call, numbers out of a step's range.
step runners 60 "$bin/runners"
# (One test asks for more memory than there is, which the tool would count.)
step memcheck 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$bin/gpu_test" --test-threads=1 --skip impossible
step synccheck 150 compute-sanitizer --tool synccheck --error-exitcode 9 "$bin/gpu_test" --test-threads=1 --skip impossible
step racecheck 100 compute-sanitizer --tool racecheck --error-exitcode 9 "$bin/gpu_test" --test-threads=1 attention activations replayed damage

# Real models: every strategy gives the same tokens and logits; both devices predict alike.
prompt="It was a dark and stormy night"
for model in models/demo "$bin/books"; do
  name=$(basename "$model")
  for strategy in fused cached prefetch lru gpu-async auto; do
    step "generate-$name-$strategy" 60 "$tersor" generate "$model" --device cuda --strategy $strategy --prompt "$prompt" -n 100 --json
  done
done
step generate-books-lru-mru 60 "$tersor" generate "$bin/books" --device cuda --strategy lru --lru-policy mru --memory-budget 100MB --prompt "$prompt" -n 100 --json
# KL of the GPU's predictions from the CPU's, of the same weights: activations are rounded in other places.
step eval-books 60 "$tersor" eval "$bin/books" --reference "$bin/books" --reference-device cpu --text "$bin/text.txt" --tokens 2000 --device cuda --json

# Kernels, with torch's beside them.
step torch 100 python3 bench/cuda/torch_reference.py 28672x8192 8192x28672 14336x4096
for shape in 28672x8192 8192x28672 14336x4096; do
  step "kernels-$shape-2.25" 60 "$tersor" kernels --device cuda --codec rans --rows "${shape%x*}" --cols "${shape#*x}" --entropy 2.25 --json
done
for shape in 28672x8192 8192x28672; do # of these the load is reported
  step "kernels-$shape-2.25-pairs" 60 "$tersor" kernels --device cuda --codec rans-pairs --rows "${shape%x*}" --cols "${shape#*x}" --entropy 2.25 --json
done
step kernels-28672x8192-3.0 60 "$tersor" kernels --device cuda --codec rans --rows 28672 --cols 8192 --entropy 3.0 --json

# An 8 B-shaped Llama of 32 equal layers, 2.3 bits a weight.
step make 60 python3 bench/cuda/make_model.py "$work/one"
step quantize 100 "$tersor" quantize "$work/one" -o "$work/coded" --bpw 2.3 --json
step repeat 60 python3 tools/repeat_layers.py "$work/coded" 32 "$work/8b"
for strategy in cached fused gpu-async auto; do
  step "bench-8b-$strategy" 60 "$tersor" bench "$work/8b" --device cuda --strategy $strategy -p 512 -n 128 --repeat 3 --json
done
step bench-8b-cached-short 60 "$tersor" bench "$work/8b" --device cuda --strategy cached -p 16 -n 128 --repeat 3 --json
# What the second stream does beside the first: 512 tokens of a prompt, and a step.
step timeline-prompt 60 "$tersor" bench "$work/8b" --device cuda --strategy gpu-async -p 512 -n 1 --repeat 1 --timeline --json
step timeline-step 60 "$tersor" bench "$work/8b" --device cuda --strategy gpu-async -p 16 -n 8 --repeat 1 --timeline --json
for strategy in prefetch auto; do # about a third of the coded bytes
  step "bench-8b-1100MB-$strategy" 60 "$tersor" bench "$work/8b" --device cuda --strategy $strategy --memory-budget 1100MB -p 128 -n 32 --repeat 2 --json
done
for strategy in fused lru gpu-async auto; do
  step "bench-8b-2600MB-$strategy" 60 "$tersor" bench "$work/8b" --device cuda --strategy $strategy --memory-budget 2600MB -p 128 -n 32 --repeat 2 --json
done
python3 bench/cuda/report.py "$out" || failed=1
exit $failed
