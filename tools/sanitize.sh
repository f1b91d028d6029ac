#!/usr/bin/env bash
# Runs tests under AddressSanitizer (crates cpu, codec, format, runtime), then under ThreadSanitizer (crates cpu and runtime: the thread pool, the
# kernels, the strategies with their prefetch worker):
#
#     tools/sanitize.sh [address|thread] [-- arguments of the test binaries]
#
# Needs rustup; installs its nightly toolchain if there is none. With that toolchain's component rust-src the standard library is instrumented too.
# Without it
# - the address sanitizer still sees every access of ours: its allocator and libc interceptors serve std as well;
# - the thread sanitizer sees neither the locks, channels and parking inside the prebuilt std nor its fences, so it is given tools/tsan.supp,
#   which names those of std, libtest and rayon, and two functions of ours that do nothing but lock, and one test at a time (libtest then
#   needs its channel less).
# The thread sanitizer does not run the test that damages every byte of a model, one after another: that would take hours, and is the address sanitizer's.
# Doctests are not run: rustdoc links no sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
which=(address thread)
case ${1:-} in address | thread) which=("$1"); shift ;; esac
[ "${1:-}" = -- ] && shift

cargo +nightly --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
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
  flags="-Zsanitizer=$sanitizer -Copt-level=2" # Intrinsics that are not inlined take hours.
  packages=(-p tersor-cpu -p tersor-runtime)
  arguments=("$@")
  if [ "$sanitizer" = address ]; then
    packages+=(-p tersor-codec -p tersor-format)
  else
    arguments+=(--test-threads=1 --skip every_byte_of_a_tiny_model)
    [ ${#std[@]} -gt 0 ] || flags+=" -Cunsafe-allow-abi-mismatch=sanitizer"
  fi
  log=$(mktemp)
  echo "$sanitizer sanitizer over $covered"
  # Tests reserve absurd sizes on purpose and expect a refusal: allocator_may_return_null.
  if RUSTFLAGS="$flags" CARGO_TARGET_DIR="${SANITIZE_TARGET:-target/sanitize}/$sanitizer" \
    ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1:allocator_may_return_null=1" \
    TSAN_OPTIONS="second_deadlock_stack=1:allocator_may_return_null=1:suppressions=$PWD/tools/tsan.supp" \
    cargo +nightly test "${std[@]}" --target "$target" "${packages[@]}" --lib --tests --no-fail-fast -- "${arguments[@]}" >"$log" 2>&1
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
