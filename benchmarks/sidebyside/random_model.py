"""A model of Llama-3.2-1B's shape with random weights, for transformers and as a GGUF of the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["write_gguf", "write_transformers"]

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_transformers(tokenizer_folder: Path, target: Path) -> None:
    """Write the model with another model's tokenizer, whose vocabulary it has."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(target)
    finally:
        torch.set_default_dtype(default)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(target)


def write_gguf(model_folder: Path, tokenizer_gguf: Path, target: Path) -> None:
    """Write the same weights in fp16, with the tokenizer of another GGUF."""
    config = LlamaConfig.from_pretrained(model_folder)
    writer = gguf.GGUFWriter(str(target), "llama")
    _add_shape(writer, config)
    for name, value, kind, item_kind in _tokenizer_fields(tokenizer_gguf):
        writer.add_key_value(name, value, kind, sub_type=item_kind)
    with safe_open(model_folder / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 -- not a mapping
            tensor = weights.get_tensor(name).float().numpy()
            writer.add_tensor(_gguf_name(name), _as_llama_cpp(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _tokenizer_fields(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            item_kind = field.types[1] if len(field.types) > 1 else None
            yield name, field.contents(), field.types[0], item_kind


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _as_llama_cpp(name: str, tensor: Any, config: Any) -> Any:
    """Keep norms in float32; interleave the halves of each query and key head, as llama.cpp rotates them."""
    if tensor.ndim == 1:
        return tensor
    for projection, num_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if projection in name:
            tensor = tensor.reshape(num_heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(tensor, dtype=np.float16)
