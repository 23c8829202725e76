"""Layers whose neurons are zero for most of a token's: which they are, and how they are stored neuron by neuron."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .families import Family, family_by_name
from .formats import NEURON_FORMAT

if TYPE_CHECKING:
    from .manifest import ModelRecord

__all__ = ["cuts_gates", "ffn_kind", "has_zero_neurons"]


def cuts_gates(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether something is taken off a layer's gates, and what becomes negative is 0; `config`: transformers' own."""
    shares = config.get("activation_sparsity_pattern") or ()
    return family.cutoff is not None and layer < len(shares) and shares[layer] > 0


def has_zero_neurons(model: "ModelRecord", layer: int | None = None) -> bool:
    """Whether a layer's neurons, or with None those of any layer, are zero for most of a token's."""
    if model.activation == "relu":
        return True
    family, layers = family_by_name(model.family), range(model.num_layers) if layer is None else (layer,)
    return any(cuts_gates(family, model.config, number) for number in layers)


def ffn_kind(model: "ModelRecord", kind: str, layer: int) -> str:
    """Return the format of a layer's FFN where that of the FFN is `kind`: neuron by neuron is for some layers alone."""
    return "int4" if kind == NEURON_FORMAT and not has_zero_neurons(model, layer) else kind
