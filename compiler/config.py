"""A compile's options, checked, and what those stand for that were not given."""

from dataclasses import dataclass

from coreinfer.bundles.shared.checks import raise_problems
from coreinfer.bundles.shared.option_fields import field_problems

from .conflicts import conflicts
from .efforts import METHODS, Budgets, Method, Removal, Ridge
from .options import (
    BUILTIN,
    DEFAULT_MAX_KL,
    GROUPS,
    MACHINE,
    TRIED_KEEPS,
    CompileOptions,
    DType,
    Format,
    HealOptimizer,
)

__all__ = [
    "BUILTIN",
    "DEFAULT_MAX_KL",
    "GROUPS",
    "MACHINE",
    "Budgets",
    "CompileConfig",
    "DType",
    "Format",
    "HealOptimizer",
    "Removal",
]

_FIRST_KEEP = 0.7
"""Where a search for a quality compares numbers of clusters."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(CompileOptions):
    """Options of one compile. `quality.sizes` and `quality.search` derive what is decided on the way."""

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        if self.packs == "auto" and self.token_share is None:
            # Nothing else goes with it, and what is recorded of the bundle should say so.
            object.__setattr__(self, "token_share", "auto")
        raise_problems([*field_problems(self)])
        raise_problems(conflicts(self))

    @property
    def effective_keep(self) -> float:
        """The keep ratio, or where a search begins."""
        if self.packs == "thin":
            return 1.0
        if self.packs == "auto":
            return TRIED_KEEPS[0]
        return _FIRST_KEEP if self.keep is None else self.keep

    @property
    def effective_max_kl(self) -> float | None:
        """What packs, or shares, may lose: without any other word about size or quality, little."""
        if self.searches_share:
            says_nothing = self.min_top1 is None
        elif self.packs == "thin":
            says_nothing = False
        else:
            says_nothing = self.keep is None and self.budget_mb is None and self.min_top1 is None
        return DEFAULT_MAX_KL if self.max_kl is None and says_nothing else self.max_kl

    @property
    def searches_share(self) -> bool:
        """Whether token shares are found by a quality to aim at."""
        return self.token_share == "auto"

    @property
    def allows_halves(self) -> bool:
        """Whether tokens may read inputs in half, of a model without experts."""
        return self.token_share is not None and self.half_inputs is not False and self.quantize == "int4"

    @property
    def aims_at_quality(self) -> bool:
        """Whether a quality decides how much is kept, or read."""
        return self.effective_max_kl is not None or self.min_top1 is not None

    @property
    def effective_cluster_weight(self) -> float:
        """The cluster weight of the scores, with its default filled in."""
        if self.cluster_weight is not None and self.cluster_weight != "auto":
            return self.cluster_weight
        return 0.3 if self.selection == "output-aware" else 1.0

    @property
    def chooses_cluster_weight(self) -> bool:
        """Whether the weight for the repair is chosen in each layer."""
        asked = self._method.cluster_weight if self.cluster_weight is None else self.cluster_weight
        return asked == "auto" and self.reconstruct

    @property
    def effective_removal(self) -> Removal:
        """The removal with its default filled in: other selections remove neurons as their papers do."""
        if self.removal is not None:
            return self.removal
        return self._method.removal if self.selection == "output-aware" and self.reconstruct else "top-k"

    @property
    def effective_budgets(self) -> Budgets:
        """How layers share the neurons, with its default filled in."""
        return self.budgets or self._method.budgets

    @property
    def effective_carry(self) -> bool:
        """Whether layers are repaired on the output of narrow ones, with its default filled in."""
        return self._method.carry if self.carry is None else self.carry

    @property
    def effective_ridge(self) -> Ridge:
        """The ridge, with its default filled in."""
        return self._method.ridge if self.ridge is None else self.ridge

    @property
    def tokens_a_neuron(self) -> int | None:
        """Calibration tokens of a cluster that repairs look at, for each neuron of a layer; None for all."""
        return self._method.tokens_a_neuron

    @property
    def effective_heal_steps(self) -> int:
        """Steps of healing, with its default filled in."""
        return self._method.heal_steps if self.heal_steps is None else self.heal_steps

    @property
    def effective_controls(self) -> bool:
        """Whether controls are measured, with its default filled in."""
        return self._method.controls if self.controls is None else self.controls

    @property
    def _method(self) -> Method:
        return METHODS[self.effort]

    @property
    def num_places(self) -> int:
        """Among how many workers text and clusters are divided: one without Ray. Sums depend on it, by rounding."""
        return self.workers or 1

    @property
    def repairs_rounding(self) -> bool:
        """Whether the repair also compensates rounding."""
        return self.repair_rounding and self.reconstruct and self.effective_carry and self.quantize != "bf16"

    @property
    def heals(self) -> bool:
        """Whether packs are healed."""
        return self.packs != "thin" and bool(self.effective_heal_steps or self.heal_cluster_steps)

    @property
    def effective_head_quantize(self) -> Format:
        """The head's format with its default filled in: its errors change the logits directly, so int8 or bf16."""
        return self.head_quantize or ("bf16" if self.quantize == "bf16" else "int8")
