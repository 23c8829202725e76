"""A mixture of experts as a module whose experts can be changed, and left out, by pointer swap.

transformers keeps the experts of a layer in two tensors of three dimensions. A bundle has the matrices of each expert
for itself, and a cluster's pack may lack experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import CLAMPED_SWIGLU, ExpertNames, Family, resolve
from coreinfer.bundles.manifest import ExpertsRecord
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .packed_linear import GRID, packed_product

__all__ = ["Change", "ExpertRun", "Mixture", "Router", "experts_of", "take_experts"]

ROLES = ("gate", "up", "down")
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What gate and up give -> the neurons."""


Change = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
"""What enters matrices of an expert, (chosen, inputs), its number, and what the router multiplies its outputs by,
(chosen,) -> what is multiplied."""


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """What one expert did with the tokens that chose it.

    Attributes:
        expert: its number.
        rows: (chosen,) ascending places of its tokens among all that the mixture was given.
        inputs: (chosen, hidden size).
        activations: (chosen, neurons), input of the down projection; of packed weights with padding.
        weights: (chosen,) what the router multiplies its outputs by.
        outputs: (chosen, hidden size), weighted.
    """

    expert: int
    rows: torch.Tensor
    inputs: torch.Tensor
    activations: torch.Tensor
    weights: torch.Tensor
    outputs: torch.Tensor


class Router(nn.Module):
    """Says which experts each token uses, and what their outputs are multiplied by."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, record: ExpertsRecord) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._record = record

    def forward(self, rows: torch.Tensor, absent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for (tokens, hidden size).

        Args:
            absent: (absent experts,) numbers of those whose logits become minus infinity.
        Returns:
            Numbers of experts, and weights: (tokens, chosen experts) both.
        """
        logits = functional.linear(rows, self.weight, self.bias).float().index_fill(1, absent, -torch.inf)
        weights, chosen = logits.softmax(dim=-1).topk(self._record.num_chosen, dim=-1)
        if self._record.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights.to(rows.dtype)


class Mixture(nn.Module):
    """A router and the experts that there are.

    Attributes:
        router: the base's; all else is the FFN.
        tensors: `expert_role` -> matrix or bias, as `assign_ffn` takes them; int4 matrices may be packed, beside grids
            (`packed_linear`). Not parameters of the module.
        watch: called with what each expert did; None to leave it out.
        changes: of "gate_up" and of "down" what is done to their inputs, for each expert; of neither as a rule.
    """

    def __init__(
        self,
        router: Router,
        record: ExpertsRecord,
        combine: Combine,
        tensors: Mapping[str, Any],
        *,
        returns_weights: bool,
    ) -> None:
        super().__init__()
        self.router = router
        self.watch: Callable[[ExpertRun], None] | None = None
        self.changes: dict[str, Change] = {}
        self.tensors: Mapping[str, Any] = {}
        self._num_experts = record.num_experts
        self._combine = combine
        self._returns_weights = returns_weights
        self._absent = torch.empty(0, dtype=torch.long)
        self.assign(tensors)

    def assign(self, tensors: Mapping[str, Any]) -> None:
        """Compute with other experts; those of which there are no tensors are not chosen."""
        self.tensors = tensors
        absent = [number for number in range(self._num_experts) if expert_role(number, "down") not in tensors]
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        # Not one of inference, where that assigns: gradients may go through it later.
        with torch.inference_mode(mode=False):
            self._absent = torch.tensor(absent, dtype=torch.long, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Mix (..., hidden size) -> the same shape; outputs are added in the order of the experts' numbers.

        Where the family's layers expect them, the router's weights (tokens, chosen experts) are returned too.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        chosen, weights = self.router(rows, self._absent)
        mixed = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            own = weights[row, rank]
            inputs = self._entering("gate_up", rows[row], expert, own)
            activations = self._combine(self._multiply(inputs, expert, "gate"), self._multiply(inputs, expert, "up"))
            activations = self._entering("down", activations, expert, own)
            outputs = self._multiply(activations, expert, "down") * own[:, None]
            if self.watch is not None:
                run = ExpertRun(
                    expert=expert, rows=row, inputs=inputs, activations=activations, weights=own, outputs=outputs
                )
                self.watch(run)
            mixed.index_add_(0, row, outputs)
        mixed = mixed.reshape(hidden.shape)
        return (mixed, weights) if self._returns_weights else mixed

    def _entering(self, group: str, inputs: torch.Tensor, expert: int, weights: torch.Tensor) -> torch.Tensor:
        change = self.changes.get(group)
        return inputs if change is None else change(inputs, expert, weights)

    def _multiply(self, inputs: torch.Tensor, expert: int, role: str) -> torch.Tensor:
        name, bias = expert_role(expert, role), self.tensors.get(expert_role(expert, f"{role}_bias"))
        # Padding between the products stays, as it is of zeros.
        num_outputs = self.router.weight.shape[1] if role == "down" else None
        return packed_product(inputs, self.tensors[name], self.tensors.get(name + GRID), bias, num_outputs)


def experts_of(family: Family, config: Any) -> ExpertsRecord | None:
    """Read from a model's config what experts it has; None where its FFN is one."""
    names = family.experts
    if names is None:
        return None
    return ExpertsRecord(
        num_experts=int(getattr(config, names.num_field)),
        num_chosen=int(config.num_experts_per_tok),
        normalizes=bool(config.norm_topk_prob) if names.normalizes is None else names.normalizes,
    )


def take_experts(model: Any, family: Family) -> None:
    """Put a `Mixture` in the place of each layer's own; its matrices are views of what transformers has in one.

    Where rows of gate and up take turns, or matrices are turned, they are copied, a layer at a time.

    Args:
        model: that transformers built, with or without memory; one that has them already stays as it is.
    """
    record = experts_of(family, model.config)
    if record is None or family.experts is None:
        return
    names, combine = family.experts, _combine(family, model.config)
    for layer in resolve(model, family.layers):
        whole = layer.get_submodule(names.module)
        if not isinstance(whole, Mixture):
            own = resolve(whole, names.router)
            router = Router(own.weight.detach(), own.bias.detach() if names.biased else None, record)
            tensors = _tensors(whole.experts, record, names)
            mixture = Mixture(router, record, combine, tensors, returns_weights=names.returns_weights)
            layer.set_submodule(names.module, mixture)


def _combine(family: Family, config: Any) -> Combine:
    if family.activation == CLAMPED_SWIGLU:
        return partial(_clamped_swiglu, float(config.swiglu_alpha), float(config.swiglu_limit))
    return partial(_gated, ACT2FN[str(getattr(config, family.activation_field))])


def _gated(activation: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _clamped_swiglu(alpha: float, limit: float, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _tensors(experts: Any, record: ExpertsRecord, names: ExpertNames) -> dict[str, torch.Tensor]:
    """Each expert's matrices (outputs, inputs), and biases, by `expert_role`."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(record.num_experts):
        both, down = (matrix.detach()[number] for matrix in (experts.gate_up_proj, experts.down_proj))
        if names.transposed:
            both, down = both.T, down.T
        parts = dict(zip(ROLES, (*_apart(both, names), down), strict=True))
        if names.biased:
            gate_bias, up_bias = _apart(experts.gate_up_proj_bias.detach()[number], names)
            parts |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": experts.down_proj_bias.detach()[number]}
        tensors |= {expert_role(number, role): part.contiguous() for role, part in parts.items()}
    return tensors


def _apart(both: torch.Tensor, names: ExpertNames) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of gate and those of up among the rows of both."""
    if names.interleaved:
        return both[::2], both[1::2]
    gate, up = both.chunk(2)
    return gate, up
