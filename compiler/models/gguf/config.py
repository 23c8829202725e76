"""A model's config from the header of its GGUF file: every field that shapes the model is read, none assumed."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from coreinfer.bundles.families import family_of_config

from .experts import expert_fields
from .gemma3n import gemma3n_fields
from .gpt_oss import gpt_oss_fields
from .header import Header
from .keys import HeaderKeys
from .rope import scaled_rope
from .rotated_parts import gpt2_fields, gpt_neox_fields, phi3_fields, stablelm_fields, starcoder2_fields
from .sliding import layer_types, sliding_layers, sliding_window
from .tying import table_of

__all__ = ["ARCHITECTURES", "architecture_of", "config_fields"]

_BLOCK = re.compile(r"blk\.(\d+)\.")
# Of a file that states no base of the frequencies, llama.cpp's.
_DEFAULT_THETA = 10_000.0
# Gemma 3's layers that slide have a base of their own, which files seldom state.
_SLIDING_THETA = 10_000.0
_SLIDING_PATTERN = 6
# llama.cpp's, where a file of Gemma 2 does not say.
_GEMMA2_PATTERN, _GEMMA2_WINDOW, _GEMMA2_SCORE_LIMIT, _GEMMA2_LOGIT_LIMIT = 2, 4096, 50.0, 30.0
_OLMO_PATTERN = 4
# The layout of q and k that Llama has in every GGUF file.
_LLAMA_LAYOUT = "Meta AI original pth"
# Keys that say that a model has none of something: with these values nothing is lost.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (0, 1),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "use_parallel_residual": (False,),
}
# Architecture -> the field of the norms' epsilon, and its key: of LayerNorms.
_EPSILONS = {
    "stablelm": ("layer_norm_eps", "attention.layer_norm_epsilon"),
    "starcoder2": ("norm_epsilon", "attention.layer_norm_epsilon"),
    "gptneox": ("layer_norm_eps", "attention.layer_norm_epsilon"),
    "gpt2": ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
}
_ROTATE_PART = ("phi3", "stablelm", "gptneox")
_EVEN_HEADS = ("phi3", "stablelm", "starcoder2", "gptneox", "gpt2", "olmoe")
# Each head has keys and values of its own, which files need not say.
_UNGROUPED = ("gptneox", "gpt2")
_TOKEN_ID_KEYS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
_END_KEYS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eot_token_ids", "eom_token_id", "eom_token_ids")


def config_fields(header: Header, name: str) -> dict[str, Any]:
    """Read the fields of the config that transformers would have of the model that a file was made from.

    Args:
        name: name of the model in an error.
    Raises:
        ConfigError: a size is missing or contradicts the tensors.
        UnsupportedModelError: the architecture is not read, or a key asks for something that is not computed.
    """
    architecture = architecture_of(header, name)
    keys = HeaderKeys(header, architecture, name)
    fields = _shared_fields(keys, header, name, architecture)
    fields |= ARCHITECTURES[architecture](keys, header, fields)
    keys.check_all_read(_NEUTRAL)
    if architecture in _EVEN_HEADS:
        _check_even(keys, fields)
        del fields["head_dim"]
    if architecture in _UNGROUPED:
        del fields["num_key_value_heads"]
    family = family_of_config(fields, name)
    return {family.config_field(field): value for field, value in fields.items()}


def architecture_of(header: Header, name: str) -> str:
    """Find the architecture that a file states.

    Raises:
        UnsupportedModelError: the architecture is not supported.
    """
    stated = header.metadata.get("general.architecture")
    if stated in ARCHITECTURES:
        return str(stated)
    supported = ", ".join(ARCHITECTURES)
    what = f"architecture {stated!r}" if stated is not None else "a header without general.architecture"
    raise UnsupportedModelError(f"--model {name}: {what} is not supported in GGUF; supported: {supported}")


def _shared_fields(keys: HeaderKeys, header: Header, name: str, architecture: str) -> dict[str, Any]:
    num_heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    epsilon, epsilon_key = _EPSILONS.get(architecture, ("rms_norm_eps", "attention.layer_norm_rms_epsilon"))
    num_layers = keys.size("block_count")
    blocks = {int(match[1]) for match in map(_BLOCK.match, header.tensors) if match}
    if blocks != set(range(num_layers)):
        raise keys.refused("block_count", f"it says {num_layers} layers, the tensors are of {_listed(sorted(blocks))}")
    num_tokens = len(_tokens(header, name))
    vocabulary = keys.size("vocab_size") if keys.has("vocab_size") else num_tokens
    if num_tokens > vocabulary:
        raise keys.refused("vocab_size", f"expected room for {num_tokens} tokens of the tokenizer, got {vocabulary}")
    return {
        "max_position_embeddings": keys.size("context_length"),
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _num_kv_heads(keys, num_heads, ungrouped=architecture in _UNGROUPED),
        "head_dim": _head_dim(keys, hidden, num_heads, rotates_part=architecture in _ROTATE_PART),
        epsilon: keys.needed_number(epsilon_key),
        "vocab_size": vocabulary,
        "tie_word_embeddings": table_of(header) is not None,
        **_token_ids(header, name, vocabulary),
    }


def _listed(blocks: list[int]) -> str:
    return f"layers {', '.join(map(str, blocks[:8]))}{', ...' if len(blocks) > 8 else ''}" if blocks else "no layer"


def _tokens(header: Header, name: str) -> list[str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError(f"--model {name}: tokenizer.ggml.tokens: expected the vocabulary, got none")
    return tokens


def _num_kv_heads(keys: HeaderKeys, num_heads: int, *, ungrouped: bool) -> int:
    if not ungrouped:
        return keys.size("attention.head_count_kv")
    keys.expect("attention.head_count_kv", (num_heads,))
    return num_heads


def _check_even(keys: HeaderKeys, fields: Mapping[str, Any]) -> None:
    """Refuse heads of another size than the hidden size says, where the config has no field for it."""
    if fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"]:
        raise keys.unsupported("attention.key_length")


def _head_dim(keys: HeaderKeys, hidden: int, num_heads: int, *, rotates_part: bool) -> int:
    if keys.has("attention.key_length"):
        head_dim = keys.size("attention.key_length")
    elif hidden % num_heads:
        raise keys.refused("attention.key_length", f"expected a size, got none, and {num_heads} heads of {hidden}")
    else:
        head_dim = hidden // num_heads
    keys.expect("attention.value_length", (head_dim,))
    if not rotates_part:
        keys.expect("rope.dimension_count", (head_dim,))
    return head_dim


def _token_ids(header: Header, name: str, vocabulary: int) -> dict[str, Any]:
    ids: dict[str, Any] = dict.fromkeys(_TOKEN_ID_KEYS)
    for field, key in _TOKEN_ID_KEYS.items():
        found = _ids_of(header, key, name, vocabulary)
        ids[field] = found[0] if found else None
    # All that end a text or a turn; transformers has one list for them.
    ends = [end for key in _END_KEYS for end in _ids_of(header, key, name, vocabulary)]
    distinct = list(dict.fromkeys(ends))
    return ids | {"eos_token_id": distinct if len(distinct) > 1 else next(iter(distinct), None)}


def _ids_of(header: Header, key: str, name: str, vocabulary: int) -> list[int]:
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < vocabulary:
            raise ConfigError(
                f"--model {name}: tokenizer.ggml.{key}: expected a token id below {vocabulary}, got {token_id!r}"
            )
    return ids


def _llama(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    keys.expect("tensor_data_layout", (_LLAMA_LAYOUT,))
    window = sliding_window(keys)
    fields = {
        "attention_bias": _has_biases(header, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_biases(header, "ffn_gate", "ffn_up", "ffn_down"),
        "rope_parameters": _rope(keys, header, shared, keys.number("rope.freq_base") or _DEFAULT_THETA),
    }
    if keys.value("expert_count"):
        # Mixtral is Mistral with experts, and in llama.cpp Llama with them.
        experts = expert_fields(keys, "mixtral", normalizes=True)
        rope = fields["rope_parameters"]
        return {"model_type": "mixtral", "sliding_window": window or None, "rope_parameters": rope, **experts}
    if not window:
        return {"model_type": "llama", **fields}
    if fields.pop("attention_bias") or fields.pop("mlp_bias"):
        raise keys.unsupported("attention.sliding_window")
    # Mistral is Llama with a window in every layer.
    return {"model_type": "mistral", "sliding_window": window, **fields}


def _smollm3(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "smollm3",
        "attention_bias": _has_biases(header, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_biases(header, "ffn_gate", "ffn_up", "ffn_down"),
        # Which layers do not rotate, the header does not state: every fourth, as in llama.cpp.
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(shared["num_hidden_layers"])],
        "rope_parameters": _rope(keys, header, shared, keys.needed_number("rope.freq_base")),
    }


def _granite(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    # In this architecture the key says whether there are rotary embeddings at all.
    keys.expect("rope.scaling.finetuned", (True,))
    scale = keys.number("attention.scale") or int(shared["head_dim"]) ** -0.5
    return {
        "model_type": "granite",
        "attention_bias": _has_biases(header, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_biases(header, "ffn_gate", "ffn_up", "ffn_down"),
        "attention_multiplier": scale,
        "embedding_multiplier": keys.number("embedding_scale") or 1.0,
        "residual_multiplier": keys.number("residual_scale") or 1.0,
        "logits_scaling": keys.needed_number("logit_scale"),
        "rope_parameters": _rope(keys, header, shared, keys.number("rope.freq_base") or _DEFAULT_THETA),
    }


def _granite_moe(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    fields = _granite(keys, header, shared)
    # Experts have no biases.
    del fields["mlp_bias"]
    return fields | {"model_type": "granitemoe", **expert_fields(keys, "granitemoe", normalizes=True)}


def _olmoe(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "rope_parameters": _rope(keys, header, shared, keys.number("rope.freq_base") or _DEFAULT_THETA),
        # Of the four mixtures llama.cpp leaves this one's weights as the softmax over all experts has them.
        **expert_fields(keys, "olmoe", normalizes=False),
    }


def _qwen3_moe(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    experts = expert_fields(keys, "qwen3_moe", normalizes=True)
    # As llama.cpp has it where a file does not say.
    width = int(shared["intermediate_size"]) // experts["num_experts_per_tok"]
    if keys.value("expert_feed_forward_length"):
        width = keys.size("expert_feed_forward_length")
    return {**_qwen("qwen3_moe")(keys, header, shared), "moe_intermediate_size": width, **experts}


def _olmo2(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    scaled = _rope(keys, header, shared, keys.needed_number("rope.freq_base"))
    window, num_layers = sliding_window(keys), int(shared["num_hidden_layers"])
    if not window:
        return {"model_type": "olmo2", "rope_parameters": scaled}
    plain = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa") or scaled["rope_theta"]}
    # OLMo 3 is OLMo 2 with a window in some layers, whose positions are not scaled.
    return {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": layer_types(sliding_layers(keys, num_layers, _OLMO_PATTERN)),
        "rope_parameters": {"full_attention": scaled, "sliding_attention": plain},
    }


def _qwen(model_type: str) -> Callable[[HeaderKeys, Header, Mapping[str, Any]], dict[str, Any]]:
    def fields(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
        # Which layers slide, the header does not state.
        keys.expect("attention.sliding_window", (0,))
        found: dict[str, Any] = {
            "model_type": model_type,
            "rope_parameters": _rope(keys, header, shared, keys.needed_number("rope.freq_base")),
        }
        if model_type.startswith("qwen3"):
            found["attention_bias"] = _has_biases(header, "attn_q", "attn_k", "attn_v", "attn_output")
        return found

    return fields


def _gemma2(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    theta = keys.number("rope.freq_base") or _DEFAULT_THETA
    # transformers has one base for all layers.
    keys.expect("rope.freq_base_swa", (theta,))
    limits = {"attn_logit_softcapping": _GEMMA2_SCORE_LIMIT, "final_logit_softcapping": _GEMMA2_LOGIT_LIMIT}
    return {
        "model_type": "gemma2",
        "sliding_window": sliding_window(keys) if keys.has("attention.sliding_window") else _GEMMA2_WINDOW,
        "layer_types": layer_types(sliding_layers(keys, int(shared["num_hidden_layers"]), _GEMMA2_PATTERN)),
        "rope_parameters": _rope(keys, header, shared, theta),
        "query_pre_attn_scalar": _query_scalar(shared, wide_at=46),
        **{key: (keys.number(key) or None) if keys.has(key) else usual for key, usual in limits.items()},
    }


def _gemma3(keys: HeaderKeys, header: Header, shared: Mapping[str, Any]) -> dict[str, Any]:
    window, num_layers = sliding_window(keys), int(shared["num_hidden_layers"])
    sliding = sliding_layers(keys, num_layers, _SLIDING_PATTERN) if window else [False] * num_layers
    plain = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa") or _SLIDING_THETA}
    for key in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        keys.expect(key, (shared["head_dim"],))
    return {
        "model_type": "gemma3_text",
        "sliding_window": window or None,
        "layer_types": layer_types(sliding),
        # Scaling is that of the layers that see everything.
        "rope_parameters": {
            "full_attention": _rope(keys, header, shared, keys.needed_number("rope.freq_base")),
            "sliding_attention": plain,
        },
        "query_pre_attn_scalar": _query_scalar(shared, wide_at=62),
        "final_logit_softcapping": keys.number("final_logit_softcapping") or None,
    }


def _query_scalar(shared: Mapping[str, Any], *, wide_at: int) -> int:
    """What attention is scaled by the root of: not in the header, known by the number of layers as in llama.cpp."""
    if shared["num_hidden_layers"] == wide_at:
        return int(shared["hidden_size"] // shared["num_attention_heads"])
    return int(shared["head_dim"])


def _rope(keys: HeaderKeys, header: Header, shared: Mapping[str, Any], theta: float) -> dict[str, Any]:
    context = int(shared["max_position_embeddings"])
    return scaled_rope(keys, header, theta=theta, head_dim=int(shared["head_dim"]), context=context)


def _has_biases(header: Header, *names: str) -> bool:
    return all(f"blk.0.{name}.bias" in header.tensors for name in names)


# general.architecture -> the fields that it has in addition to the shared ones. OPT has no architecture in GGUF.
ARCHITECTURES: dict[str, Callable[[HeaderKeys, Header, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "granite": _granite,
    "qwen2": _qwen("qwen2"),
    "qwen3": _qwen("qwen3"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3n": gemma3n_fields,
    "olmo2": _olmo2,
    "granitemoe": _granite_moe,
    "olmoe": _olmoe,
    "qwen3moe": _qwen3_moe,
    "phi3": phi3_fields,
    "stablelm": stablelm_fields,
    "starcoder2": starcoder2_fields,
    "gptneox": gpt_neox_fields,
    "gpt2": gpt2_fields,
    "gpt-oss": gpt_oss_fields,
}
