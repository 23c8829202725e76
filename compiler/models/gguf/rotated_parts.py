"""Architectures in which a part of each head is rotated, or norms are LayerNorms: Phi 3, StableLM, StarCoder2, GPTs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from coreinfer.bundles.errors import UnsupportedModelError

from .header import Header
from .keys import HeaderKeys
from .rope import LONG_FACTORS, SHORT_FACTORS, scaled_rope
from .values import read_tensor

__all__ = ["gpt2_fields", "gpt_neox_fields", "phi3_fields", "stablelm_fields", "starcoder2_fields"]

# Of a file that states no base of the frequencies, llama.cpp's.
_DEFAULT_THETA = 10_000.0


def phi3_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read what Phi 3's config has besides the shared fields."""
    context, window = int(shared["max_position_embeddings"]), keys.number("attention.sliding_window")
    original = keys.number("rope.scaling.original_context_length")
    return {
        "model_type": "phi3",
        # Phi 4 says 0: all positions are seen.
        "sliding_window": int(window) if window else None,
        "original_max_position_embeddings": int(original or context),
        "rope_parameters": _phi3_rope(keys, header, shared, context, original),
    }


def _phi3_rope(
    keys: HeaderKeys, header: Header, shared: Mapping[str, Any], context: int, original: float | None
) -> dict[str, Any]:
    # Says only whether the model was trained on with the scaling.
    keys.value("rope.scaling.finetuned")
    rotated = _rotated(keys, int(shared["head_dim"]))
    parameters = {
        "rope_theta": keys.number("rope.freq_base") or _DEFAULT_THETA,
        "rope_type": "default",
        "partial_rotary_factor": rotated / shared["head_dim"],
    }
    if not {LONG_FACTORS, SHORT_FACTORS} & header.tensors.keys():
        keys.expect("rope.scaling.type", ("none",))
        keys.expect("rope.scaling.attn_factor", (1.0,))
        return parameters
    keys.expect("rope.scaling.type", ("none", "longrope"))
    if original is None:
        raise keys.refused("rope.scaling.original_context_length", "expected a number, as there are factors, got none")
    return parameters | {
        "rope_type": "longrope",
        "short_factor": _factors(header, SHORT_FACTORS, rotated // 2),
        "long_factor": _factors(header, LONG_FACTORS, rotated // 2),
        # Without the key llama.cpp has 1, and transformers works one out.
        "attention_factor": keys.number("rope.scaling.attn_factor") or 1.0,
        "factor": context / original,
        "original_max_position_embeddings": int(original),
    }


def _factors(header: Header, name: str, count: int) -> list[float]:
    entry = header.tensors.get(name)
    factors = np.zeros(0, dtype=np.float32) if entry is None else read_tensor(entry).astype(np.float32)
    if factors.shape != (count,) or not np.isfinite(factors).all() or factors.min() <= 0:
        got = "none" if entry is None else f"shape {list(factors.shape)}"
        raise UnsupportedModelError(f"{header.file.name}: tensor {name}: expected {count} factors above 0, got {got}")
    return [float(factor) for factor in factors]


def _rotated(keys: HeaderKeys, head_dim: int) -> int:
    """Return how many dimensions of a head rotate, which has to be stated."""
    rotated = keys.size("rope.dimension_count")
    if rotated % 2 or rotated > head_dim:
        raise keys.refused("rope.dimension_count", f"expected an even number up to {head_dim}, got {rotated}")
    return rotated


def _has_bias(header: Header, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in header.tensors for name in names)


def stablelm_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read what StableLM's config has besides the shared fields."""
    # What converters state here says little; llama.cpp, too, tells parallel blocks by the norm that they do without.
    keys.value("use_parallel_residual")
    return {
        "model_type": "stablelm",
        "use_qkv_bias": _has_bias(header, "attn_q", "attn_k", "attn_v"),
        "use_parallel_residual": not any(".ffn_norm." in tensor for tensor in header.tensors),
        "rope_parameters": _rope_of_part(keys, header, shared),
    }


def _rope_of_part(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = int(shared["head_dim"])
    return {**_rope(keys, header, shared), "partial_rotary_factor": _rotated(keys, head_dim) / head_dim}


def _rope(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    return scaled_rope(
        keys,
        header,
        theta=keys.number("rope.freq_base") or _DEFAULT_THETA,
        head_dim=int(shared["head_dim"]),
        context=int(shared["max_position_embeddings"]),
    )


def starcoder2_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read what StarCoder2's config has besides the shared fields; llama.cpp knows no window of it."""
    return {
        "model_type": "starcoder2",
        "use_bias": _has_bias(header, "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
        "sliding_window": None,
        "rope_parameters": _rope(keys, header, shared),
    }


def gpt_neox_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read what GPT-NeoX's config has besides the shared fields; llama.cpp knows one activation of it."""
    return {
        "model_type": "gpt_neox",
        "attention_bias": _has_bias(header, "attn_qkv", "attn_output"),
        "use_parallel_residual": keys.needed_flag("use_parallel_residual"),
        "rope_parameters": _rope_of_part(keys, header, shared),
    }


def gpt2_fields(_keys: HeaderKeys, _header: Header, _shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read what GPT-2's config has besides the shared fields: nothing."""
    return {"model_type": "gpt2"}
