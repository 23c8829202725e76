"""A model's weights from its GGUF file: all of them, and nothing else."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.families import ExpertNames, family_of_config, num_cached_layers
from coreinfer.compiler.models.empty import empty_model
from transformers import PreTrainedConfig, PreTrainedModel

from .config import architecture_of
from .experts import refuse_single_experts
from .header import Header, TensorEntry
from .names import TensorLayout, file_names, layout_of, paired_rows, path_in_layer, rows_by_head
from .tying import EMBEDDING, HEAD, table_of
from .values import check_readable, read_rows, read_tensor

__all__ = ["load_weights"]

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_SINGLE_EXPERT = re.compile(r"ffn_(gate|up|down)\.\d+")
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
    layout = _layout(header, name)
    unused = _unused(header, layout, config)
    sources = _sources(header, layout, unused, name)
    empty = empty_model(config)
    _check_complete(header, layout, sources, unused, empty, name)
    for tensor, entry in header.tensors.items():
        check_readable(tensor, entry)
    weights = dict(_weights(header, sources, layout, config, dtype))
    model: PreTrainedModel = type(empty).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model


def _layout(header: Header, name: str) -> TensorLayout:
    architecture = architecture_of(header, name)
    return layout_of(architecture, has_experts=bool(header.metadata.get(f"{architecture}.expert_count")))


def _unused(header: Header, layout: TensorLayout, config: PreTrainedConfig) -> set[str]:
    """Tensors of keys and values in layers that have those of others."""
    if not layout.caches:
        return set()
    family = family_of_config(config.to_dict(), "").name
    num_cached = num_cached_layers(family, config.num_hidden_layers, config.to_dict())
    found = ((tensor, _BLOCK.fullmatch(tensor)) for tensor in header.tensors)
    return {tensor for tensor, match in found if match and match[2] in layout.caches and int(match[1]) >= num_cached}


def _sources(header: Header, layout: TensorLayout, unused: Set[str], name: str) -> dict[str, tuple[str, ...]]:
    """Name in the model -> in the file, for tensors of names that the architecture has."""
    per_layer, paths = layout.per_layer, {part: path for path, parts in layout.experts.items() for part in parts}
    paths |= {name: path for path, name in layout.vectors.items()}
    sources: dict[str, tuple[str, ...]] = {}
    for tensor, entry in header.tensors.items():
        match = _BLOCK.fullmatch(tensor)
        if tensor in unused:
            continue
        if match and match[2] in per_layer:
            sources[f"{layout.layers}.{int(match[1])}.{per_layer[match[2]]}.{match[3]}"] = (tensor,)
        elif match and f"{match[2]}.{match[3]}" in paths:
            parameter = f"{layout.layers}.{int(match[1])}.{paths[f'{match[2]}.{match[3]}']}"
            sources[parameter] = file_names(parameter, layout)
        elif match and _SINGLE_EXPERT.fullmatch(match[2]):
            refuse_single_experts(tensor, name)
        stem, _, kind = tensor.rpartition(".")
        if stem in layout.shared:
            sources[f"{layout.shared[stem]}.{kind}"] = (tensor,)
        if stem in layout.stacked:
            sources |= {f"{layout.stacked[stem]}.{index}.{kind}": (tensor,) for index in range(entry.shape[0])}
    if HEAD in header.tensors and (table := table_of(header)):
        # The better one serves as both.
        _log.info("%s and %s are one table in other bits; %s serves as both", EMBEDDING, HEAD, table)
        sources[f"{layout.shared['token_embd']}.weight"] = (table,)
        del sources[f"{layout.shared['output']}.weight"]
    return sources


def _check_complete(
    header: Header,
    layout: TensorLayout,
    sources: Mapping[str, tuple[str, ...]],
    unused: Set[str],
    empty: PreTrainedModel,
    name: str,
) -> None:
    shapes = _shapes(sources, layout, empty)
    missing = [tensor for tensor in shapes if tensor not in header.tensors]
    taken = set(shapes)
    if taken & {EMBEDDING, HEAD} and table_of(header):
        taken |= {EMBEDDING, HEAD}
    left_over = [tensor for tensor in header.tensors if tensor not in {*taken, *unused, *layout.factors}]
    other = [
        f"{tensor} is {list(header.tensors[tensor].shape)}, expected {list(shape)}"
        for tensor, shape in shapes.items()
        if tensor in header.tensors and header.tensors[tensor].shape != shape
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


def _shapes(
    sources: Mapping[str, tuple[str, ...]], layout: TensorLayout, empty: PreTrainedModel
) -> dict[str, tuple[int, ...]]:
    """Tensors that the file has to hold -> their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    # Shared parameters come once, under the name that they have first.
    for parameter, value in empty.named_parameters():
        tensors, shape = sources.get(parameter) or file_names(parameter, layout), tuple(value.shape)
        if path_in_layer(parameter, layout) in layout.experts:
            shape = _of_all_experts(shape, len(tensors), _experts_of(empty.config))
        if modules := layout.stacked.get(_stem(tensors[0])):
            shape = (len(list(empty.get_submodule(modules).children())), *shape)
        shapes |= {tensor: shape[:: -1 if _is_turned(tensor, layout) else 1] for tensor in tensors}
    return shapes


