"""A model's weights from its GGUF file: all of them, and nothing else."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.models.empty import empty_model
from transformers import PreTrainedConfig, PreTrainedModel

from .config import architecture_of
from .header import Header, TensorEntry
from .rope import ROPE_FACTORS
from .tying import EMBEDDING, HEAD, table_of
from .values import check_readable, read_tensor

__all__ = ["load_weights"]

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_MOST_NAMED = 5
_Values = npt.NDArray[Any]
# What a converter of llama.cpp did to a tensor, undone: values and config -> values.
_Undo = Callable[[_Values, PreTrainedConfig], _Values]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How an architecture names and stores what transformers has.

    Attributes:
        norms: names of a layer's norms in the file -> in the model.
        undo: name in the file, without layer -> how to undo what was done to its values.
    """

    norms: Mapping[str, str]
    undo: Mapping[str, _Undo] = field(default_factory=dict)


def _pairs_apart(count: str) -> _Undo:
    """Undo the order of rows in which rotated pairs lie side by side; transformers has the halves of a head apart."""

    def undo(values: _Values, config: PreTrainedConfig) -> _Values:
        heads = int(getattr(config, count))
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    return undo


def _one_less(values: _Values, _: PreTrainedConfig) -> _Values:
    """Undo the 1 that is added to Gemma's norms; in float32, as their files have them."""
    return values.astype(np.float32) - np.float32(1.0)


_SHARED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **_HEAD_NORMS,
}
_LAYOUTS = {
    "llama": _Layout(
        norms=_TWO_NORMS,
        undo={"attn_q": _pairs_apart("num_attention_heads"), "attn_k": _pairs_apart("num_key_value_heads")},
    ),
    "qwen2": _Layout(norms=_TWO_NORMS),
    "qwen3": _Layout(norms={**_TWO_NORMS, **_HEAD_NORMS}),
    "gemma3": _Layout(norms=_GEMMA_NORMS, undo=dict.fromkeys([*_GEMMA_NORMS, "output_norm"], _one_less)),
}


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
    layout = _LAYOUTS[architecture_of(header, name)]
    sources = _sources(header, layout)
    empty = empty_model(config)
    _check_complete(header, sources, empty, name)
    for tensor, entry in header.tensors.items():
        check_readable(tensor, entry)
    weights = dict(_weights(header, sources, layout, config, dtype))
    model: PreTrainedModel = type(empty).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model


def _sources(header: Header, layout: _Layout) -> dict[str, str]:
    """Name in the model -> in the file, for tensors of names that the architecture has."""
    per_layer = {**_LINEARS, **layout.norms}
    sources = {}
    for tensor in header.tensors:
        match = _BLOCK.fullmatch(tensor)
        if match and match[2] in per_layer:
            sources[f"model.layers.{int(match[1])}.{per_layer[match[2]]}.{match[3]}"] = tensor
        stem, _, kind = tensor.rpartition(".")
        if stem in _SHARED:
            sources[f"{_SHARED[stem]}.{kind}"] = tensor
    if HEAD in header.tensors and (table := table_of(header)):
        # The better one serves as both.
        _log.info("%s and %s are one table in other bits; %s serves as both", EMBEDDING, HEAD, table)
        sources[f"{_SHARED['token_embd']}.weight"] = table
        del sources[f"{_SHARED['output']}.weight"]
    return sources


def _file_name(parameter: str, layout: _Layout) -> str:
    """Name in the file of a parameter of the model: what `_sources` maps, the other way."""
    stem, _, kind = parameter.rpartition(".")
    shared = {ours: theirs for theirs, ours in _SHARED.items()}
    if stem in shared:
        return f"{shared[stem]}.{kind}"
    per_layer = {ours: theirs for theirs, ours in {**_LINEARS, **layout.norms}.items()}
    layer, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{per_layer[inner]}.{kind}"


def _check_complete(header: Header, sources: Mapping[str, str], empty: PreTrainedModel, name: str) -> None:
    layout = _LAYOUTS[architecture_of(header, name)]
    # Shared parameters come once, under the name that they have first.
    shapes = {parameter: tuple(value.shape) for parameter, value in empty.named_parameters()}
    missing = [_file_name(parameter, layout) for parameter in shapes if parameter not in sources]
    taken = {sources[parameter] for parameter in shapes if parameter in sources}
    if taken & {EMBEDDING, HEAD} and table_of(header):
        taken |= {EMBEDDING, HEAD}
    left_over = [tensor for tensor in header.tensors if tensor not in taken and tensor != ROPE_FACTORS]
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


def _few(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _weights(
    header: Header, sources: Mapping[str, str], layout: _Layout, config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, tensor in sources.items():
        yield parameter, _convert(tensor, header.tensors[tensor], layout, config, dtype)


def _convert(
    tensor: str, entry: TensorEntry, layout: _Layout, config: PreTrainedConfig, dtype: torch.dtype
) -> torch.Tensor:
    match = _BLOCK.fullmatch(tensor)
    undo = layout.undo.get(match[2] if match else tensor.rpartition(".")[0])
    values = read_tensor(entry)
    if undo is not None:
        values = undo(values, config)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
