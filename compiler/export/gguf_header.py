"""What a GGUF file states of a model: the keys that llama.cpp reads, and refusals of what they cannot say."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coreinfer.bundles.families import CLAMPED_SWIGLU
from coreinfer.compiler.models.gguf.gemma3n import SLIDING_PATTERN as GEMMA3N_PATTERN
from coreinfer.compiler.models.gguf.gpt_oss import SWIGLU

from .chosen import ChosenModel
from .gguf_gemma3n import check_gemma3n, stream_fields
from .gguf_refusal import refusal
from .gguf_rope import rope_fields, rounds_ramp

__all__ = ["ARCHITECTURES", "architecture_for", "export_facts", "header_fields"]

_LAYERWISE = "deci"
"""The one architecture of llama.cpp that is Llama, with biases where a file has them, and reads a width per layer."""
ARCHITECTURES = {
    "llama": "llama",
    "ministral": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gpt_oss": "gpt-oss",
}
"""Family -> the architecture of llama.cpp that its models are written as."""
_LAYERWISE_FAMILIES = ("llama", "ministral", "qwen2")
_TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ACTIVATIONS = {
    "gemma2": _TANH_GELUS,
    "gemma3": _TANH_GELUS,
    "gemma3n": _TANH_GELUS,
    "starcoder2": _TANH_GELUS,
    # llama.cpp has no other, and takes its tanh for the exact one that GPT-NeoX's models have: see `export_facts`.
    "gpt_neox": (*_TANH_GELUS, "gelu"),
    "gpt2": _TANH_GELUS,
    "gpt_oss": (CLAMPED_SWIGLU,),
}
_SWIGLU = ("silu",)
_EPSILONS = {
    "stablelm": "layer_norm_eps",
    "starcoder2": "norm_epsilon",
    "gpt_neox": "layer_norm_eps",
    "gpt2": "layer_norm_epsilon",
}
"""Family -> the config's epsilon, where norms are LayerNorms."""
_SLIDES = "sliding_attention"
_NOT_SLIDING = ("mistral", "ministral", "phi3", "starcoder2", "mixtral", "qwen3_moe")
"""Model types whose window llama.cpp does not know."""
_SLIDING_PATTERN = {"gemma2": 2, "gemma3": 6, "gemma3n": GEMMA3N_PATTERN, "olmo3": 4, "gpt_oss": 2}
"""Where a file does not say which layers slide: all but every so many."""
_NO_ROPE_PATTERN = 4
_NOT_NORMALIZING = ("olmoe",)
"""Mixtures of which llama.cpp leaves the weights of experts as the softmax over all has them."""


def architecture_for(chosen: ChosenModel) -> str:
    """Choose the architecture that a model is written as.

    Raises:
        UnsupportedModelError: llama.cpp has none that computes this model.
    """
    family, activation = chosen.family.name, chosen.bundle.manifest.model.activation
    if family not in ARCHITECTURES:
        raise refusal(f"the family {family} is not written as GGUF (it is {', '.join(ARCHITECTURES)}); use --to hf")
    if activation not in _ACTIVATIONS.get(family, _SWIGLU):
        raise refusal(f"llama.cpp's {family} has no activation {activation!r}; use --to hf")
    if len(set(chosen.widths)) > 1 and family in _LAYERWISE_FAMILIES:
        return _LAYERWISE
    return ARCHITECTURES[family]


def header_fields(chosen: ChosenModel, architecture: str, widths: Sequence[int]) -> dict[str, Any]:
    """Return the keys of the model's shape, with the architecture's prefix.

    Raises:
        UnsupportedModelError: the config asks for something that llama.cpp does not compute in this architecture.
    """
    model, config = chosen.bundle.manifest.model, chosen.config
    fields: dict[str, Any] = {
        "block_count": model.num_layers,
        "context_length": _context(chosen),
        "embedding_length": model.hidden_size,
        "feed_forward_length": list(widths) if architecture == _LAYERWISE else widths[0],
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "vocab_size": model.vocab_size,
    }
    kind, setting = "layer_norm_rms_epsilon", "rms_norm_eps"
    if chosen.family.name in _EPSILONS:
        kind, setting = "layer_norm_epsilon", _EPSILONS[chosen.family.name]
    fields[f"attention.{kind}"] = float(config[setting])
    fields |= _expert_fields(chosen, widths[0])
    fields |= _OWN_FIELDS.get(chosen.family.name, _plain_attention)(chosen)
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def _expert_fields(chosen: ChosenModel, width: int) -> dict[str, Any]:
    record, family = chosen.bundle.manifest.model.experts, chosen.family.name
    if record is None or chosen.experts is None:
        return {}
    # Which llama.cpp does by architecture, whatever a file says.
    normalizes = family not in _NOT_NORMALIZING
    if record.normalizes != normalizes:
        does = "divides" if normalizes else "does not divide"
        raise refusal(
            f"llama.cpp's {family} {does} the weights of a token's experts by their sum (norm_topk_prob), and with "
            "this model it is the other way; use --to hf"
        )
    fields: dict[str, Any] = {"expert_count": len(chosen.experts[0]), "expert_used_count": record.num_chosen}
    if family == "gpt_oss":
        fields["expert_feed_forward_length"] = width
    if family == "qwen3_moe":
        # The other key is the width of layers without experts, of which there are none.
        fields |= {"expert_feed_forward_length": width, "feed_forward_length": int(chosen.config["intermediate_size"])}
    return fields


