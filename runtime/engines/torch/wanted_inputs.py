"""Which inputs of a group of matrices a token wants, how many they are, and how to get at them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.families import Family, resolve
from torch import nn
from torch.nn import functional

__all__ = ["Entering", "Groups", "InputCounts", "change_inputs", "wanted"]

Groups = tuple[int, str]
"""A layer, and one of `INPUT_GROUPS`."""


@dataclass(frozen=True, kw_only=True)
class Entering:
    """What enters matrices that have the same inputs.

    Attributes:
        values: (..., inputs).
        is_first: whether the group's other matrices, which have the same inputs, are still to come.
        expert: whose they are; None where the FFN is one, and of attention.
        weights: (...) what the router multiplies the expert's outputs by.
    """

    values: torch.Tensor
    is_first: bool
    expert: int | None = None
    weights: torch.Tensor | None = None

    def scores(self, norms: torch.Tensor) -> torch.Tensor:
        """Say how much each input counts, (..., inputs) float32: |x_j| times the norm of column j, and its weight.

        Args:
            norms: (inputs,) float32 of the matrices' columns, or (experts, inputs) of all experts of a layer; of
                padding, whose inputs are 0, there are none.
        """
        if self.expert is not None and self.weights is not None:
            norms = norms[self.expert] * self.weights.float()[..., None]
        return self.values.float().abs() * functional.pad(norms, (0, self.values.shape[-1] - norms.shape[-1]))


def wanted(entering: Entering, norms: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Say which inputs are wanted, (..., inputs) bool.

    Args:
        norms: as `Entering.scores` takes them.
        threshold: of one number, which scores must pass.
    """
    return entering.scores(norms) > threshold


def change_inputs(
    layer: nn.Module, family: Family, group: str, change: Callable[[Entering], torch.Tensor]
) -> ExitStack:
    """Have a group's matrices multiply what a function makes of their inputs, until what is returned is closed."""
    stack = ExitStack()
    for path in (paths := family.input_groups.get(group, ())):
        hook = _before(change, is_first=path == paths[0])
        stack.callback(resolve(layer, path).register_forward_pre_hook(hook).remove)
    if not paths:
        assert family.experts is not None
        changes = resolve(layer, family.experts.module).changes
        assert group not in changes
        changes[group] = lambda values, expert, weights: change(
            Entering(values=values, is_first=True, expert=expert, weights=weights)
        )
        stack.callback(changes.pop, group)
    return stack


def _before(change: Callable[[Entering], torch.Tensor], *, is_first: bool) -> Any:
    def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return change(Entering(values=inputs[0], is_first=is_first)), *inputs[1:]

    return before


@dataclass(kw_only=True)
class InputCounts:
    """How many inputs of each group were wanted, and how many there were."""

    num_wanted: dict[Groups, int] = field(default_factory=dict)
    num_inputs: dict[Groups, int] = field(default_factory=dict)

    def add(self, place: Groups, is_wanted: torch.Tensor) -> None:
        """Count the inputs of some tokens."""
        self.num_wanted[place] = self.num_wanted.get(place, 0) + int(is_wanted.sum())
        self.num_inputs[place] = self.num_inputs.get(place, 0) + is_wanted.numel()

    def merge(self, other: "InputCounts") -> None:
        """Add what was counted elsewhere."""
        for own, found in ((self.num_wanted, other.num_wanted), (self.num_inputs, other.num_inputs)):
            for place, count in found.items():
                own[place] = own.get(place, 0) + count

    def share(self, weights: npt.NDArray[np.float32]) -> float:
        """Share of the layers' weights that were wanted; those of groups that were not counted all were.

        Args:
            weights: (layers, 4) how many each group has.
        """
        shares = np.ones(weights.shape)
        for (layer, group), count in self.num_inputs.items():
            shares[layer, INPUT_GROUPS.index(group)] = self.num_wanted[layer, group] / count
        return float(np.average(shares, weights=weights))
