"""The parameters of an exported model, under transformers' names, and where the bundle holds each."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import UnsupportedModelError
from coreinfer.bundles.contract import expert_role, is_norms, tensor_name
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.models.empty import empty_model
from coreinfer.runtime.engines.torch.joined import take_apart
from transformers import AutoConfig, PreTrainedConfig

from .chosen import ChosenModel

__all__ = ["Parameter", "list_parameters", "model_config", "read_floats"]

_EXPERT_MATRICES = {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)}
_EXPERT_BIASES = {"experts.gate_up_proj_bias": ("gate_bias", "up_bias"), "experts.down_proj_bias": ("down_bias",)}
"""Paths from a mixture to transformers' tensors of all experts -> the matrices, or biases, of each."""
_PACKED_PARTS = re.compile(r"\.(q4|q8|high|low|scale|zero)$")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the model.

    Attributes:
        name: transformers' name, or of a part of a module that it has as one. Matrices and biases of a layer's experts
            have the name of the tensor in which transformers has them, one after another, each one's gate before its
            up.
        file: the file of the bundle that holds it.
        stored: its name there.
        shape: as it is stored.
        padded: the shape that it is exported with; neurons that are added are zeros.
        role: of an expert's matrix "gate", "up" or "down", of its bias "gate_bias" and so on.
        rows: of a router, the numbers of the experts that are there; it is exported in float32, as it computes.
    """

    name: str
    file: Mapping[str, StoredTensor]
    stored: str
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    role: str | None = None
    rows: tuple[int, ...] | None = None

    @property
    def num_added(self) -> int:
        """Values that are added to fill up, all of them zeros."""
        return 0 if self.rows is not None else math.prod(self.padded) - math.prod(self.shape)


def model_config(chosen: ChosenModel, **changes: Any) -> PreTrainedConfig:
    """Build the transformers config of the model, with some fields changed."""
    settings = {**chosen.config, **changes}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def list_parameters(chosen: ChosenModel, widths: Sequence[int]) -> list[Parameter]:
    """List all parameters.

    Args:
        widths: neurons of each layer in the export, or of each expert there, at least those that the bundle has.
    Raises:
        UnsupportedModelError: the bundle holds tensors that the model does not have, or lacks some that it has.
    """
    base, ffn_names, mixtures = chosen.bundle.base, _ffn_names(chosen), _mixture_names(chosen, widths)
    parameters: list[Parameter] = []
    model = empty_model(model_config(chosen))
    take_apart(model, chosen.family)
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        if name in ffn_names:
            layer, role = ffn_names[name]
            narrow, padded = (_resized(shape, role, width) for width in (chosen.widths[layer], widths[layer]))
            stored = tensor_name(layer, role)
            parameters.append(Parameter(name=name, file=chosen.ffn, stored=stored, shape=narrow, padded=padded))
        elif name in mixtures:
            parameters.extend(mixtures[name])
        else:
            parameters.append(Parameter(name=name, file=base, stored=name, shape=shape, padded=shape))
    stored_names = {_PACKED_PARTS.sub("", name) for name in base if not is_norms(name)}
    if (path := chosen.family.cutoff) is not None:
        # What the gates' own mean and deviation say, which other programs compute.
        stored_names = {name for name in stored_names if f".{path}." not in name}
    _check_same_tensors(stored_names, parameters, chosen)
    return parameters


def _ffn_names(chosen: ChosenModel) -> dict[str, tuple[int, str]]:
    """Transformers' name -> layer and role, as in the bundle's files."""
    names: dict[str, tuple[int, str]] = {}
    for layer in range(len(chosen.widths)):
        for role, path in chosen.family.projections.items():
            stem = f"{chosen.family.layers}.{layer}.{path}"
            names |= {f"{stem}.weight": (layer, role), f"{stem}.bias": (layer, f"{role}_bias")}
    return names


def _mixture_names(chosen: ChosenModel, widths: Sequence[int]) -> dict[str, list[Parameter]]:
    """Transformers' name -> what is exported of it, of all that a mixture has in the place of an FFN."""
    names: dict[str, list[Parameter]] = {}
    paths, record = chosen.family.experts, chosen.bundle.manifest.model.experts
    if chosen.experts is None or paths is None or record is None:
        return names
    tensors = _EXPERT_MATRICES | _EXPERT_BIASES if paths.biased else _EXPERT_MATRICES
    for layer in range(len(chosen.experts)):
        module = f"{chosen.family.layers}.{layer}.{paths.module}"
        for kind in ("weight", "bias") if paths.biased else ("weight",):
            name = f"{module}.{paths.router}.{kind}"
            names[name] = [_router(chosen, name, f"{module}.router.{kind}", layer)]
        for path, roles in tensors.items():
            name = f"{module}.{path}"
            names[name] = list(_of_experts(chosen, name, layer, roles, widths[layer]))
    return names


