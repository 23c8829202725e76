"""Models that no row of the table of families describes, and why."""

from collections.abc import Mapping

__all__ = ["refusal_reason"]

_REFUSALS: Mapping[str, tuple[str, ...]] = {
    "its FFN is a mixture of experts with parts that no row describes yet, such as shared experts or another router": (
        "qwen2_moe",
        "qwen3_5_moe",
        "flex_olmo",
        "granitemoeshared",
        "phimoe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "ernie4_5_moe",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "minimax",
        "minimax_m2",
        "llama4_text",
        "dbrx",
    ),
    "it is not a transformer FFN everywhere: some layers, or parts of them, are of another kind": (
        "falcon_h1",
        "lfm2",
        "lfm2_moe",
        "granitemoehybrid",
        "mamba",
        "mamba2",
        "jamba",
        "bamba",
        "zamba",
        "zamba2",
        "nemotron_h",
        "recurrent_gemma",
        "qwen3_next",
        "olmo_hybrid",
    ),
    "it reads more than text, and its text model computes otherwise than a model of text alone": (
        "paligemma",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "mllama",
        "llama4",
        "gemma4",
    ),
}
"""What keeps a model out of the table -> the model types that it is true of."""


def refusal_reason(model_type: str) -> str | None:
    """Say what keeps a model type out of the table of families; None where that is not known."""
    return next((reason for reason, model_types in _REFUSALS.items() if model_type in model_types), None)
