"""The parameters of an exported model, under transformers' names, and where the bundle holds each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import UnsupportedModelError
from coreinfer.bundles.contract import is_norms, tensor_name
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.models.empty import empty_model
from coreinfer.runtime.engines.torch.joined import take_apart
from transformers import AutoConfig, PreTrainedConfig

from .chosen import ChosenModel

__all__ = ["Parameter", "list_parameters", "model_config", "read_floats"]

_PACKED_PARTS = re.compile(r"\.(q4|q8|high|low|scale|zero)$")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the model.

    Attributes:
        name: transformers' name, or of a part of a module that it has as one.
        file: the file of the bundle that holds it.
        stored: its name there.
        shape: as it is stored.
        padded: the shape that it is exported with; neurons that are added are zeros.
    """

    name: str
    file: Mapping[str, StoredTensor]
    stored: str
    shape: tuple[int, ...]
    padded: tuple[int, ...]


def model_config(chosen: ChosenModel, **changes: Any) -> PreTrainedConfig:
    """Build the transformers config of the model, with some fields changed."""
    settings = {**chosen.config, **changes}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def list_parameters(chosen: ChosenModel, widths: Sequence[int]) -> list[Parameter]:
    """List all parameters.

    Args:
        widths: neurons of each layer in the export, at least those that the bundle has.
    Raises:
        UnsupportedModelError: the bundle holds tensors that the model does not have.
    """
    base, ffn_names = chosen.bundle.base, _ffn_names(chosen)
    parameters = []
    model = empty_model(model_config(chosen))
    take_apart(model, chosen.family)
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        if name in ffn_names:
            layer, role = ffn_names[name]
            narrow, padded = (_resized(shape, role, width) for width in (chosen.widths[layer], widths[layer]))
            stored = tensor_name(layer, role)
            parameters.append(Parameter(name=name, file=chosen.ffn, stored=stored, shape=narrow, padded=padded))
        else:
            parameters.append(Parameter(name=name, file=base, stored=name, shape=shape, padded=shape))
    _check_all_used({_PACKED_PARTS.sub("", name) for name in base if not is_norms(name)}, parameters, chosen)
    return parameters


def _ffn_names(chosen: ChosenModel) -> dict[str, tuple[int, str]]:
    """Transformers' name -> layer and role, as in the bundle's files."""
    names: dict[str, tuple[int, str]] = {}
    for layer in range(len(chosen.widths)):
        for role, path in chosen.family.projections.items():
            stem = f"{chosen.family.layers}.{layer}.{path}"
            names |= {f"{stem}.weight": (layer, role), f"{stem}.bias": (layer, f"{role}_bias")}
    return names


def _resized(shape: tuple[int, ...], role: str, width: int) -> tuple[int, ...]:
    if role == "down_bias":
        return shape
    return (shape[0], width) if role == "down" else (width, *shape[1:])


def _check_all_used(stored: set[str], parameters: Sequence[Parameter], chosen: ChosenModel) -> None:
    if unknown := sorted(stored - {parameter.stored for parameter in parameters}):
        raise UnsupportedModelError(
            f"bundle {chosen.bundle.path}: transformers' {chosen.config.get('model_type')} model has no tensor "
            f"{unknown[0]}; compile the bundle again with this coreinfer and transformers"
        )


def read_floats(parameter: Parameter) -> npt.NDArray[np.float32]:
    """Read a parameter as float32 of its padded shape."""
    if len(parameter.shape) == 1:
        values = np.asarray(parameter.file[parameter.stored].array, dtype=np.float32)
    else:
        values = float_matrix(parameter.file, parameter.stored, (parameter.shape[0], parameter.shape[1]))
    grown = [(0, more - has) for has, more in zip(parameter.shape, parameter.padded, strict=True)]
    return np.pad(values, grown)
