#!/usr/bin/env bash
# Build wheels that run on old and new Linux systems: tools/build-wheels.sh [x86_64|aarch64 ...]
#
# zig (the package ziglang) is a C++ compiler that links against an old glibc, for either processor; auditwheel says
# which systems a wheel runs on. Wheels for this Python's version go to build/wheels. Needs: pip install ziglang
# auditwheel setuptools pybind11.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
GLIBC=${GLIBC:-2.17}
OUT=$PWD/build/wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tag() { "$PYTHON" -c 'import sys; print(f"cpython-{sys.version_info[0]}{sys.version_info[1]}")'; }

compiler() { # name, zig's program, processor
  printf '#!/bin/sh\nexec "%s" -m ziglang %s -target %s-linux-gnu.%s -fno-sanitize=undefined "$@"\n' \
    "$PYTHON" "$2" "$3" "$GLIBC" >"$work/$1"
  chmod +x "$work/$1"
}

build() { # processor
  compiler cc cc "$1"
  compiler c++ c++ "$1"
  # From a copy: what an editable installation left in the tree must not get in.
  git archive --prefix=source/ HEAD | tar -x -C "$work"
  (
    cd "$work/source"
    CC=$work/cc CXX=$work/c++ LDSHARED="$work/cc -shared" LDCXXSHARED="$work/c++ -shared" LDFLAGS=-s \
      CFLAGS= CXXFLAGS= _PYTHON_HOST_PLATFORM="linux-$1" SETUPTOOLS_EXT_SUFFIX=".$(tag)-$1-linux-gnu.so" \
      "$PYTHON" -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir "$OUT" \
      --config-settings="--build-option=--plat-name=manylinux_${GLIBC/./_}_$1" .
  )
  rm -rf "$work/source"
}

check() { # processor
  local wheel
  wheel=$(ls "$OUT"/*"_$1.whl")
  "$PYTHON" -m auditwheel show "$wheel" | tee "$work/shown"
  grep -q "manylinux_${GLIBC/./_}_$1" "$work/shown" || { echo "error: $wheel does not run on glibc $GLIBC" >&2; exit 1; }
  ls -l "$wheel"
}

mkdir -p "$OUT"
for processor in "${@:-x86_64}"; do
  rm -f "$OUT"/*"_$processor.whl"
  build "$processor"
  check "$processor"
done
