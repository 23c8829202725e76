"""Rounding weights to the stored formats: python benchmarks/rounding.py [--isa avx2] [--threads 2] [--rounds 9].

A matrix of bfloat16 weights is rounded to every format with every instruction set of this CPU, and read as float32.
Megabytes are those of the bfloat16 weights. A table with the best of several rounds, then one JSON line.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from coreinfer.bundles.formats import PACKED_FORMATS, float_matrix, stored_shapes
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.quantize import _kernels

ROWS, COLS = 512, 4096


@click.command()
@click.option("--isa", "isas", multiple=True, help="Instruction sets; all that this CPU has by default.")
@click.option("--threads", type=click.IntRange(1, 256), default=usable_cores(), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(isas: tuple[str, ...], threads: int, rounds: int) -> None:
    """Time rounding and reading."""
    generator = np.random.default_rng(0)
    weights = (generator.standard_normal((ROWS, COLS), dtype=np.float32) * 0.02).view(np.uint32) >> 16
    bits, moments = weights.astype(np.uint16), generator.random(COLS, dtype=np.float32)
    rows = []
    click.echo(f"{'':12s} {'isa':>9s} {'threads':>8s} {'MB of bf16 a second':>20s}")
    for kind in PACKED_FORMATS:
        for isa in isas or _kernels.available_isas():
            for num_threads in sorted({1, threads}):
                row = {"format": kind, "isa": isa, "threads": num_threads}

                def rounded(row: dict[str, Any] = row) -> tuple[Any, ...]:
                    return _kernels.round_matrix(
                        bits, row["format"], moments, num_threads=row["threads"], isa=row["isa"]
                    )

                rows.append({**row, "mb_per_second": speed(rounded, bits.nbytes, rounds)})
                click.echo(f"{kind:12s} {isa:>9s} {num_threads:8d} {rows[-1]['mb_per_second']:20.0f}")
    reading = {kind: reading_speed(bits, kind, rounds) for kind in PACKED_FORMATS}
    for kind, found in reading.items():
        click.echo(f"{kind:12s} {'read':>9s} {1:8d} {found:20.0f}")
    click.echo(json.dumps({"rows": ROWS, "cols": COLS, "rounding": rows, "reading": reading}))


def speed(work: Callable[[], object], num_bytes: int, rounds: int) -> float:
    """Megabytes a second, the best of some rounds: other programs can only slow one down."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return num_bytes / min(seconds) / 1e6


def reading_speed(bits: Any, kind: str, rounds: int) -> float:
    """How fast `float_matrix` reads what was stored."""
    arrays = _kernels.round_matrix(bits, kind, None, num_threads=usable_cores())
    shapes = stored_shapes("w", kind, (ROWS, COLS))
    file = {name: StoredTensor(dtype, array) for (name, (dtype, _)), array in zip(shapes.items(), arrays, strict=True)}
    return speed(lambda: float_matrix(file, "w", (ROWS, COLS)), bits.nbytes, rounds)


if __name__ == "__main__":
    main()
