"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedModel

from .gguf_experts import MIXTURE_SHAPES, expert_keys, expert_tensors
from .gguf_gemma3n import GEMMA3N_SHAPE, gemma3n_keys, gemma3n_tensors
from .model_factory import build_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gpt_oss": "gpt-oss",
}
EPSILONS = {
    "stablelm": "layer_norm_eps",
    "starcoder2": "norm_epsilon",
    "gptneox": "layer_norm_eps",
    "gpt2": "layer_norm_epsilon",
}
"""Architecture -> the config's epsilon, where norms are LayerNorms."""
VOCABULARY = 384
HIDDEN = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
}
_NAMES_OF_GPTS = {
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NAMES_OF_OUTPUT_NORMS = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LLAMA_LIKE = ("llama", "smollm3", "granite", "granitemoe")
_GRANITE = {
    "attention.scale": ("attention_multiplier", 0.25),
    "embedding_scale": ("embedding_multiplier", 6.0),
    "logit_scale": ("logits_scaling", 0.5),
    "residual_scale": ("residual_multiplier", 0.4),
}
Values = npt.NDArray[Any]


def tiny_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model; heads are of another size than the hidden size divided by their number."""
    # Every fourth layer of SmolLM3 does not rotate.
    shape = {**_SHAPE, "head_dim": 8, **({"num_hidden_layers": 4} if family == "smollm3" else {}), **changes}
    if family in ("gemma2", "gemma3", "olmo3"):
        shape = {"sliding_window": 4, "num_hidden_layers": 2, **shape}
        layers = [["sliding_attention", "full_attention"][layer % 2] for layer in range(shape["num_hidden_layers"])]
        shape = {"layer_types": layers, **shape}
    if family == "gemma3n":
        shape = {**shape, **GEMMA3N_SHAPE, "vocab_size_per_layer_input": shape["vocab_size"], **changes}
    if family in ("gemma2", "gemma3"):
        shape = {"query_pre_attn_scalar": shape["head_dim"], **shape}
    if family == "gemma2":
        shape = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **shape}
    if family in ("granite", "granitemoe"):
        shape = {**dict(_GRANITE.values()), **shape}
    if family in MIXTURE_SHAPES:
        shape = {"num_experts_per_tok": 2, **MIXTURE_SHAPES[family], **shape}
    shape = _with_own_fields(family, shape)
    classes: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "smollm3": transformers.SmolLM3Config,
        "granite": transformers.GraniteConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
        "gemma3n": transformers.Gemma3nTextConfig,
        "olmo2": transformers.Olmo2Config,
        "olmo3": transformers.Olmo3Config,
        "phi3": transformers.Phi3Config,
        "stablelm": transformers.StableLmConfig,
        "starcoder2": transformers.Starcoder2Config,
        "gpt_neox": transformers.GPTNeoXConfig,
        "gpt2": transformers.GPT2Config,
        "mixtral": transformers.MixtralConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "olmoe": transformers.OlmoeConfig,
        "granitemoe": transformers.GraniteMoeConfig,
        "gpt_oss": transformers.GptOssConfig,
    }
    return classes[family](**shape)


def _with_own_fields(family: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Fields of families whose configs have none for the size of a head."""
    if family == "olmoe":
        # As many heads of keys as of queries, or llama.cpp has no norms for them.
        shape = {key: value for key, value in shape.items() if key != "head_dim"}
        return shape | {"num_attention_heads": 8, "num_key_value_heads": 8}
    if family not in ("phi3", "stablelm", "starcoder2", "gpt_neox", "gpt2"):
        return shape
    left_out = ("head_dim", "num_key_value_heads") if family in ("gpt_neox", "gpt2") else ("head_dim",)
    shape = {key: value for key, value in shape.items() if key not in left_out} | {"num_attention_heads": 8}
    if family in ("phi3", "stablelm", "gpt_neox"):
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
        shape = {"rope_parameters": rope, **shape}
    if family == "gpt2":
        shape["n_inner"] = shape.pop("intermediate_size")
    own: dict[str, dict[str, Any]] = {
        "phi3": {"sliding_window": 4, "original_max_position_embeddings": 256},
        "stablelm": {"use_qkv_bias": True},
        "starcoder2": {"sliding_window": None},
    }
    return {**own.get(family, {}), **shape}


def tiny_model(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    """A random model whose weights, and norms plus one, are exact in float16."""
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = parameter if "norm" in name or ".ln_" in name else torch.zeros_like(parameter)
            noise = torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3)
            parameter.copy_(((base + noise) * 512).round() / 512)
    model.eval()
    return model


@dataclass(kw_only=True)
class Contents:
    """What a GGUF file is to hold; tests change it before it is written.

    Attributes:
        metadata: key -> value; ints become uint32, floats float32, lists arrays.
        tensors: name -> float32 values, in torch's order.
        kinds: name -> type that the tensor is stored as; float32 where it is not named.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, Values]
    kinds: dict[str, gguf.GGMLQuantizationType] = field(default_factory=dict)


def contents(model: PreTrainedModel, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16) -> Contents:
    """What llama.cpp's converter would write of a model; matrices are stored as `kind`."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    tensors: dict[str, Values] = {}
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if architecture == "gemma3n":
        tensors, state = gemma3n_tensors(state, config), {}
    for name, values in state.items():
        if ".experts." in name:
            tensors |= expert_tensors(name, values, architecture)
        else:
            tensors[_file_name(name, architecture)] = _stored(name, values, architecture, config)
    matrices = [name for name, values in tensors.items() if values.ndim > 1 and not name.endswith(".bias")]
    kinds = {name: kind for name in matrices if "ffn_gate_inp" not in name and not tensors[name].shape[-1] % 8}
    metadata = {**_header(config, architecture), **tokenizer_metadata()}
    return Contents(architecture=architecture, metadata=metadata, tensors=tensors, kinds=kinds)


def _file_name(name: str, architecture: str) -> str:
    if name.endswith(".sinks"):
        return f"blk.{name.split('.')[2]}.attn_sinks.weight"
    stem, _, kind = name.rpartition(".")
    names = _NAMES_OF_OUTPUT_NORMS if architecture in ("gemma2", "gemma3", "olmo2", "gpt-oss") else _NAMES
    names = _NAMES_OF_GPTS if architecture in ("gptneox", "gpt2") else names
    if stem in names:
        return f"{names[stem]}.{kind}"
    layer, _, inner = stem.split(".", maxsplit=2)[2].partition(".")
    return f"blk.{layer}.{names[inner]}.{kind}"


def _stored(name: str, values: Values, architecture: str, config: transformers.PreTrainedConfig) -> Values:
    if architecture in ("gemma2", "gemma3") and "norm" in name:
        return values + np.float32(1.0)
    if architecture == "gptneox" and "query_key_value" in name:
        heads = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
        return heads.swapaxes(0, 1).reshape(values.shape)
    if architecture == "gpt2" and values.ndim == 2 and ".h." in name:
        return values.T
    if architecture in _LLAMA_LIKE and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def _header(config: Any, architecture: str) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.n_inner if architecture == "gpt2" else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture not in ("gptneox", "gpt2"):
        values |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
    kind = "layer_norm_epsilon" if architecture in EPSILONS else "layer_norm_rms_epsilon"
    values[f"attention.{kind}"] = float(getattr(config, EPSILONS.get(architecture, "rms_norm_eps")))
    if architecture == "gptneox":
        values["use_parallel_residual"] = config.use_parallel_residual
    values |= _rotation(config, architecture, head_dim)
    values |= expert_keys(config)
    if architecture == "gemma3n":
        values |= gemma3n_keys(config)
    if config.model_type in ("granite", "granitemoe"):
        values |= {key: float(getattr(config, field)) for key, (field, _) in _GRANITE.items()}
    if config.model_type == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[key] = float(getattr(config, key))
    if config.model_type in ("mistral", "gemma2", "gemma3_text", "olmo3", "phi3", "mixtral", "gpt_oss"):
        values["attention.sliding_window"] = config.sliding_window or 0
    if config.model_type in ("gemma3_text", "olmo3"):
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _rotation(config: Any, architecture: str, head_dim: int) -> dict[str, Any]:
    if architecture in ("llama", "qwen2"):
        return {"rope.dimension_count": head_dim}
    if architecture not in ("phi3", "stablelm", "gptneox"):
        return {}
    keys = {"rope.dimension_count": int(head_dim * config.rope_parameters["partial_rotary_factor"])}
    if architecture == "phi3":
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return keys


def tokenizer_metadata() -> dict[str, Any]:
    """The tiny tokenizer of the tests, as a header states it."""
    vocabulary = build_tokenizer().get_vocab()
    tokens = [f"[PAD{index}]" for index in range(VOCABULARY)]
    kinds = [5] * VOCABULARY
    for token, index in vocabulary.items():
        tokens[index], kinds[index] = token, 3 if index < 3 else 1
    merges = [" ".join(pair) for pair in _merges()]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def _merges() -> list[Sequence[str]]:
    merges: list[Any] = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def write(path: Path, what: Contents, *, parts: int = 1) -> list[Path]:
    """Write a file, or several as llama.cpp splits them: the metadata in the first, the tensors in turn."""
    names = list(what.tensors)
    paths = []
    for part in range(parts):
        part_path = path if parts == 1 else path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(part_path, what.architecture)
        if part:
            # Parts after the first hold nothing but their place.
            writer.kv_data[0].clear()
        else:
            _add_metadata(writer, what.metadata)
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))
        for name in names[part::parts]:
            _add_tensor(writer, name, what)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(part_path)
    return paths


def _add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
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


def _add_tensor(writer: gguf.GGUFWriter, name: str, what: Contents) -> None:
    kind = what.kinds.get(name, gguf.GGMLQuantizationType.F32)
    values = np.ascontiguousarray(what.tensors[name], dtype=np.float32)
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
