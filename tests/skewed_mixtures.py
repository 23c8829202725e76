"""Tiny mixtures of experts whose routers neglect two of each layer's six experts, as trained ones may."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.compiler import CompileConfig
from transformers import PreTrainedModel

from .model_factory import build_model, build_tokenizer

__all__ = ["NEGLECTED", "build_skewed", "save_skewed", "skewed_inputs"]

NEGLECTED = ((4, 5), (0, 3), (1, 2))
"""Of each layer."""
_ALWAYS, _AGAINST = 0.5, -40.0


def build_skewed(family: str, **settings: Any) -> PreTrainedModel:
    """Build a model (see `build_model`) in whose hidden states one number is always large, and speaks against experts.

    What a layer adds leaves this number as it is.
    """
    model: Any = build_model(family, **settings)
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = _ALWAYS
        for layer, neglected in zip(resolve(model, row.layers), NEGLECTED, strict=True):
            mixture = resolve(layer, row.experts.module)
            router = resolve(mixture, row.experts.router).weight
            router[:, 0] = 0
            router[list(neglected), 0] = _AGAINST
            layer.self_attn.o_proj.weight[0] = 0
            if layer.self_attn.o_proj.bias is not None:
                layer.self_attn.o_proj.bias[0] = 0
            downs = mixture.experts.down_proj
            (downs.mT if row.experts.transposed else downs)[:, 0] = 0
            if row.experts.biased:
                mixture.experts.down_proj_bias[:, 0] = 0
    made: PreTrainedModel = model
    return made


def save_skewed(folder: Path, family: str, **settings: Any) -> Path:
    """Write such a model and its tokenizer to a folder that `--model` takes."""
    build_skewed(family, **settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def skewed_inputs(given: CompileConfig, root: Path, family: str, **settings: Any) -> CompileConfig:
    """Give the options of a compile of such a model, which is written to a folder once, with `--experts both`."""
    folder = root / family
    if not folder.exists():
        save_skewed(folder, family, **settings)
    options: dict[str, Any] = {"model": str(folder), "budgets": None, "cache_dir": root / "cache"}
    return replace(given, experts="both", clusters=2, keep=0.5, **options)
