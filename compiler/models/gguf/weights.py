"""A model's weights from its GGUF file: all of them, and nothing else."""

import logging
import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.models.empty import empty_model
from transformers import PreTrainedConfig, PreTrainedModel

from .config import architecture_of
from .header import Header, TensorEntry
from .names import LAYOUTS, TensorLayout, file_name, paired_rows, rows_by_head
from .tying import EMBEDDING, HEAD, table_of
from .values import check_readable, read_tensor

__all__ = ["load_weights"]

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_MOST_NAMED = 5


def load_weights(header: Header, config: PreTrainedConfig, *, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """Build the model and assign each parameter its tensor of the file; each is unpacked and converted by itself.

    Args:
        config: made of what `config_fields` read from the header.
        dtype: of the parameters.
        name: name of the model in an error.
    Raises:
        ConfigError: a tensor is missing, left over or of another shape.
        UnsupportedModelError: a tensor's type cannot be unpacked.
    """
    layout = LAYOUTS[architecture_of(header, name)]
    sources = _sources(header, layout)
    empty = empty_model(config)
    _check_complete(header, sources, empty, name)
    for tensor, entry in header.tensors.items():
        check_readable(tensor, entry)
    weights = dict(_weights(header, sources, layout, config, dtype))
    model: PreTrainedModel = type(empty).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model


def _sources(header: Header, layout: TensorLayout) -> dict[str, str]:
    """Name in the model -> in the file, for tensors of names that the architecture has."""
    per_layer = layout.per_layer
    sources = {}
    for tensor in header.tensors:
        match = _BLOCK.fullmatch(tensor)
        if match and match[2] in per_layer:
            sources[f"{layout.layers}.{int(match[1])}.{per_layer[match[2]]}.{match[3]}"] = tensor
        stem, _, kind = tensor.rpartition(".")
        if stem in layout.shared:
            sources[f"{layout.shared[stem]}.{kind}"] = tensor
    if HEAD in header.tensors and (table := table_of(header)):
        # The better one serves as both.
        _log.info("%s and %s are one table in other bits; %s serves as both", EMBEDDING, HEAD, table)
        sources[f"{layout.shared['token_embd']}.weight"] = table
        del sources[f"{layout.shared['output']}.weight"]
    return sources


def _check_complete(header: Header, sources: Mapping[str, str], empty: PreTrainedModel, name: str) -> None:
    layout = LAYOUTS[architecture_of(header, name)]
    # Shared parameters come once, under the name that they have first.
    shapes = {
        parameter: tuple(value.shape)[:: -1 if _is_turned(file_name(parameter, layout), layout) else 1]
        for parameter, value in empty.named_parameters()
    }
    missing = [file_name(parameter, layout) for parameter in shapes if parameter not in sources]
    taken = {sources[parameter] for parameter in shapes if parameter in sources}
    if taken & {EMBEDDING, HEAD} and table_of(header):
        taken |= {EMBEDDING, HEAD}
    left_over = [tensor for tensor in header.tensors if tensor not in {*taken, *layout.factors}]
    other = [
        f"{tensor} is {list(header.tensors[tensor].shape)}, expected {list(shape)}"
        for parameter, shape in shapes.items()
        if (tensor := sources.get(parameter, "")) and header.tensors[tensor].shape != shape
    ]
    problems = [
        f"{what} {_few(tensors)}"
        for what, tensors in (("missing", missing), ("left over", left_over), ("of another shape", other))
        if tensors
    ]
    if problems:
        raise ConfigError(
            f"--model {name}: its tensors are not those of the {empty.config.model_type} model of its header: "
            f"{'; '.join(problems)}; download or convert it again"
        )


def _stem(tensor: str) -> str:
    """Name of a tensor's module, without its layer."""
    match = _BLOCK.fullmatch(tensor)
    return match[2] if match else tensor.rpartition(".")[0]


def _is_turned(tensor: str, layout: TensorLayout) -> bool:
    return _stem(tensor) in layout.turned and tensor.endswith(".weight")


def _few(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _weights(
    header: Header, sources: Mapping[str, str], layout: TensorLayout, config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, tensor in sources.items():
        yield parameter, _convert(tensor, header.tensors[tensor], layout, config, dtype)


def _convert(
    tensor: str, entry: TensorEntry, layout: TensorLayout, config: PreTrainedConfig, dtype: torch.dtype
) -> torch.Tensor:
    stem, values = _stem(tensor), read_tensor(entry)
    if stem in layout.paired:
        rows = paired_rows(len(values), int(getattr(config, layout.paired[stem])))
        values = values[np.argsort(rows)]
    if stem in layout.by_head:
        values = rows_by_head(values, int(config.num_attention_heads))
    if _is_turned(tensor, layout):
        values = values.T
    if layout.norm_offset and stem in (*layout.norms, "output_norm"):
        # In float32, as files have norms.
        values = values.astype(np.float32) - np.float32(layout.norm_offset)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
