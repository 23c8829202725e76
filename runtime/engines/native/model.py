"""What the native engine is built from: a bundle's tensors and config, family by family, as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, BundleCorrupt, Manifest, UnsupportedModelError
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.formats import stored_parts
from coreinfer.bundles.manifest import ModelRecord
from coreinfer.bundles.tensors import TensorFile

from .rotary import rotary_table

__all__ = ["ffn_layers", "model_spec"]

Floats = npt.NDArray[np.float32]
Matrix = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class _Names:
    """How a family calls the tensors of its base; None for what it does not have.

    Attributes:
        root: path to the decoder.
        output: the attention's output projection.
        norms: name in the native engine -> name in the layer.
        norm_offset: added to the weight of an RMS norm.
        settings: those of the config that models of this family are computed with, in addition to shapes. A config may
            hold any others, which transformers leaves alone as well.
    """

    root: str = "model."
    output: str = "self_attn.o_proj"
    final_norm: str = "norm"
    norms: Mapping[str, str]
    norm_offset: float = 0.0
    settings: frozenset[str]


_ROTARY_SETTINGS = frozenset({"model_type", "rms_norm_eps", "rope_parameters", "sliding_window"})
_LLAMA = _Names(
    norms={"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}, settings=_ROTARY_SETTINGS
)
_QWEN = replace(_LLAMA, settings=_ROTARY_SETTINGS | {"layer_types"})
_FAMILY_NAMES: dict[str, _Names] = {
    "llama": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma3": _Names(
        norms={
            "attention_norm": "input_layernorm",
            "attention_output_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_output_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        settings=_ROTARY_SETTINGS
        | {"attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"},
    ),
    "opt": _Names(
        root="model.decoder.",
        output="self_attn.out_proj",
        final_norm="final_layer_norm",
        norms={"attention_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"},
        settings=frozenset({"do_layer_norm_before", "layer_norm_elementwise_affine", "word_embed_proj_dim"}),
    ),
}
# OPT keeps two learned positions free in front.
_POSITION_OFFSET = 2
# OPT with do_layer_norm_before off: the same norms, of the residual stream after each sublayer.
_POST_NORM = {"attention_norm": "attention_after_norm", "ffn_norm": "ffn_after_norm"}
_NORM_PLACES = tuple(
    f"{sublayer}_{place}" for sublayer in ("attention", "ffn") for place in ("norm", "output_norm", "after_norm")
)
_NONLINEARITIES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
}


def model_spec(bundle: Bundle) -> dict[str, Any]:
    """Describe everything but the FFN for `_native.Model`; arrays are views of the mapped files.

    Raises:
        UnsupportedModelError: the config asks for something that the native engine does not compute.
    """
    manifest, base = bundle.manifest, bundle.base
    model = manifest.model
    names, config = _names_and_settings(manifest)
    width = int(config.get("word_embed_proj_dim") or model.hidden_size)
    embedding = _matrix(base, f"{names.root}embed_tokens.weight", (model.vocab_size, width))
    projected = width != model.hidden_size
    tables = _rotary_tables(config, model.head_dim)
    return {
        "hidden": model.hidden_size,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab": model.vocab_size,
        "max_positions": model.max_positions,
        "position_offset": _POSITION_OFFSET if model.family == "opt" else 0,
        "epsilon": float(config.get("rms_norm_eps", 1e-5)),
        "attention_scale": float(config.get("query_pre_attn_scalar") or model.head_dim) ** -0.5,
        "embedding_scale": math.sqrt(model.hidden_size) if model.family == "gemma3" else 1.0,
        "layer_norm": model.family == "opt",
        "nonlinearity": _nonlinearity(model.activation),
        "embedding": embedding,
        "head": embedding if model.tied_head else _matrix(base, "lm_head.weight", (model.vocab_size, width)),
        "positions": _positions(base, names, manifest),
        "project_in": _matrix(base, f"{names.root}project_in.weight", (model.hidden_size, width))
        if projected
        else None,
        "project_out": _matrix(base, f"{names.root}project_out.weight", (width, model.hidden_size))
        if projected
        else None,
        "final_norm": _norm(base, names.root + names.final_norm, names.norm_offset),
        "rotary": list(tables.values()),
        "layers": [_layer(base, names, model, config, index, list(tables)) for index in range(model.num_layers)],
    }


def ffn_layers(file: TensorFile, manifest: Manifest, num_neurons: Sequence[int]) -> list[dict[str, Any]]:
    """Describe the dense FFN or a cluster pack for `_native.Ffn`; arrays are views of the mapped file.

    Args:
        num_neurons: neurons of each layer.
    """
    hidden = manifest.model.hidden_size
    layers = []
    for layer, count in enumerate(num_neurons):
        shapes = {"gate": (count, hidden), "up": (count, hidden), "down": (hidden, count)}
        if not manifest.model.gated:
            del shapes["gate"]
        linears = {}
        for role, shape in shapes.items():
            name = tensor_name(layer, role)
            linears[role] = (_matrix(file, name, shape), _vector(file, f"{name}_bias"))
        layers.append({"gate": None} | linears)
    return layers


def _names_and_settings(manifest: Manifest) -> tuple[_Names, dict[str, Any]]:
    names = _FAMILY_NAMES.get(manifest.model.family)
    known = names.settings if names else frozenset()
    config = {key: value for key, value in manifest.model.config.items() if key in known}
    unknown = [key for key in ("attn_logit_softcapping", "final_logit_softcapping") if config.get(key)]
    if config.get("layer_norm_elementwise_affine", True) is not True:
        unknown.append("layer_norm_elementwise_affine")
    if names is None or unknown:
        what = f"family {manifest.model.family!r}" if names is None else ", ".join(unknown)
        raise UnsupportedModelError(f"model {manifest.model.name}: the native engine has no {what}; use engine='torch'")
    return names, config


def _nonlinearity(activation: str) -> str:
    if activation not in _NONLINEARITIES:
        raise UnsupportedModelError(
            f"activation {activation!r}: the native engine has {', '.join(_NONLINEARITIES)}; use engine='torch'"
        )
    return _NONLINEARITIES[activation]


def _layer(
    base: TensorFile, names: _Names, model: ModelRecord, config: Mapping[str, Any], index: int, tables: list[str]
) -> dict[str, Any]:
    root = f"{names.root}layers.{index}."
    hidden, query = model.hidden_size, model.num_heads * model.head_dim
    key = model.num_kv_heads * model.head_dim
    linears = {
        "query": _linear(base, f"{root}self_attn.q_proj", (query, hidden)),
        "key": _linear(base, f"{root}self_attn.k_proj", (key, hidden)),
        "value": _linear(base, f"{root}self_attn.v_proj", (key, hidden)),
        "output": _linear(base, root + names.output, (hidden, query)),
    }
    places = names.norms
    if config.get("do_layer_norm_before") is False:
        places = {_POST_NORM[place]: name for place, name in places.items()}
    norms = {place: _norm(base, root + places[place], names.norm_offset) for place in _NORM_PLACES if place in places}
    kind = _layer_kind(config, index)
    return {
        **dict.fromkeys(_NORM_PLACES),
        **linears,
        **norms,
        "query_norm": _norm(base, f"{root}self_attn.q_norm", names.norm_offset),
        "key_norm": _norm(base, f"{root}self_attn.k_norm", names.norm_offset),
        "rope": -1 if not tables else tables.index(kind) if kind in tables else 0,
        "window": _window(config, kind),
    }


def _layer_kind(config: Mapping[str, Any], index: int) -> str:
    if config.get("layer_types"):
        return str(config["layer_types"][index])
    # Mistral slides in every layer, and has no list of them.
    return "sliding_attention" if config.get("model_type") == "mistral" else "full_attention"


def _window(config: Mapping[str, Any], kind: str) -> int:
    return int(config.get("sliding_window") or 0) if kind == "sliding_attention" else 0


def _rotary_tables(config: Mapping[str, Any], head_dim: int) -> dict[str, tuple[list[float], float]]:
    """Kind of layer ("" where all are alike) -> inverse frequencies (head_dim / 2) and the scale of cos and sin."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        return {}
    kinds = {"": parameters} if "rope_theta" in parameters else parameters
    return {kind: rotary_table(values, head_dim) for kind, values in kinds.items()}


