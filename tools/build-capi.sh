#!/usr/bin/env bash
# Build the C library: tools/build-capi.sh [FOLDER]
#
# FOLDER (build/capi) gets include/coreinfer.h, include/coreinfer_engine.h and lib/libcoreinfer.so. Needs a C++17 compiler (CXX, g++ unless told), nothing
# of Python. COREINFER_CXXFLAGS adds options. What was built before and has not changed is not built again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/build/capi}
native=$root/runtime/engines/native
folders="$native/csrc $native/assembly $native/capi $root/bundles/shared/csrc"
export COMMAND="${CXX:-g++} -std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wno-uninitialized
  -Wno-maybe-uninitialized -Wno-psabi ${COREINFER_CXXFLAGS:-} $(printf -- '-I%s ' $folders)"
case $(uname) in Darwin) suffix=dylib strict= ;; *) suffix=so strict=-Wl,--no-undefined ;; esac

mkdir -p "$out/objects" "$out/include" "$out/lib"
[ "$(cat "$out/command" 2>/dev/null)" = "$COMMAND" ] || rm -f "$out"/objects/*
printf '%s' "$COMMAND" >"$out/command"

newest=$(find $folders -name '*.h' -exec ls -t {} + | head -n 1)
# binding*.cpp and reading.cpp are the Python module's.
for source in $(ls $native/{csrc,assembly,capi}/*.cpp | grep -v -e /binding -e /reading.cpp); do
  object=$out/objects/$(basename "$source" .cpp).o
  [ "$object" -nt "$source" ] && [ "$object" -nt "$newest" ] || printf '%s %s\n' "$source" "$object"
done | xargs -r -L 1 -P "$(getconf _NPROCESSORS_ONLN)" sh -c '$COMMAND -c "$0" -o "$1"'
$COMMAND -shared $strict "$out"/objects/*.o -o "$out/lib/libcoreinfer.$suffix"
cp "$native"/capi/coreinfer.h "$native"/capi/coreinfer_engine.h "$out/include/"
