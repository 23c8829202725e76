"""The families that CoreInfer can narrow, as a table.

A row says where a family keeps its decoder layers and the names of its FFN's modules, as attribute paths
of the model that transformers builds. Adding a family is one row here and one tiny random config in the tests
(docs/adding-a-family.md).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from .errors import UnsupportedModelError
from .refused_models import refusal_reason

__all__ = [
    "CACHE_ARGUMENTS",
    "CLAMPED_SWIGLU",
    "FAMILIES",
    "ExpertNames",
    "Family",
    "assign_ffn",
    "cache_argument",
    "family_by_name",
    "family_of_config",
    "ffn_tensors",
    "num_cached_layers",
    "resolve",
]


CLAMPED_SWIGLU = "clamped_swiglu"
"""Activation of gpt_oss: (up + 1) * gate * sigmoid(alpha * gate), where gate is `swiglu_limit` at most and up within
plus and minus that; alpha is `swiglu_alpha`."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Where a family whose FFN is a mixture of experts keeps it, and how its router weighs the chosen ones.

    A router's weights are the softmax over all experts, of which the largest `num_experts_per_tok` are taken; where
    they are normalized, divided by their sum, which is the softmax over the chosen ones alone.

    Attributes:
        module: path from a layer to the mixture, in which transformers has the experts' matrices, all in one
            (`experts.gate_up_proj`, `experts.down_proj`).
        router: path from there to the router.
        num_field, dim_field: config fields of the number of experts, and of the neurons of each.
        normalizes: whether weights are normalized; None where the config's `norm_topk_prob` says so.
        biased: whether the router and each expert's matrices have biases.
        interleaved: whether rows of gate and up take turns in transformers' matrix of both; else those of gate come
            first.
        transposed: whether transformers has the experts' matrices as (inputs, outputs).
        returns_weights: whether layers expect the router's weights beside what the mixture puts out.
        unpacked: methods of quantization whose packed experts can be read (`compiler/models/unpack`).
    """

    module: str = "mlp"
    router: str = "gate"
    num_field: str = "num_experts"
    dim_field: str = "intermediate_size"
    normalizes: bool | None = None
    biased: bool = False
    interleaved: bool = False
    transposed: bool = False
    returns_weights: bool = False
    unpacked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of the parts of one family's models.

    Attributes:
        name: what the manifest calls the family.
        model_types: `model_type` values of transformers configs that belong to it.
        layers: path from the causal language model to its list of decoder layers.
        up, down: paths from a layer to the linear modules into and out of the FFN (fc1 and fc2 where ungated).
        gate: path to the gate projection, None for an ungated FFN.
        qkv, o: paths from a layer to the linear modules into and out of the attention.
        activation_field, ffn_dim_field: config fields that name the activation and the intermediate dimension.
        activation: name of the activation, of a family whose configs do not say it.
        embedding: path to the token embedding, from the causal language model.
        adds_ffn_output: whether a layer ends by adding the down projection's output to the hidden state as it is,
            with no factor on it and no norm after either.
        positions: path to the learned positions, where there are some.
        joined: paths from a layer to linear modules that transformers has as one -> the names that its parts get.
            Once they are taken apart, the parts are its submodules.
        joined_by_head: whether rows of a joined module lie head by head, each head's parts one after another; else part
            by part.
        transposed: paths from a layer to modules whose weights transformers has as (inputs, outputs). They are turned
            as soon as the model is built.
        config_names: names of config fields that most families share -> those of this one.
        ffn_dim_factor: neurons for each dimension of the hidden states, where `ffn_dim_field` may say nothing.
        rotates_part: whether `partial_rotary_factor` says how much of each head is rotated.
        tied_head: whether models share embedding and head where their config.json does not say.
        experts: of a family whose FFN is a mixture of experts, each of which is gated; its FFN has no modules then that
            `gate`, `up` and `down` would name.
        cutoff: path to what says how much is taken off the gates of layers in which only the largest count
            (`runtime/engines/torch/sparse_gate.py`); other layers have none.
        has_streams: whether layers pass several streams to each other, and keys and values.
        tables: paths to embeddings of tokens beside `embedding`, from the causal language model.
        exact: ends of the names of small matrices that are stored in bf16, whatever others are.
        shared_caches_field: config field that says how many layers, the last ones, attend to the keys and values of
            earlier ones and have none of their own.
        uncomputed: settings that files of published models state, and that these do not compute with.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "model.layers"
    up: str = "mlp.up_proj"
    gate: str | None = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    activation_field: str = "hidden_act"
    activation: str | None = None
    ffn_dim_field: str = "intermediate_size"
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    adds_ffn_output: bool = True
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined_by_head: bool = False
    transposed: tuple[str, ...] = ()
    config_names: Mapping[str, str] = field(default_factory=dict)
    ffn_dim_factor: int | None = None
    rotates_part: bool = False
    tied_head: bool = False
    experts: ExpertNames | None = None
    cutoff: str | None = None
    has_streams: bool = False
    tables: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    shared_caches_field: str | None = None
    uncomputed: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate x) * up x rather than act(fc1 x)."""
        return self.gate is not None

    def config_field(self, name: str) -> str:
        """Name in this family's configs of a field that most families share."""
        return self.config_names.get(name, name)

    @property
    def projections(self) -> dict[str, str]:
        """Role in the FFN ("gate", "up", "down") -> path from a layer to its module; none of a mixture of experts."""
        if self.experts is not None:
            return {}
        paths = {"gate": self.gate, "up": self.up, "down": self.down}
        return {role: path for role, path in paths.items() if path is not None}

    @property
    def input_groups(self) -> dict[str, tuple[str, ...]]:
        """Group of `INPUT_GROUPS` -> paths from a layer to its modules, which have the same inputs.

        Of a mixture of experts those of the attention alone: an expert's are no modules.
        """
        groups = {"qkv": self.qkv, "o": (self.o,)}
        if self.experts is None:
            groups["gate_up"] = tuple(path for role, path in self.projections.items() if role != "down")
            groups["down"] = (self.down,)
        return groups


