"""How much faster products are that read only what is wanted of their inputs: a trial on random weights."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from coreinfer.bundles.formats import GROUP_SIZE
from torch.nn import functional

from .column_layout import Columns, column_bytes, padded_outputs
from .column_products import multiply_columns
from .packed_linear import GRID, packed_product, packed_shapes
from .transfer import CudaTransfer

__all__ = ["TRIAL_SHARE", "gain_of_columns"]

TRIAL_SHARE = 0.64
_ROUNDS = 9
# Far more than a GPU's cache holds.
_TRIAL_BYTES = 512_000_000


def gain_of_columns(
    shapes: Sequence[tuple[int, int, bool]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    packed: bool,
    least_bytes: int = _TRIAL_BYTES,
) -> float:
    """Time products with all weights over those with the wanted ones at a share of 0.64, on random weights.

    Args:
        shapes: (inputs, outputs, whether of the FFN) of groups, which are multiplied in turns.
        packed: whether matrices of the FFN are multiplied as int4.
        least_bytes: columns that are gone through before one comes again, so that no cache holds them.
    """
    num_bytes = sum(column_bytes(*shape[:2]) for shape in shapes)
    repeats = -(-least_bytes // num_bytes)
    all_runs: list[Callable[[], object]] = []
    wanted_runs: list[Callable[[], object]] = []
    for _ in range(repeats):
        for num_inputs, num_outputs, in_ffn in shapes:
            inputs = torch.randn(1, num_inputs, dtype=dtype, device=device)
            all_runs.append(_plain(inputs, num_outputs, packed=packed and in_ffn))
            wanted_runs.append(_by_columns(inputs, num_outputs))
    with torch.inference_mode():
        timed = [_repeatable(runs, device) for runs in (all_runs, wanted_runs)]
        seconds: list[list[float]] = [[], []]
        for _ in range(_ROUNDS):
            for run, own in zip(timed, seconds, strict=True):
                own.append(_seconds(run, device))
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _plain(inputs: torch.Tensor, num_outputs: int, *, packed: bool) -> Callable[[], object]:
    num_inputs, device, dtype = inputs.shape[1], inputs.device, inputs.dtype
    if not packed:
        weight = torch.randn(num_outputs, num_inputs, dtype=dtype, device=device)
        return lambda: functional.linear(inputs, weight)
    shapes = packed_shapes("down", (num_outputs, num_inputs), dtype, device)
    (shape, kind), (grid_shape, _) = shapes["down"], shapes["down" + GRID]
    weight = torch.randint(0, 100, shape, dtype=kind, device=device)
    grid = torch.rand(grid_shape, dtype=dtype, device=device)
    return lambda: packed_product(inputs, weight, grid, None, num_outputs)


def _by_columns(inputs: torch.Tensor, num_outputs: int) -> Callable[[], object]:
    num_inputs, device = inputs.shape[1], inputs.device
    groups, padded = -(-num_inputs // GROUP_SIZE), padded_outputs(num_outputs)
    plane = (groups * GROUP_SIZE, padded // 4)
    columns = Columns(
        high=torch.randint(0, 256, plane, dtype=torch.uint8, device=device),
        low=torch.randint(0, 256, plane, dtype=torch.uint8, device=device),
        scales=torch.rand((groups, padded), device=device).to(torch.float16),
        zeros=torch.randint(0, 241, (groups, padded), dtype=torch.uint8, device=device),
    )
    norms = torch.ones(num_inputs, device=device)
    limit = inputs.float().abs().flatten().quantile(1 - TRIAL_SHARE).repeat(2)
    return lambda: multiply_columns(columns, inputs.view(-1), norms, limit)


def _repeatable(runs: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """Run all, on a GPU as a recorded graph: as decoding does."""

    def all_of_them() -> None:
        for run in runs:
            run()

    all_of_them()
    if device.type != "cuda":
        return all_of_them
    return CudaTransfer(device).record(all_of_them, lambda: None)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
