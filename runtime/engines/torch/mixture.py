"""A mixture of experts as a module whose experts can be changed, and left out, by pointer swap.

transformers keeps the experts of a layer in two tensors of three dimensions. A bundle has the matrices of each expert
for itself, and a cluster's pack may lack experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.manifest import ExpertsRecord
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

__all__ = ["ExpertRun", "Mixture", "Router", "experts_of", "take_experts"]

ROLES = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """What one expert did with the tokens that chose it.

    Attributes:
        expert: its number.
        rows: (chosen,) ascending places of its tokens among all that the mixture was given.
        inputs: (chosen, hidden size).
        activations: (chosen, neurons), input of the down projection.
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

    def __init__(self, weight: torch.Tensor, record: ExpertsRecord) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._record = record

    def forward(self, rows: torch.Tensor, absent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for (tokens, hidden size).

        Args:
            absent: (absent experts,) numbers of those whose logits become minus infinity.
        Returns:
            Numbers of experts, and weights: (tokens, chosen experts) both.
        """
        logits = functional.linear(rows, self.weight).float().index_fill(1, absent, -torch.inf)
        weights, chosen = logits.softmax(dim=-1).topk(self._record.num_chosen, dim=-1)
        if self._record.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights.to(rows.dtype)


class Mixture(nn.Module):
    """A router and the experts that there are.

    Attributes:
        router: the base's; all else is the FFN.
        tensors: `expert_role` -> matrix, as `assign_ffn` takes them. Not parameters of the module.
        watch: called with what each expert did; None to leave it out.
    """

    def __init__(self, router: Router, record: ExpertsRecord, activation: str, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.router = router
        self.watch: Callable[[ExpertRun], None] | None = None
        self.tensors: Mapping[str, Any] = {}
        self._num_experts = record.num_experts
        self._activation = ACT2FN[activation]
        self._absent = torch.empty(0, dtype=torch.long)
        self.assign(tensors)

    def assign(self, tensors: Mapping[str, Any]) -> None:
        """Compute with other experts; those of which there are no tensors are not chosen."""
        self.tensors = tensors
        absent = [number for number in range(self._num_experts) if expert_role(number, "down") not in tensors]
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._absent = torch.tensor(absent, dtype=torch.long, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix (..., hidden size) -> the same shape; outputs are added in the order of the experts' numbers."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        chosen, weights = self.router(rows, self._absent)
        mixed = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            gate, up, down = (self.tensors[expert_role(expert, role)] for role in ROLES)
            inputs = rows[row]
            activations = self._activation(functional.linear(inputs, gate)) * functional.linear(inputs, up)
            own = weights[row, rank]
            outputs = functional.linear(activations, down) * own[:, None]
            if self.watch is not None:
                run = ExpertRun(
                    expert=expert, rows=row, inputs=inputs, activations=activations, weights=own, outputs=outputs
                )
                self.watch(run)
            mixed.index_add_(0, row, outputs)
        return mixed.reshape(hidden.shape)


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

    Args:
        model: that transformers built, with or without memory; one that has them already stays as it is.
    """
    record = experts_of(family, model.config)
    if record is None or family.experts is None:
        return
    activation = str(getattr(model.config, family.activation_field))
    for layer in resolve(model, family.layers):
        whole = layer.get_submodule(family.experts.module)
        if not isinstance(whole, Mixture):
            router = Router(resolve(whole, family.experts.router).weight.detach(), record)
            tensors = _matrices(whole.experts, record)
            layer.set_submodule(family.experts.module, Mixture(router, record, activation, tensors))


def _matrices(experts: Any, record: ExpertsRecord) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for number in range(record.num_experts):
        gate, up = experts.gate_up_proj.detach()[number].chunk(2)
        matrices = (gate, up, experts.down_proj.detach()[number])
        tensors |= {expert_role(number, role): matrix for role, matrix in zip(ROLES, matrices, strict=True)}
    return tensors
