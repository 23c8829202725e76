"""Stage `quantize`: round weights to few bits, minimising the error of a layer's outputs, not of the weights.

The error of a row's output is, with inputs x whose second moments are m_i = E[x_i^2] and which are taken as
uncorrelated, sum_i m_i (w_i - w'_i)^2 (OBQ, arXiv 2208.11580, with a diagonal Hessian). Each row's groups of 32
inputs are independent under it: several ranges are tried for each group, the best is refitted by weighted least
squares, and the one with the lowest error is kept. Weights that already lie on a 4-bit grid with a minimum, as those of
Q4_1 files do, are found again up to the rounding of the zero point.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.formats import GROUP_SIZE, PACKED_FORMATS, pack_int4, pack_int8, pack_planes, stored_shapes
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.prune.narrow import bf16_bits

__all__ = ["QuantizeOptions", "quantize_int4", "quantize_int8", "store_matrix"]

# Shrunken ranges that are tried: shares of the lowest and of the highest weight of a group.
_RANGES = (
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
_INT8_RANGES = (1.0, 0.97, 0.93)
_CHUNK_WEIGHTS = 1 << 22
_LEAST_SCALE = 6.0e-8
"""Least positive float16."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Formats of the groups of tensors.

    Attributes:
        body: FFN and attention.
        head: token embedding and head.
    """

    body: str
    head: str


@dataclass(kw_only=True)
class _Grid:
    """Rounded groups: w' = scale * (code - zero / 16).

    Attributes:
        codes: (groups, 32) float32 of whole numbers.
        scales, zeros: (groups, 1) float32, exact in float16 and in whole numbers.
        errors: (groups, 1) weighted squared error.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    errors: torch.Tensor


def store_matrix(
    name: str, weight: torch.Tensor, kind: str, moments: torch.Tensor | None
) -> Mapping[str, StoredTensor]:
    """Turn a matrix into the tensors that a bundle stores.

    Args:
        name: of the matrix.
        weight: (rows, cols).
        kind: "bf16", "int8", "int8-planes" or "int4".
        moments: (cols,) second moments of the inputs; None for all alike.
    """
    if kind not in PACKED_FORMATS:
        return {name: StoredTensor("BF16", bf16_bits(weight.detach()))}
    if kind == "int4":
        parts = quantize_int4(weight.detach(), moments)
    else:
        codes, scales = quantize_int8(weight.detach(), moments)
        parts = pack_planes(codes, scales) if kind == "int8-planes" else pack_int8(codes, scales)
    assert [name + suffix for suffix in parts] == list(stored_shapes(name, kind, (weight.shape[0], weight.shape[1])))
    return {name + suffix: tensor for suffix, tensor in parts.items()}


def quantize_int4(weight: torch.Tensor, moments: torch.Tensor | None) -> dict[str, StoredTensor]:
    """Round (rows, cols) to 4 bits with a scale and a zero point a group; see `pack_int4`."""
    rows, cols = weight.shape
    all_codes, all_scales, all_zeros = [], [], []
    for groups, importance in _chunks(weight, moments):
        best = _best_range(groups, importance)
        grid = _better(best, _refit(groups, importance, best))
        all_codes.append(grid.codes.to(torch.uint8))
        all_scales.append(grid.scales)
        all_zeros.append(grid.zeros)
    codes = torch.cat(all_codes).reshape(rows, -1)[:, :cols]
    scales = torch.cat(all_scales).reshape(rows, -1).numpy().astype(np.float16)
    zeros = torch.cat(all_zeros).reshape(rows, -1).numpy().astype(np.uint8)
    return pack_int4(codes.numpy(), scales, zeros)


