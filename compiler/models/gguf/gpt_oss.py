"""gpt-oss in GGUF files: what its config has besides the shared fields."""

from collections.abc import Mapping
from typing import Any

from .experts import expert_fields
from .header import Header
from .keys import HeaderKeys
from .rope import scaled_rope
from .sliding import layer_types, sliding_layers

__all__ = ["SWIGLU", "gpt_oss_fields"]

SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
"""What no file states: llama.cpp has it for all models of the architecture."""
_SLIDING_PATTERN = 2
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output")


def gpt_oss_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read them.

    Raises:
        ConfigError: a size is missing.
        UnsupportedModelError: layers that slide have positions of their own, or the experts are of another kind.
    """
    theta = keys.needed_number("rope.freq_base")
    keys.expect("rope.freq_base_swa", (theta,))
    head_dim, context = int(shared["head_dim"]), int(shared["max_position_embeddings"])
    rope = scaled_rope(keys, header, theta=theta, head_dim=head_dim, context=context)
    if rope["rope_type"] == "yarn":
        # As all models that were published; llama.cpp rounds the ends of the ramp to whole dimensions.
        rope["truncate"] = False
    return {
        "model_type": "gpt_oss",
        "attention_bias": any(f"blk.0.{name}.bias" in header.tensors for name in _BIASED),
        "intermediate_size": keys.size("expert_feed_forward_length"),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(sliding_layers(keys, int(shared["num_hidden_layers"]), _SLIDING_PATTERN)),
        "rope_parameters": rope,
        **SWIGLU,
        **expert_fields(keys, "gpt_oss", normalizes=True),
    }
