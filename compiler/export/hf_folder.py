"""A chosen model as a folder that transformers loads without our code: one width for all layers, floats."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from coreinfer.bundles.families import ExpertNames
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler.models.empty import empty_model
from coreinfer.runtime.engines.torch.joined import put_together
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .chosen import ChosenModel
from .parameters import Parameter, list_parameters, model_config, read_floats

__all__ = ["DTYPES", "HfExport", "write_hf"]


_NUM_EXPERTS = {"num_experts", "num_local_experts"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class HfExport:
    """What was written.

    Attributes:
        width: neurons of every layer, or of each of its experts.
        padding_bytes: bytes of neurons that are all zeros.
    """

    width: int
    num_bytes: int
    padding_bytes: int


def write_hf(folder: Path, chosen: ChosenModel, *, dtype: str) -> HfExport:
    """Write config, weights, tokenizer, chat template and generation defaults.

    The whole model is in memory, in `dtype`.

    Raises:
        UnsupportedModelError: the bundle holds tensors that transformers' model does not have.
        OSError: the folder cannot be written.
    """
    width = max(chosen.widths)
    parameters = list_parameters(chosen, [width] * len(chosen.widths))
    named = groupby(parameters, key=lambda parameter: parameter.name)
    parts = {name: _values(list(group), chosen.family.experts, DTYPES[dtype]) for name, group in named}
    config = model_config(chosen, **_sizes(chosen, width), dtype=dtype)
    state = put_together(parts, chosen.family, config)
    empty = empty_model(config)
    config.architectures = [type(empty).__name__]
    model: Any = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[dtype])
    model.generation_config = _generation(chosen)
    model.save_pretrained(folder)
    _write_tokenizer(folder, chosen)
    added = sum(parameter.num_added for parameter in parameters)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return HfExport(width=width, num_bytes=num_bytes, padding_bytes=added * DTYPES[dtype].itemsize)


def _sizes(chosen: ChosenModel, width: int) -> dict[str, int]:
    """Fields of the config that the export changes."""
    names = chosen.family.experts
    if names is None or chosen.experts is None:
        return {chosen.family.ffn_dim_field: width}
    # Of which a config may have transformers' other name.
    numbers = dict.fromkeys({names.num_field, *_NUM_EXPERTS & chosen.config.keys()}, len(chosen.experts[0]))
    return {names.dim_field: width, **numbers}


def _values(parts: Sequence[Parameter], names: ExpertNames | None, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of transformers: a parameter, or what all experts have of a kind, as it has that."""
    values = [torch.from_numpy(read_floats(part)).to(dtype) for part in parts]
    if names is None or parts[0].role is None:
        return values[0]
    num_experts = sum(part.role == parts[0].role for part in parts)
    # (experts, roles, outputs, ...)
    whole: torch.Tensor = torch.stack(values).unflatten(0, (num_experts, -1))
    whole = (whole.transpose(1, 2) if names.interleaved else whole).flatten(1, 2)
    return whole.mT.contiguous() if names.transposed and whole.ndim == 3 else whole


def _defaults(chosen: ChosenModel) -> dict[str, Any]:
    defaults: dict[str, Any] = json.loads(chosen.bundle.read_bytes(LAYOUT.generation))
    return defaults


def _generation(chosen: ChosenModel) -> GenerationConfig:
    config, ends = chosen.config, _defaults(chosen)["eos_token_ids"]
    return GenerationConfig(
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=config.get("pad_token_id"),
    )


def _write_tokenizer(folder: Path, chosen: ChosenModel) -> None:
    bundle = chosen.bundle
    templates = {"default": LAYOUT.chat_template, "tool_use": LAYOUT.tool_template}
    found = {name: bundle.read_bytes(file).decode() for name, file in templates.items() if bundle.has(file)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.path / LAYOUT.tokenizer),
        chat_template=found.get("default") if len(found) < 2 else found,
        clean_up_tokenization_spaces=False,
        model_max_length=bundle.manifest.model.max_positions,
        **_defaults(chosen)["special_tokens"],
    )
    tokenizer.save_pretrained(folder)
    # As it is in the bundle: the tokenizer's class may write it anew in its own way.
    (folder / "tokenizer.json").write_bytes(bundle.read_bytes(LAYOUT.tokenizer))
