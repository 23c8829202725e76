"""What enters the matrices of a layer, seen and replaced while a model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

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
)
from torch.nn import functional

__all__ = [
    "LowWeights",
    "Norms",
    "group_outputs",
    "group_weights",
    "groups_of",
    "groups_read",
    "inputs_seen",
    "inputs_taken",
    "read_norms",
    "reads_halves_of",
]

Norms = Mapping[Groups, torch.Tensor]
"""Norms of the columns of a group's matrices, (inputs,) float32, or (experts, inputs)."""
LowWeights = Mapping[tuple[int, str], torch.Tensor]
"""Layer and path of a module -> what the low bits of its codes add to its weights, (outputs, inputs)."""
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
def groups_read(
    loaded: LoadedModel,
    places: Iterable[Groups],
    reading: Callable[[Groups], Callable[[Entering], Taken]],
    losing: Callable[[Groups], Callable[[str, torch.Tensor], torch.Tensor]],
) -> Iterator[None]:
    """Run the block with functions of some groups in use; see `take_inputs`.

    Args:
        reading: makes a group's `read`.
        losing: makes its `low_product`.
    """
    with ExitStack() as stack:
        for place in places:
            layer = loaded.layers[place[0]]
            stack.enter_context(take_inputs(layer, loaded.family, place[1], reading(place), losing(place)))
        yield


def reads_halves_of(loaded: LoadedModel, place: Groups, low_weights: LowWeights) -> bool:
    """Whether inputs of a group are read in half; experts have no modules, and no halves."""
    return any((place[0], path) in low_weights for path in loaded.family.input_groups.get(place[1], ()))


def inputs_taken(
    loaded: LoadedModel,
    norms: Norms,
    thresholds: Mapping[Groups, tuple[float, float]],
    low_weights: LowWeights,
    counts: InputCounts | None = None,
) -> AbstractContextManager[None]:
    """Run the block with inputs left out, read in half or read whole, by their groups' thresholds.

    Args:
        thresholds: of the groups of which anything is left out or read in half.
        low_weights: of the groups that have halves.
        counts: is added to, each group's inputs once.
    """

    def reading(place: Groups) -> Callable[[Entering], Taken]:
        limits = torch.tensor(thresholds[place], dtype=torch.float32, device=loaded.device)
        has_halves = reads_halves_of(loaded, place, low_weights)
        assert has_halves or limits[0] == limits[1]

        def taken(entering: Entering) -> Taken:
            found = take(entering, norms[place], limits, has_halves=has_halves)
            if entering.is_first and counts is not None:
                counts.add(place, found)
            return found

        return taken

    def losing(place: Groups) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda path, halves: functional.linear(halves, low_weights[place[0], path])

    return groups_read(loaded, thresholds, reading, losing)
