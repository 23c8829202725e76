"""compressed-tensors: several formats, each for the modules that its groups of the config name.

The library finds a module's group and undoes its format; what a module must hold for that is stated here, because the
library takes what it is given.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .asked import Settings
from .packing import Method, Packing, Part, groups_of, matrix_shape

__all__ = ["COMPRESSED_TENSORS"]

_PACKED, _FP4, _MX = "pack-quantized", ("nvfp4-pack-quantized", "mxfp4-pack-quantized"), "mxfp8-quantized"
_WHOLE = ("int-quantized", "float-quantized", "naive-quantized", _MX)
_FORMATS = (_PACKED, *_WHOLE, *_FP4)
_MIXED = "mixed-precision"
_FLOATS = ("F32", "BF16", "F16")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_OF_WEIGHTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")
_ONE: Collection[tuple[int, ...]] = ((1,), (), (1, 1))


def _problem(settings: Settings) -> str | None:
    status, spread = settings.get("quantization_status"), settings.get("sparsity_config") or {"format": "dense"}
    if status != "compressed":
        return f"quantization_status {status!r} (expected 'compressed')"
    for setting in ("transform_config", "kv_cache_scheme", "moe_sparsity_config"):
        if settings.get(setting):
            return f"a {setting} that is not empty"
    if not isinstance(spread, Mapping) or spread.get("format") != "dense":
        return f"sparsity_config {spread!r} (expected format 'dense')"
    try:
        groups = _groups(settings)
        for target in [*_ignored(settings), *(target for group in groups.values() for target in group.targets)]:
            re.compile(target)
    except (ValueError, TypeError, NotImplementedError, KeyError, re.error) as error:
        return f"config_groups or ignore that compressed-tensors cannot read ({_first_lines(error)})"
    return next(filter(None, (_group_problem(settings, name, group) for name, group in groups.items())), None)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3])


def _groups(settings: Settings) -> Mapping[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate({"config_groups": settings.get("config_groups")})
    groups: Mapping[str, Any] = config.config_groups
    return groups


def _ignored(settings: Settings) -> Collection[str]:
    return settings.get("ignore") or ()


def _format(settings: Settings, group: Any) -> str:
    """Format of a group: its own, or that of the whole model."""
    return _text(group.format or settings.get("format"))


def _text(value: Any) -> str:
    """Text of a setting, which the library may hold as an enumeration."""
    return str(getattr(value, "value", value))


def _group_problem(settings: Settings, name: str, group: Any) -> str | None:
    if (weights := group.weights) is None:
        return None
    found, strategy = _format(settings, group), _text(weights.strategy)
    whole = settings.get("format")
    if found not in _FORMATS or (whole not in (found, _MIXED)):
        return f"format {found!r} in {name} and {whole!r} (expected one of {', '.join(_FORMATS)})"
    if strategy not in _SCALES:
        return f"strategy {strategy!r} in {name} (expected one of {', '.join(_SCALES)})"
    if _text(weights.actorder) == "group":
        return f"actorder 'group' in {name}"
    if weights.dynamic or (not weights.symmetric and _text(weights.type) != "int"):
        return f"weights of dynamic or asymmetric floats in {name}"
    return None


def _tensor(_: Any, __: int, ___: int) -> Collection[tuple[int, ...]]:
    return _ONE


def _rows(_: Any, outputs: int, __: int) -> Collection[tuple[int, ...]]:
    return [(outputs, 1)]


def _row_groups(weights: Any, outputs: int, inputs: int) -> Collection[tuple[int, ...]]:
    return [(outputs, groups_of(inputs, weights.group_size))]


def _blocks(weights: Any, outputs: int, inputs: int) -> Collection[tuple[int, ...]]:
    rows, columns = weights.block_structure
    return [(groups_of(outputs, rows), groups_of(inputs, columns))]


_SCALES: Mapping[str, Callable[[Any, int, int], Collection[tuple[int, ...]]]] = {
    "tensor": _tensor,
    "channel": _rows,
    "group": _row_groups,
    "tensor_group": _row_groups,
    "block": _blocks,
}
"""Strategy -> shapes that scales may have."""


def _packings(settings: Settings, model: nn.Module) -> Callable[[str], Packing | None]:
    groups = dict(_grouped(settings, model))
    return lambda name: _packing(settings, model, name, groups[name]) if name in groups else None


def _grouped(settings: Settings, model: nn.Module) -> list[tuple[str, Any]]:
    from compressed_tensors.utils import match_named_modules, match_targets

    # As the library applies them: the last group that names a target counts, and of a module's targets the narrowest.
    groups = {target: group for group in _groups(settings).values() for target in group.targets}
    matched = match_named_modules(model, groups, _ignored(settings))
    found = ((name, groups[match_targets(name, module, groups)[0]]) for name, module in matched)
    return [(name, group) for name, group in found if group.weights is not None]


def _packing(settings: Settings, model: nn.Module, name: str, group: Any) -> Packing:
    outputs, inputs = matrix_shape(model, name)
    weights, kind = group.weights, _format(settings, group)
    scales = _SCALES[_text(weights.strategy)](weights, outputs, inputs)
    needed = {
        **_values(weights, kind, outputs, inputs),
        "weight_scale": Part(dtypes=_scale_dtypes(kind), shapes=scales),
    }
    if not weights.symmetric:
        needed["weight_zero_point"] = _zeros(weights, kind, outputs, scales)
    return Packing(needed=needed, passed_over=_OF_ACTIVATIONS, unpack=partial(_unpack, kind, group, (outputs, inputs)))


def _values(weights: Any, kind: str, outputs: int, inputs: int) -> dict[str, Part]:
    """Parts that hold the codes, and what they are to be read by."""
    if kind == _PACKED:
        words = -(-inputs * weights.num_bits // 32)
        shape = Part(dtypes=("I64", "I32"), shapes=[(2,)])
        return {"weight_packed": Part(dtypes=("I32",), shapes=[(outputs, words)]), "weight_shape": shape}
    if kind in _FP4:
        pairs = {"weight_packed": Part(dtypes=("U8",), shapes=[(outputs, inputs // 2)])}
        return {**pairs, "weight_global_scale": Part(dtypes=("F32",), shapes=_ONE)} if kind == _FP4[0] else pairs
    dtype = "I8" if _text(weights.type) == "int" else "F8_E4M3"
    return {"weight": Part(dtypes=(dtype,), shapes=[(outputs, inputs)])}


def _scale_dtypes(kind: str) -> Collection[str]:
    if kind == _FP4[0]:
        return ("F8_E4M3",)
    return ("U8",) if kind in (_FP4[1], _MX) else _FLOATS


def _zeros(weights: Any, kind: str, outputs: int, scales: Collection[tuple[int, ...]]) -> Part:
    if kind == _PACKED and _text(weights.strategy) in ("group", "channel"):
        words = -(-outputs * weights.num_bits // 32)
        return Part(dtypes=("I32",), shapes=[(words, *shape[1:]) for shape in scales])
    return Part(dtypes=("I8",), shapes=scales)


def _unpack(kind: str, group: Any, shape: tuple[int, int], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor

    stated = tuple(parts["weight_shape"].tolist()) if "weight_shape" in parts else shape
    if stated != shape:
        raise ValueError(f"its weight_shape is {list(stated)}, expected {list(shape)}")
    scales = parts["weight_scale"]
    # The library computes in the type of the scales; in float32, code times scale is exact.
    wide = scales.float() if scales.dtype in (torch.float16, torch.bfloat16) else scales
    weight: torch.Tensor = BaseCompressor.get_value_from_registry(kind).decompress(
        {**parts, "weight_scale": wide}, group
    )["weight"]
    return weight


COMPRESSED_TENSORS = Method(
    parts=(*_OF_WEIGHTS, *_OF_ACTIVATIONS),
    problem=_problem,
    packings=_packings,
)
