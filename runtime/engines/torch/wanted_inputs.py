"""Which inputs of a group of matrices a token wants, whole or in half, how many they are, and how to get at them."""

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

__all__ = ["Entering", "Groups", "InputCounts", "Taken", "change_inputs", "take", "take_inputs"]

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


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is read of the inputs of matrices.

    Attributes:
        is_wanted: (..., inputs) bool, whether an input is read at all.
        is_whole: the same, whether it is read whole.
        values: (..., inputs), 0 where it is not read.
        halves: (..., inputs), 0 where it is not read in half; None where the group has no halves.
    """

    is_wanted: torch.Tensor
    is_whole: torch.Tensor
    values: torch.Tensor
    halves: torch.Tensor | None


def take(entering: Entering, norms: torch.Tensor, thresholds: torch.Tensor, *, has_halves: bool) -> Taken:
    """Read inputs by their scores.

    Args:
        norms: as `Entering.scores` takes them.
        thresholds: (2,), what scores must pass to be read, and to be read whole.
        has_halves: whether the group's inputs are read in half at all, which the thresholds' values do not tell a step
            that is recorded.
    """
    scores = entering.scores(norms)
    is_wanted, is_whole = scores > thresholds[0], scores > thresholds[1]
    values = entering.values.masked_fill(~is_wanted, 0)
    return Taken(
        is_wanted=is_wanted,
        is_whole=is_whole,
        values=values,
        halves=values.masked_fill(is_whole, 0) if has_halves else None,
    )


def take_inputs(
    layer: nn.Module,
    family: Family,
    group: str,
    read: Callable[[Entering], Taken | None],
    low_product: Callable[[str, torch.Tensor], torch.Tensor],
) -> ExitStack:
    """Have a group's matrices multiply what is read of their inputs, until what is returned is closed.

    Args:
        read: None leaves inputs as they are.
        low_product: from the path of a module, and inputs that are read in half, to what their weights' low bits add to
            the module's outputs.
    """
    # Each matrix takes its inputs before it multiplies, and nothing comes between.
    halves: list[torch.Tensor | None] = [None]

    def taken(entering: Entering) -> torch.Tensor:
        found = read(entering)
        halves[0] = None if found is None else found.halves
        return entering.values if found is None else found.values

    def after(path: str) -> Any:
        def corrected(_module: nn.Module, _inputs: Any, outputs: torch.Tensor) -> torch.Tensor | None:
            own, halves[0] = halves[0], None
            return None if own is None else outputs - low_product(path, own)

        return corrected

    stack = change_inputs(layer, family, group, taken)
    for path in family.input_groups.get(group, ()):
        stack.callback(resolve(layer, path).register_forward_hook(after(path)).remove)
    return stack


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
    """How many inputs of each group were wanted, how many of these whole, and how many there were."""

    num_wanted: dict[Groups, int] = field(default_factory=dict)
    num_whole: dict[Groups, int] = field(default_factory=dict)
    num_inputs: dict[Groups, int] = field(default_factory=dict)

    def add(self, place: Groups, taken: Taken) -> None:
        """Count the inputs of some tokens."""
        self.num_wanted[place] = self.num_wanted.get(place, 0) + int(taken.is_wanted.sum())
        self.num_whole[place] = self.num_whole.get(place, 0) + int(taken.is_whole.sum())
        self.num_inputs[place] = self.num_inputs.get(place, 0) + taken.is_wanted.numel()

    def merge(self, other: "InputCounts") -> None:
        """Add what was counted elsewhere."""
        pairs = (
            (self.num_wanted, other.num_wanted),
            (self.num_whole, other.num_whole),
            (self.num_inputs, other.num_inputs),
        )
        for own, found in pairs:
            for place, count in found.items():
                own[place] = own.get(place, 0) + count

    def share(self, weights: npt.NDArray[np.float32]) -> float:
        """Share of the bytes of the layers' weights that were read; those of groups that were not counted all were.

        An input that was read in half counts half.

        Args:
            weights: (layers, 4) how many each group has.
        """
        shares = np.ones(weights.shape)
        for (layer, group), count in self.num_inputs.items():
            read = (self.num_wanted[layer, group] + self.num_whole[layer, group]) / 2
            shares[layer, INPUT_GROUPS.index(group)] = read / count
        return float(np.average(shares, weights=weights))