def _experts_of(config: PreTrainedConfig) -> ExpertNames:
    names = family_of_config(config.to_dict(), "").experts
    assert names is not None
    return names


def _of_all_experts(shape: tuple[int, ...], num_tensors: int, names: ExpertNames) -> tuple[int, ...]:
    """Shape of each tensor that a parameter of all experts has in the file: (experts, outputs, ...)."""
    if names.transposed:
        shape = (shape[0], *shape[:0:-1])
    return (shape[0], shape[1] // num_tensors, *shape[2:])


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
    header: Header,
    sources: Mapping[str, tuple[str, ...]],
    layout: TensorLayout,
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, tensors in sources.items():
        entries = [header.tensors[tensor] for tensor in tensors]
        if path_in_layer(parameter, layout) in layout.experts:
            yield parameter, _experts(entries, _experts_of(config), dtype)
        else:
            values = _values(parameter, tensors[0], entries[0], layout)
            yield parameter, _convert(tensors[0], values, layout, config, dtype)


def _values(parameter: str, tensor: str, entry: TensorEntry, layout: TensorLayout) -> npt.NDArray[Any]:
    """What a tensor holds of a parameter: all of it, or one of several matrices."""
    if (modules := layout.stacked.get(_stem(tensor))) is None:
        return read_tensor(entry)
    index = int(parameter.removeprefix(f"{modules}.").partition(".")[0])
    return read_rows(entry, slice(index, index + 1))[0]  # type: ignore[no-any-return]


def _convert(
    tensor: str, values: npt.NDArray[Any], layout: TensorLayout, config: PreTrainedConfig, dtype: torch.dtype
) -> torch.Tensor:
    stem = _stem(tensor)
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


def _experts(entries: Sequence[TensorEntry], names: ExpertNames, dtype: torch.dtype) -> torch.Tensor:
    """Put tensors (experts, outputs, ...) together as transformers has them; one expert is unpacked at a time.

    Returns:
        (experts, outputs of all, ...) in `dtype`, or (experts, inputs, outputs of all).
    """
    num_experts, _, *inner = entries[0].shape
    num_rows = [entry.shape[1] for entry in entries]
    whole = torch.empty((num_experts, sum(num_rows), *inner), dtype=dtype)
    for expert in range(num_experts):
        own = whole[expert]
        parts = (
            [own[start :: len(entries)] for start in range(len(entries))] if names.interleaved else own.split(num_rows)
        )
        for entry, part in zip(entries, parts, strict=True):
            part.copy_(torch.from_numpy(read_rows(entry, slice(expert, expert + 1))[0]))
    return whole.mT if names.transposed and whole.ndim == 3 else whole
