"""Which inputs of a group of matrices a token wants, and how many they are."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from torch.nn import functional

__all__ = ["Groups", "InputCounts", "wanted"]

Groups = tuple[int, str]
"""A layer, and one of `INPUT_GROUPS`."""


def wanted(inputs: torch.Tensor, norms: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Say which inputs are wanted, (..., inputs) bool.

    Args:
        inputs: (..., inputs).
        norms: (inputs,) float32 of the matrices' columns; of padding, whose inputs are 0, there are none.
        threshold: of one number, which |x| times its norm must pass.
    """
    whole = functional.pad(norms, (0, inputs.shape[-1] - len(norms)))
    return inputs.float().abs() * whole > threshold


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
