"""How each method of quantization is undone."""

from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import UnsupportedModelError
from coreinfer.bundles.families import Family

from .asked import FIELD, check_method, describe, refusal, settings_of
from .bitsandbytes import BITSANDBYTES
from .compressed import COMPRESSED_TENSORS
from .fp8 import FP8
from .grouped import AWQ, GPTQ
from .mxfp4 import MXFP4
from .packing import Method

__all__ = ["METHODS", "check_family", "check_quantization"]

METHODS: Mapping[str, Method] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "gptq": GPTQ,
    "mxfp4": MXFP4,
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


def check_family(family: Family, config: Mapping[str, Any], what: str) -> None:
    """Refuse a method that is not read of models of a family: few are of mixtures of experts, and some of these alone.

    Args:
        config, what: as of `check_quantization`, which let it pass.
    Raises:
        UnsupportedModelError: it is such a method.
    """
    settings = settings_of(config)
    if settings is None:
        return
    if family.has_streams:
        raise UnsupportedModelError(
            f"{what}: its weights are quantized already ({describe(settings)}; {FIELD} in config.json), which is not "
            f"read of {family.name} models; give the model that it was quantized from"
        )
    if family.experts is None and METHODS[settings["quant_method"]].of_experts:
        raise UnsupportedModelError(
            f"{what}: its weights are quantized already ({describe(settings)}; {FIELD} in config.json), which is read "
            f"of mixtures of experts alone, and {family.name} models are none; "
            "give the model that it was quantized from"
        )
    if family.experts is not None and settings["quant_method"] not in family.experts.unpacked:
        read = " or ".join(("plain ones", *family.experts.unpacked))
        raise UnsupportedModelError(
            f"{what}: its weights are quantized already, and of mixtures of experts only {read} are read; "
            "give the model that it was quantized from"
        )
