"""The seed prompts of the builtin corpus, and how far the model continues each."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from coreinfer.compiler.config import CompileConfig

__all__ = ["Continuation", "Seed", "load_seeds", "plan_continuation"]

_MIN_NEW_TOKENS = 32
_SURPLUS = 1.05
"""Some continuations end early, and some seeds are longer than others."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A seed prompt.

    Attributes:
        topic: what it is about.
        kind: "chat" for something that a user asks, "text" for the opening of a document.
    """

    topic: str
    kind: str
    prompt: str


def load_seeds() -> tuple[Seed, ...]:
    """Read the seed prompts that ship with the package."""
    text = resources.files(__package__).joinpath("seeds.jsonl").read_text(encoding="utf-8")
    return tuple(Seed(**json.loads(line)) for line in text.splitlines())


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the model writes.

    Attributes:
        seed_ids: numbers of the seeds that are continued, ascending.
        num_new: maximum number of new tokens of each.
    """

    seed_ids: Sequence[int]
    num_new: int


def plan_continuation(config: CompileConfig, prompt_tokens: Sequence[int]) -> Continuation:
    """Choose the seeds, and the length of continuations, so that both together make the token budget.

    Continuations have at least 32 tokens, and half a document at most. Where that is too much for the budget, evenly
    spread seeds are continued, and the others left out.

    Args:
        prompt_tokens: of each seed.
    """
    num_seeds, whole = len(prompt_tokens), sum(prompt_tokens)
    share = (config.calibration_tokens - whole) // num_seeds
    num_new = min(max(_MIN_NEW_TOKENS, share), config.document_tokens - config.document_tokens // 2)
    wanted = config.calibration_tokens / (whole / num_seeds + num_new)
    count = num_seeds if share >= _MIN_NEW_TOKENS else min(num_seeds, math.ceil(_SURPLUS * wanted))
    return Continuation(seed_ids=[index * num_seeds // count for index in range(count)], num_new=num_new)
