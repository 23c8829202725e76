"""Settings of config.json that would change a model's arithmetic, but are not implemented here.

transformers' classes take any setting, and leave those that they do not know alone: a config.json of a model of another
architecture that calls itself llama would compute other numbers than its makers meant.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from coreinfer.bundles.errors import UnsupportedModelError, join_problems
from coreinfer.bundles.families import CLAMPED_SWIGLU, Family
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["check_settings"]

_OFF: tuple[Any, ...] = (None, False, 0)
_FACTORS = (None, 1)
_OF_OTHER_MODELS: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": _OFF,
    "attention_multiplier": (None,),
    "attn_logit_softcapping": _OFF,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _OFF,
    "do_layer_norm_before": (None, True),
    "embedding_multiplier": _FACTORS,
    "final_logit_softcapping": _OFF,
    "logit_scale": _FACTORS,
    "logits_scaling": _FACTORS,
    "no_rope_layers": (*_OFF, []),
    "num_experts": _OFF,
    "num_local_experts": _OFF,
    "parallel_attn": _OFF,
    "qk_layernorm": _OFF,
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": _FACTORS,
    "scale_depth": (None,),
    "scale_emb": _FACTORS,
    "sliding_window": _OFF,
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
    "word_embed_proj_dim": (None,),
}
"""Setting -> values that change nothing, of settings that some architectures compute with."""
_STATED = {CLAMPED_SWIGLU: "silu"}
"""Activations that configs have no name for -> what they state in their place."""


def check_settings(family: Family, config: PreTrainedConfig, name: str) -> None:
    """Refuse settings that are not implemented.

    Args:
        name: what the user called the model.
    Raises:
        UnsupportedModelError: there are some; all are named, with their values.
    """
    problems = [*_unread(family, config), *_without_effect(config), *_unknown(family, config), *_experts(config)]
    problems += [*_widths(family, config), *_gates(config)]
    if problems:
        raise UnsupportedModelError(
            f"--model {name}: config.json has {join_problems(problems)}; "
            "give a model that does without, or take the setting out if the model was trained without it"
        )


def _unread(family: Family, config: PreTrainedConfig) -> Iterator[str]:
    """Settings that the model's class has no field for."""
    known = {field.name for field in fields(config)}
    if family.experts is not None:
        # transformers has two names for it.
        known |= {"num_experts", "num_local_experts"}
    for setting, harmless in _OF_OTHER_MODELS.items():
        value = getattr(config, setting, None)
        if setting not in known and setting not in family.uncomputed and value not in harmless:
            yield f"{setting} {value!r}, which {config.model_type} models do not compute with"
    kinds = set(getattr(config, "layer_types", None) or ())
    if "layer_types" in known:
        if "sliding_attention" in kinds and not getattr(config, "sliding_window", None):
            yield "layer_types with sliding_attention, and no sliding_window in use"
    elif not kinds <= {"full_attention"}:
        yield f"layer_types {_short(kinds)}, where all layers of {config.model_type} models are alike"


def _without_effect(config: PreTrainedConfig) -> Iterator[str]:
    """Settings that the class has a field for, and computes as if it had not, or not as one decodes."""
    cap = getattr(config, "attn_logit_softcapping", None)
    # transformers computes it in its own attention only, which it then takes whatever else there is.
    if cap and config.model_type != "gemma2":
        yield f"attn_logit_softcapping {cap!r}, which transformers does not compute"
    if getattr(config, "add_cross_attention", None):
        yield "add_cross_attention true, which reads what another model puts out"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention true, with which no text can be decoded token by token"


def _unknown(family: Family, config: PreTrainedConfig) -> Iterator[str]:
    activation = getattr(config, family.activation_field)
    if family.activation is not None and activation != _STATED[family.activation]:
        yield f"{family.activation_field} {activation!r}, where {config.model_type} models compute {family.activation}"
    if family.activation is None and activation not in ACT2FN:
        yield f"{family.activation_field} {activation!r}, an activation that transformers does not know"
    for parameters in _rotary(config):
        kind, share = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor", 1)
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            yield f"rope_type {kind!r}, rotary embeddings that transformers does not know"
        if share not in _FACTORS and not family.rotates_part:
            yield f"partial_rotary_factor {share!r}, where {config.model_type} models rotate whole heads"


def _experts(config: PreTrainedConfig) -> Iterator[str]:
    """Layers of a mixture whose FFN is one, and limits that no engine computes with."""
    if layers := getattr(config, "mlp_only_layers", None):
        yield f"mlp_only_layers {layers!r}, layers without experts among those with"
    if (step := getattr(config, "decoder_sparse_step", None)) not in (None, 1):
        yield f"decoder_sparse_step {step!r}, layers without experts among those with"
    # Limits of 0 and below leave no gate anything, and the native engine refuses them.
    if (limit := getattr(config, "swiglu_limit", None)) is not None and limit <= 0:
        yield f"swiglu_limit {limit!r}, expected above 0"


def _widths(family: Family, config: PreTrainedConfig) -> Iterator[str]:
    """FFNs of unlike widths, where a config states one for each layer."""
    widths = getattr(config, family.ffn_dim_field, None)
    if isinstance(widths, (list, tuple)) and len(set(widths)) > 1:
        yield f"{family.ffn_dim_field} {_short(set(widths))}, where all layers are to have as many neurons"


def _gates(config: PreTrainedConfig) -> Iterator[str]:
    """Shares of gates that become 0 of which no deviation's multiple above the mean is known."""
    shares = set(getattr(config, "activation_sparsity_pattern", None) or ())
    if wrong := [share for share in shares if share != 0 and not 0.5 < share < 1]:
        yield f"activation_sparsity_pattern {_short(wrong)}, where layers leave none or most of their gates out"


def _rotary(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """Parameters of rotary embeddings, of each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [values for values in parameters.values() if isinstance(values, Mapping)]
    return nested or [parameters]


def _short(values: Collection[Any]) -> str:
    return ", ".join(sorted(map(str, values)))
