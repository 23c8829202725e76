"""A model without its weights."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["empty_model"]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model without memory for its parameters."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
