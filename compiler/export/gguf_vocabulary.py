"""A bundle's tokenizer as keys of a GGUF file, and proof that they split text alike.

tokenizer.json says more than the keys can: what is written is read again as a GGUF file's tokenizer is, and compared
on texts of many scripts. A tokenizer that they do not describe is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler.models.gguf.header import Header
from coreinfer.compiler.models.gguf.splits import SPLITS
from coreinfer.compiler.models.gguf.tokenizer import PHI3_NAMES, build_tokenizer, drops_spaces
from tokenizers import Tokenizer

from .chosen import ChosenModel
from .gguf_refusal import refusal

__all__ = ["PROBES", "vocabulary_fields"]

_PREFIX = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
_TEMPLATE = "tokenizer.chat_template"
_IDS = {"bos_token": "bos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
_MORE_ENDS = ("eot_token_id", "eom_token_id")
PROBES = (
    "Hello World, it's 1234567 o'clock; WE'RE late (again)...  two spaces\n\n\tand a tab\r\n",
    "def f(x_1: int) -> str:\n    return f'{x_1:>08.3f}' + \"\\n\"  # 100%",
    "Größe, naïve café; Ελληνικά, русский язык 2024, العربية, עברית, हिन्दी, ไทย",
    "漢字かな交じり文、中文字符。한국어 텍스트 １２３",
    "emoji 👩‍👩‍👧 🇩🇪 cafe\u0301 ½ ² № ﬁ\u00a0nbsp\u200bzero <|x|> <s> [INST] ",
    "   leading, trailing   ",
    "HTTPServer camelCase snake_case ALLCAPS1a2b 3.14e-10 $5,000.00 a@b.co http://x.y/z?q=1&r=2",
)


def vocabulary_fields(chosen: ChosenModel) -> dict[str, Any]:
    """Return the tokenizer's keys, and the model's name, by which llama.cpp knows some tokenizers.

    Raises:
        UnsupportedModelError: no keys describe this tokenizer.
    """
    bundle = chosen.bundle
    text = bundle.read_bytes(LAYOUT.tokenizer).decode()
    ours, data = Tokenizer.from_str(text), json.loads(text)
    defaults = json.loads(bundle.read_bytes(LAYOUT.generation))
    fields = _tokens(data, bundle.manifest.model.vocab_size)
    fields |= _special(ours, data, defaults)
    kinds = _pieces(data, fields) if _is_pieces(data) else _byte_level(data)
    templates = _templates(chosen)
    for name, kind in product(_names(chosen.title, fields["tokens"]), kinds):
        found = {f"{_PREFIX}{key}": value for key, value in {**fields, **kind}.items()} | {"general.name": name}
        if _reads_alike(ours, found, chosen.family.name, str(bundle.path)):
            return {**found, **templates}
    path = bundle.path / LAYOUT.tokenizer
    raise refusal(f"{path}: llama.cpp has no tokenizer that splits text as this one; use --to hf")


def _is_pieces(data: Mapping[str, Any]) -> bool:
    return bool(data["model"].get("byte_fallback"))


def _tokens(data: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    model = data["model"]
    if model.get("type") != "BPE":
        raise refusal(f"a tokenizer of type {model.get('type')} is not exported; use --to hf")
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [_UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index] = token
        is_byte = _is_pieces(data) and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        kinds[index] = _BYTE if is_byte else _NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return {"tokens": tokens, "token_type": kinds}


def _special(ours: Tokenizer, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: ours.token_to_id(token) for name, token in defaults["special_tokens"].items()}
    fields: dict[str, Any] = {key: named[name] for name, key in _IDS.items() if named.get(name) is not None}
    ends = [int(token_id) for token_id in defaults["eos_token_ids"]]
    first = named.get("eos_token")
    ends = ([first] if first in ends else []) + [end for end in ends if end != first]
    if ends:
        fields["eos_token_id"] = ends[0]
    # llama.cpp finds others by their text, such as <|im_end|>.
    fields |= dict(zip(_MORE_ENDS, ends[1:], strict=False))
    with_special, without = (ours.encode("a", add_special_tokens=adds).ids for adds in (True, False))
    fields["add_bos_token"] = with_special[:1] != without[:1]
    fields["add_eos_token"] = with_special[-1:] != without[-1:]
    return fields


def _byte_level(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    same = {"model": "gpt2", "merges": merges, "add_space_prefix": False}
    return [{**same, "pre": pre} for pre in SPLITS]


def _pieces(data: Mapping[str, Any], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """SentencePiece's: a token's score is the rank of the first merge that makes it, or of the token itself."""
    tokens: Sequence[str] = fields["tokens"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    by_merges = [float(-ranks.get(token, len(ranks))) for token in tokens]
    by_ids = [float(-index) for index in range(len(tokens))]
    return [
        {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": spaced}
        for scores in (by_ids, by_merges)
        for spaced in (False, True)
    ]


def _templates(chosen: ChosenModel) -> dict[str, Any]:
    bundle = chosen.bundle
    found = {}
    if bundle.has(LAYOUT.chat_template):
        found[_TEMPLATE] = bundle.read_bytes(LAYOUT.chat_template).decode()
    if bundle.has(LAYOUT.tool_template):
        found[f"{_TEMPLATE}.tool_use"] = bundle.read_bytes(LAYOUT.tool_template).decode()
        return {**found, "tokenizer.chat_templates": ["tool_use"]}
    return found


def _names(title: str, tokens: Sequence[str]) -> Iterator[str]:
    """The model's title, and another by which llama.cpp drops spaces after control tokens, or does not."""
    other = re.sub("|".join(PHI3_NAMES), "Phi 3", title, flags=re.IGNORECASE)
    if other != title:
        if drops_spaces(title, set(tokens)):
            yield title
        yield other
        return
    yield title
    if drops_spaces(named := f"{title} ({PHI3_NAMES[0]})", set(tokens)):
        yield named


def _reads_alike(ours: Tokenizer, fields: Mapping[str, Any], architecture: str, where: str) -> bool:
    metadata = {"general.architecture": architecture, **fields}
    header = Header(file=Path(where), metadata=metadata, tensors={})
    theirs = build_tokenizer(header, where).backend_tokenizer
    texts = [*PROBES, *(f"{token} and {token}x" for token in _added(ours))]
    return all(
        ours.encode(text, add_special_tokens=adds).ids == theirs.encode(text, add_special_tokens=adds).ids
        for text in texts
        for adds in (False, True)
    )


def _added(ours: Tokenizer) -> list[str]:
    return [token.content for token in ours.get_added_tokens_decoder().values()][:64]
