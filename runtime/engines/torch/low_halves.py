"""What the two low bits of stored int4 weights add to a product: the part of it that halves of inputs do without."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import ATTENTION_GROUPS, INPUT_GROUPS, norms_role, tensor_name
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.formats import LOW_BITS, LOW_MEAN, int4_grid, low_halves
from coreinfer.bundles.tensors import TensorFile
from torch import nn

from .packed_linear import GRID, Tensors, is_down, pack_grid, packed_product
from .wanted_inputs import Groups

__all__ = ["LowProducts", "StoredMatrix", "group_matrices", "hold", "low_bytes"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A matrix of a group, and where it is stored.

    Attributes:
        path: from the layer to its module.
        role: in the FFN ("gate", "up", "down"); None in the attention.
        name: in the file.
        shape: (outputs, inputs).
    """

    path: str
    role: str | None
    file: TensorFile
    name: str
    shape: tuple[int, int]

    def low_halves(self) -> torch.Tensor:
        """Read what its low bits add, (outputs, inputs) float32.

        Raises:
            KeyError: it is not stored as int4.
        """
        return torch.from_numpy(low_halves(self.file, self.name, self.shape))

    def low_grid(self) -> tuple[Any, Any, Any]:
        """Read the same as codes, scales and zeros, as `int4_grid` returns them."""
        codes, scales, _ = int4_grid(self.file, self.name, self.shape)
        return codes & LOW_BITS, scales, np.full_like(scales, LOW_MEAN)


def group_matrices(layer: nn.Module, family: Family, file: TensorFile, place: Groups) -> Iterator[StoredMatrix]:
    """Find the matrices of a group of a bundle with token shares; experts have no modules, and are not found.

    Args:
        layer: whose attention is in place; of its FFN nothing is looked at.
        file: the base, or of groups of the FFN the file of that in use, in which the norms of its columns are.
    """
    number, group = place
    if group in ATTENTION_GROUPS:
        for path in family.input_groups[group]:
            weight, name = resolve(layer, path).weight, f"{family.layers}.{number}.{path}.weight"
            shape = (int(weight.shape[0]), int(weight.shape[1]))
            yield StoredMatrix(path=path, role=None, file=file, name=name, shape=shape)
        return
    inputs, neurons = (file.shape_of(tensor_name(number, norms_role(own)))[1][0] for own in ("gate_up", "down"))
    for role, path in family.projections.items():
        if (role == "down") == (group == "down"):
            # As wide as the residual stream at the end that is not of neurons.
            shape = (inputs, neurons) if role == "down" else (neurons, inputs)
            yield StoredMatrix(path=path, role=role, file=file, name=tensor_name(number, role), shape=shape)


def low_bytes(bundle: Bundle, layers: Sequence[nn.Module], family: Family, ffn_bytes: int) -> int:
    """Memory that `LowProducts` take at most: a copy of the attention's matrices, and of the FFN in use.

    Args:
        layers: of a model, with or without memory.
        ffn_bytes: of the largest FFN.
    """
    if not bundle.manifest.has_halves:
        return 0
    paths = [path for group in ATTENTION_GROUPS for path in family.input_groups[group]]
    weights = [resolve(layer, path).weight for layer in layers for path in paths]
    return ffn_bytes + sum(int(weight.numel() * weight.element_size()) for weight in weights)


def hold(held: dict[Key, torch.Tensor], key: Key, value: torch.Tensor, device: torch.device) -> bool:
    """Write over what is held in its memory, if shapes agree, else hold another; returns whether the memory is new."""
    old = held.get(key)
    if old is not None and old.shape == value.shape:
        old.copy_(value)
        return False
    held[key] = value.to(device)
    return True


class LowProducts:
    """Multiplies inputs that are read in half by what the low bits of the weights in use add to them.

    A second copy of these weights lies on the device from the first use on. It is written over in place.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        family: Family,
        bundle: Bundle,
        *,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
    ) -> None:
        """Hold nothing yet.

        Args:
            packed: whether the FFN's int4 matrices are multiplied as they are, and so these.
        """
        self._layers, self._family, self._bundle = layers, family, bundle
        self._dtype, self._device, self._packed = dtype, device, packed
        self._held: dict[tuple[int, str, str], torch.Tensor] = {}
        self._ffn: TensorFile | None = None
        self._num_outputs: dict[tuple[int, str], int | None] = {}
        self._places: tuple[Groups, ...] = ()
        if bundle.token_shares is not None and bundle.manifest.has_halves:
            ratios = bundle.token_shares["half_ratios"].array
            self._places = tuple(
                (layer, group)
                for layer in range(len(layers))
                for number, group in enumerate(INPUT_GROUPS)
                if ratios[layer, number] > 1
            )

    def has_halves(self, place: Groups) -> bool:
        """Whether inputs of a group are read in half."""
        return place in self._places

    def use(self, ffn: TensorFile) -> bool:
        """Multiply by the low bits of the base and of another FFN; returns whether memory moved.

        Args:
            ffn: its file.
        """
        if ffn is self._ffn:
            return False
        had_base, self._ffn = self._ffn is not None, None
        moved = False
        for place in self._places:
            in_base = place[1] in ATTENTION_GROUPS
            if not (in_base and had_base):
                file = self._bundle.base if in_base else ffn
                for matrix in group_matrices(self._layers[place[0]], self._family, file, place):
                    moved |= self._hold(place[0], matrix)
        self._ffn = ffn
        return moved

    def _hold(self, layer: int, matrix: StoredMatrix) -> bool:
        role, num_outputs = matrix.role, None
        if role is None or not self._packed:
            tensors: Tensors = {"": matrix.low_halves().to(self._dtype)}
        else:
            found = pack_grid(matrix.low_grid(), role, matrix.shape, self._dtype, self._device)
            tensors = {"": found[role], GRID: found[role + GRID]}
            # As `empty_model` has it: the padding between the products stays.
            num_outputs = matrix.shape[0] if is_down(role) else None
        self._num_outputs[layer, matrix.path] = num_outputs
        moved = [hold(self._held, (layer, matrix.path, name), part, self._device) for name, part in tensors.items()]
        return any(moved)

    def product(self, layer: int, path: str, halves: torch.Tensor) -> torch.Tensor:
        """Multiply (..., inputs) -> (..., outputs) of a module.

        Args:
            path: of the module, from the layer.
        """
        weight, grid = self._held[layer, path, ""], self._held.get((layer, path, GRID))
        return packed_product(halves, weight, grid, None, self._num_outputs[layer, path])
