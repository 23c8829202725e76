"""A chosen model as one GGUF file, written tensor by tensor."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.families import Family
from coreinfer.bundles.formats import GROUP_SIZE
from coreinfer.compiler.models.gguf.names import TensorLayout, file_names, layout_of, paired_rows
from coreinfer.compiler.models.gguf.rope import ROPE_FACTORS
from gguf import GGMLQuantizationType, GGUFWriter

from .blocks import block_bytes, block_type, encode
from .chosen import ChosenModel
from .gguf_gemma3n import table_rows, unused_tensors
from .gguf_header import architecture_for, header_fields
from .gguf_rope import rope_factors
from .gguf_vocabulary import vocabulary_fields
from .parameters import Parameter, list_parameters

__all__ = ["GgufExport", "write_gguf"]

_FLOAT32 = np.dtype(np.float32)
_LAYER = re.compile(r"blk\.\d+\.")
_FILE_TYPES = {"int4": 3, "int8": 7, "bf16": 32}
"""general.file_type, by the format of the FFN: mostly Q4_1, Q8_0, BF16."""


@dataclass(frozen=True, kw_only=True)
class GgufExport:
    """What was written.

    Attributes:
        types: ggml's name of a type -> number of tensors.
        padding_bytes: bytes of neurons that are all zeros, for an architecture or a block size.
    """

    architecture: str
    types: dict[str, int]
    num_bytes: int
    padding_bytes: int


def write_gguf(path: Path, chosen: ChosenModel) -> GgufExport:
    """Write a model.

    Raises:
        UnsupportedModelError: llama.cpp cannot compute it, or its tokenizer.
        OSError: the file cannot be written.
    """
    architecture = architecture_for(chosen)
    widths = _widths(chosen, architecture)
    fields = {**_general_fields(chosen), **header_fields(chosen, architecture, widths), **vocabulary_fields(chosen)}
    parameters, factors = list_parameters(chosen, widths), rope_factors(chosen)
    writer = GGUFWriter(path, architecture)
    _add_fields(writer, fields)
    layout = layout_of(architecture, has_experts=chosen.experts is not None)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    tensors, unused = _tensors(parameters, chosen.family, layout), list(unused_tensors(chosen, layout))
    for name, parts in tensors.items():
        _add_tensor(writer, name, [_with_all_rows(part, chosen) for part in parts], layout)
    for tensor in unused:
        writer.add_tensor_info(tensor.name, tensor.shape, _FLOAT32, tensor.num_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in _values(tensors, layout, chosen, factors):
        writer.write_tensor_data(values)
    for tensor in unused:
        writer.write_tensor_data(tensor.values)
    writer.close()
    return _summary(path, architecture, tensors)


def _add_tensor(writer: GGUFWriter, name: str, parts: Sequence[Parameter], layout: TensorLayout) -> None:
    shape: tuple[int, ...] = (sum(part.padded[0] for part in parts), *parts[0].padded[1:])
    if parts[0].role is not None or name.rpartition(".")[0] in layout.stacked:
        shape = (len(parts), *parts[0].padded)
    writer.add_tensor_info(name, shape, _FLOAT32, sum(map(block_bytes, parts)), raw_dtype=block_type(parts[0]))


def _with_all_rows(parameter: Parameter, chosen: ChosenModel) -> Parameter:
    """Of a table that has rows for some tokens alone the shape that it has in the file."""
    if not _is_table(parameter, chosen):
        return parameter
    return replace(parameter, padded=(chosen.bundle.manifest.model.vocab_size, *parameter.padded[1:]))


def _is_table(parameter: Parameter, chosen: ChosenModel) -> bool:
    return parameter.name.removesuffix(".weight") in chosen.family.tables


def _tensors(parameters: Sequence[Parameter], family: Family, layout: TensorLayout) -> dict[str, list[Parameter]]:
    """Name in the file -> what lies there, row after row: several parts where transformers has one module or tensor."""
    tensors: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        name = parameter.name
        for path, parts in family.joined.items():
            for part in parts:
                name = name.replace(f".{path}.{part}.", f".{path}.")
        names = file_names(name, layout)
        tensors.setdefault(names[-1] if parameter.role in ("up", "up_bias") else names[0], []).append(parameter)
    return tensors


def _widths(chosen: ChosenModel, architecture: str) -> list[int]:
    """Widths in the file: whole blocks, as the down projection's rows need them, and one for all where it must be."""
    widths = [width if _is_plain(chosen) else -(-width // GROUP_SIZE) * GROUP_SIZE for width in chosen.widths]
    return widths if architecture == "deci" else [max(widths)] * len(widths)


def _is_plain(chosen: ChosenModel) -> bool:
    return chosen.bundle.manifest.quantization["ffn"].format == "bf16"


def _values(
    tensors: Mapping[str, Sequence[Parameter]],
    layout: TensorLayout,
    chosen: ChosenModel,
    factors: npt.NDArray[np.float32] | None,
) -> Iterator[npt.NDArray[Any]]:
    if factors is not None:
        yield factors
    for name, parts in tensors.items():
        stem = _LAYER.sub("", name).rpartition(".")[0]
        rows = None
        if stem in layout.paired:
            rows = paired_rows(parts[0].shape[0], int(chosen.config[layout.paired[stem]]))
        elif _is_table(parts[0], chosen) and parts[0].shape[0] != chosen.bundle.manifest.model.vocab_size:
            rows = table_rows(parts[0].shape[0], chosen.bundle.manifest.model.vocab_size)
        offset = layout.norm_offset if stem in (*layout.norms, "output_norm") else 0.0
        yield np.concatenate([encode(part, rows, offset) for part in parts])


def _general_fields(chosen: ChosenModel) -> dict[str, Any]:
    manifest = chosen.bundle.manifest
    return {
        "general.type": "model",
        "general.name": chosen.title,
        "general.description": f"exported by coreinfer from a bundle of {manifest.model.name}",
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[manifest.quantization["ffn"].format],
    }


def _add_fields(writer: GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Add keys by the type of their values."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _summary(path: Path, architecture: str, tensors: Mapping[str, Sequence[Parameter]]) -> GgufExport:
    types: dict[str, int] = {}
    padding = 0
    for parts in tensors.values():
        kind: GGMLQuantizationType = block_type(parts[0])
        types[kind.name] = types.get(kind.name, 0) + 1
        padding += sum(map(_padding_bytes, parts))
    return GgufExport(architecture=architecture, types=types, num_bytes=path.stat().st_size, padding_bytes=padding)


def _padding_bytes(parameter: Parameter) -> int:
    num_bytes, whole = block_bytes(parameter), math.prod(parameter.padded)
    return num_bytes - num_bytes * (whole - parameter.num_added) // whole
