"""Mixtures of experts in GGUF files: what a header states of them, and which files are refused."""

from typing import Any

from coreinfer.bundles.errors import UnsupportedModelError
from coreinfer.bundles.families import family_by_name

from .keys import HeaderKeys

__all__ = ["expert_fields", "refuse_single_experts"]

_SOFTMAX, _SOFTMAX_OF_CHOSEN = 1, 3
"""The routers that take a softmax over all experts, and over the chosen ones, among llama.cpp's."""
_NOT_READ = (
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_group_count",
    "expert_group_used_count",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "moe_every_n_layers",
)
"""What other mixtures have, and 0 says that this one has not."""


def expert_fields(keys: HeaderKeys, family_name: str, *, normalizes: bool) -> dict[str, Any]:
    """Read which experts a model has: fields of its config.

    Args:
        family_name: of the family that the model is of.
        normalizes: whether llama.cpp divides the weights of the chosen experts by their sum in this architecture. A
            file need not say so, and llama.cpp does not ask.
    Raises:
        ConfigError: a count is missing, or a token uses more experts than there are.
        UnsupportedModelError: the experts are of another kind.
    """
    names = family_by_name(family_name).experts
    assert names is not None
    keys.expect("expert_weights_norm", (normalizes,))
    # Of normalized weights both are the same.
    keys.expect("expert_gating_func", (_SOFTMAX, _SOFTMAX_OF_CHOSEN) if normalizes else (_SOFTMAX,))
    keys.expect("expert_weights_scale", (0.0, 1.0))
    for key in _NOT_READ:
        keys.expect(key, (0,))
    num_experts, num_chosen = keys.size("expert_count"), keys.size("expert_used_count")
    if num_chosen > num_experts:
        raise keys.refused(
            "expert_used_count", f"expected at most {num_experts}, the number of experts, got {num_chosen}"
        )
    fields: dict[str, Any] = {names.num_field: num_experts, "num_experts_per_tok": num_chosen}
    if names.normalizes is None:
        fields["norm_topk_prob"] = normalizes
    return fields


def refuse_single_experts(tensor: str, name: str) -> None:
    """Say that a tensor is one expert's.

    Args:
        tensor: its name in the file.
        name: name of the model in an error.
    """
    raise UnsupportedModelError(
        f"--model {name}: {tensor}: a file of before April 2024, in which each expert has tensors of its own; neither "
        "this nor llama.cpp reads these; download a newer file, or compile the model in safetensors"
    )
