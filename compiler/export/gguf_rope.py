"""Rotary embeddings as keys of a GGUF file."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .chosen import ChosenModel
from .gguf_refusal import refusal

__all__ = ["rope_factors", "rope_fields", "rounds_ramp"]

_NOT_TRUNCATING = ("gpt_oss",)
"""Families whose models have a ramp of YaRN that ends between dimensions (`truncate` false)."""


def rope_fields(rope: Mapping[str, Any], chosen: ChosenModel) -> dict[str, Any]:
    """Return the keys of a model's rotary embeddings.

    Raises:
        UnsupportedModelError: no keys state them, or llama.cpp computes others.
    """
    kind = rope.get("rope_type", "default")
    share, head_dim = float(rope.get("partial_rotary_factor") or 1.0), chosen.bundle.manifest.model.head_dim
    if share != 1.0 and not chosen.family.rotates_part:
        raise refusal("rotation of a part of each head is not exported; use --to hf")
    fields: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * share),
    }
    if kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        if not _is_plain_yarn(rope, chosen):
            raise refusal("YaRN with parameters other than factor and original length is not exported; use --to hf")
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    elif kind not in _FACTORS and kind != "default":
        raise refusal(f"positions scaled by {kind!r} are not exported; use --to hf")
    elif kind in _FACTORS and chosen.family.name != "llama":
        raise refusal(f"llama.cpp's {chosen.family.name} has no positions scaled by {kind!r}; use --to hf")
    return fields


def _is_plain_yarn(rope: Mapping[str, Any], chosen: ChosenModel) -> bool:
    usual = 0.1 * math.log(float(rope["factor"])) + 1.0
    stated = rope.get("attention_factor")
    return (
        (stated is None or math.isclose(float(stated), usual, rel_tol=1e-6))
        and rope.get("beta_fast") in (None, 32)
        and rope.get("beta_slow") in (None, 1)
        and rope.get("mscale") == rope.get("mscale_all_dim") is None
        # A file does not say; it is read as the family's models were trained.
        and bool(rope.get("truncate", True)) == (chosen.family.name not in _NOT_TRUNCATING)
    )


def rounds_ramp(chosen: ChosenModel) -> bool:
    """Whether llama.cpp rounds the ends of YaRN's ramp, and the model was trained without that."""
    rope = chosen.config.get("rope_parameters") or {}
    return chosen.family.name in _NOT_TRUNCATING and rope.get("rope_type") == "yarn"


def rope_factors(chosen: ChosenModel) -> npt.NDArray[np.float32] | None:
    """Return (head_dim / 2,) what llama.cpp divides the inverse frequencies by; None where a key says it all.

    Raises:
        UnsupportedModelError: long and short texts have factors of their own.
    """
    rope = chosen.config.get("rope_parameters") or {}
    factors = _FACTORS.get(rope.get("rope_type", "default"))
    return None if factors is None else factors(rope, chosen.bundle.manifest.model.head_dim)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Llama 3.1's: long waves by `factor`, short ones not, a blend in between (as transformers computes it)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    turns = rope["original_max_position_embeddings"] / (2 * np.pi * np.float32(rope["rope_theta"]) ** exponents)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / (blend + (1 - blend) / float(rope["factor"])), dtype=np.float32)


def _longrope_factors(rope: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    if rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor") != 1.0:
        raise refusal("LongRoPE with factors of its own for long texts is not exported; use --to hf")
    return np.asarray(rope["short_factor"], dtype=np.float32)


_FACTORS: Mapping[str, Callable[[Mapping[str, Any], int], npt.NDArray[np.float32]]] = {
    "llama3": _llama3_factors,
    "longrope": _longrope_factors,
}
