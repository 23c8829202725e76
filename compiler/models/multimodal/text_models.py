"""Models that read pictures or sounds too: the text model inside them, which is what is compiled.

In transformers these are a text model, towers for what is no text, and a head. Of those listed here, text alone runs
through the text model and the head just as through a model of its own: image tokens that look ahead, learned lines
between pictures and the like are not reached.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError

__all__ = ["MULTIMODAL", "TEXT_NAMES", "Multimodal", "multimodal_of", "text_fields", "text_name"]

_PLAIN_TEXT = ("llama", "mistral", "qwen2", "qwen3")
"""Text models whose logits are what their head puts out: transformers applies no factor or limit of a text_config
after the head of these multimodal models, but for Gemma 3n's."""


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """What one of transformers' multimodal models consists of.

    Attributes:
        text_types: `model_type`s of text models that compute the same alone; the first is that of a text_config that
            names none.
        others: names of the parts that text does not reach, without the `model.` that some files have before them.
        tied_head: whether embedding and head are one where neither config says it and no file tells.
        without: fields of a text_config that change the text model's logits, and not the whole model's.
    """

    text_types: tuple[str, ...] = _PLAIN_TEXT
    others: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    tied_head: bool = False
    without: tuple[str, ...] = ()


_WITH_NEWLINE = ("vision_tower", "multi_modal_projector", "image_newline")
_IDEFICS = ("vision_model", "connector")
MULTIMODAL: Mapping[str, Multimodal] = {
    "gemma3": Multimodal(text_types=("gemma3_text",), tied_head=True, without=("final_logit_softcapping",)),
    "gemma3n": Multimodal(
        text_types=("gemma3n_text",),
        others=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
        tied_head=True,
    ),
    "mistral3": Multimodal(text_types=("mistral", "llama", "qwen2", "qwen3"), tied_head=True),
    "llava": Multimodal(),
    "llava_next": Multimodal(others=_WITH_NEWLINE),
    "llava_onevision": Multimodal(text_types=("qwen2", "llama", "mistral", "qwen3"), others=_WITH_NEWLINE),
    "internvl": Multimodal(text_types=("qwen2", "llama", "mistral", "qwen3"), tied_head=True),
    "idefics3": Multimodal(others=_IDEFICS),
    "smolvlm": Multimodal(others=_IDEFICS),
}
"""`model_type` -> what such a model consists of."""
TEXT_NAMES: Mapping[str, str] = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.(?:language_model|text_model)\.": "model.",
}
"""Beginnings of names of the text model's tensors, as files of these models have them -> alone. First match counts."""
_TIED = "tie_word_embeddings"
_OUTER_FIELDS = (
    "eos_token_id",
    # How weights are quantized, those that can be undone and the others.
    "quantization_config",
    "quantization",
    "compression_config",
)
"""Fields of config.json that count for the text model, whatever its text_config says."""


def multimodal_of(config: Mapping[str, Any]) -> Multimodal | None:
    """Find what a model consists of; None of one that reads text alone, or is not known.

    Args:
        config: of config.json; only `model_type` is read.
    """
    return MULTIMODAL.get(str(config.get("model_type")))


def text_fields(config: Mapping[str, Any], where: str, has_head: Callable[[], bool | None]) -> Mapping[str, Any]:
    """Return what a config.json states of the text model: all that it states, where it is of a text model itself.

    Args:
        where: name of the model in an error, such as "--model tiny".
        has_head: whether the files have a head beside the embedding; None where that cannot be told.
    Raises:
        ConfigError: there is no text_config.
        UnsupportedModelError: the text model is none that computes the same alone.
    """
    parts = multimodal_of(config)
    if parts is None:
        return config
    outer, text = config["model_type"], config.get("text_config")
    if not isinstance(text, Mapping) or not text:
        raise ConfigError(
            f"{where}: config.json: text_config: expected what the text model of this {outer} is, got "
            f"{'nothing' if not text else type(text).__name__}; give the whole checkpoint"
        )
    text_type = text.get("model_type") or parts.text_types[0]
    if text_type not in parts.text_types:
        raise UnsupportedModelError(
            f"{where}: a {outer} whose text model is a {text_type}; expected one that computes the same alone: "
            f"{', '.join(parts.text_types)}"
        )
    if uncomputed := [field for field in parts.without if text.get(field) is not None]:
        raise UnsupportedModelError(
            f"{where}: config.json has {', '.join(f'{field} {text[field]!r}' for field in uncomputed)} in text_config, "
            f"which {outer} models do not compute; take it out if the model was trained without it"
        )
    outer_values = {field: config[field] for field in _OUTER_FIELDS if config.get(field) is not None}
    tied = _is_tied(config, text, parts, has_head)
    return {**text, **_dtype(text, config), **outer_values, "model_type": text_type, _TIED: tied}


def _dtype(text: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Type of the weights; transformers would look for it in the files, where towers may have another."""
    stated = [of[field] for of in (text, config) for field in ("dtype", "torch_dtype") if of.get(field)]
    return {"dtype": stated[0]} if stated else {}


def _is_tied(
    config: Mapping[str, Any], text: Mapping[str, Any], parts: Multimodal, has_head: Callable[[], bool | None]
) -> bool:
    """Whether the embedding is the head; published configs do not say, or say one thing outside and another inside."""
    stated = {bool(of[_TIED]) for of in (config, text) if of.get(_TIED) is not None}
    if len(stated) == 1:
        return stated.pop()
    found = has_head()
    return (bool(stated) or parts.tied_head) if found is None else not found


def text_name(name: str, parts: Multimodal) -> str | None:
    """Name in the text model of a tensor in a multimodal model's file; None of the other parts'."""
    if name.removeprefix("model.").split(".")[0] in parts.others:
        return None
    for beginning, alone in TEXT_NAMES.items():
        renamed, found = re.subn(beginning, alone, name)
        if found:
            return renamed
    return name
