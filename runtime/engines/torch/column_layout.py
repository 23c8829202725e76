"""int4 weights input by input, so that a token's wanted inputs are all that is read of them.

The layout of torch's own int4 product holds eight inputs of an output in one word, so that one input cannot be read
without its neighbours, and the plain layout has an output's inputs side by side. Here the weights of one input lie
side by side, over the outputs of all matrices of a group: 128 bytes, a line that a GPU reads as a whole, hold 512
outputs. The two high bits of each code lie apart from the two low ones, which are read only where an input is whole;
byte b of a line holds, from its lowest bits up, the outputs b, 128 + b, 256 + b and 384 + b of the line's 512, so that
neighbours in the line are neighbours among the outputs. Scales and zero points are those of the bundle, group by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from coreinfer.bundles.formats import GROUP_SIZE
from torch.nn import functional

__all__ = ["Columns", "column_bytes", "lay_out_columns", "padded_outputs"]

_LINE_BYTES, _SLOTS = 128, 4
_TILE_OUTPUTS = _LINE_BYTES * _SLOTS
_GRID_BYTES = 3
"""A scale and a zero point."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Matrices with the same inputs, below each other. Padding has scale 0.

    Attributes:
        high, low: (inputs to whole groups, outputs / 4) uint8, two bits of each code.
        scales: (groups, outputs) float16.
        zeros: (groups, outputs) uint8, in sixteenths.
    """

    high: torch.Tensor
    low: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def padded_outputs(num_outputs: int) -> int:
    """Outputs of `Columns`, whole lines of a plane."""
    return -(-num_outputs // _TILE_OUTPUTS) * _TILE_OUTPUTS


def column_bytes(num_inputs: int, num_outputs: int) -> int:
    """Memory of `Columns`."""
    return -(-num_inputs // GROUP_SIZE) * padded_outputs(num_outputs) * (GROUP_SIZE // 2 + _GRID_BYTES)


def lay_out_columns(grids: Sequence[tuple[Any, Any, Any]], num_rows: Sequence[int], device: torch.device) -> Columns:
    """Lay out matrices, on the device itself.

    Args:
        grids: of each what `int4_grid` returns.
        num_rows: outputs of each; rows that its grid lacks are padding.
    """
    parts = zip(*(map(torch.from_numpy, grid) for grid in grids), strict=True)
    codes, scales, zeros = (_stacked([one.to(device) for one in part], num_rows) for part in parts)
    slots = codes.view(-1, _SLOTS, _LINE_BYTES, codes.shape[1]).permute(3, 0, 2, 1)
    return Columns(
        high=_plane(slots >> 2),
        low=_plane(slots & 3),
        scales=scales.T.to(torch.float16).contiguous(),
        zeros=(zeros.T * 16).round().to(torch.uint8).contiguous(),
    )


def _stacked(parts: Sequence[torch.Tensor], num_rows: Sequence[int]) -> torch.Tensor:
    """(rows, ...) of all parts, padded to whole tiles."""
    cut = [part[:rows] for part, rows in zip(parts, num_rows, strict=True)]
    padded = [functional.pad(part, (0, 0, 0, rows - len(part))) for part, rows in zip(cut, num_rows, strict=True)]
    whole = torch.cat(padded)
    return functional.pad(whole, (0, 0, 0, padded_outputs(len(whole)) - len(whole)))


def _plane(slots: torch.Tensor) -> torch.Tensor:
    """Two bits of (inputs, tiles, line, slots) -> (inputs, bytes)."""
    plane = slots[..., 0].clone(memory_format=torch.contiguous_format)
    for number in range(1, _SLOTS):
        plane |= slots[..., number] << (2 * number)
    return plane.reshape(len(plane), -1)
