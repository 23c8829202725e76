"""A model's weights from a folder that is quantized already: all of them, and nothing else.

transformers can undo some methods while it loads. But it fills scales that it does not find with what is in memory, and
passes over others; so every tensor is accounted for here, by the headers of the files, before any is unpacked.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from coreinfer.compiler.models.checkpoint import check_loaded, some
from coreinfer.compiler.models.empty import empty_model
from coreinfer.compiler.models.multimodal.text_models import Multimodal, text_name
from coreinfer.compiler.models.safetensors_headers import safetensors_files
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .asked import describe, settings_of
from .methods import METHODS
from .packing import FLOATS, Method, Packing, Part

__all__ = ["load_unpacked"]

_WEIGHT = "weight"
_UNPACKING_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What unpacking raises where values contradict each other; headers are compared before."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Header of a tensor: where it is, its name there and in the model, its type as safetensors calls it, its shape."""

    file: Path
    file_name: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What becomes of the tensors.

    Attributes:
        method: how the weights are quantized.
        plain: tensors that are the model's as they are.
        packed: module -> how its weight is packed, and the parts of it.
        problems: as `check_loaded` takes them.
        unread: tensors of a type that is not expected of them, with what is.
    """

    method: Method
    plain: list[_Stored] = field(default_factory=list)
    packed: dict[str, tuple[Packing, dict[str, _Stored]]] = field(default_factory=dict)
    problems: dict[str, list[Any]] = field(
        default_factory=lambda: {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    )
    unread: list[str] = field(default_factory=list)


def load_unpacked(
    folder: Path, config: PreTrainedConfig, what: str, *, dtype: torch.dtype, parts: Multimodal | None = None
) -> PreTrainedModel:
    """Build the model, plain as if it had never been quantized; weights are unpacked one by one.

    Args:
        config: that `check_quantization` let pass, of weights that are quantized.
        what: name of the model in an error, such as "--model tiny".
        dtype: of the parameters.
        parts: of a multimodal model, of which only the text model is read.
    Raises:
        ConfigError: tensors are missing, left over, of another shape, or contradict each other; they are named.
        UnsupportedModelError: tensors are of a type that is not expected of them.
    """
    settings = settings_of(config.to_dict())
    assert settings is not None
    method = METHODS[settings["quant_method"]]
    plain = copy.deepcopy(config)
    del plain.quantization_config
    empty = empty_model(plain)
    plan = _plan(list(_headers(folder, what, parts)), method, method.packings(settings, empty), empty)
    if plan.unread:
        raise UnsupportedModelError(
            f"{what}: its weights are quantized already ({describe(settings)}), and of types that do not fit: "
            f"{some(plan.unread)}; give a whole checkpoint with its own config.json"
        )
    check_loaded(plan.problems, what)
    if not plan.packed:
        raise ConfigError(
            f"{what}: its config.json says that its weights are quantized already ({describe(settings)}), but none of "
            "them are; give the whole checkpoint with its own config.json, or take quantization_config out of it"
        )
    loading: Any = type(empty).from_pretrained(
        None,
        config=plain,
        state_dict=dict(_weights(plan, dtype, what)),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loading
    check_loaded(info, what)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return cast("PreTrainedModel", model)


def _headers(folder: Path, what: str, parts: Multimodal | None) -> Iterator[_Stored]:
    files = safetensors_files(folder, what)
    if not files[0].exists() and len(files) == 1:
        raise ConfigError(f"{what}: quantized weights are read from safetensors, and found none; save it as such first")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for file_name in tensors.keys():  # noqa: SIM118
                name = file_name if parts is None else text_name(file_name, parts)
                if name is None:
                    continue
                header = tensors.get_slice(file_name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                yield _Stored(file=file, file_name=file_name, name=name, dtype=dtype, shape=shape)


def _plan(
    stored: Collection[_Stored], method: Method, packings: Callable[[str], Packing | None], empty: nn.Module
) -> _Plan:
    plan, parameters = _Plan(method=method), empty.state_dict()
    modules: dict[str, dict[str, _Stored]] = {}
    for tensor in stored:
        module, part = _split(tensor.name, method)
        if part:
            modules.setdefault(module, {})[part] = tensor
        else:
            _keep(plan, tensor, parameters)
    for module, parts in modules.items():
        weight = parameters.get(f"{module}{method.weight}")
        is_matrix = weight is not None and weight.ndim == (3 if method.of_experts else 2)
        packing = packings(module) if is_matrix and not _is_plain(parts) else None
        if packing is None:
            for tensor in parts.values():
                _keep(plan, tensor, parameters)
        else:
            _take_apart(plan, module, packing, parts)
    _pass_over_zeros(plan, stored)
    return plan


def _pass_over_zeros(plan: _Plan, stored: Collection[_Stored]) -> None:
    """Pass over biases of zeros that AutoGPTQ adds to modules which have none."""
    added = [tensor for tensor in stored if tensor.name.removesuffix(".bias") in plan.packed]
    left_over = plan.problems["unexpected_keys"]
    for tensor in added:
        if tensor.name in left_over and not _read(tensor).any():
            left_over.remove(tensor.name)


def _split(name: str, method: Method) -> tuple[str, str]:
    """Module and part of a tensor's name; the part is empty where it is none."""
    parts = [*method.parts, *([_WEIGHT] if method.weight else [])]
    for part in sorted(parts, key=len, reverse=True):
        if name.endswith(f"{method.joint}{part}"):
            return name.removesuffix(f"{method.joint}{part}"), part
    return name, ""


