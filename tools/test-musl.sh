#!/usr/bin/env bash
# Show that the engine computes the same bits with musl as with this machine's C library: tools/test-musl.sh BUNDLE [x86_64 aarch64]
#
# zig builds the C library and its kernel test for musl; both run here without anything to install, those for another processor under
# QEMU. The kernel test compares digests of every operation with those in its source, tools/compare_logits.py each call's logits of
# prompts with those of the engine here. Needs a Python that has coreinfer (PYTHON), zig (ZIG, or pip install ziglang), and for AArch64
# Debian's package qemu-user-static.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ZIG=${ZIG:-$PYTHON -m ziglang}

refuse() { echo "error: $1" >&2; exit 2; }

[ -f "${1:-}/manifest.json" ] || refuse "BUNDLE: expected a folder with manifest.json, got '${1:-}'; usage: tools/test-musl.sh BUNDLE [x86_64 aarch64]"
bundle=$1
shift
$ZIG version >/dev/null || refuse "'$ZIG' does not run; pip install ziglang, or set ZIG"
"$PYTHON" -c 'import coreinfer.runtime' || refuse "$PYTHON does not have coreinfer; set PYTHON"

for processor in "${@:-x86_64}"; do
  case $processor in x86_64 | aarch64) ;; *) refuse "expected x86_64 or aarch64, got '$processor'" ;; esac
  run=
  [ "$processor" = "$(uname -m)" ] || run=qemu-$processor-static
  [ -z "$run" ] || command -v "$run" >/dev/null || refuse "no program $run; apt-get install qemu-user-static"
  out=$PWD/build/musl/$processor
  target="-target $processor-linux-musl -fno-sanitize=undefined -Wno-unknown-warning-option"
  printf '\n== %s\n' "$processor-linux-musl"
  CXX="$ZIG c++ $target" tools/build-capi.sh "$out"
  CXX="$ZIG c++ $target" OBJECTS=$out/objects RUN=$run tools/test-kernels.sh -static
  $ZIG cc $target -std=c11 -O2 -I"$out/include" -c tools/logits.c -o "$out/logits.o"
  $ZIG c++ $target -static "$out/logits.o" "$out"/objects/*.o -pthread -o "$out/logits"
  # shellcheck disable=SC2086
  "$PYTHON" tools/compare_logits.py "$bundle" --threads "${THREADS:-2}" --tokens "${TOKENS:-32}" $run "$out/logits"
done
