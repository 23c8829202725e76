"""What enters the matrices of a layer, seen and replaced while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS, norms_role, tensor_name
from coreinfer.bundles.families import resolve
from coreinfer.bundles.tensors import TensorFile
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.runtime.engines.torch.wanted_inputs import Groups, InputCounts, wanted

__all__ = ["Norms", "group_weights", "groups_of", "inputs_masked", "inputs_seen", "read_norms"]

Norms = Mapping[Groups, torch.Tensor]
"""Norms of the columns of a group's matrices, (inputs,) float32."""
Floats = npt.NDArray[np.float32]


def groups_of(loaded: LoadedModel) -> list[Groups]:
    """List all groups of a model, layer by layer."""
    return [(layer, group) for layer in range(loaded.record.num_layers) for group in INPUT_GROUPS]


def group_weights(loaded: LoadedModel) -> Floats:
    """Count the weights of each group, which have the same number of bits: (layers, 4) float32."""
    counts = np.zeros((loaded.record.num_layers, len(INPUT_GROUPS)), dtype=np.float32)
    for number, layer in enumerate(loaded.layers):
        for place, group in enumerate(INPUT_GROUPS):
            paths = loaded.family.input_groups[group]
            counts[number, place] = sum(resolve(layer, path).weight.numel() for path in paths)
    return counts


def read_norms(loaded: LoadedModel, base: TensorFile, ffn: TensorFile) -> dict[Groups, torch.Tensor]:
    """Read the norms that lie beside stored weights."""
    return {
        (layer, group): torch.tensor(
            (base if group in ("qkv", "o") else ffn)[tensor_name(layer, norms_role(group))].array
        ).to(loaded.device)
        for layer, group in groups_of(loaded)
    }


@contextmanager
def inputs_seen(loaded: LoadedModel, see: Callable[[int, str, torch.Tensor], None]) -> Iterator[None]:
    """Run the block with a function that is given the inputs, (..., inputs), of each group once."""

    def hook(layer: int, group: str) -> Any:
        return lambda _module, inputs: see(layer, group, inputs[0])

    with ExitStack() as stack:
        for layer, group in groups_of(loaded):
            path = loaded.family.input_groups[group][0]
            handle = resolve(loaded.layers[layer], path).register_forward_pre_hook(hook(layer, group))
            stack.callback(handle.remove)
        yield


@contextmanager
def inputs_masked(
    loaded: LoadedModel, norms: Norms, thresholds: Mapping[Groups, float], counts: InputCounts | None = None
) -> Iterator[None]:
    """Run the block with 0 in the place of inputs that do not pass their group's threshold.

    Args:
        thresholds: of the groups of which anything is left out.
        counts: is added to, each group's inputs once.
    """

    def hook(place: Groups, threshold: torch.Tensor, *, first: bool) -> Any:
        def before(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            is_wanted = wanted(inputs[0], norms[place], threshold)
            if first and counts is not None:
                counts.add(place, is_wanted)
            return inputs[0].masked_fill(~is_wanted, 0), *inputs[1:]

        return before

    with ExitStack() as stack:
        for place, value in thresholds.items():
            threshold = torch.tensor(value, dtype=torch.float32, device=loaded.device)
            for number, path in enumerate(loaded.family.input_groups[place[1]]):
                module = resolve(loaded.layers[place[0]], path)
                before = hook(place, threshold, first=number == 0)
                stack.callback(module.register_forward_pre_hook(before).remove)
        yield