FAMILIES: tuple[Family, ...] = (
    Family(
        name="opt",
        model_types=("opt",),
        layers="model.decoder.layers",
        up="fc1",
        gate=None,
        down="fc2",
        o="self_attn.out_proj",
        activation_field="activation_function",
        ffn_dim_field="ffn_dim",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        # Some OPT models norm the sum.
        adds_ffn_output=False,
        tied_head=True,
    ),
    # EXAONE 3 is computed by transformers' Llama.
    Family(name="llama", model_types=("llama", "mistral", "exaone")),
    Family(name="ministral", model_types=("ministral",)),
    Family(name="smollm3", model_types=("smollm3",), tied_head=True),
    Family(name="granite", model_types=("granite",), adds_ffn_output=False),
    Family(name="qwen2", model_types=("qwen2",)),
    Family(name="qwen3", model_types=("qwen3",)),
    Family(
        name="gemma2",
        model_types=("gemma2",),
        activation_field="hidden_activation",
        adds_ffn_output=False,
        tied_head=True,
    ),
    Family(
        name="gemma3",
        model_types=("gemma3_text",),
        activation_field="hidden_activation",
        adds_ffn_output=False,
        tied_head=True,
    ),
    Family(
        name="gemma3n",
        model_types=("gemma3n_text",),
        activation_field="hidden_activation",
        adds_ffn_output=False,
        tied_head=True,
        cutoff="mlp.cutoff",
        has_streams=True,
        tables=("model.embed_tokens_per_layer",),
        exact=("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"),
        shared_caches_field="num_kv_shared_layers",
        uncomputed=("query_pre_attn_scalar",),
    ),
    Family(name="olmo2", model_types=("olmo2",), adds_ffn_output=False),
    Family(name="olmo3", model_types=("olmo3",), adds_ffn_output=False),
    Family(
        name="phi3",
        model_types=("phi3",),
        up="mlp.gate_up_proj.up_proj",
        gate="mlp.gate_up_proj.gate_proj",
        qkv=("self_attn.qkv_proj.q_proj", "self_attn.qkv_proj.k_proj", "self_attn.qkv_proj.v_proj"),
        joined={"mlp.gate_up_proj": ("gate_proj", "up_proj"), "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")},
        rotates_part=True,
    ),
    Family(name="stablelm", model_types=("stablelm",), rotates_part=True),
    Family(
        name="starcoder2",
        model_types=("starcoder2",),
        up="mlp.c_fc",
        gate=None,
        down="mlp.c_proj",
        tied_head=True,
    ),
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        up="mlp.dense_h_to_4h",
        gate=None,
        down="mlp.dense_4h_to_h",
        qkv=tuple(f"attention.query_key_value.{part}" for part in ("q_proj", "k_proj", "v_proj")),
        o="attention.dense",
        embedding="gpt_neox.embed_in",
        joined={"attention.query_key_value": ("q_proj", "k_proj", "v_proj")},
        joined_by_head=True,
        rotates_part=True,
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        layers="transformer.h",
        up="mlp.c_fc",
        gate=None,
        down="mlp.c_proj",
        qkv=tuple(f"attn.c_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")),
        o="attn.c_proj",
        activation_field="activation_function",
        ffn_dim_field="n_inner",
        ffn_dim_factor=4,
        embedding="transformer.wte",
        positions="transformer.wpe",
        joined={"attn.c_attn": ("q_proj", "k_proj", "v_proj")},
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        config_names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        tied_head=True,
    ),
    Family(
        name="mixtral",
        model_types=("mixtral",),
        experts=ExpertNames(num_field="num_local_experts", normalizes=True),
    ),
    Family(name="qwen3_moe", model_types=("qwen3_moe",), experts=ExpertNames(dim_field="moe_intermediate_size")),
    Family(name="olmoe", model_types=("olmoe",), experts=ExpertNames()),
    Family(
        name="granitemoe",
        model_types=("granitemoe",),
        adds_ffn_output=False,
        experts=ExpertNames(module="block_sparse_moe", router="router", num_field="num_local_experts", normalizes=True),
    ),
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        activation=CLAMPED_SWIGLU,
        experts=ExpertNames(
            router="router",
            num_field="num_local_experts",
            normalizes=True,
            biased=True,
            interleaved=True,
            transposed=True,
            returns_weights=True,
            unpacked=("mxfp4",),
        ),
    ),
)


