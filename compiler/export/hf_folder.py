"""A chosen model as a folder that transformers loads without our code: one width for all layers, floats."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler.models.empty import empty_model
from coreinfer.runtime.engines.torch.joined import put_together
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .chosen import ChosenModel
from .parameters import list_parameters, model_config, read_floats

__all__ = ["DTYPES", "HfExport", "write_hf"]


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class HfExport:
    """What was written.

    Attributes:
        width: neurons of every layer.
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
    parts = {parameter.name: torch.from_numpy(read_floats(parameter)).to(DTYPES[dtype]) for parameter in parameters}
    config = model_config(chosen, **{chosen.family.ffn_dim_field: width, "dtype": dtype})
    state = put_together(parts, chosen.family, config)
    empty = empty_model(config)
    config.architectures = [type(empty).__name__]
    model: Any = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[dtype])
    model.generation_config = _generation(chosen)
    model.save_pretrained(folder)
    _write_tokenizer(folder, chosen)
    item = DTYPES[dtype].itemsize
    added = sum(_size(parameter.padded) - _size(parameter.shape) for parameter in parameters)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return HfExport(width=width, num_bytes=num_bytes, padding_bytes=added * item)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


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
