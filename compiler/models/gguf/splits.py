"""How text is split before byte-level merges, by the name that a GGUF file states for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

__all__ = ["SPLITS", "Split"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the tokenizer of one kind of model does in addition to its merges.

    Attributes:
        pattern: regular expression of the pieces, None for that of GPT-2.
        digits: whether each digit is a piece of its own before anything else.
        composes: whether text is brought to Unicode's composed form first.
        whole_words: whether a piece that is in the vocabulary is taken whole, without merges.
        begins: whether a text begins with the token for that unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    composes: bool = False
    whole_words: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> Any:
        """Build the splitter, which ends in the byte alphabet."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


# As the models' own tokenizer.json have them; Llama takes digits by three, Qwen one by one.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _ENDING + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _ENDING + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA = Split(pattern=_PIECES % "{1,3}", whole_words=True, begins=True)
_DBRX = Split(pattern=_PIECES % "{1,3}")
_QWEN = Split(pattern=_PIECES % "", composes=True)

SPLITS: Mapping[str, Split] = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "starcoder": Split(digits=True),
    "refact": Split(digits=True),
    "llama-bpe": _LLAMA,
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "falcon3": _LLAMA,
    "dbrx": _DBRX,
    "smaug-bpe": _DBRX,
    "olmo": Split(),
    "tekken": Split(pattern=_CASED_PIECES, whole_words=True, begins=True),
    # Of gpt-oss, as tiktoken's o200k_base has it.
    "gpt-4o": Split(pattern=_O200K_PIECES),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
}
"""tokenizer.ggml.pre -> how that model splits; what is not here is refused, for another split gives other tokens."""
