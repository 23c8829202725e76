"""Load the text model of a multimodal one (`text_models.py`): other parts stay in their files, which are not read."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from coreinfer.compiler.models.built_config import build_config
from coreinfer.compiler.models.safetensors_headers import INDEX, WEIGHTS, has_head, tensor_sizes
from coreinfer.compiler.models.source_files import source_file
from coreinfer.compiler.models.sources import ModelSource
from coreinfer.compiler.models.stated import CONFIG
from transformers import PreTrainedConfig

from .text_models import Multimodal, multimodal_of, text_fields, text_name

__all__ = ["log_left_out", "parts_of", "read_text_config", "without_others"]

_log = logging.getLogger(__name__)


def parts_of(source: ModelSource) -> Multimodal | None:
    """Find what a multimodal model consists of; None of another model."""
    return None if source.gguf_file else multimodal_of(_outer(source))


def read_text_config(source: ModelSource) -> PreTrainedConfig | None:
    """Read the config of a multimodal model's text model; None of another model.

    Raises:
        ConfigError: it describes no model that can be.
        UnsupportedModelError: the text model is none that computes the same alone.
    """
    outer, what = _outer(source), f"--model {source.name}"
    if multimodal_of(outer) is None:
        return None
    return build_config(text_fields(outer, what, lambda: _has_head(source)), f"{what}: text_config in {CONFIG}")


def without_others(info: Mapping[str, Any], parts: Multimodal) -> Mapping[str, Any]:
    """Take the parts that are no text out of what transformers found left over."""
    left_over = [name for name in info["unexpected_keys"] if text_name(name, parts) is not None]
    return {**info, "unexpected_keys": left_over}


def log_left_out(source: ModelSource, parts: Multimodal) -> None:
    """Say which parts of a multimodal model are left out, once its files are here."""
    config = source_file(source, CONFIG)
    sizes = tensor_sizes(config.parent, f"--model {source.name}") if config else {}
    left_out: dict[str, int] = {}
    for name, num_bytes in sizes.items():
        if text_name(name, parts) is None:
            part = name.removeprefix("model.").split(".")[0]
            left_out[part] = left_out.get(part, 0) + num_bytes
    shown = [f"{part} ({num_bytes:,} bytes)" for part, num_bytes in sorted(left_out.items())]
    # Files that are no safetensors do not say how many bytes a tensor takes.
    _log.warning("%s: read as its text model alone; left out: %s", source.name, ", ".join(shown or parts.others))


def _outer(source: ModelSource) -> Mapping[str, Any]:
    """Read config.json as it stands; nothing where it cannot be read, which transformers tells."""
    path = source_file(source, CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _has_head(source: ModelSource) -> bool | None:
    file = source_file(source, WEIGHTS) or source_file(source, INDEX)
    return None if file is None else has_head(file.parent, f"--model {source.name}")