def quantize_int8(
    weight: torch.Tensor, moments: torch.Tensor | None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Round (rows, cols) to 8 bits with a scale a group: codes and scales as `pack_int8` takes them."""
    rows, cols = weight.shape
    all_codes, all_scales = [], []
    for groups, importance in _chunks(weight, moments):
        largest = groups.abs().amax(dim=1, keepdim=True)
        best: _Grid | None = None
        for share in _INT8_RANGES:
            scales = _half(largest * (share / 127))
            codes = (groups / scales).round().clamp(-127, 127)
            errors = (importance * (groups - scales * codes).square()).sum(dim=1, keepdim=True)
            grid = _Grid(codes=codes, scales=scales, zeros=torch.zeros_like(scales), errors=errors)
            best = grid if best is None else _better(best, grid)
        assert best is not None
        all_codes.append(best.codes.to(torch.int8))
        all_scales.append(best.scales)
    codes = torch.cat(all_codes).reshape(rows, -1)[:, :cols]
    return codes.numpy(), torch.cat(all_scales).reshape(rows, -1).numpy().astype(np.float16)


def _chunks(weight: torch.Tensor, moments: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut into groups: (groups, 32) weights and importances, some rows at a time; padding has no importance."""
    cols = weight.shape[1]
    padding = -cols % GROUP_SIZE
    importance = torch.ones(cols) if moments is None else moments.float().cpu()
    # A dead input may still fire one day: it keeps a little weight.
    importance = importance + 1e-3 * importance.mean().clamp_min(1e-20)
    importance = torch.nn.functional.pad(importance, (0, padding)).reshape(-1, GROUP_SIZE)
    for part in weight.split(max(1, _CHUNK_WEIGHTS // max(1, cols))):
        padded = torch.nn.functional.pad(part.float().cpu(), (0, padding))
        yield padded.reshape(-1, GROUP_SIZE), importance.repeat(part.shape[0], 1)


def _best_range(groups: torch.Tensor, importance: torch.Tensor) -> _Grid:
    # Zero points lie inside the codes, so that a range always holds 0.
    low = groups.amin(dim=1, keepdim=True).clamp_max(0)
    high = groups.amax(dim=1, keepdim=True).clamp_min(0)
    best: _Grid | None = None
    for low_share, high_share in _RANGES:
        scales = (high * high_share - low * low_share) / 15
        grid = _round_to(groups, importance, scales, -low * low_share)
        best = grid if best is None else _better(best, grid)
    assert best is not None
    return best


def _round_to(groups: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> _Grid:
    """Round to w = scale * code - offset, with scale and zero point as they will be stored."""
    scales = _half(scales)
    zeros = (offsets / scales * 16).round().clamp(0, 255)
    codes = (groups / scales + zeros / 16).round().clamp(0, 15)
    rounded = scales * (codes - zeros / 16)
    errors = (importance * (groups - rounded).square()).sum(dim=1, keepdim=True)
    return _Grid(codes=codes, scales=scales, zeros=zeros, errors=errors)


def _refit(groups: torch.Tensor, importance: torch.Tensor, grid: _Grid) -> _Grid:
    """Fit scale and offset to the codes by weighted least squares, and round again."""
    total = importance.sum(dim=1, keepdim=True)
    mean_code = (importance * grid.codes).sum(dim=1, keepdim=True) / total
    mean_weight = (importance * groups).sum(dim=1, keepdim=True) / total
    centred = grid.codes - mean_code
    variance = (importance * centred.square()).sum(dim=1, keepdim=True)
    slope = (importance * centred * groups).sum(dim=1, keepdim=True) / variance.clamp_min(1e-30)
    scales = torch.where((slope > 0) & (variance > 0), slope, grid.scales)
    return _round_to(groups, importance, scales, scales * mean_code - mean_weight)


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(_LEAST_SCALE, 65504).half().float()


def _better(first: _Grid, second: _Grid) -> _Grid:
    """Take for each group the one with the smaller error."""
    take = second.errors < first.errors
    return _Grid(
        codes=torch.where(take, second.codes, first.codes),
        scales=torch.where(take, second.scales, first.scales),
        zeros=torch.where(take, second.zeros, first.zeros),
        errors=torch.where(take, second.errors, first.errors),
    )
