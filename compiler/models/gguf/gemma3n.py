"""Gemma 3n in GGUF files: what its config has besides the shared fields."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from .header import Header
from .keys import HeaderKeys
from .rope import scaled_rope
from .sliding import layer_types, sliding_layers

__all__ = ["LOGIT_LIMIT", "SLIDING_PATTERN", "gemma3n_fields"]

SLIDING_PATTERN = 5
LOGIT_LIMIT = 30.0
"""llama.cpp's, where a file does not say."""
_SLIDING_THETA = 10_000.0
_NORMAL = NormalDist()
_DIGITS, _FLOAT_ERROR = 6, 1e-6


def gemma3n_fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Read them.

    Raises:
        ConfigError: a size or a key is missing.
        UnsupportedModelError: a key asks for something that is not computed.
    """
    num_layers, head_dim = int(shared["num_hidden_layers"]), int(shared["head_dim"])
    num_streams, context = keys.size("altup.num_inputs"), int(shared["max_position_embeddings"])
    theta = keys.needed_number("rope.freq_base")
    plain = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa") or _SLIDING_THETA}
    for key in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        keys.expect(key, (head_dim,))
    return {
        "model_type": "gemma3n_text",
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(sliding_layers(keys, num_layers, SLIDING_PATTERN)),
        # Scaling is that of the layers that see everything.
        "rope_parameters": {
            "full_attention": scaled_rope(keys, header, theta=theta, head_dim=head_dim, context=context),
            "sliding_attention": plain,
        },
        "final_logit_softcapping": _logit_limit(keys),
        "altup_num_inputs": num_streams,
        "altup_active_idx": _count(keys, "altup.active_idx", num_streams),
        "hidden_size_per_layer_input": keys.size("embedding_length_per_layer_input"),
        "num_kv_shared_layers": _count(keys, "attention.shared_kv_layers", num_layers),
        "activation_sparsity_pattern": _shares(keys, num_layers),
        **_sizes(header, int(shared["vocab_size"])),
    }


def _logit_limit(keys: HeaderKeys) -> float:
    limit = keys.number("final_logit_softcapping")
    if limit is not None and limit <= 0:
        raise keys.unsupported("final_logit_softcapping")
    return LOGIT_LIMIT if limit is None else limit


def _count(keys: HeaderKeys, key: str, below: int) -> int:
    """Read a number from 0 on, which has to be stated."""
    value = keys.needed_number(key)
    if value not in range(below):
        raise keys.refused(key, f"expected a whole number from 0 to {below - 1}, got {value!r}")
    return int(value)


def _shares(keys: HeaderKeys, num_layers: int) -> list[float]:
    """Read which share of each layer's gates is cut off: files have the multiple of the deviation that does it."""
    key = "activation_sparsity_scale"
    multiples = keys.value(key)
    if not isinstance(multiples, list) or len(multiples) != num_layers:
        got = "a header without that key; convert the model again" if multiples is None else repr(multiples)
        raise keys.refused(key, f"expected a number for each of {num_layers} layers, got {got}")
    # A share of a half and less leaves out negative gates alone, or fewer.
    if any(multiple != -float("inf") and not 0 < multiple < float("inf") for multiple in multiples):
        raise keys.unsupported(key)
    return [0.0 if multiple < 0 else _share(multiple) for multiple in multiples]


def _share(multiple: float) -> float:
    """The share that a multiple in float32 was computed of: the one of few digits, where there is one."""
    share = _NORMAL.cdf(multiple)
    short = round(share, _DIGITS)
    return short if short < 1 and abs(_NORMAL.inv_cdf(short) - multiple) <= _FLOAT_ERROR * multiple else share


def _sizes(header: Header, vocabulary: int) -> dict[str, int]:
    """Sizes that only shapes tell; where these are of no model, the comparison of all shapes names them."""
    sizes = {}
    table = header.tensors.get("per_layer_token_embd.weight")
    ranks = [entry.shape[-1] for name, entry in header.tensors.items() if name.endswith(".laurel_r.weight")]
    if ranks:
        sizes["laurel_rank"] = ranks[0]
    if table is not None:
        # Other tokens have the row of token 0.
        sizes["vocab_size_per_layer_input"] = min(table.shape[0], vocabulary)
    return sizes
