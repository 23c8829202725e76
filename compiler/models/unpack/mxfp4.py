"""MXFP4, as OpenAI publishes the experts of gpt-oss: floats of 4 bits, 32 of which share a power of two.

The format is that of the OCP Microscaling Formats specification 1.0: elements E2M1, scales E8M0. All of its numbers
below 2^128 are numbers of bfloat16 too, so that nothing is rounded; larger ones become infinite, and are refused with
all weights that are not finite.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from .asked import Settings
from .mxfp4_table import mxfp4_values
from .packing import Method, Packing, Part

__all__ = ["MXFP4"]

_GROUP = 32


def _table() -> torch.Tensor:
    """`mxfp4_values` in bfloat16: (256 x 16,), a scale's codes one after another."""
    return torch.tensor(mxfp4_values().reshape(-1), dtype=torch.bfloat16)


def _packing(model: nn.Module, name: str) -> Packing | None:
    shape = model.get_parameter(name).shape
    if len(shape) != 3:
        return None
    num_experts, num_inputs, num_outputs = shape
    groups = (num_experts, num_outputs, -(-num_inputs // _GROUP))
    return Packing(
        needed={
            "blocks": Part(dtypes=("U8",), shapes=[(*groups, _GROUP // 2)]),
            "scales": Part(dtypes=("U8",), shapes=[groups]),
        },
        unpack=_unpack,
    )


def _unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Look all weights up, an expert at a time: (experts, inputs, outputs)."""
    table = _table()
    return torch.stack([_expert(table, *both) for both in zip(parts["blocks"], parts["scales"], strict=True)])


def _expert(table: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # The low half of a byte comes first.
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return table[codes.long() + 16 * scales.long()[..., None]].flatten(-2).T


def _packings(_settings: Settings, model: nn.Module) -> "partial[Packing | None]":
    return partial(_packing, model)


MXFP4 = Method(
    parts=("blocks", "scales"), problem=lambda _: None, packings=_packings, joint="_", weight="", of_experts=True
)
