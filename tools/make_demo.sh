#!/usr/bin/env bash
# Rebuilds models/demo byte for byte: tools/make_demo.sh [checkpoint, default ../shared/data/books-6m] [destination, default models/demo]
# The checkpoint is CC0 and lies beside the repository of its developers; the demo's generation_config.json adds a repetition penalty, since a
# model of 6 M parameters repeats itself when it is read greedily.
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:-../shared/data/books-6m}
destination=${2:-models/demo}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp "$checkpoint"/* "$scratch"
chmod u+w "$scratch"/*
printf '{"eos_token_id": 0, "repetition_penalty": 1.2}\n' >"$scratch/generation_config.json"
cargo run --release --quiet -- quantize "$scratch" -o "$scratch/out" --scheme ecsq --bpw 4.0 --codec rans
mkdir -p "$destination"
cp "$scratch"/out/* "$destination"