def _is_plain(parts: Mapping[str, _Stored]) -> bool:
    return set(parts) == {_WEIGHT} and parts[_WEIGHT].dtype in FLOATS


def _keep(plan: _Plan, tensor: _Stored, parameters: Collection[str]) -> None:
    """Take a tensor as it is, if the model has one of its name."""
    if tensor.name not in parameters:
        plan.problems["unexpected_keys"].append(tensor.name)
    elif tensor.dtype in FLOATS:
        plan.plain.append(tensor)
    else:
        plan.unread.append(f"{tensor.name} is {tensor.dtype}, expected a float type or another module's format")


def _take_apart(plan: _Plan, module: str, packing: Packing, parts: Mapping[str, _Stored]) -> None:
    """Compare a module's parts with what its packing needs."""
    known = {**packing.optional, **packing.needed}
    used = {part: tensor for part, tensor in parts.items() if part in known}
    plan.packed[module] = packing, used
    problems = plan.problems
    joint = plan.method.joint
    problems["missing_keys"] += [f"{module}{joint}{part}" for part in packing.needed if part not in parts]
    problems["unexpected_keys"] += [
        tensor.name for part, tensor in parts.items() if part not in known and part not in packing.passed_over
    ]
    for part, tensor in used.items():
        _compare(plan, tensor, known[part])


def _compare(plan: _Plan, tensor: _Stored, part: Part) -> None:
    if tensor.dtype not in part.dtypes:
        plan.unread.append(f"{tensor.name} is {tensor.dtype}, expected {' or '.join(part.dtypes)}")
    elif part.shapes and tensor.shape not in part.shapes:
        plan.problems["mismatched_keys"].append((tensor.name, tensor.shape, next(iter(part.shapes))))


def _weights(plan: _Plan, dtype: torch.dtype, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in plan.plain:
        yield tensor.name, _read(tensor).to(dtype)
    for module, (packing, parts) in plan.packed.items():
        try:
            weight = packing.unpack({part: _read(tensor) for part, tensor in parts.items()})
        except _UNPACKING_ERRORS as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ConfigError(f"{what}: {module} cannot be unpacked ({reason}); give a whole checkpoint") from error
        yield f"{module}{plan.method.weight}", weight.to(dtype).contiguous()


def _read(tensor: _Stored) -> torch.Tensor:
    with safe_open(tensor.file, framework="pt") as tensors:
        values: torch.Tensor = tensors.get_tensor(tensor.file_name)
    return values
