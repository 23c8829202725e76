"""Compare generated answers with right ones."""

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["entity_f1", "exact_match", "normalize", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra space, as SQuAD's evaluation does (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is one of the accepted ones, or begins with one as whole words, else 0.

    A base model continues after its answer, so what follows the accepted words does not count against it.
    """
    words = normalize(answer).split()
    targets = [normalize(text).split() for text in accepted]
    return float(any(target and words[: len(target)] == target for target in targets))


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Maximum F1 of the words in common with an accepted answer."""
    return max((_f1(normalize(answer).split(), normalize(text).split()) for text in accepted), default=0.0)


def entity_f1(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the `name (type)` entries of a list with semicolons."""
    return max((_f1(_entities(answer), _entities(text)) for text in accepted), default=0.0)


def _entities(text: str) -> list[str]:
    # Parentheses tell names from types, so entries are only trimmed and lowered.
    return sorted({" ".join(entry.lower().split()) for entry in text.split(";") if entry.strip()})


def _f1(got: list[str], expected: list[str]) -> float:
    common = sum((Counter(got) & Counter(expected)).values())
    if not got or not expected:
        return float(got == expected)
    return 2 * common / (len(got) + len(expected))
