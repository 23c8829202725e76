#!/usr/bin/env bash
# Cross-compile the kernels for AArch64 and run their test under qemu-user.
# Needs the Debian packages g++-aarch64-linux-gnu and qemu-user, or another compiler (CXX) and emulator (RUN).
set -euo pipefail
cd "$(dirname "$0")"
CXX=${CXX:-aarch64-linux-gnu-g++} RUN=${RUN:-qemu-aarch64 -cpu max} ./test-kernels.sh -static
