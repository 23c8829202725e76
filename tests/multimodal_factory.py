"""Tiny random multimodal models of transformers, with the text models of `model_factory` inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from .model_factory import build_model, build_tokenizer, tiny_config

TEXT_OF = {
    "gemma3": "gemma3",
    "mistral3": "mistral",
    "llava": "llama",
    "llava_next": "mistral",
    "llava_onevision": "qwen2",
    "internvl": "qwen3",
    "idefics3": "llama",
    "smolvlm": "llama",
}
"""`model_type` -> the family of its text model."""
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Token ids of pictures: beyond what the tests' texts have.
_IMAGE = 383
_OUTER: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": _IMAGE},
    "internvl": {"image_token_id": _IMAGE},
    "idefics3": {"image_token_id": _IMAGE},
    "smolvlm": {"image_token_id": _IMAGE},
}


def multimodal_config(kind: str, **text: Any) -> Any:
    """The config of a tiny multimodal model.

    Args:
        text: fields of its text model's config, in the place of those of `tiny_config`.
    """
    config = tiny_config(TEXT_OF[kind])
    config.update(text)
    kinds = {"mistral3": "pixtral", "internvl": "internvl_vision", "gemma3": "siglip_vision_model"}
    vision = {**_VISION, "model_type": kinds.get(kind, "clip_vision_model")}
    if kind == "internvl":
        vision |= {"image_size": [16, 16], "patch_size": [8, 8]}
    if kind in ("idefics3", "smolvlm"):
        vision |= {"model_type": f"{kind}_vision"}
    outer = _OUTER.get(kind, {"image_token_index": _IMAGE})
    outer_class: Any = transformers.CONFIG_MAPPING[kind]
    return outer_class(
        text_config=config.to_dict(), vision_config=vision, tie_word_embeddings=config.tie_word_embeddings, **outer
    )


def build_multimodal(kind: str, **text: Any) -> PreTrainedModel:
    """Build a tiny multimodal model in float32; its text model is that of `build_model`."""
    torch.manual_seed(5)
    model: Any = transformers.AutoModelForImageTextToText.from_config(
        multimodal_config(kind, **text), dtype=torch.float32
    )
    alone = build_model(TEXT_OF[kind], **text).state_dict()
    body = model.model.text_model if kind in ("idefics3", "smolvlm") else model.model.language_model
    body.load_state_dict({name.removeprefix("model."): value for name, value in alone.items() if "lm_head" not in name})
    with torch.no_grad():
        model.lm_head.weight.copy_(alone["lm_head.weight"])
    return model.eval()  # type: ignore[no-any-return]


def save_multimodal(folder: Path, kind: str, **text: Any) -> PreTrainedModel:
    """Write a tiny multimodal model and a tokenizer to a folder that `--model` takes."""
    model = build_multimodal(kind, **text)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def build_gemma3n(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Build a tiny Gemma 3n in float32, its tower for pictures a single matrix: the real one needs a library."""
    text = build_model("gemma3n")
    config = transformers.Gemma3nConfig(
        text_config=text.config.to_dict(),
        vision_config={"hidden_size": 16},
        audio_config={"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1},
    )
    from_config: Any = transformers.AutoModel.from_config

    def without_pictures(config: Any, **options: Any) -> Any:
        return torch.nn.Linear(4, 4) if config.model_type == "gemma3n_vision" else from_config(config, **options)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoModel, "from_config", without_pictures)
        model: Any = transformers.Gemma3nForConditionalGeneration(config)
    alone = text.state_dict()
    body: Any = model.model.language_model
    body.load_state_dict({name.removeprefix("model."): value for name, value in alone.items() if "lm_head" not in name})
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]
