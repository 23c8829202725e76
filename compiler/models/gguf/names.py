"""What llama.cpp's converters call the tensors of a model, and what they do to their values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

__all__ = ["LAYOUTS", "TensorLayout", "file_names", "layout_of", "paired_rows", "path_in_layer", "rows_by_head"]


LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """How an architecture names and stores what transformers has.

    Attributes:
        norms: names of a layer's norms in the file -> in the model.
        paired: name in the file, without layer, of matrices in which rotated pairs of rows lie side by side -> field of
            the config that counts their heads.
        norm_offset: what is added to every norm.
        linears: names of a layer's linear modules in the file -> in the model.
        factors: tensors that the config is made of.
        shared: names of modules outside of the layers in the file -> in the model.
        layers: path in the model to its layers.
        turned: names in the file, without layer, of matrices that the model has as (inputs, outputs).
        by_head: names in the file, without layer, of modules whose rows are queries, keys and values one after another,
            and lie head by head in the model.
        experts: of a mixture, paths from a layer to parameters of all experts -> names in the file, without layer, of
            tensors (experts, outputs, ...), of which the parameter has one or two; `Family.experts` says how.
        vectors: paths from a layer to parameters that are no module's weight or bias -> names in the file, without
            layer.
        stacked: names in the file, outside of the layers, of tensors that hold the matrices of several modules -> path
            in the model to the list of these.
        caches: names in the file, without layer, of modules that layers with keys and values of others have no use for;
            files have them all the same.
    """

    norms: Mapping[str, str]
    paired: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    linears: Mapping[str, str] = field(default_factory=lambda: LINEARS)
    factors: tuple[str, ...] = (ROPE_FACTORS,)
    shared: Mapping[str, str] = field(default_factory=lambda: SHARED)
    layers: str = "model.layers"
    turned: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vectors: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[str, ...] = ()

    @property
    def per_layer(self) -> dict[str, str]:
        """Names of all of a layer's modules in the file -> in the model."""
        return {**self.linears, **self.norms}