def _context(chosen: ChosenModel) -> int:
    """Positions; of a window that llama.cpp does not know, only as many as it spans: up to there all agree."""
    return min(chosen.bundle.manifest.model.max_positions, _ignored_window(chosen) or sys.maxsize)


def _ignored_window(chosen: ChosenModel) -> int | None:
    window, kinds = chosen.config.get("sliding_window"), chosen.config.get("layer_types")
    if not window or (kinds is not None and _SLIDES not in kinds):
        return None
    return int(window) if chosen.config.get("model_type") in _NOT_SLIDING else None


def export_facts(chosen: ChosenModel) -> dict[str, str]:
    """What people should know of a file that llama.cpp computes otherwise than the model was trained."""
    facts = {}
    if window := _ignored_window(chosen):
        title = str(chosen.config["model_type"]).capitalize()
        facts["context"] = f"{window} tokens: llama.cpp does not slide {title}'s window, and further on it would differ"
    if chosen.bundle.manifest.model.activation == "gelu":
        facts["activation"] = "llama.cpp computes GELU by tanh, which is off by 0.0005 at most"
    if chosen.family.cutoff is not None:
        facts["gates"] = (
            "llama.cpp takes their deviation over one gate less than there are, so that some more or fewer are cut off"
        )
    if rounds_ramp(chosen):
        facts["positions"] = (
            "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which the model was not trained with"
        )
    return facts


def _plain_attention(chosen: ChosenModel) -> dict[str, Any]:
    config = chosen.config
    if _SLIDES in (config.get("layer_types") or []) and not _ignored_window(chosen):
        raise refusal(f"llama.cpp's {chosen.family.name} has no sliding window; use --to hf")
    if chosen.family.name in ("qwen3", "qwen3_moe") and config.get("attention_bias"):
        raise refusal(f"llama.cpp's {chosen.family.name} has no attention biases; use --to hf")
    return rope_fields(config["rope_parameters"], chosen)


def _check_plain(chosen: ChosenModel, **expected: Any) -> None:
    """Refuse settings that the architecture has no keys for, unless they are what llama.cpp computes anyway."""
    expected = {"attention_bias": False, "mlp_bias": False, **expected}
    for setting, value in expected.items():
        if (stated := chosen.config.get(setting, value)) != value:
            raise refusal(f"llama.cpp's {chosen.family.name} has no {setting} of {stated!r}; use --to hf")


def _smollm3(chosen: ChosenModel) -> dict[str, Any]:
    layers = range(chosen.bundle.manifest.model.num_layers)
    _check_plain(chosen, no_rope_layers=[int((layer + 1) % _NO_ROPE_PATTERN != 0) for layer in layers])
    return _plain_attention(chosen)


def _granite(chosen: ChosenModel) -> dict[str, Any]:
    _check_plain(chosen)
    keys = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "logit_scale": "logits_scaling",
        "residual_scale": "residual_multiplier",
    }
    return _plain_attention(chosen) | {key: float(chosen.config[setting]) for key, setting in keys.items()}


def _olmoe(chosen: ChosenModel) -> dict[str, Any]:
    model = chosen.bundle.manifest.model
    # llama.cpp has a norm of keys of the hidden size, and a head in every file.
    _check_plain(
        chosen,
        head_dim=model.hidden_size // model.num_heads,
        num_key_value_heads=model.num_heads,
        clip_qkv=None,
        tie_word_embeddings=False,
    )
    return _plain_attention(chosen)


