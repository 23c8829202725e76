#!/usr/bin/env bash
# Check the torch engine on a GPU in one command of at most 8 minutes: tools/gpu-check.sh [BUNDLE] [options] [-- options of benchmarks/gpu.py]
# tools/gpu_check.py --help lists the options; docs/gpu.md says what it does. PYTHON names the Python to use.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" "$root/tools/gpu_check.py" "$@"
