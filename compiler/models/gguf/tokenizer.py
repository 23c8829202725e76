"""A tokenizer from the header of a GGUF file, as the model that it was made from has it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .header import Header
from .splits import SPLITS

__all__ = ["PHI3_NAMES", "build_tokenizer", "drops_spaces"]

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"
_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
# Types of tokens in the file.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Keys that change a text's tokens and are not carried over, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([],),
    "add_sep_token": (False,),
}
PHI3_NAMES = ("phi-3", "phi3")
"""llama.cpp knows Phi 3's tokenizers by these in the model's name, in capitals or not."""
_SPACES_STAY = ("<s>", "<unk>", "<|endoftext|>")
_PHI3_TOKENS = (*_SPACES_STAY, "</s>")
_Keys = Mapping[str, Any]


def build_tokenizer(header: Header, name: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer that a file describes.

    Args:
        name: name of the model in an error.
    Raises:
        ConfigError: the vocabulary is missing or contradicts itself.
        UnsupportedModelError: the tokenizer is of a kind, or splits in a way, that is not known here.
    """
    keys = {key.removeprefix(_PREFIX): value for key, value in header.metadata.items() if key.startswith(_PREFIX)}
    where = f"--model {name}: {_PREFIX}"
    for key, neutral in _NEUTRAL.items():
        if key in keys and keys[key] not in neutral:
            raise UnsupportedModelError(f"{where}{key} = {keys[key]!r} is not supported; {_ADVICE}")
    kind = keys.get("model")
    architecture = str(header.metadata.get("general.architecture"))
    build = _KINDS.get((str(kind), architecture)) or _KINDS.get((str(kind), ""))
    if build is None:
        raise UnsupportedModelError(
            f"{where}model = {kind!r} is not supported; expected {' or '.join(sorted({k for k, _ in _KINDS}))}"
        )
    try:
        backend, begins = build(keys, where)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{where}tokens: no tokenizer can be built of them ({type(error).__name__}: {error})"
        ) from error
    except Exception as error:
        # What the tokenizers library raises of merges that the vocabulary lacks is a plain Exception.
        if type(error) is not Exception:
            raise
        raise ConfigError(f"{where}merges: they do not fit the vocabulary ({error})") from error
    _add_tokens(backend, keys, where, drops=drops_spaces(str(header.metadata.get("general.name", "")), keys["tokens"]))
    return _wrap(backend, keys, where, begins=begins, chat_template=_chat_template(header.metadata))


_ADVICE = "compile the model in safetensors that the file was made from"


