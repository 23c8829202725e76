"""How a GGUF file states that positions are scaled, as the parameters that transformers reads."""

from typing import Any

import numpy as np
from coreinfer.bundles.errors import UnsupportedModelError

from .header import Header
from .keys import HeaderKeys
from .values import read_tensor

__all__ = ["LONG_FACTORS", "ROPE_FACTORS", "SHORT_FACTORS", "scaled_rope"]

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of llama.cpp that divides the inverse frequencies one by one, as Llama 3.1 does."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""The same of LongRoPE (arXiv 2402.13753), which has others where texts are long."""


def scaled_rope(keys: HeaderKeys, header: Header, *, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Recover the rope parameters of the model that a file was made from.

    Args:
        theta: base of the frequencies.
        context: positions of the model.
    Raises:
        UnsupportedModelError: the file asks for another scaling than none, linear, yarn or factors in a tensor.
    """
    # Says only whether the model was trained on with the scaling.
    keys.value("rope.scaling.finetuned")
    kind, factor = _kind_and_factor(keys)
    original = keys.number("rope.scaling.original_context_length")
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if original is None:
            raise keys.refused("rope.scaling.original_context_length", "expected a number for yarn, got none")
        parameters |= _yarn(keys, factor, int(original))
    else:
        keys.expect("rope.scaling.attn_factor", (1.0,))
    if ROPE_FACTORS not in header.tensors:
        return parameters
    if kind != "none":
        raise keys.unsupported("rope.scaling.type")
    return parameters | _factors(header, head_dim, context)


def _kind_and_factor(keys: HeaderKeys) -> tuple[str, float]:
    """Kind of scaling and its factor, as llama.cpp understands what is not stated."""
    stated = keys.value("rope.scaling.type")
    factor = keys.number("rope.scaling.factor")
    # What the key was called before there were kinds.
    deprecated = keys.number("rope.scale_linear")
    if factor is None:
        factor = deprecated
    if stated == "none":
        return "none", 1.0
    if stated not in (None, "linear", "yarn"):
        raise keys.unsupported("rope.scaling.type")
    if stated is not None and factor is None:
        raise keys.refused("rope.scaling.factor", f"expected a number for {stated} scaling, got none")
    if factor is not None and factor < 0:
        raise keys.unsupported("rope.scaling.factor")
    if factor in (None, 0.0) or (factor == 1.0 and stated != "yarn"):
        return "none", 1.0
    assert factor is not None
    return stated or "linear", factor


def _yarn(keys: HeaderKeys, factor: float, original: int) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071); llama.cpp's converters write transformers' attention_factor under either name."""
    keys.expect("rope.scaling.yarn_ext_factor", (1.0,))
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": keys.number("rope.scaling.attn_factor"),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow"),
    }
    yarn_factor = keys.number("rope.scaling.yarn_attn_factor")
    if yarn_factor is not None:
        if parameters["attention_factor"] not in (None, 1.0, yarn_factor):
            raise keys.unsupported("rope.scaling.yarn_attn_factor")
        parameters["attention_factor"] = yarn_factor
    return {name: value for name, value in parameters.items() if value is not None}


def _factors(header: Header, head_dim: int, context: int) -> dict[str, Any]:
    """Frequency factors as LongRoPE's, the same for short and long texts; Llama 3.1's are worked out by its converter.

    The factors themselves are kept: what they were worked out from cannot always be told from them.
    """
    entry = header.tensors[ROPE_FACTORS]
    factors = read_tensor(entry).astype(np.float32)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() < 1.0:
        raise UnsupportedModelError(
            f"{header.file.name}: tensor {ROPE_FACTORS}: expected {head_dim // 2} factors of at least 1, "
            f"got shape {list(factors.shape)} from {factors.min():g} to {factors.max():g}"
        )
    if np.all(factors == 1.0):
        return {}
    values = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "factor": 1.0,
        # Where the long factors begin, were they others.
        "original_max_position_embeddings": context,
    }