def family_by_name(name: str) -> Family:
    """Find a row of the table by the name that the manifest stores.

    Raises:
        UnsupportedModelError: no row has that name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UnsupportedModelError(_unsupported(f"family {name!r}"))


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """Find the row for a transformers config.

    Args:
        config: the config as a mapping; only `model_type` is read.
        where: name of the model in an error.
    Raises:
        UnsupportedModelError: the model type is not supported.
    """
    model_type = str(config.get("model_type"))
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    reason = refusal_reason(model_type)
    because = "" if reason is None else f" ({reason})"
    raise UnsupportedModelError(_unsupported(f"model {where}: model_type {model_type!r}{because}"))


def num_cached_layers(family: str, num_layers: int, config: Mapping[str, Any]) -> int:
    """Count the layers of a model that have keys and values of their own.

    Args:
        family: name of its row.
        config: its transformers config.
    """
    field_name = family_by_name(family).shared_caches_field
    return num_layers - (int(config.get(field_name) or 0) if field_name is not None else 0)


def resolve(root: Any, path: str) -> Any:
    """Follow a dotted attribute path."""
    return reduce(getattr, path.split("."), root)


CACHE_ARGUMENTS = ("cache", "layer_past", "past_key_values")
"""What forward passes call their key-value cache: models `cache` from transformers 5.24 on, some layers otherwise."""


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """Name a key-value cache as the forward pass of a model or a layer does."""
    names = inspect.signature(type(module).forward).parameters
    return {next(name for name in CACHE_ARGUMENTS if name in names): cache}


def assign_ffn(layer: Any, family: Family, tensors: Mapping[str, Any]) -> None:
    """Put FFN tensors into a layer of the model that transformers built: a pointer swap, of any width.

    Args:
        layer: a decoder layer.
        tensors: role ("gate", "up", "down", and "up_bias" and so on where the family has biases) -> torch tensor. Of
            a mixture `expert_role` of the experts that there are, of matrices and biases; the router does without the
            others.
    """
    if family.experts is not None:
        resolve(layer, family.experts.module).assign(tensors)
        return
    for role, path in family.projections.items():
        module = resolve(layer, path)
        module.weight.data = tensors[role]
        if module.bias is not None:
            module.bias.data = tensors[f"{role}_bias"]


def ffn_tensors(layer: Any, family: Family) -> dict[str, Any]:
    """Name the FFN tensors of a layer by role, as `assign_ffn` takes them."""
    if family.experts is not None:
        return dict(resolve(layer, family.experts.module).tensors)
    tensors = {}
    for role, path in family.projections.items():
        module = resolve(layer, path)
        tensors[role] = module.weight.data
        if module.bias is not None:
            tensors[f"{role}_bias"] = module.bias.data
    return tensors


def _unsupported(what: str) -> str:
    supported: Sequence[str] = [f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES]
    return f"{what} is not supported; supported families: {'; '.join(supported)}"
