"""bitsandbytes: a table of 16 values and a scale for each block of a weight, or 8 bits and a scale for each row.

All that is needed to unpack is in the file: the table too, and a description of the blocks in JSON.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .asked import Settings
from .packing import FLOATS, Method, Packing, Part, matrix_shape

__all__ = ["BITSANDBYTES"]

_STATE = "weight.quant_state.bitsandbytes__"
_TABLES = ("nf4", "fp4")
_ROW_FORMAT = 0
_NESTED = {
    "weight.nested_absmax": Part(dtypes=("F32",)),
    "weight.nested_quant_map": Part(dtypes=("F32",), shapes=[(256,)]),
}


def _problem(settings: Settings) -> str | None:
    table = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_4bit"):
        return None if table in _TABLES else f"bnb_4bit_quant_type {table!r} (expected {' or '.join(_TABLES)})"
    return None if settings.get("load_in_8bit") else "neither load_in_4bit nor load_in_8bit"


def _packing(settings: Settings, model: nn.Module, name: str) -> Packing:
    shape = matrix_shape(model, name)
    if not settings.get("load_in_4bit"):
        return Packing(
            needed={"weight": Part(dtypes=("I8",), shapes=[shape]), "SCB": Part(dtypes=("F32",), shapes=[shape[:1]])},
            optional={"weight_format": Part(dtypes=("U8",), shapes=[()])},
            unpack=_unpack_rows,
        )
    nested = bool(settings.get("bnb_4bit_use_double_quant"))
    return Packing(
        needed={
            # Bytes may be stored as if they were numbers of another type.
            "weight": Part(dtypes=("U8", *FLOATS)),
            "weight.absmax": Part(dtypes=("U8",) if nested else ("F32",)),
            "weight.quant_map": Part(dtypes=("F32",), shapes=[(16,)]),
            _STATE + settings.get("bnb_4bit_quant_type", "fp4"): Part(dtypes=("U8",)),
            **(_NESTED if nested else {}),
        },
        unpack=partial(_unpack_blocks, shape),
    )


def _unpack_rows(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "weight_format" in parts and int(parts["weight_format"]) != _ROW_FORMAT:
        raise ValueError(f"weight_format {int(parts['weight_format'])}, expected {_ROW_FORMAT}: row by row")
    scales = parts["SCB"] / 127
    return parts["weight"].float() * scales[:, None]


def _unpack_blocks(shape: tuple[int, ...], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    state = _state(parts)
    if tuple(state["shape"]) != shape:
        raise ValueError(f"its shape is {state['shape']}, expected {list(shape)}")
    packed = parts["weight"].contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
    values, size = parts["weight.quant_map"][codes], state["blocksize"]
    scales = _scales(parts, state)
    count = shape[0] * shape[1]
    if len(packed) != -(-count // 2) or len(scales) != -(-count // size):
        raise ValueError(f"{len(packed)} bytes and {len(scales)} scales, expected half of {count} and {count} / {size}")
    blocks = nn.functional.pad(values[:count], (0, -count % size)).view(-1, size) * scales[:, None]
    return blocks.flatten()[:count].view(shape)


def _state(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    text = next(value for part, value in parts.items() if part.startswith(_STATE))
    state: dict[str, Any] = json.loads(bytes(text.tolist()))
    return state


def _scales(parts: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """Scales of the blocks; they may be quantized themselves, around a mean."""
    scales = parts["weight.absmax"]
    if "weight.nested_absmax" not in parts:
        return scales
    outer = parts["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)]
    levels = parts["weight.nested_quant_map"][scales.int()]
    return levels * outer + float(state["nested_offset"])


BITSANDBYTES = Method(
    parts=(
        "weight.absmax",
        "weight.quant_map",
        *(_STATE + table for table in _TABLES),
        *_NESTED,
        "SCB",
        "weight_format",
    ),
    problem=_problem,
    packings=lambda settings, model: partial(_packing, settings, model),
)
