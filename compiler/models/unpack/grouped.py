"""GPTQ and AWQ: codes of some bits in words of 32, a scale and a zero for each group of inputs and each output.

A weight is scale * (code - zero). The layouts are those of AutoGPTQ and of AutoAWQ's GEMM version.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .asked import Settings
from .packing import Method, Packing, Part, groups_of, matrix_shape, unlike

__all__ = ["AWQ", "GPTQ"]

_WORD_BITS = 32
_WORDS, _SCALES = ("I32",), ("F16", "BF16", "F32")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which 4 bits of a word hold each of its 8 outputs."""
_NEITHER: tuple[Any, ...] = (False, "", {}, [])
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_COMMON = {"pack_dtype": ("int32",), "dynamic": _NEITHER, "adapter": _NEITHER, "rotation": _NEITHER}
_GPTQ_SETTINGS = {
    **_COMMON,
    "bits": (2, 4, 8),
    "method": ("gptq",),
    "checkpoint_format": _GPTQ_FORMATS,
    "format": _GPTQ_FORMATS,
    "is_marlin_format": _NEITHER,
}
_AWQ_SETTINGS = {
    **_COMMON,
    "bits": (4,),
    "method": ("awq",),
    "version": ("gemm",),
    "format": ("gemm",),
    "checkpoint_format": ("gemm",),
    "zero_point": (True,),
}


def _problem(settings: Settings, known: Mapping[str, tuple[Any, ...]]) -> str | None:
    size = settings.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        return f"group_size {size!r} (expected -1 or a number of inputs)"
    return unlike(settings, known)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD_BITS)


def _parts(model: nn.Module, name: str, settings: Settings) -> tuple[int, int, dict[str, Part]]:
    """Outputs and inputs of a module, and what both methods have: zeros and scales."""
    num_outputs, num_inputs = matrix_shape(model, name)
    groups = groups_of(num_inputs, settings["group_size"])
    parts = {
        "qzeros": Part(dtypes=_WORDS, shapes=[(groups, _words(num_outputs, settings["bits"]))]),
        "scales": Part(dtypes=_SCALES, shapes=[(groups, num_outputs)]),
    }
    return num_outputs, num_inputs, parts


def _gptq_packing(settings: Settings, model: nn.Module, name: str) -> Packing:
    num_outputs, num_inputs, parts = _parts(model, name, settings)
    codes = Part(dtypes=_WORDS, shapes=[(_words(num_inputs, settings["bits"]), num_outputs)])
    groups = {"g_idx": Part(dtypes=_WORDS, shapes=[(num_inputs,)])}
    ordered = bool(settings.get("desc_act"))
    return Packing(
        needed={"qweight": codes, **parts, **(groups if ordered else {})},
        optional={} if ordered else groups,
        unpack=partial(_unpack_gptq, settings, num_inputs),
    )


def _unpack_gptq(settings: Settings, num_inputs: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    bits, size, scales = settings["bits"], settings["group_size"], parts["scales"].float()
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    codes = (parts["qweight"][:, None] >> shifts[:, None] & (1 << bits) - 1).flatten(0, 1)[:num_inputs]
    zeros = (parts["qzeros"][..., None] >> shifts & (1 << bits) - 1).flatten(1)[:, : scales.shape[1]]
    if "gptq_v2" not in (settings.get("checkpoint_format"), settings.get("format")):
        zeros = _first_version(zeros, (1 << bits) - 1)
    groups = parts.get("g_idx", torch.arange(num_inputs) // (num_inputs if size == -1 else size)).long()
    if groups.min() < 0 or groups.max() >= len(scales):
        raise ValueError(f"g_idx from {groups.min()} to {groups.max()}, expected 0 to {len(scales) - 1}")
    weight: torch.Tensor = (codes - zeros[groups]).float() * scales[groups]
    return weight.T


def _first_version(stored: torch.Tensor, largest: int) -> torch.Tensor:
    """The zeros of the first format, which stores one less than each; where that is below 0, its writers differ."""
    if (stored == largest).any():
        raise ValueError(f"qzeros hold {largest}, which stands for a zero of 0 or of {largest + 1}; expected less")
    return stored + 1


def _awq_packing(settings: Settings, model: nn.Module, name: str) -> Packing:
    num_outputs, num_inputs, parts = _parts(model, name, settings)
    codes = Part(dtypes=_WORDS, shapes=[(num_inputs, _words(num_outputs, settings["bits"]))])
    return Packing(needed={"qweight": codes, **parts}, unpack=partial(_unpack_awq, settings["group_size"]))


def _unpack_awq(size: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    scales = parts["scales"].float()
    codes, zeros = (_awq_codes(parts[part])[:, : scales.shape[1]] for part in ("qweight", "qzeros"))
    groups = torch.arange(len(codes)) // (len(codes) if size == -1 else size)
    return ((codes - zeros[groups]).float() * scales[groups]).T


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    shifts = 4 * torch.tensor(_AWQ_PLACES, dtype=torch.int32)
    return (words[..., None] >> shifts & 15).flatten(1)


def _method(known: Mapping[str, tuple[Any, ...]], packing: Callable[[Settings, nn.Module, str], Packing]) -> Method:
    return Method(
        parts=("qweight", "qzeros", "scales", "g_idx"),
        problem=partial(_problem, known=known),
        packings=lambda settings, model: partial(packing, settings, model),
    )


GPTQ = _method(_GPTQ_SETTINGS, _gptq_packing)
AWQ = _method(_AWQ_SETTINGS, _awq_packing)