def _wrap(backend: Tokenizer, keys: _Keys, where: str, *, begins: bool, chat_template: Any) -> PreTrainedTokenizerFast:
    tokens = keys["tokens"]
    special = {name: tokens[keys[key]] for name, key in _SPECIAL_TOKENS.items() if keys.get(key) is not None}
    begins, ends = bool(keys.get("add_bos_token", begins)), bool(keys.get("add_eos_token", False))
    for adds, key, token in ((begins, "bos", "bos_token"), (ends, "eos", "eos_token")):
        if adds and token not in special:
            raise ConfigError(f"{where}{key}_token_id: expected a token id, for each text is given it, got none")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=begins,
        add_eos_token=ends,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(_SPECIAL_TOKENS) | special,
    )


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the template; where there are several, all by name, the first as "default"."""
    named = {
        key.removeprefix(f"{_TEMPLATE}."): str(text)
        for key, text in metadata.items()
        if key.startswith(f"{_TEMPLATE}.")
    }
    default = metadata.get(_TEMPLATE)
    if not named:
        return None if default is None else str(default)
    return named if default is None else {"default": str(default), **named}


def _byte_level(keys: _Keys, where: str) -> tuple[Tokenizer, bool]:
    """Byte-level merges, as GPT-2 began them; returns the tokenizer, and whether a text begins with a token."""
    pre = keys.get("pre")
    if pre not in SPLITS:
        stated = f"pre = {pre!r} is not known" if pre is not None else "pre: the file does not state how text is split"
        raise UnsupportedModelError(f"{where}{stated}; expected one of {', '.join(SPLITS)}; {_ADVICE}")
    if keys.get("add_space_prefix"):
        raise UnsupportedModelError(f"{where}add_space_prefix = True is not supported with {keys['model']}; {_ADVICE}")
    split = SPLITS[str(pre)]
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    vocabulary = _vocabulary([_spelled(token, kind) for token, kind in _typed(keys)], where)
    model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=split.whole_words)
    tokenizer = Tokenizer(model)
    if split.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.begins


def _spelled(token: str, kind: int) -> str:
    """Spell an ordinary token that is not in the byte alphabet; tokens that text is searched for stay as they are."""
    if kind in (_CONTROL, _USER_DEFINED) or _ALPHABET.issuperset(token):
        return token
    speller = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in speller.pre_tokenize_str(token))


def _sentence_pieces(keys: _Keys, where: str) -> tuple[Tokenizer, bool]:
    """SentencePiece as Llama has it: a space before the text, bytes for what is not in the vocabulary."""
    spaced = bool(keys.get("add_space_prefix", True))
    tokenizer = Tokenizer(_pieces_model(keys["tokens"], keys, keys.get("scores"), where))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if spaced else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if spaced else [])])
    return tokenizer, True


def _gemma_pieces(keys: _Keys, where: str) -> tuple[Tokenizer, bool]:
    """SentencePiece as Gemma has it: no space before the text; the order of the tokens is that of the merges."""
    if keys.get("add_space_prefix", False):
        raise UnsupportedModelError(f"{where}add_space_prefix = True is not supported with Gemma's; {_ADVICE}")
    # Files spell tokens of spaces alone with spaces.
    tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in keys["tokens"]]
    tokenizer = Tokenizer(_pieces_model(tokens, keys, [-index for index in range(len(tokens))], where))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, True


def _pieces_model(tokens: list[str], keys: _Keys, scores: list[float] | None, where: str) -> models.BPE:
    vocabulary = _vocabulary(tokens, where)
    if "merges" in keys:
        merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    elif scores is None or len(scores) != len(tokens):
        raise ValueError(f"expected a score for each of {len(tokens)} tokens")
    else:
        merges = _merges_of(tokens, vocabulary, scores)
    unknown = keys.get("unknown_token_id")
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )


def _merges_of(tokens: list[str], vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that a vocabulary with scores stands for: of each token all pairs that make it, the best token first."""
    found = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        inside = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        inside.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in inside]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _vocabulary(tokens: list[str], where: str) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ConfigError(f"{where}tokens: {len(tokens) - len(vocabulary)} tokens stand in it twice")
    return vocabulary


def _typed(keys: _Keys) -> list[tuple[str, int]]:
    tokens = keys["tokens"]
    kinds = keys.get("token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"expected a type for each of {len(tokens)} tokens, got {len(kinds)}")
    return list(zip(tokens, kinds, strict=True))


def drops_spaces(name: str, tokens: Collection[str]) -> bool:
    """Whether spaces after a control token are no part of a text.

    No key of a file says so. llama.cpp goes by the model's name, and does not load a file with such a name that lacks
    one of four tokens.

    Args:
        name: "general.name".
        tokens: all of the vocabulary.
    """
    is_named = any(part in name.lower() for part in PHI3_NAMES)
    return is_named and all(token in tokens for token in _PHI3_TOKENS)


def _add_tokens(backend: Tokenizer, keys: _Keys, where: str, *, drops: bool) -> None:
    """Have text searched for control tokens, such as the end of a turn, and for those that its maker added."""
    present = backend.get_vocab()
    typed = _typed(keys)

    def added(token: str) -> AddedToken:
        return AddedToken(token, normalized=False, rstrip=drops and token not in _SPACES_STAY)

    backend.add_special_tokens([added(token) for token, kind in typed if kind == _CONTROL])
    backend.add_tokens([added(token) for token, kind in typed if kind == _USER_DEFINED and token in present])
    if backend.get_vocab_size() != len(typed):
        raise ConfigError(
            f"{where}token_type: {backend.get_vocab_size() - len(typed)} tokens are not in the vocabulary"
        )


# (tokenizer.ggml.model, architecture, or "" for any) -> how such a tokenizer is built.
_KINDS: Mapping[tuple[str, str], Callable[[_Keys, str], tuple[Tokenizer, bool]]] = {
    ("gpt2", ""): _byte_level,
    ("llama", ""): _sentence_pieces,
    ("llama", "gemma3"): _gemma_pieces,
    ("llama", "gemma3n"): _gemma_pieces,
}
