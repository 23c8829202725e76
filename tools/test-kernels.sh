#!/usr/bin/env bash
# Build the engine's C++ parts with a compiler and run their kernel test: tools/test-kernels.sh [options of the compiler]
# CXX names the compiler, RUN a program to run the test under (an emulator), OBJECTS a folder of objects that are tested
# instead of the sources (tools/build-capi.sh leaves some).
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
if [ -n "${OBJECTS:-}" ]; then
  sources=$(ls "$OBJECTS"/*.o)
else
  # binding*.cpp and reading.cpp are the Python module's.
  sources=$(ls runtime/engines/native/csrc/*.cpp runtime/engines/native/capi/sha256*.cpp | grep -v -e /binding -e /reading.cpp)
fi
# shellcheck disable=SC2086
${CXX:-g++} -std=c++17 -O2 -ffp-contract=off -g1 -Wall -Wextra -Wno-uninitialized -Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-psabi -Ibundles/shared/csrc "$@" \
  tools/kernel_tests/*.cpp $sources -pthread -o "$build/kernel_test"
${RUN:-} "$build/kernel_test"
