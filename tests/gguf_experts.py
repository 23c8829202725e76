"""What GGUF files of tiny mixtures of experts have besides that of other models."""

from typing import Any

import numpy as np
import numpy.typing as npt

# As in all gpt-oss models that were published; here the ends of its ramp are whole dimensions, 0 and 0.9998, to which
# llama.cpp rounds them.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10780.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
MIXTURE_SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "sliding_window": 4},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6},
    "granitemoe": {"num_local_experts": 6},
    "gpt_oss": {"num_local_experts": 6, "sliding_window": 4, "rope_parameters": YARN},
}
"""Families of mixtures -> the fields of theirs, with the weights of the chosen experts as llama.cpp has them."""


def expert_tensors(name: str, values: npt.NDArray[Any], architecture: str) -> dict[str, npt.NDArray[Any]]:
    """Tensors (experts, outputs, ...) of one of transformers' parameters; gates and ups are in two."""
    kind = "bias" if name.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and kind == "weight":
        values = values.swapaxes(1, 2)
    stem = f"blk.{name.split('.')[2]}.ffn"
    if "down_proj" in name:
        return {f"{stem}_down_exps.{kind}": values}
    gates, ups = (values[:, ::2], values[:, 1::2]) if architecture == "gpt-oss" else np.split(values, 2, axis=1)
    return {f"{stem}_gate_exps.{kind}": gates, f"{stem}_up_exps.{kind}": ups}


def expert_keys(config: Any) -> dict[str, Any]:
    """Keys of a header; none of a model that is no mixture."""
    if config.model_type not in MIXTURE_SHAPES:
        return {}
    values = {
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    if config.model_type == "qwen3_moe":
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "gpt_oss":
        rope = config.rope_parameters
        values |= {
            "expert_feed_forward_length": config.intermediate_size,
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return values
