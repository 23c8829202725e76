"""Gemma 3n as llama.cpp's converter writes it: what is its own among the tensors and keys."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GEMMA3N_SHAPE", "gemma3n_keys", "gemma3n_tensors"]

Values = npt.NDArray[Any]
GEMMA3N_SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.6, 0.0],
    "final_logit_softcapping": 4.0,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 32,
    "altup_active_idx": 1,
}
"""The last two layers have the keys and values of the first two."""
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_LAYER = {
    **{f"self_attn.{role}_proj": f"attn_{role}" for role in ("q", "k", "v")},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{role}_proj": f"ffn_{role}" for role in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_per_layer_input_norm": "post_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}
_STACKED = {"model.altup_projections": "altup_proj", "model.altup_unembed_projections": "altup_unembd_proj"}


def gemma3n_tensors(state: Mapping[str, Values], config: Any) -> dict[str, Values]:
    """Name in the file -> values; layers that share keys have some of their own all the same, as in published files."""
    stacks: dict[str, list[Values]] = defaultdict(list)
    tensors: dict[str, Values] = {}
    for name, values in state.items():
        stem, _, kind = name.rpartition(".")
        if stem.rpartition(".")[0] in _STACKED:
            stacks[f"{_STACKED[stem.rpartition('.')[0]]}.{kind}"].append(values)
        elif stem in _OUTSIDE:
            tensors[f"{_OUTSIDE[stem]}.{kind}"] = values
        else:
            layer, _, path = name.removeprefix("model.layers.").partition(".")
            scale = path == "altup.correct_output_scale"
            own = "altup_correct_scale.weight" if scale else f"{_IN_LAYER[path.rpartition('.')[0]]}.{kind}"
            tensors[f"blk.{layer}.{own}"] = values
    for sharing in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        for name in ("attn_k", "attn_v", "attn_k_norm"):
            tensors[f"blk.{sharing}.{name}.weight"] = tensors[f"blk.0.{name}.weight"] + np.float32(1)
    return tensors | {name: np.stack(values) for name, values in stacks.items()}


def gemma3n_keys(config: Any) -> dict[str, Any]:
    """Keys without the architecture's prefix."""
    multiples = [NormalDist().inv_cdf(share) if share else -np.inf for share in config.activation_sparsity_pattern]
    return {
        "feed_forward_length": list(config.intermediate_size),
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "activation_sparsity_scale": [float(np.float32(multiple)) for multiple in multiples],
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }
