"""What is known of a model that is in memory: its shapes, as the manifest states them, and norms of its columns."""

import logging
from typing import Any

import numpy as np
import torch
from coreinfer.bundles.families import Family, resolve
from coreinfer.bundles.manifest import ExpertsRecord, ModelRecord
from coreinfer.runtime.engines.torch.mixture import experts_of
from torch import nn
from transformers import PreTrainedConfig

__all__ = ["column_norms", "record_of"]

_log = logging.getLogger(__name__)


def column_norms(model: nn.Module, family: Family, record: ModelRecord) -> np.ndarray[Any, np.dtype[np.float32]]:
    """L2 norms of the down projections' columns: see `LoadedModel`."""
    if record.experts is not None:
        return np.ones((record.num_layers, record.experts.num_experts), dtype=np.float32)
    downs = [resolve(layer, family.down) for layer in resolve(model, family.layers)]
    norms: np.ndarray[Any, np.dtype[np.float32]] = (
        torch.stack([down.weight.detach().float().norm(dim=0) for down in downs]).cpu().numpy()
    )
    return norms


def record_of(model: nn.Module, family: Family, name: str, config: PreTrainedConfig) -> ModelRecord:
    """What the manifest says of a model."""
    heads = int(config.num_attention_heads)
    experts = experts_of(family, config)
    data = {key: value for key, value in config.to_dict().items() if key not in _DROPPED_FIELDS}
    return ModelRecord(
        name=name,
        family=family.name,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        ffn_dim=_num_neurons(family, config, experts),
        vocab_size=int(config.vocab_size),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        max_positions=_positions(config, name),
        activation=family.activation or str(getattr(config, family.activation_field)),
        gated=family.gated,
        ffn_bias=_has_ffn_bias(model, family),
        tied_head=bool(config.tie_word_embeddings),
        config=data,
        experts=experts,
    )


def _has_ffn_bias(model: nn.Module, family: Family) -> bool:
    if family.experts is not None:
        return family.experts.biased
    return resolve(next(iter(resolve(model, family.layers))), family.up).bias is not None


def _num_neurons(family: Family, config: PreTrainedConfig, experts: ExpertsRecord | None) -> int:
    """Neurons of a layer, all its experts' together."""
    if family.experts is None or experts is None:
        stated = getattr(config, family.ffn_dim_field)
        # Of each layer, all alike (`settings.py`).
        stated = stated[0] if isinstance(stated, (list, tuple)) else stated
        return int((family.ffn_dim_factor or 0) * config.hidden_size if stated is None else stated)
    return experts.num_experts * int(getattr(config, family.experts.dim_field))


def _positions(config: PreTrainedConfig, name: str) -> int:
    """Positions that are read: with LongRoPE those of short texts, for a text's keys are rotated once and for all."""
    most, rope = int(config.max_position_embeddings), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return most
    first = int(rope["original_max_position_embeddings"])
    if first < most:
        _log.warning("%s has rotary factors of their own for texts beyond %d tokens: read up to there", name, first)
    return min(most, first)


# Fields of a config that name places or code of elsewhere, or change from release to release.
_DROPPED_FIELDS = frozenset(
    {"_name_or_path", "name_or_path", "auto_map", "transformers_version", "quantization_config"}
)
