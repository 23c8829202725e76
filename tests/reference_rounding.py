"""The rounding of compiler/quantize/csrc in plain numpy: slow, and bit for bit what the kernels must store.

All is float32, one operation after the other. Sums over the inputs of a group go through them in their order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.tensors import StoredTensor

from .packing import pack_int4, pack_int8, pack_planes

RANGES = (
    (1.0, 1.0),
    (0.95, 0.95),
    (0.9, 0.9),
    (0.85, 0.85),
    (0.78, 0.78),
    (1.0, 0.9),
    (0.9, 1.0),
    (1.0, 0.8),
    (0.8, 1.0),
)
INT8_RANGES = (1.0, 0.97, 0.93)
LEAST_SCALE = np.float32(6.0e-8)
Floats = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class Grid:
    """w' = scale * (code - zero / 16) of (groups, 32) weights; scales, zeros and errors are (groups, 1)."""

    codes: Floats
    scales: Floats
    zeros: Floats
    errors: Floats


def reference_parts(weight: Floats, kind: str, moments: Floats | None) -> dict[str, StoredTensor]:
    """Round (rows, cols): suffix of the tensor's name -> tensor, as a bundle stores it."""
    rows, cols = weight.shape
    with np.errstate(over="ignore", invalid="ignore"):
        groups, importance = grouped(weight, moments)
        grid = int4_grid(groups, importance) if kind == "int4" else int8_grid(groups, importance)
    codes = grid.codes.reshape(rows, -1)[:, :cols]
    scales = grid.scales.reshape(rows, -1).astype(np.float16)
    if kind == "int4":
        return pack_int4(codes.astype(np.uint8), scales, grid.zeros.reshape(rows, -1).astype(np.uint8))
    return (pack_planes if kind == "int8-planes" else pack_int8)(codes.astype(np.int8), scales)


def grouped(weight: Floats, moments: Floats | None) -> tuple[Floats, Floats]:
    """Cut into groups: (groups, 32) weights and importances; padding has no importance."""
    rows, cols = weight.shape
    importance = np.ones(cols, dtype=np.float32) if moments is None else moments
    # Cumulated sums are made in order.
    mean = np.float32(np.cumsum(importance, dtype=np.float64)[-1] / cols)
    # A dead input may still fire one day: it keeps a little weight.
    importance = importance + np.float32(1e-3) * np.maximum(mean, np.float32(1e-20))
    padding = (0, -cols % 32)
    every = np.pad(importance, padding).reshape(-1, 32)
    return np.pad(weight, ((0, 0), padding)).reshape(-1, 32), np.tile(every, (rows, 1))


def int4_grid(groups: Floats, importance: Floats) -> Grid:
    # Zero points lie inside the codes, so that a range always holds 0.
    low = np.minimum(groups.min(axis=1, keepdims=True), np.float32(0))
    high = np.maximum(groups.max(axis=1, keepdims=True), np.float32(0))
    grids = []
    for low_share, high_share in RANGES:
        offsets = -low * np.float32(low_share)
        scales = (high * np.float32(high_share) + offsets) / np.float32(15)
        grids.append(round_to(groups, importance, scales, offsets))
    best = least_error(grids)
    return least_error([best, refitted(groups, importance, best)])


def round_to(groups: Floats, importance: Floats, scales: Floats, offsets: Floats) -> Grid:
    """Round to w = scale * code - offset, with scale and zero point as they will be stored."""
    scales = to_half(scales)
    zeros = np.clip(np.rint(offsets / scales * np.float32(16)), 0, 255).astype(np.float32)
    codes = np.clip(np.rint(groups / scales + zeros / np.float32(16)), 0, 15).astype(np.float32)
    errors = groups - scales * (codes - zeros / np.float32(16))
    return Grid(codes=codes, scales=scales, zeros=zeros, errors=sum_in_order(importance * (errors * errors)))


def refitted(groups: Floats, importance: Floats, grid: Grid) -> Grid:
    """Fit scale and offset to the codes by weighted least squares, and round again."""
    total = sum_in_order(importance)
    mean_code = sum_in_order(importance * grid.codes) / total
    mean_weight = sum_in_order(importance * groups) / total
    centred = grid.codes - mean_code
    variance = sum_in_order(importance * (centred * centred))
    slope = sum_in_order(importance * centred * groups) / np.maximum(variance, np.float32(1e-30))
    scales = np.where((slope > 0) & (variance > 0), slope, grid.scales)
    return round_to(groups, importance, scales, scales * mean_code - mean_weight)


def int8_grid(groups: Floats, importance: Floats) -> Grid:
    largest, grids = np.abs(groups).max(axis=1, keepdims=True), []
    for share in INT8_RANGES:
        scales = to_half(largest * np.float32(share / 127))
        codes = np.clip(np.rint(groups / scales), -127, 127).astype(np.float32)
        errors = groups - scales * codes
        sums = sum_in_order(importance * (errors * errors))
        grids.append(Grid(codes=codes, scales=scales, zeros=np.zeros_like(scales), errors=sums))
    return least_error(grids)


def least_error(grids: list[Grid]) -> Grid:
    """Take for each group the grid with the least error; the first of them, and never one whose error is NaN."""
    best = grids[0]
    for grid in grids[1:]:
        better = grid.errors < best.errors
        best = Grid(**{name: np.where(better, value, vars(best)[name]) for name, value in vars(grid).items()})
    return best


def to_half(scales: Floats) -> Floats:
    halves: Any = np.clip(scales, LEAST_SCALE, np.float32(65504)).astype(np.float16)
    return np.asarray(halves, dtype=np.float32)


def sum_in_order(values: Floats) -> Floats:
    """Sum (groups, 32) over the inputs: (groups, 1)."""
    total = np.zeros((len(values), 1), dtype=np.float32)
    for column in range(values.shape[1]):
        total += values[:, column : column + 1]
    return total
