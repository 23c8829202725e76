"""Tiny random models of every family, a tiny tokenizer and a tiny sentence encoder, built on the spot.

Weights are rounded to bfloat16, so that a bundle stores them without loss.
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = (
    "opt",
    "opt-post-norm",
    "llama",
    "mistral",
    "exaone",
    "ministral",
    "smollm3",
    "granite",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3n",
    "olmo2",
    "olmo3",
    "phi3",
    "stablelm",
    "starcoder2",
    "gpt_neox",
    "gpt2",
)
"""Families whose FFN is one."""
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
"""Families whose FFN is a mixture of experts."""
SHAPES = ("opt", "opt-post-norm", "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
"""Families whose parts are unlike: for tests of what is stored and moved, whatever a model's arithmetic is."""
UNLIKE = ("opt", "llama", "gemma3")
"""The fewest of them, for what other tests show of all families in one format: LayerNorm, biases and learned positions;
RMSNorm, gates and a tied head; four norms and windows."""
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 96}
_SLIDING: dict[str, Any] = {"sliding_window": 16}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


_MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 6.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.4,
}
_CONFIGS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "exaone": (transformers.ExaoneConfig, {}),
    "ministral": (transformers.MinistralConfig, {**_SLIDING, "layer_types": _MIXED}),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "granite": (transformers.GraniteConfig, _MULTIPLIERS),
    "qwen3": (transformers.Qwen3Config, {}),
    # Caps that the tiny models' scores and logits reach.
    "gemma2": (
        transformers.Gemma2Config,
        {**_SLIDING, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {**_SLIDING, "layer_types": _MIXED}),
    # The last layer has the first one's keys and values, and some tokens have no embedding of their own in the layers.
    "gemma3n": (
        transformers.Gemma3nTextConfig,
        {
            **_SLIDING,
            "layer_types": _MIXED,
            "num_kv_shared_layers": 1,
            "activation_sparsity_pattern": [0.6, 0.0, 0.75],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
            "laurel_rank": 8,
        },
    ),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo3": (transformers.Olmo3Config, {**_SLIDING, "layer_types": _MIXED}),
    "phi3": (transformers.Phi3Config, {**_SLIDING, "partial_rotary_factor": 0.5}),
    "stablelm": (transformers.StableLmConfig, {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": (transformers.Starcoder2Config, _SLIDING),
    "mixtral": (transformers.MixtralConfig, {**_SLIDING, "num_local_experts": 6}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **_SLIDING,
            "use_sliding_window": True,
            "num_experts": 6,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 6, "intermediate_size": 32}),
    "granitemoe": (
        transformers.GraniteMoeConfig,
        {
            **_MULTIPLIERS,
            "num_local_experts": 6,
            "intermediate_size": 48,
        },
    ),
    # A limit that the tiny model's gates and ups reach.
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            **_SLIDING,
            "layer_types": _MIXED,
            "num_local_experts": 6,
            "intermediate_size": 40,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """The config of a tiny model: 3 layers, where a family slides some that do and one that does not."""
    if family.startswith("opt"):
        post_norm = family == "opt-post-norm"
        return transformers.OPTConfig(
            **_SHAPE, ffn_dim=96, word_embed_proj_dim=16 if post_norm else 32, do_layer_norm_before=not post_norm
        )
    if family == "gpt_neox":
        # As its files state it; the class has no such argument.
        stated: dict[str, Any] = {"rotary_pct": 0.5}
        return transformers.GPTNeoXConfig(**_SHAPE, intermediate_size=96, **stated)
    if family == "gpt2":
        return transformers.GPT2Config(**_SHAPE, n_inner=96)
    if family == "llama":
        return transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True)
    if family == "mistral":
        return transformers.MistralConfig(**_GROUPED, sliding_window=16)
    if family == "qwen2":
        return transformers.Qwen2Config(**{k: v for k, v in _GROUPED.items() if k != "head_dim"})
    kind, settings = _CONFIGS[family]
    if family in MIXTURES:
        settings = {"num_experts_per_tok": 2, **settings}
    return kind(**{**_GROUPED, **settings})


def build_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Build a tiny random causal language model in float32, its weights exact in bfloat16.

    Args:
        settings: fields of the config, in the place of those of `tiny_config`.
    """
    torch.manual_seed(seed)
    config = tiny_config(family)
    config.update(settings)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than at the start of training, so that the FFN matters; norms stay near 1, biases are not 0, and
            # sinks are as unlike as scores.
            scale = 1.0 if name.endswith("sinks") else 0.1 if parameter.ndim == 1 else 0.25
            noise = torch.randn_like(parameter) * scale
            is_norm = "norm" in name or ".ln_" in name
            parameter.copy_((parameter + noise if is_norm else noise).bfloat16().float())
    model.eval()
    return model


@lru_cache(maxsize=1)
def corpus_texts() -> tuple[str, ...]:
    """120 sentences on four topics."""
    words = {
        "kitchen": ["flour", "butter", "oven", "sugar", "bake", "stir", "recipe", "dough", "salt", "lemon", "soup"],
        "code": ["function", "loop", "variable", "compiler", "return", "string", "array", "debug", "class", "import"],
        "sea": ["wave", "ship", "harbour", "sailor", "storm", "anchor", "island", "tide", "captain", "whale", "sail"],
        "law": ["court", "judge", "contract", "clause", "appeal", "witness", "verdict", "statute", "lawyer", "claim"],
    }
    generator = random.Random(0)
    joined = [
        f"The {topic} text number {number} speaks of {' and '.join(generator.choices(vocabulary, k=14))}."
        for number in range(30)
        for topic, vocabulary in words.items()
    ]
    return tuple(joined)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the tiny corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def save_model(folder: Path, family: str, **settings: Any) -> Path:
    """Write a tiny model (see `build_model`) and its tokenizer to a folder that `--model` takes."""
    build_model(family, **settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """Write a tiny random sentence encoder to a folder that `--encoder` takes."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=128, **names)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    parts = folder / "parts"
    transformers.BertModel(config).save_pretrained(parts)
    fast.save_pretrained(parts)
    transformer = Transformer(str(parts), max_seq_length=128)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


def save_corpus(path: Path) -> Path:
    """Write the tiny corpus as a text file, a blank line between texts."""
    path.write_text("\n\n".join(corpus_texts()), encoding="utf-8")
    return path
