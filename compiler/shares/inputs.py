"""What enters the matrices of a layer, seen and replaced while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.families import resolve
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import column_norms
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.runtime.engines.torch.wanted_inputs import (
    Entering,
    Groups,
    InputCounts,
    Taken,
    change_inputs,
    take,
    take_inputs,
    wanted,
)
from torch.nn import functional

__all__ = [
    "LowWeights",
    "Norms",
    "group_outputs",
    "group_weights",
    "groups_of",
    "inputs_replaced",
    "inputs_seen",
    "inputs_taken",
    "read_norms",
]

Norms = Mapping[Groups, torch.Tensor]
"""Norms of the columns of a group's matrices, (inputs,) float32, or (experts, inputs)."""
LowWeights = Mapping[tuple[int, str], torch.Tensor]
"""Layer and path of a module -> what the low bits of its codes add to its weights, (outputs, inputs)."""
Replacement = Callable[[Groups, Entering, torch.Tensor], torch.Tensor]
"""A group, what enters its matrices, and which of it is wanted, (..., inputs) bool -> what they multiply."""
Floats = npt.NDArray[np.float32]


def groups_of(loaded: LoadedModel) -> list[Groups]:
    """List all groups of a model, layer by layer."""
    return [(layer, group) for layer in range(loaded.record.num_layers) for group in INPUT_GROUPS]


def group_weights(loaded: LoadedModel) -> Floats:
    """Count the weights of each group that a token may read, which have the same number of bits: (layers, 4) float32.

    Of a mixture those of a token's experts.
    """
    counts = np.zeros((loaded.record.num_layers, len(INPUT_GROUPS)), dtype=np.float32)
    for layer in range(loaded.record.num_layers):
        for place, group in enumerate(INPUT_GROUPS):
            counts[layer, place] = sum(rows * columns for rows, columns in _shapes(loaded, layer, group))
    if loaded.record.experts is not None:
        counts[:, 2:] *= loaded.record.experts.num_chosen
    return counts


def group_outputs(loaded: LoadedModel) -> list[int]:
    """Outputs of each group of a layer, or of one of its experts: (4,)."""
    return [sum(rows for rows, _ in _shapes(loaded, 0, group)) for group in INPUT_GROUPS]


def _shapes(loaded: LoadedModel, layer: int, group: str) -> list[tuple[int, int]]:
    """Shapes, (outputs, inputs), of a group's matrices; of a mixture those of one expert."""
    if group in loaded.family.input_groups:
        weights = [resolve(loaded.layers[layer], path).weight for path in loaded.family.input_groups[group]]
        return [(weight.shape[0], weight.shape[1]) for weight in weights]
    size, inner = loaded.record.hidden_size, loaded.record.expert_neurons
    return [(size, inner)] if group == "down" else [(inner, size)] * 2


def read_norms(loaded: LoadedModel, base: TensorFile, ffn: TensorFile) -> dict[Groups, torch.Tensor]:
    """Read the norms that lie beside stored weights.

    Args:
        ffn: the file of the FFN that the weights are in, see `StoredPacks.ffn`.
    """
    return {
        (layer, group): torch.tensor(column_norms(base, ffn, loaded.record, layer, group)).to(loaded.device)
        for layer, group in groups_of(loaded)
    }


@contextmanager
def inputs_seen(loaded: LoadedModel, see: Callable[[int, str, Entering], None]) -> Iterator[None]:
    """Run the block with a function that is given the inputs of each group once, or of each expert's."""

    def seeing(layer: int, group: str) -> Callable[[Entering], torch.Tensor]:
        def unchanged(entering: Entering) -> torch.Tensor:
            if entering.is_first:
                see(layer, group, entering)
            return entering.values

        return unchanged

    with ExitStack() as stack:
        for layer, group in groups_of(loaded):
            stack.enter_context(change_inputs(loaded.layers[layer], loaded.family, group, seeing(layer, group)))
        yield


@contextmanager
def inputs_replaced(
    loaded: LoadedModel, norms: Norms, thresholds: Mapping[Groups, float], replacement: Replacement
) -> Iterator[None]:
    """Run the block with other inputs of some groups, by which of them pass their group's threshold.

    Args:
        thresholds: of the groups whose inputs are replaced.
    """

    def replacing(place: Groups, threshold: torch.Tensor) -> Callable[[Entering], torch.Tensor]:
        def replaced(entering: Entering) -> torch.Tensor:
            with torch.no_grad():
                is_wanted = wanted(entering, norms[place], threshold)
            return replacement(place, entering, is_wanted)

        return replaced

    with ExitStack() as stack:
        for place, value in thresholds.items():
            threshold = torch.tensor(value, dtype=torch.float32, device=loaded.device)
            layer, change = loaded.layers[place[0]], replacing(place, threshold)
            stack.enter_context(change_inputs(layer, loaded.family, place[1], change))
        yield


@contextmanager
def inputs_taken(
    loaded: LoadedModel,
    norms: Norms,
    thresholds: Mapping[Groups, tuple[float, float]],
    low_weights: LowWeights,
    counts: InputCounts | None = None,
) -> Iterator[None]:
    """Run the block with inputs left out, read in half or read whole, by their groups' thresholds.

    Args:
        thresholds: of the groups of which anything is left out or read in half.
        low_weights: of the groups that have halves.
        counts: is added to, each group's inputs once.
    """

    def taking(place: Groups, limits: torch.Tensor) -> Callable[[Entering], Taken]:
        # Experts have no modules, and no halves.
        has_halves = any((place[0], path) in low_weights for path in loaded.family.input_groups.get(place[1], ()))
        assert has_halves or limits[0] == limits[1]

        def taken(entering: Entering) -> Taken:
            found = take(entering, norms[place], limits, has_halves=has_halves)
            if entering.is_first and counts is not None:
                counts.add(place, found)
            return found

        return taken

    def low_product(layer: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda path, halves: functional.linear(halves, low_weights[layer, path])

    with ExitStack() as stack:
        for place, pair in thresholds.items():
            limits = torch.tensor(pair, dtype=torch.float32, device=loaded.device)
            layer, group = place
            stack.enter_context(
                take_inputs(loaded.layers[layer], loaded.family, group, taking(place, limits), low_product(layer))
            )
        yield