def _positions(base: TensorFile, names: _Names, manifest: Manifest) -> Matrix | None:
    name = f"{names.root}embed_positions.weight"
    if name not in base:
        return None
    return _matrix(base, name, (manifest.model.max_positions + _POSITION_OFFSET, manifest.model.hidden_size))


def _matrix(file: TensorFile, name: str, shape: tuple[int, int]) -> Matrix:
    """Describe a stored matrix as the native module takes it; it checks the sizes."""
    try:
        kind, parts = stored_parts(file, name)
    except KeyError as error:
        raise BundleCorrupt(f"{file.path}: tensor {error} is missing; compile the bundle again") from error
    if kind == "f32":
        raise UnsupportedModelError(
            f"{file.path}: tensor {name!r} is F32; the native engine reads bf16, int8 and int4 matrices: "
            "use engine='torch'"
        )
    return (kind, *shape, *(part.array for part in parts))


def _vector(file: TensorFile, name: str) -> Floats | None:
    return np.asarray(file[name].array, dtype=np.float32) if name in file else None


def _linear(file: TensorFile, path: str, shape: tuple[int, int]) -> tuple[Matrix, Floats | None]:
    return _matrix(file, f"{path}.weight", shape), _vector(file, f"{path}.bias")


def _norm(file: TensorFile, path: str, offset: float) -> tuple[Floats, Floats | None] | None:
    weight = _vector(file, f"{path}.weight")
    if weight is None:
        return None
    return weight + np.float32(offset) if offset else weight, _vector(file, f"{path}.bias")
