"""The builtin corpus: seed prompts that the model itself continues.

Nothing needs to be downloaded, and the text is of the kind that the model will decode: its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.tokenizer_files import chat_templates
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.team import Team

from .corpus import Document
from .seeds import Seed, load_seeds, plan_continuation
from .writing import Sampling, continue_prompts, stored_in_int8

__all__ = ["Seed", "builtin_documents", "continue_seeds", "load_seeds"]

_TEMPERATURE = 0.7
_TOP_P = 0.95
_WRITER = "runtime, int8, seeds by budget"
"""What writes: texts of another writer, such as those that transformers wrote once, have other keys in the cache."""


def builtin_documents(
    config: CompileConfig, team: Team, cache: Cache, model_key: str, folder: Path, progress: Progress
) -> list[Document]:
    """Let the model continue the seed prompts, unless the cache holds the texts; see `continue_seeds`.

    Args:
        folder: for files that are needed meanwhile.
    """
    loaded = team.loaded
    key = stage_key(
        "builtin",
        writer=_WRITER,
        model=model_key,
        tokens=config.calibration_tokens,
        longest=config.document_tokens,
        seed=config.seed,
        # Of the weights that are rounded.
        dtype=str(loaded.dtype),
        # The native engine divides the sums of attention among them, and so rounds otherwise with another number.
        threads=config.threads or usable_cores(),
        # The same file, read as another model than before, gives other results.
        config=loaded.record.config,
        prompts=[seed.prompt for seed in load_seeds()],
    )

    def compute() -> list[dict[str, Any]]:
        return [
            {"text": text, "routing_text": prompt, "token_ids": list(token_ids), "has_prompt": True}
            for prompt, text, token_ids in continue_seeds(config, team, folder, progress)
        ]

    return [Document(**{**item, "token_ids": tuple(item["token_ids"])}) for item in cache.json(key, compute)]


def continue_seeds(
    config: CompileConfig, team: Team, folder: Path, progress: Progress
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Let the model continue seed prompts by sampling.

    Seeds, and the length of the continuations, are chosen so that both together make the token budget.

    Yields:
        Prompt, text (prompt and continuation), and its token ids, in the order of the seeds.
    """
    seeds, tokenizer = load_seeds(), team.loaded.tokenizer
    prompts = [_prompt_ids(seed, tokenizer, config.document_tokens // 2) for seed in seeds]
    plan = plan_continuation(config, [len(ids) for ids in prompts])
    seeds, prompts = tuple(seeds[index] for index in plan.seed_ids), [prompts[index] for index in plan.seed_ids]
    sampling = Sampling(num_new=plan.num_new, temperature=_TEMPERATURE, top_p=_TOP_P, seed=config.seed)
    # One step more for storing the model.
    with progress.stage("corpus", len(prompts) + 1) as advance, stored_in_int8(config, team.loaded, folder) as stored:
        advance()
        continued = continue_prompts(config, team, stored, prompts, sampling, advance)
    for seed, ids, new_ids in zip(seeds, prompts, continued, strict=True):
        answer = tokenizer.decode(new_ids, skip_special_tokens=True)
        yield seed.prompt, f"{seed.prompt}\n{answer}".strip(), (*ids, *new_ids)


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
