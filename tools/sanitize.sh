#!/usr/bin/env bash
# Run the tests of the C++ modules under AddressSanitizer and UndefinedBehaviorSanitizer: the kernel test, then the Python tests
# with instrumented modules in place of the installed ones. Give the Python of an environment made by `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# shellcheck disable=SC2086
tools/test-kernels.sh $flags

# The instrumented modules take the installed ones' places while the tests run.
suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
modules="runtime/engines/native/_native$suffix compiler/quantize/_kernels$suffix compiler/prune/_products$suffix"
trap 'for module in $modules; do [ ! -e "$module.saved" ] || mv "$module.saved" "$module"; done' EXIT
sources() { ls -d "$(dirname "$1")"/csrc "$(dirname "$1")"/assembly "$(dirname "$1")"/capi 2>/dev/null || true; }
for module in $modules; do
  cp "$module" "$module.saved"
  # shellcheck disable=SC2046,SC2086
  g++ -std=c++17 -O1 -g1 -fPIC -shared -fvisibility=hidden -ffp-contract=off -DCOREINFER_STATIC -pthread -w $flags \
    $("$python" -m pybind11 --includes) $(printf -- '-I%s ' bundles/shared/csrc $(sources "$module")) \
    $(for folder in $(sources "$module"); do ls "$folder"/*.cpp; done) -o "$module"
done
# Python itself leaks by design, and numpy and torch are not instrumented.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  "$python" -m pytest -q -p no:cacheprovider tests/test_native_kernels.py tests/test_native_decoder.py tests/test_native_rows.py \
  tests/test_mixtures.py tests/test_memory_experts.py tests/test_kv_pool.py tests/test_wide_cache.py tests/test_rounding_kernels.py tests/test_products.py
