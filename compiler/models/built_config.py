"""The config that transformers builds of fields: what they leave out has the defaults of the model's class."""

from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .quiet import quiet_transformers

__all__ = ["build_config"]


def build_config(fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Build the config of a model.

    Args:
        fields: `model_type` and others.
        where: what states them in an error, such as "--model tiny: its header".
    Raises:
        ConfigError: there can be no such model.
    """
    try:
        with quiet_transformers():
            return AutoConfig.for_model(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} describes no model that can be ({reason})") from error
