"""Bytes of FFN weights that a token reads, by how many neurons layers keep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .expert_packs import ExpertPacks
from .formats import ffn_layer_bytes
from .zero_neurons import ffn_kind

if TYPE_CHECKING:
    from .manifest import ModelRecord

__all__ = ["ffn_bytes"]


def ffn_bytes(
    model: "ModelRecord",
    kind: str,
    layer_budgets: Sequence[int],
    experts: ExpertPacks = "whole",
    layer_experts: Sequence[int] | None = None,
) -> int:
    """Bytes of FFN weights that are read for one token, by each layer's number of neurons, if none is left out.

    Args:
        layer_experts: how many experts share a layer's neurons, where these are narrower; None for all.
    """
    if model.experts is None:
        kinds = (ffn_kind(model, kind, layer) for layer in range(len(layer_budgets)))
        return sum(_layer_bytes(model, own, budget) for own, budget in zip(kinds, layer_budgets, strict=True))
    if experts != "whole":
        counts = layer_experts or (model.experts.num_experts,) * len(layer_budgets)
        widths = (budget // count for budget, count in zip(layer_budgets, counts, strict=True))
        return model.experts.num_chosen * sum(_layer_bytes(model, kind, width) for width in widths)
    chosen = (min(model.experts.num_chosen, budget // model.expert_neurons) for budget in layer_budgets)
    return sum(chosen) * _layer_bytes(model, kind, model.expert_neurons)


def _layer_bytes(model: "ModelRecord", kind: str, num_neurons: int) -> int:
    return ffn_layer_bytes(kind, model.hidden_size, num_neurons, gated=model.gated)
