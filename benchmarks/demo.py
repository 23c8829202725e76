"""What `make demo` ends with: dense model and packs side by side on its prompts, and llama.cpp where it is installed.

    python benchmarks/demo.py BUNDLE [--model GGUF] [-n 64] PROMPT...

Speed is the median over the prompts of greedy decoding, in rounds that interleave the contenders; KL is that of the
bundle's own held-out text, against the model's own weights. The table goes to stdout.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from coreinfer import runtime
from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler.models.sources import find_source

NUM_ROUNDS = 3
LINE_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        num_bytes: that a token reads.
        kl: on held-out text; None where it is not known.
        answers: to each prompt.
        tokens_per_second: of each prompt and round.
    """

    name: str
    num_bytes: int
    kl: float | None
    answers: Sequence[str]
    tokens_per_second: Sequence[float]


Answer = Callable[[str], tuple[str, float]]
"""Answers a prompt: the text, and tokens a second of decoding."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True)
@click.option("--model", help="The GGUF file that the bundle was compiled from, for llama.cpp.")
@click.option("-n", "num_tokens", default=64, show_default=True, help="Tokens of an answer.")
@command_errors
def main(bundle: Path, prompts: tuple[str, ...], model: str | None, num_tokens: int) -> None:
    """Answer PROMPTS with the dense model and the packs of BUNDLE, and show what was won and what it cost."""
    engine = runtime.load(bundle)
    contenders = _contenders(engine, model, num_tokens)
    answers: dict[str, list[str]] = {name: [] for name in contenders}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(NUM_ROUNDS):
        for prompt in prompts:
            for name, answer in contenders.items():
                text, speed = answer(prompt)
                speeds[name].append(speed)
                if number == 0:
                    answers[name].append(text)
    rows = [
        Row(name=name, answers=answers[name], tokens_per_second=speeds[name], **_cost(engine, name, model))
        for name in contenders
    ]
    for line in _table(rows, prompts):
        click.echo(line)


def _contenders(engine: runtime.Engine, model: str | None, num_tokens: int) -> Mapping[str, Answer]:
    def with_mode(mode: Any) -> Answer:
        def answer(prompt: str) -> tuple[str, float]:
            generation = engine.generate(prompt, mode=mode, max_new_tokens=num_tokens)
            return generation.text, generation.decode_tokens_per_second

        return answer

    contenders: dict[str, Answer] = {"dense": with_mode("dense"), "pack": with_mode("similarity")}
    if model is not None and importlib.util.find_spec("llama_cpp"):
        contenders["llama.cpp"] = _llama(engine, str(find_source(model).gguf_path), num_tokens)
    return contenders


def _llama(engine: runtime.Engine, path: str, num_tokens: int) -> Answer:
    """llama.cpp on the same prompt tokens, greedily."""
    api: Any = importlib.import_module("llama_cpp")
    threads = usable_cores()
    model = api.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def best() -> int:
        logits = api.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def answer(prompt: str) -> tuple[str, float]:
        model.n_tokens = 0
        model.eval(engine.prompt_ids([{"role": "user", "content": prompt}]))
        ids, start = [best()], time.perf_counter()
        while len(ids) < num_tokens and ids[-1] != model.token_eos():
            model.eval([ids[-1]])
            ids.append(best())
        seconds = time.perf_counter() - start
        return model.detokenize(ids).decode("utf-8", errors="replace"), (len(ids) - 1) / seconds

    return answer


def _cost(engine: runtime.Engine, name: str, model: str | None) -> dict[str, Any]:
    """Bytes a token and KL of a contender."""
    if name == "llama.cpp":
        assert model is not None
        return {"num_bytes": find_source(model).gguf_path.stat().st_size, "kl": None}
    cost, quality = token_bytes(engine.manifest), engine.manifest.quality
    score = None if quality is None else quality.dense if name == "dense" else quality.clusters
    return {"num_bytes": cost.dense if name == "dense" else cost.pack, "kl": None if score is None else score.kl}


def _table(rows: Sequence[Row], prompts: Sequence[str]) -> Iterator[str]:
    yield f"{'':12}{'MB a token':>12}{'tokens/s':>12}{'KL':>9}"
    for row in rows:
        kl = "" if row.kl is None else f"{row.kl:.3f}"
        speed = statistics.median(row.tokens_per_second)
        yield f"{row.name:12}{row.num_bytes / 1e6:12.1f}{speed:12.1f}{kl:>9}"
    for number, prompt in enumerate(prompts):
        yield ""
        yield prompt
        for row in rows:
            yield f"  {row.name:10}{_first_line(row.answers[number])}"


def _first_line(answer: str) -> str:
    """The first line that says something: a fence around code does not."""
    lines = [line for line in answer.split("\n") if line.strip() and not line.startswith("```")]
    line = lines[0] if lines else ""
    return line if len(line) <= LINE_CHARACTERS else f"{line[: LINE_CHARACTERS - 3]}..."


if __name__ == "__main__":
    main()
