"""What a local model states of itself, read without torch and transformers: most wrong ones are refused at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.families import Family, family_of_config

from .gguf.config import config_fields
from .gguf.parts import read_parts
from .multimodal.text_models import multimodal_of, text_fields
from .safetensors_headers import INDEX, WEIGHTS, has_head, safetensors_files
from .sources import ModelSource
from .unpack.asked import check_method

__all__ = ["CONFIG", "check_mappable", "check_stays_mapped", "stated_config", "stated_text"]

CONFIG = "config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers reads too, where there are no safetensors."""


def stated_config(source: ModelSource, *, defaults: bool = False) -> Mapping[str, Any] | None:
    """Read the config of a model, as far as its own files state it; None of a model on the Hub, which is not here yet.

    Args:
        defaults: as of `stated_text`.

    Raises:
        ConfigError: there is no model in the folder, or what it states cannot be read.
        UnsupportedModelError: its family or its quantization is not supported.
    """
    if source.gguf_file:
        return config_fields(read_parts(source.gguf_path), source.name)
    if source.path is None:
        return None
    folder, what = source.path, f"--model {source.name}"
    config = stated_text(_read_config(folder, source.name), folder, what, defaults=defaults)
    family_of_config(config, source.name)
    check_method(config, what)
    if not any((source.path / name).exists() for name in (WEIGHTS, INDEX, *_PICKLED)):
        raise ConfigError(
            f"{what}: its weights cannot be loaded (there is no {WEIGHTS} in the folder); give the whole checkpoint"
        )
    return config


def stated_text(config: Mapping[str, Any], folder: Path, what: str, *, defaults: bool = False) -> Mapping[str, Any]:
    """Return what a config.json states of the text model (`multimodal.py`).

    Args:
        folder: that it is in.
        what: name of the model in an error, such as "--model tiny".
        defaults: fill in what the text_config of a multimodal model leaves out, as transformers does, which is imported
            for it; published ones leave out even sizes.
    Raises:
        ConfigError: it describes no model that can be.
        UnsupportedModelError: the text model is none that computes the same alone.
    """
    fields = text_fields(config, what, lambda: has_head(folder, what))
    if not defaults or multimodal_of(config) is None:
        return fields
    # Here, not above: it needs transformers.
    from .built_config import build_config

    return build_config(fields, f"{what}: text_config in {CONFIG}").to_dict()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        problem = None if isinstance(config, dict) and "model_type" in config else f"{CONFIG} has no model_type"
    except FileNotFoundError:
        problem = f"it has no {CONFIG}"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{CONFIG}: {error}"
    if problem:
        raise ConfigError(
            f"--model {name}: no model can be read there ({problem}); "
            f"give a Hub id, a folder with {CONFIG}, a .gguf file or package:NAME/PATH"
        )
    return dict(config)


def check_mappable(source: ModelSource) -> None:
    """Refuse a model whose weights cannot stay in their file; on the Hub none is refused.

    Raises:
        ConfigError: it has no safetensors files.
    """
    if source.gguf_file:
        raise ConfigError(
            f"--max-memory: expected a model in safetensors, whose weights can stay in their file, got {source.name}; "
            "save it with transformers first"
        )
    what = f"--model {source.name}"
    if source.path and not any(file.is_file() for file in safetensors_files(source.path, what)):
        raise ConfigError(
            f"{what}: --max-memory needs safetensors, whose weights can stay in their file, and found none; "
            "save it with transformers first"
        )


def check_stays_mapped(family: Family, name: str) -> None:
    """Refuse a family whose weights cannot all stay in their file.

    Raises:
        ConfigError: some have to be copied.
    """
    if family.joined_by_head:
        raise ConfigError(
            f"--max-memory: expected a model whose weights can stay in their file, and {name} is a {family.name}: its "
            "queries, keys and values lie mixed in one matrix and have to be copied; leave out --max-memory"
        )