SHARED: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PHI3_LINEARS = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_STARCODER2_LINEARS = {
    **{name: path for name, path in LINEARS.items() if name.startswith("attn_")},
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT_NEOX_LINEARS = {
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GPT2_LINEARS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_OUTPUT_NORMS}
_GEMMA3N_LINEARS = {
    **LINEARS,
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
}
_GEMMA3N_NORMS = {
    **_GEMMA_NORMS,
    **_HEAD_NORMS,
    "post_norm": "post_per_layer_input_norm",
    "altup_router_norm": "altup.router_norm",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
_LLAMA = TensorLayout(norms=_TWO_NORMS, paired={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"})
LAYOUTS = {
    "llama": _LLAMA,
    # Llama with widths of its own in each layer.
    "deci": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen2": TensorLayout(norms=_TWO_NORMS),
    "qwen3": TensorLayout(norms={**_TWO_NORMS, **_HEAD_NORMS}),
    "gemma2": TensorLayout(norms=_GEMMA_NORMS, norm_offset=1.0),
    "gemma3": TensorLayout(norms={**_GEMMA_NORMS, **_HEAD_NORMS}, norm_offset=1.0),
    "gemma3n": TensorLayout(
        norms=_GEMMA3N_NORMS,
        linears=_GEMMA3N_LINEARS,
        shared={
            **SHARED,
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        vectors={"altup.correct_output_scale": "altup_correct_scale.weight"},
        stacked={"altup_proj": "model.altup_projections", "altup_unembd_proj": "model.altup_unembed_projections"},
        caches=("attn_k", "attn_v", "attn_k_norm"),
    ),
    "olmo2": TensorLayout(norms={**_OUTPUT_NORMS, **_HEAD_NORMS}),
    "phi3": TensorLayout(norms=_TWO_NORMS, linears=_PHI3_LINEARS, factors=(LONG_FACTORS, SHORT_FACTORS)),
    "stablelm": TensorLayout(norms=_TWO_NORMS),
    "starcoder2": TensorLayout(norms=_TWO_NORMS, linears=_STARCODER2_LINEARS),
    "gptneox": TensorLayout(
        norms=_TWO_NORMS,
        linears=_GPT_NEOX_LINEARS,
        factors=(),
        shared={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"},
        layers="gpt_neox.layers",
        by_head=("attn_qkv",),
    ),
    "gpt2": TensorLayout(
        norms={"attn_norm": "ln_1", "ffn_norm": "ln_2"},
        linears=_GPT2_LINEARS,
        factors=(),
        shared={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        turned=tuple(_GPT2_LINEARS),
    ),
}


_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


def _mixture(layout: TensorLayout, router: str = "gate", module: str = "mlp", *, biased: bool = False) -> TensorLayout:
    """The same model with a mixture of experts for an FFN."""
    linears = {name: path for name, path in LINEARS.items() if name.startswith("attn_")}
    return replace(
        layout,
        linears={**linears, "ffn_gate_inp": f"{module}.{router}"},
        experts={
            f"{module}.experts.{path}{suffix}": tuple(f"{name}.{kind}" for name in names)
            for path, names in _EXPERTS.items()
            for suffix, kind in (("", "weight"), ("_bias", "bias"))[: 2 if biased else 1]
        },
    )


MIXTURE_LAYOUTS = {
    "llama": _mixture(_LLAMA),
    "granitemoe": _mixture(_LLAMA, router="router", module="block_sparse_moe"),
    "qwen3moe": _mixture(LAYOUTS["qwen3"]),
    "olmoe": _mixture(TensorLayout(norms={**_TWO_NORMS, **_HEAD_NORMS})),
    "gpt-oss": _mixture(
        TensorLayout(
            norms={"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"},
            vectors={"self_attn.sinks": "attn_sinks.weight"},
        ),
        router="router",
        biased=True,
    ),
}


def layout_of(architecture: str, *, has_experts: bool) -> TensorLayout:
    """Return how models of an architecture are stored."""
    return (MIXTURE_LAYOUTS if has_experts else LAYOUTS)[architecture]


def path_in_layer(parameter: str, layout: TensorLayout) -> str:
    """Take the path to its layer off a parameter's name; of those outside of layers it says nothing."""
    return parameter.removeprefix(f"{layout.layers}.").partition(".")[2]


def file_names(parameter: str, layout: TensorLayout) -> tuple[str, ...]:
    """Name what a file has for a parameter of the model: one tensor, or for gates and ups of experts two."""
    stem, _, kind = parameter.rpartition(".")
    shared = {ours: theirs for theirs, ours in layout.shared.items()}
    if stem in shared:
        return (f"{shared[stem]}.{kind}",)
    stacked = {ours: theirs for theirs, ours in layout.stacked.items()}
    if (modules := stem.rpartition(".")[0]) in stacked:
        return (f"{stacked[modules]}.{kind}",)
    layer, path = parameter.removeprefix(f"{layout.layers}.").partition(".")[0], path_in_layer(parameter, layout)
    if path in layout.experts:
        return tuple(f"blk.{layer}.{name}" for name in layout.experts[path])
    if path in layout.vectors:
        return (f"blk.{layer}.{layout.vectors[path]}",)
    per_layer = {ours: theirs for theirs, ours in layout.per_layer.items()}
    return (f"blk.{layer}.{per_layer[path.rpartition('.')[0]]}.{kind}",)


def rows_by_head(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Put queries, keys and values (3 x heads x head size, ...) head by head: those of a head one after another."""
    return values.reshape(3, num_heads, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


def paired_rows(num_rows: int, num_heads: int) -> npt.NDArray[Any]:
    """Return (rows,) which row of the model is at each row of the file, where rotated pairs lie side by side.

    transformers has the halves of a head apart.
    """
    return np.arange(num_rows).reshape(num_heads, 2, num_rows // num_heads // 2).swapaxes(1, 2).reshape(-1)
