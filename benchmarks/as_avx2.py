"""Run coreinfer-compile as on a CPU that has AVX2 and nothing newer.

    python benchmarks/as_avx2.py --model ... -o DIR

torch's libraries and this package's kernels are told not to use more. The CPU's clock, caches and memory stay its own.
"""

import os
import sys
from functools import partial
from pathlib import Path

# What torch's own kernels, oneDNN, MKL and the native engine may use; read once, when they are loaded.
_LIMITS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "COREINFER_ISA": "avx2",
}


def _no(root: Path = Path("/")) -> bool:
    return False


def main() -> None:
    """Compile with the process's own arguments."""
    os.environ.update(_LIMITS)
    from coreinfer.bundles.shared import machine

    # Before the modules that ask it are imported.
    machine.cpu_multiplies_bf16 = machine.bf16_products_are_faster = _no
    from coreinfer.compiler.prune import _products
    from coreinfer.compiler.quantize import _kernels

    _products.add_products = partial(_products.add_products, isa="avx2")
    _kernels.round_matrix = partial(_kernels.round_matrix, isa="avx2")
    from coreinfer.compiler.cli import main as compile_command

    print("instruction sets: AVX2 at most", file=sys.stderr)
    compile_command()


if __name__ == "__main__":
    main()
