#!/usr/bin/env bash
# Runs every fuzz target for a while: tools/fuzz_smoke.sh [seconds per target, default 60].
# cargo-fuzz needs unstable compiler flags: a nightly toolchain if there is one, else the stable one told to accept them.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked --quiet
if cargo +nightly --version >/dev/null 2>&1; then
  fuzz=(cargo +nightly fuzz)
else
  export RUSTC_BOOTSTRAP=1
  fuzz=(cargo fuzz)
fi
targets=$("${fuzz[@]}" list)
"${fuzz[@]}" build >/dev/null
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for target in $targets; do
  if ! "${fuzz[@]}" run "$target" -- -max_total_time="$seconds" -len_control=0 -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 >"$log" 2>&1; then
    tail -n 60 "$log"
    exit 1
  fi
  echo "$target: $(grep -o 'number_of_executed_units: .*' "$log") in $seconds s, nothing found"
done
