"""How much text a compile will calibrate on, before there is a tokenizer: from the characters of prompts and files."""

from collections.abc import Sequence
from dataclasses import dataclass

from coreinfer.compiler.config import BUILTIN, CompileConfig
from coreinfer.compiler.text.reading import is_local, read_texts
from coreinfer.compiler.text.seeds import load_seeds, plan_continuation

__all__ = ["TextSize", "size_text"]

_TOKEN_CHARACTERS = 4.2
"""Of English, in vocabularies of 30,000 to 150,000 tokens."""
_TEMPLATE_TOKENS = 30
"""That a chat template puts around a prompt, on average with and without a system message."""


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Text as far as it is calibrated on, held-out text included.

    Attributes:
        num_documents: after cutting.
        routing_tokens: of what the encoder reads of the documents.
        num_prompts, prompt_tokens, new_tokens: of the builtin corpus, before it is cut down to the token budget.
    """

    num_tokens: int
    num_documents: int
    routing_tokens: int
    num_prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


def size_text(config: CompileConfig, sources: Sequence[str]) -> TextSize:
    """Reckon the text of all sources, cut down to `calibration_tokens`.

    A data set of the Hub is taken for as large as the token budget.

    Args:
        sources: as `text_sources` returns them.
    Raises:
        CalibrationError: a file cannot be read.
    """
    parts = [_read(config, sources)]
    if BUILTIN in sources:
        parts.append(_builtin(config))
    total = sum(part.num_tokens for part in parts)
    share = min(1.0, config.calibration_tokens / max(1, total))
    return TextSize(
        num_tokens=round(total * share),
        num_documents=max(1, round(sum(part.num_documents for part in parts) * share)),
        routing_tokens=round(sum(part.routing_tokens for part in parts) * share),
        num_prompts=parts[-1].num_prompts,
        prompt_tokens=parts[-1].prompt_tokens,
        new_tokens=parts[-1].new_tokens,
    )


def _read(config: CompileConfig, sources: Sequence[str]) -> TextSize:
    """Size what is not written."""
    files = [source for source in sources if is_local(source)]
    lengths = [_num_tokens(text) for text in read_texts(files, config.text_field)]
    if any(source != BUILTIN and not is_local(source) for source in sources):
        lengths.append(config.calibration_tokens)
    num_documents = sum(-(-length // config.document_tokens) for length in lengths)
    return TextSize(num_tokens=sum(lengths), num_documents=num_documents, routing_tokens=sum(lengths))


def _num_tokens(text: str) -> int:
    return max(1, round(len(text) / _TOKEN_CHARACTERS))


def _builtin(config: CompileConfig) -> TextSize:
    seeds = load_seeds()
    bare = [_num_tokens(seed.prompt) for seed in seeds]
    longest = config.document_tokens // 2
    lengths = [
        min(longest, length + (_TEMPLATE_TOKENS if seed.kind == "chat" else 0))
        for seed, length in zip(seeds, bare, strict=True)
    ]
    plan = plan_continuation(config, lengths)
    whole, new = sum(lengths[index] for index in plan.seed_ids), len(plan.seed_ids) * plan.num_new
    return TextSize(
        num_tokens=whole + new,
        num_documents=len(plan.seed_ids),
        routing_tokens=sum(bare[index] for index in plan.seed_ids),
        num_prompts=len(plan.seed_ids),
        prompt_tokens=whole,
        new_tokens=new,
    )
