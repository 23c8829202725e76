"""The builtin corpus: seed prompts that the model itself continues.

Nothing needs to be downloaded, and the text is of the kind that the model will decode: its own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel, quiet_transformers, stop_ids
from coreinfer.compiler.models.tokenizer_files import chat_templates
from coreinfer.compiler.progress import Progress

__all__ = ["Seed", "continue_seeds", "load_seeds"]

_BATCH_SIZE = 64
_MIN_NEW_TOKENS = 32
_TEMPERATURE = 0.7
_TOP_P = 0.95


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


def continue_seeds(
    config: CompileConfig, loaded: LoadedModel, progress: Progress
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Let the model continue every seed prompt by sampling.

    The length of the continuations is chosen so that prompts and continuations together make the token budget.

    Yields:
        Prompt, text (prompt and continuation), and its token ids.
    """
    prompts = [(seed, _prompt_ids(seed, loaded.tokenizer, config.document_tokens // 2)) for seed in load_seeds()]
    num_prompt_tokens = sum(len(ids) for _, ids in prompts)
    share = (config.calibration_tokens - num_prompt_tokens) // len(prompts)
    num_new = min(max(_MIN_NEW_TOKENS, share), config.document_tokens - config.document_tokens // 2)
    # Prompts of like length share a batch, so that little of it is padding.
    prompts.sort(key=lambda item: len(item[1]))
    batches = [prompts[start : start + _BATCH_SIZE] for start in range(0, len(prompts), _BATCH_SIZE)]
    torch.manual_seed(config.seed)
    with progress.stage("corpus", len(prompts)) as advance:
        for batch in batches:
            continued = _continue(loaded, [ids for _, ids in batch], num_new)
            for (seed, ids), new_ids in zip(batch, continued, strict=True):
                answer = loaded.tokenizer.decode(new_ids, skip_special_tokens=True)
                yield seed.prompt, f"{seed.prompt}\n{answer}".strip(), (*ids, *new_ids)
            advance(len(batch))


def _prompt_ids(seed: Seed, tokenizer: Any, longest: int) -> list[int]:
    template = chat_templates(tokenizer).get("default")
    if seed.kind == "chat" and template:
        messages = [{"role": "user", "content": seed.prompt}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = text_ids(tokenizer.backend_tokenizer, seed.prompt)
    return list(ids[-longest:])


def _continue(loaded: LoadedModel, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
    """Sample a continuation of every prompt; what follows an end of text is cut off."""
    tokenizer, longest = loaded.tokenizer, max(map(len, prompts))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    padded = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    with quiet_transformers(), torch.inference_mode():
        output = loaded.model.generate(  # type: ignore[operator]
            torch.tensor(padded, device=loaded.device),
            attention_mask=torch.tensor(mask, device=loaded.device),
            max_new_tokens=num_new,
            do_sample=True,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            pad_token_id=pad_id,
        )
    stops = stop_ids(loaded)
    return [_cut(row, stops) for row in output[:, longest:].tolist()]


def _cut(token_ids: list[int], stops: set[int]) -> list[int]:
    for position, token_id in enumerate(token_ids):
        if token_id in stops:
            return token_ids[: position + 1]
    return token_ids
