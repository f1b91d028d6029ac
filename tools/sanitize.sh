#!/usr/bin/env bash
# Runs the tests of the crates with unsafe code or threads (cpu, format, runtime) under AddressSanitizer, then under ThreadSanitizer:
#
#     tools/sanitize.sh [address|thread] [-- arguments of the test binaries]
#
# Needs a nightly toolchain. With its component rust-src the standard library is instrumented too. Without it the address sanitizer still
# sees every access of ours (its allocator and libc interceptors serve std as well), and the thread sanitizer is refused: it does not see the
# locks and channels inside the prebuilt std, and reports thousands of races that are none, the first in libtest's own channel.
# Doctests are not run: rustdoc links no sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
which=(address thread)
case ${1:-} in address | thread) which=("$1"); shift ;; esac
[ "${1:-}" = -- ] && shift

cargo +nightly --version >/dev/null 2>&1 || { echo "error: no nightly toolchain: rustup toolchain install nightly" >&2; exit 1; }
target=$(rustc +nightly -vV | sed -n 's/^host: //p')
std=()
if [ -f "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock" ]; then
  std=(-Zbuild-std)
  covered="crates, dependencies and the standard library"
else
  covered="crates and dependencies, not the standard library (no rust-src)"
fi

failed=0
for sanitizer in "${which[@]}"; do
  if [ "$sanitizer" = thread ] && [ ${#std[@]} -eq 0 ]; then
    echo "thread sanitizer: NOT RUN, it needs the standard library's source: rustup component add rust-src --toolchain nightly"
    failed=1
    continue
  fi
  flags="-Zsanitizer=$sanitizer"
  log=$(mktemp)
  echo "$sanitizer sanitizer over $covered"
  # Tests reserve absurd sizes on purpose and expect a refusal: allocator_may_return_null. Unoptimized kernels would take hours: opt-level.
  if RUSTFLAGS="$flags -Copt-level=1" CARGO_TARGET_DIR="${SANITIZE_TARGET:-target/sanitize}/$sanitizer" \
    ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1:allocator_may_return_null=1" TSAN_OPTIONS="second_deadlock_stack=1:allocator_may_return_null=1" \
    cargo +nightly test "${std[@]}" --target "$target" -p tersor-cpu -p tersor-format -p tersor-runtime --lib --tests --no-fail-fast -- "$@" >"$log" 2>&1
  then outcome=clean; else outcome=FAILED; failed=1; fi
  passed=$(grep -o '^test result: .* \([0-9]*\) passed' "$log" | grep -o '[0-9]* passed' | awk '{s += $1} END {print s + 0}' || true)
  reports=$(grep -c -E '(ERROR: AddressSanitizer|ERROR: LeakSanitizer|WARNING: ThreadSanitizer)' "$log" || true)
  if [ "$reports" -gt 0 ]; then outcome=FAILED; failed=1; fi
  echo "$sanitizer sanitizer: $outcome, $passed tests passed, $reports reports"
  if [ "$outcome" = FAILED ]; then
    grep -n -E '^error|^test .*FAILED|Sanitizer|^ +#[0-9]+ .*tersor' "$log" | head -60
    echo "full log: $log"
  else
    rm -f "$log"
  fi
done
exit $failed