def _olmo2(chosen: ChosenModel) -> dict[str, Any]:
    model = chosen.bundle.manifest.model
    # llama.cpp works the size of a head out.
    _check_plain(chosen, head_dim=model.hidden_size // model.num_heads)
    return _plain_attention(chosen)


def _stablelm(chosen: ChosenModel) -> dict[str, Any]:
    # llama.cpp tells parallel blocks by the norm that they do without.
    _check_plain(chosen, qk_layernorm=False, tie_word_embeddings=False)
    return _plain_attention(chosen) | {"use_parallel_residual": bool(chosen.config.get("use_parallel_residual"))}


def _starcoder2(chosen: ChosenModel) -> dict[str, Any]:
    _check_plain(chosen, use_bias=True)
    return _plain_attention(chosen)


def _gpt_neox(chosen: ChosenModel) -> dict[str, Any]:
    _check_plain(chosen, attention_bias=True, tie_word_embeddings=False)
    return _plain_attention(chosen) | {"use_parallel_residual": bool(chosen.config["use_parallel_residual"])}


def _gpt2(chosen: ChosenModel) -> dict[str, Any]:
    _check_plain(chosen, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return {}


def _olmo3(chosen: ChosenModel) -> dict[str, Any]:
    model = chosen.bundle.manifest.model
    _check_plain(chosen, head_dim=model.hidden_size // model.num_heads)
    rope = chosen.config["rope_parameters"]
    fields = rope_fields(rope["full_attention"], chosen)
    return fields | _sliding(chosen, rope["sliding_attention"], always=True)


def _gemma2(chosen: ChosenModel) -> dict[str, Any]:
    config = chosen.config
    _check_plain(chosen, query_pre_attn_scalar=_query_scalar(chosen, wide_at=46))
    limits = {key: config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if not all(limits.values()):
        raise refusal("llama.cpp's gemma2 limits scores and logits always, and this model does not; use --to hf")
    fields = rope_fields(config["rope_parameters"], chosen) | {
        key: float(limit) for key, limit in limits.items() if limit
    }
    return fields | _sliding(chosen, config["rope_parameters"])


def _query_scalar(chosen: ChosenModel, *, wide_at: int) -> int:
    """What attention is scaled by the root of, as llama.cpp tells it by the number of layers."""
    model = chosen.bundle.manifest.model
    return model.hidden_size // model.num_heads if model.num_layers == wide_at else model.head_dim


def _gemma3(chosen: ChosenModel) -> dict[str, Any]:
    config = chosen.config
    scale_is_known = config["query_pre_attn_scalar"] == _query_scalar(chosen, wide_at=62)
    if not scale_is_known or config.get("attn_logit_softcapping") or config.get("attention_bias"):
        raise refusal(
            "llama.cpp's gemma3 has its own scale of attention, no soft cap of it and no biases, and this model's "
            "config differs; use --to hf"
        )
    fields = rope_fields(config["rope_parameters"]["full_attention"], chosen)
    if config.get("final_logit_softcapping"):
        fields["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return fields | _sliding(chosen, config["rope_parameters"]["sliding_attention"])


def _gemma3n(chosen: ChosenModel) -> dict[str, Any]:
    config, rope = chosen.config, chosen.config["rope_parameters"]
    check_gemma3n(chosen)
    slides = [kind == _SLIDES for kind in config["layer_types"]]
    if slides != [(layer + 1) % GEMMA3N_PATTERN != 0 for layer in range(len(slides))]:
        raise refusal("llama.cpp's gemma3n slides in all layers but every fifth, and this model does not; use --to hf")
    fields = rope_fields(rope["full_attention"], chosen) | stream_fields(chosen)
    return fields | _sliding(chosen, rope["sliding_attention"], always=True)


def _gpt_oss(chosen: ChosenModel) -> dict[str, Any]:
    config = chosen.config
    # llama.cpp has biases of all projections, a head and a window in every file.
    _check_plain(chosen, attention_bias=True, tie_word_embeddings=False, **SWIGLU)
    if not config.get("sliding_window"):
        raise refusal("llama.cpp's gpt_oss has no model without a sliding_window; use --to hf")
    slides = [kind == _SLIDES for kind in config["layer_types"]]
    return rope_fields(config["rope_parameters"], chosen) | _window_fields(chosen, slides, always=False)


def _sliding(chosen: ChosenModel, rope: Mapping[str, Any], *, always: bool = False) -> dict[str, Any]:
    """Keys of layers that slide.

    Args:
        rope: how positions are scaled there.
        always: name the layers even where all do as llama.cpp assumes, and the window even where none slides.
    """
    slides = [kind == _SLIDES for kind in chosen.config["layer_types"]]
    if not any(slides) and not always:
        return {}
    if rope.get("rope_type", "default") != "default":
        raise refusal(f"llama.cpp's {chosen.family.name} does not scale positions of sliding layers; use --to hf")
    return _window_fields(chosen, slides, always=always) | {"rope.freq_base_swa": float(rope["rope_theta"])}


def _window_fields(chosen: ChosenModel, slides: list[bool], *, always: bool) -> dict[str, Any]:
    family = chosen.family.name
    fields: dict[str, Any] = {"attention.sliding_window": int(chosen.config["sliding_window"])}
    if always or slides != [(layer + 1) % _SLIDING_PATTERN[family] != 0 for layer in range(len(slides))]:
        fields["attention.sliding_window_pattern"] = slides
    return fields


_OWN_FIELDS: Mapping[str, Callable[[ChosenModel], dict[str, Any]]] = {
    "smollm3": _smollm3,
    "granite": _granite,
    "granitemoe": _granite,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "olmo3": _olmo3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
}
"""Family -> what it has besides the keys that all share; for others `_plain_attention`."""