def _router(chosen: ChosenModel, name: str, stored: str, layer: int) -> Parameter:
    model = chosen.bundle.manifest.model
    assert chosen.experts is not None
    assert model.experts is not None
    rows, inner = chosen.experts[layer], (model.hidden_size,) if stored.endswith(".weight") else ()
    shape, padded = (model.experts.num_experts, *inner), (len(rows), *inner)
    return Parameter(name=name, file=chosen.bundle.base, stored=stored, shape=shape, padded=padded, rows=rows)


def _of_experts(chosen: ChosenModel, name: str, layer: int, roles: tuple[str, ...], width: int) -> Iterator[Parameter]:
    assert chosen.experts is not None
    hidden = chosen.bundle.manifest.model.hidden_size
    shapes = {"down": (hidden, 0), "down_bias": (hidden,), "gate_bias": (0,), "up_bias": (0,)}
    for expert in chosen.experts[layer]:
        for role in roles:
            shape = shapes.get(role, (0, hidden))
            narrow, padded = (_resized(shape, role, neurons) for neurons in (chosen.widths[layer], width))
            stored = tensor_name(layer, expert_role(expert, role))
            yield Parameter(name=name, file=chosen.ffn, stored=stored, shape=narrow, padded=padded, role=role)


def _resized(shape: tuple[int, ...], role: str, width: int) -> tuple[int, ...]:
    if role == "down_bias":
        return shape
    return (shape[0], width) if role == "down" else (width, *shape[1:])


def _check_same_tensors(stored: set[str], parameters: Sequence[Parameter], chosen: ChosenModel) -> None:
    model_type = chosen.config.get("model_type")
    if unknown := sorted(stored - {parameter.stored for parameter in parameters}):
        raise UnsupportedModelError(
            f"bundle {chosen.bundle.path}: transformers' {model_type} model has no tensor {unknown[0]}; "
            "compile the bundle again with this coreinfer and transformers"
        )
    asked = {parameter.stored for parameter in parameters if parameter.file is chosen.bundle.base}
    if missing := sorted(asked - stored):
        raise UnsupportedModelError(
            f"bundle {chosen.bundle.path}: it has no tensor {missing[0]}, which transformers' {model_type} model has; "
            f"models of family {chosen.family.name} with it are not exported"
        )


def read_floats(parameter: Parameter) -> npt.NDArray[np.float32]:
    """Read a parameter as float32 of the shape that it is exported with."""
    if len(parameter.shape) == 1:
        values = np.asarray(parameter.file[parameter.stored].array, dtype=np.float32)
    else:
        values = float_matrix(parameter.file, parameter.stored, (parameter.shape[0], parameter.shape[1]))
    if parameter.rows is not None:
        values = values[list(parameter.rows)]
    grown = [(0, more - has) for has, more in zip(values.shape, parameter.padded, strict=True)]
    return np.pad(values, grown)
