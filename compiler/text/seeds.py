"""The seed prompts of the builtin corpus, and how far the model continues each."""

import json
from dataclasses import dataclass
from importlib import resources

from coreinfer.compiler.config import CompileConfig

__all__ = ["Seed", "continuation_tokens", "load_seeds"]

_MIN_NEW_TOKENS = 32


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


def continuation_tokens(config: CompileConfig, num_prompt_tokens: int, num_prompts: int) -> int:
    """Choose the length of continuations so that prompts and continuations together make the token budget.

    Returns:
        Maximum number of new tokens of each prompt: at least 32, and half a document at most.
    """
    share = (config.calibration_tokens - num_prompt_tokens) // num_prompts
    return min(max(_MIN_NEW_TOKENS, share), config.document_tokens - config.document_tokens // 2)
