"""What an effort stands for: the parts of the method that take most of a compile's time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .config import CompileConfig

__all__ = ["METHODS", "Budgets", "Effort", "Method", "Removal", "Ridge", "shares_profile", "weighs_errors"]

Effort = Literal["quick", "normal", "best"]
Budgets = Literal["uniform", "energy", "sensitivity"]
Removal = Literal["second-order", "top-k"]
Ridge = float | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What an effort stands for, where the options do not say it; each is the default of the option of its name.

    Attributes:
        tolerance: share of a quality that was asked for which a search may leave unused; it has no option.
        num_tries: of a search at most; it has no option.
        tokens_a_neuron: of a cluster's text that repairs layer after layer look at at most, for each neuron of a layer;
            None for all of it. It has no option.
    """

    removal: Removal
    budgets: Budgets
    carry: bool
    ridge: Ridge
    cluster_weight: float | Literal["auto"]
    controls: bool
    heal_steps: int
    tolerance: float
    num_tries: int
    tokens_a_neuron: int | None


METHODS: Mapping[Effort, Method] = {
    "quick": Method(
        removal="top-k",
        budgets="energy",
        carry=False,
        ridge=1e-2,
        cluster_weight=0.3,
        controls=False,
        heal_steps=0,
        tolerance=0.15,
        num_tries=3,
        tokens_a_neuron=None,
    ),
    "normal": Method(
        removal="second-order",
        budgets="sensitivity",
        carry=True,
        ridge="auto",
        cluster_weight=0.3,
        controls=True,
        heal_steps=0,
        tolerance=0.05,
        num_tries=6,
        tokens_a_neuron=8,
    ),
    "best": Method(
        removal="second-order",
        budgets="sensitivity",
        carry=True,
        ridge="auto",
        cluster_weight="auto",
        controls=True,
        heal_steps=60,
        tolerance=0.03,
        num_tries=8,
        tokens_a_neuron=None,
    ),
}


def weighs_errors(config: "CompileConfig") -> bool:
    """Whether neurons, ridges, cluster weights or layers compete by what their errors cost."""
    compete = config.effective_removal == "second-order" or config.effective_ridge == "auto"
    repairs = config.reconstruct and (compete or config.chooses_cluster_weight)
    return config.effective_budgets == "sensitivity" or repairs


def shares_profile(config: "CompileConfig") -> bool:
    """Whether the run of the text that profiles neurons also serves the repair: layers are narrowed each for itself."""
    apart = config.reconstruct and not config.effective_carry and config.effective_removal == "top-k"
    return apart and config.experts == "whole"
