"""How fast this machine is, measured in two seconds. Needs torch, whose products a compile consists of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.shared.ray_cluster import LOCAL
from coreinfer.bundles.shared.signals import signals_held

if TYPE_CHECKING:
    import torch
    from coreinfer.compiler.config import CompileConfig

__all__ = ["Machine", "measure_machine", "measure_worker"]

_TOKENS, _INPUTS, _OUTPUTS = 1024, 1024, 1536
_PRODUCT_FLOP = 2 * _TOKENS * _INPUTS * _OUTPUTS
_READ_VALUES = 1 << 25
"""Float32 values that are summed: more than any cache holds."""
_NUM_MEASURED = 3
_LEAST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds of this machine, with the threads that a compile uses.

    Attributes:
        float32_gflops, bfloat16_gflops: of plain matrix products, a multiplication and an addition counted as two.
        read_gbps: of a plain read of memory.
    """

    num_threads: int
    float32_gflops: float
    bfloat16_gflops: float
    read_gbps: float


def measure_worker(config: "CompileConfig", *, seconds: float = 2.0) -> Machine:
    """Measure what each worker of a compile has, or the compile itself where it has none.

    Workers on this machine share it; those of a cluster are taken for machines like this one.
    """
    num_here = config.num_places if config.ray == LOCAL else 1
    threads = config.threads or (max(1, usable_cores() // num_here) if num_here > 1 else None)
    whole = measure_machine(threads and min(usable_cores(), threads * num_here), seconds=seconds)
    return Machine(
        num_threads=threads or whole.num_threads,
        float32_gflops=whole.float32_gflops / num_here,
        bfloat16_gflops=whole.bfloat16_gflops / num_here,
        read_gbps=whole.read_gbps / num_here,
    )


def measure_machine(num_threads: int | None, *, seconds: float = 2.0) -> Machine:
    """Time products and reads, the best of many: what the machine does when nothing else runs on it.

    Torch's number of threads is left as it was.

    Args:
        num_threads: of the compile; None for all cores, as for `CompileConfig.threads`.
        seconds: to take about; products of bfloat16 where they are emulated may take longer.
    """
    with signals_held():
        import torch

    before = torch.get_num_threads()
    num_threads = num_threads or min(before, usable_cores())
    torch.set_num_threads(num_threads)
    try:
        rates = [_product_gflops(dtype, seconds / _NUM_MEASURED) for dtype in (torch.float32, torch.bfloat16)]
        values = torch.ones(_READ_VALUES)
        read_seconds = _least_seconds(values.sum, seconds / _NUM_MEASURED)
    finally:
        torch.set_num_threads(before)
    return Machine(
        num_threads=num_threads,
        float32_gflops=rates[0],
        bfloat16_gflops=rates[1],
        read_gbps=values.nbytes / read_seconds / 1e9,
    )


def _product_gflops(dtype: "torch.dtype", seconds: float) -> float:
    import torch

    inputs, weights = torch.ones((_TOKENS, _INPUTS), dtype=dtype), torch.ones((_OUTPUTS, _INPUTS), dtype=dtype)
    with torch.inference_mode():
        return _PRODUCT_FLOP / _least_seconds(lambda: torch.nn.functional.linear(inputs, weights), seconds) / 1e9


def _least_seconds(measured: Callable[[], object], seconds: float) -> float:
    """Least seconds of a call, the first left out, which also prepares."""
    measured()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _LEAST_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        measured()
        found.append(time.perf_counter() - start)
    return min(found)
