"""How each method of quantization is undone."""

from collections.abc import Mapping
from typing import Any

from .asked import FIELD, check_method, refusal, settings_of
from .bitsandbytes import BITSANDBYTES
from .compressed import COMPRESSED_TENSORS
from .fp8 import FP8
from .grouped import AWQ, GPTQ
from .packing import Method

__all__ = ["METHODS", "check_quantization"]

METHODS: Mapping[str, Method] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "gptq": GPTQ,
}
"""`quant_method` of a config.json, those of `asked.PACKAGES` -> how it is undone."""


def check_quantization(config: Mapping[str, Any], what: str) -> None:
    """Refuse a checkpoint that is quantized in a way that cannot be undone here.

    Args:
        config: of config.json.
        what: name of the model in an error, such as "--model tiny".
    Raises:
        UnsupportedModelError: its config says that it is.
        ConfigError: a package is missing.
    """
    check_method(config, what)
    settings = settings_of(config)
    if settings and (problem := METHODS[settings["quant_method"]].problem(settings)):
        raise refusal(settings, FIELD, what, problem)
