"""What the methods of unpacking have in common."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .asked import Settings

__all__ = ["FLOATS", "Method", "Packing", "Part", "groups_of", "matrix_shape", "unlike"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of safetensors whose numbers are weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor that a packed weight consists of.

    Attributes:
        dtypes: it may have, as safetensors calls them.
        shapes: it may have; empty for any.
    """

    dtypes: Collection[str]
    shapes: Collection[tuple[int, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the weight of one module is packed.

    Attributes:
        needed: parts, by their names after the module's.
        optional: parts that count where they are there.
        passed_over: parts that are about activations, not about the weight.
        unpack: parts -> the weight, float32 or another float type, in the shape that the module has.
    """

    needed: Mapping[str, Part]
    optional: Mapping[str, Part] = field(default_factory=dict)
    passed_over: Collection[str] = ()
    unpack: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of quantization that can be undone.

    Attributes:
        parts: names, after the module's, of all tensors that packed weights consist of.
        problem: settings -> what of them cannot be read, None where all can.
        packings: settings and model -> how each of its modules would be packed; None for modules that must not be.
        joint: what stands between a module's name and a part's.
        weight: what is after a module's name in the name of its weight; nothing where it is the parameter itself that
            is named.
        of_experts: whether it is the experts of a mixture that are packed, in tensors of three dimensions.
    """

    parts: Collection[str]
    problem: Callable[[Settings], str | None]
    packings: Callable[[Settings, nn.Module], Callable[[str], Packing | None]]
    joint: str = "."
    weight: str = ".weight"
    of_experts: bool = False


def unlike(settings: Settings, known: Mapping[str, Collection[Any]]) -> str | None:
    """Name the first setting whose value is none of those known; None is known of all that are not `bits`."""
    for setting, values in known.items():
        value = settings.get(setting)
        plain = value.lower() if isinstance(value, str) else value
        if plain not in values and (setting == "bits" or plain is not None):
            return f"{setting} {value!r} (expected {' or '.join(map(repr, values))})"
    return None


def matrix_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a module, or rows and columns of an embedding."""
    num_outputs, num_inputs = model.get_parameter(f"{name}.weight").shape
    return num_outputs, num_inputs


def groups_of(size: int, group_size: int) -> int:
    """Number of groups that inputs are divided into; a group size of -1 is all of them."""
    return 1 if group_size == -1 else -(-size // group_size)
