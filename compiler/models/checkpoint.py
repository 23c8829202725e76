"""What a checkpoint's files must hold: each parameter of the model, once, in its shape, in finite numbers.

transformers fills what it does not find with random numbers, drops what it does not know, and says so in its log alone.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .multimodal.text_models import Multimodal, text_name
from .safetensors_headers import safetensors_files

__all__ = [
    "LOADING_ERRORS",
    "check_encoder",
    "check_files",
    "check_finite",
    "check_loaded",
    "check_tied_head",
    "some",
]

_SHOWN = 5
_FLOATS = ("F64", "F32", "F16", "BF16")
LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    SafetensorError,
    # Of a damaged index, or a pytorch_model.bin that is cut off or holds anything but tensors.
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    TypeError,
    UnpicklingError,
)
"""What transformers raises where it cannot read a model's files."""
_LEFTOVERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of names of tensors that older checkpoints hold and no model reads."""


def check_files(folder: Path, what: str, parts: Multimodal | None = None) -> None:
    """Look at the headers of a folder's safetensors files, as far as they can be read; others are told on loading.

    Args:
        what: name of the model in an error, such as "--model tiny".
        parts: of a multimodal model, of which only the text model's tensors are looked at.
    Raises:
        UnsupportedModelError: some tensors are packed integers.
    """
    packed = []
    for file in safetensors_files(folder, what):
        if not file.is_file():
            continue
        with suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            read = [key for key in tensors.keys() if parts is None or text_name(key, parts)]  # noqa: SIM118
            dtypes = {key: tensors.get_slice(key).get_dtype() for key in read}
            packed += [f"{key} ({dtype})" for key, dtype in dtypes.items() if _is_packed(key, dtype)]
    if packed:
        raise UnsupportedModelError(
            f"{what}: expected weights in float32, bfloat16 or float16, got {some(packed)}; "
            "give the model that these were quantized from"
        )


def check_encoder(encoder: nn.Module, what: str) -> None:
    """Compare a sentence encoder in memory with its files, which are read again.

    Raises:
        ConfigError: weights are missing, left over or not finite; some are named.
        UnsupportedModelError: they are quantized.
    """
    check_finite(encoder, what)
    for module in encoder.modules():
        folder = getattr(module, "name_or_path", None)
        if isinstance(module, PreTrainedModel) and folder and Path(folder).is_dir():
            if PreTrainedConfig.get_config_dict(folder)[0].get("quantization_config"):
                raise UnsupportedModelError(
                    f"{what}: its weights are quantized already; expected plain ones, as floats"
                )
            loading: Any = type(module).from_pretrained(folder, output_loading_info=True)
            info = loading[1]
            own = tuple(f"{name}." for name, _ in module.named_children())
            # A sentence is the mean of its tokens' vectors: the pooler of BERT models, and their heads, serve nothing.
            missing = {tensor for tensor in info["missing_keys"] if not tensor.startswith("pooler.")}
            left_over = {tensor for tensor in info["unexpected_keys"] if tensor.startswith(own)}
            check_loaded({**info, "missing_keys": missing, "unexpected_keys": left_over}, what)


def _is_packed(key: str, dtype: str) -> bool:
    return dtype not in _FLOATS and not key.endswith(_LEFTOVERS)


def check_loaded(info: Mapping[str, Any], what: str) -> None:
    """Compare a checkpoint with the model that it was loaded into.

    Args:
        info: of `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.
        what: name of the model in an error, such as "--model tiny".
    Raises:
        ConfigError: tensors are missing, left over or of another shape; some of each are named.
    """
    shapes = [
        f"{tensor} is {_shape(stored)} and not {_shape(expected)}"
        for tensor, stored, expected in sorted(info["mismatched_keys"])
    ]
    left_over = [tensor for tensor in info["unexpected_keys"] if not tensor.endswith(_LEFTOVERS)]
    problems = [
        f"{what} {some(found)}"
        for what, found in (
            ("missing", sorted(info["missing_keys"])),
            ("of another shape:", shapes),
            ("left over", sorted(left_over)),
        )
        if found
    ]
    if problems:
        raise ConfigError(
            f"{what}: its weights are not those of its config.json: {'; '.join(problems)}; "
            "give the whole checkpoint with its own config.json"
        )


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size)) or "a single number"


def some(found: Collection[str]) -> str:
    """Name the first of what was found, and count the others."""
    shown = ", ".join(list(found)[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"


def check_tied_head(model: nn.Module, embedding: nn.Module, *, tied: bool, what: str) -> None:
    """Refuse a head of its own in a checkpoint whose config says that the embedding serves as head.

    Raises:
        ConfigError: transformers left the two apart, because they differ.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if tied and head.weight is not embedding.weight:
        raise ConfigError(
            f"{what}: its config.json says tie_word_embeddings true, but its weights hold a head that is not "
            "the embedding; set it to false, or take the head out"
        )


def check_finite(model: nn.Module, what: str) -> None:
    """Read all parameters once.

    Raises:
        ConfigError: some hold NaN or infinite values; they are named.
    """
    broken = [key for key, parameter in model.named_parameters() if not _is_finite(parameter.detach())]
    if broken:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise ConfigError(
            f"{what}: NaN or infinite values, read as {dtype}, in {some(broken)}; give a whole checkpoint"
        )


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; the extremes take no memory for each value, as `isfinite` does."""
    extremes = torch.stack(torch.aminmax(values)) if values.numel() else values
    return bool(torch.isfinite(extremes).all())
