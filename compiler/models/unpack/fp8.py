"""Floats of 8 bits, as DeepSeek and Qwen publish them: a scale for each block of a weight, or one for all of it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from .asked import Settings
from .packing import Method, Packing, Part, matrix_shape, unlike

__all__ = ["FP8"]

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def _problem(settings: Settings) -> str | None:
    block = settings.get("weight_block_size")
    sizes = block if isinstance(block, list | tuple) else []
    if block is not None and (len(sizes) != 2 or any(not isinstance(size, int) or size < 1 for size in sizes)):
        return f"weight_block_size {block!r} (expected two sizes)"
    return unlike(settings, {"fmt": ("e4m3",), "scale_fmt": ("float", "ue8m0")})


def _packing(settings: Settings, model: nn.Module, name: str) -> Packing:
    shape = matrix_shape(model, name)
    block = settings.get("weight_block_size")
    grid = [tuple(-(-size // step) for size, step in zip(shape, block, strict=True))] if block else [(1,), (), (1, 1)]
    return Packing(
        needed={
            "weight": Part(dtypes=("F8_E4M3",), shapes=[shape]),
            "weight_scale_inv": Part(dtypes=_SCALES, shapes=grid),
        },
        passed_over=("activation_scale", "input_scale"),
        unpack=partial(_unpack, block),
    )


def _unpack(block: tuple[int, int] | None, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weight, scales = parts["weight"].float(), parts["weight_scale_inv"].float()
    if not block:
        return weight * scales.reshape(())
    # The last block of a row or column may be smaller than the others.
    rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
    return weight * scales[rows][:, columns]


FP8 = Method(
    parts=("weight_scale_inv", "activation_scale", "input_scale"),
    problem=_problem,
    packings=lambda settings, model: partial(_packing, settings, model),
)
