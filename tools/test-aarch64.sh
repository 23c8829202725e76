#!/usr/bin/env bash
# Cross-compile the kernels for AArch64 and run their test under qemu-user.
# Needs the Debian packages g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")"
CXX=aarch64-linux-gnu-g++ RUN="qemu-aarch64 -cpu max" ./test-kernels.sh -static
