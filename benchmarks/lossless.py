"""Lossless decoding beside dense and pack decoding: whether the tokens are equal, what is accepted, what it costs.

    python benchmarks/lossless.py DIR --prompts FILE [--limit 50] [--tokens 128] [--threads N]

FILE is JSON Lines with "prompt" in each line. Every prompt is answered greedily by the native engine, dense, with its
cluster's pack and lossless, one after the other; the plain read bandwidth is measured in between. Speeds are medians
over prompts. Then the parts are timed alone: a plain token, a drafted one, verifications of several rows. Tables go to
stdout, then one JSON line; the exit status is 1 if a lossless answer is not the dense one.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from coreinfer import runtime
from coreinfer.runtime.decoding.drafting import expected_tokens
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice

MODES: tuple[runtime.Mode, ...] = ("dense", "similarity", "lossless")
_READ_BYTES = 1 << 29
_READ_EVERY = 5
_NUM_ROWS = (2, 3, 4, 5, 6, 8, 12, 16)
_NUM_TIMINGS = 15


@click.command()
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--limit", type=int, default=50, help="Prompts.")
@click.option("--tokens", type=int, default=128, help="Tokens of each answer, at most.")
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: one a physical core]")
def main(bundle_dir: Path, prompts_file: Path, limit: int, tokens: int, threads: int | None) -> None:
    """Answer prompts in three modes and time the parts of lossless decoding."""
    engine = runtime.load(bundle_dir, engine="native", threads=threads)
    lines = prompts_file.read_text(encoding="utf-8").splitlines()[:limit]
    prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    answers: dict[runtime.Mode, list[runtime.Generation]] = {mode: [] for mode in MODES}
    reads: list[float] = []
    engine.generate(prompts[0], mode="lossless", max_new_tokens=tokens)  # warms caches up
    for number, prompt in enumerate(prompts):
        click.echo(f"prompt {number + 1} of {len(prompts)}", err=True)
        if number % _READ_EVERY == 0:
            reads.append(_native.read_bandwidth(threads or 2, _READ_BYTES))
        for mode in MODES:
            answers[mode].append(engine.generate(prompt, mode=mode, max_new_tokens=tokens))
    parts = time_parts(engine.decoder)
    result = summarize(answers, parts, statistics.median(reads))
    click.echo("\n".join(table(bundle_dir.name, result)))
    click.echo(json.dumps(result))
    sys.exit(0 if result["num_equal"] == len(prompts) else 1)


def time_parts(decoder: Decoder) -> dict[str, float]:
    """Milliseconds of a plain token, a drafted one, and verifications, after 128 tokens; medians, interleaved."""
    start = 128
    decoder.use(DENSE)
    decoder.truncate(0)
    decoder.forward(range(10, 10 + start))
    pack = FfnChoice(cluster=0)
    jobs: dict[str, tuple[FfnChoice, Callable[[], object]]] = {
        "plain": (DENSE, lambda: decoder.forward([5], greedy=True)),
        "plain, whole head": (DENSE, lambda: decoder.forward([5])),
        "draft": (pack, lambda: decoder.forward([5], greedy=True)),
    }
    for num_rows in _NUM_ROWS:
        sequences, token_ids = [decoder.sequence] * num_rows, list(range(20, 20 + num_rows))
        jobs[f"verify {num_rows}"] = (DENSE, partial(decoder.forward_rows, sequences, token_ids))
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(_NUM_TIMINGS):
        for name, (choice, work) in jobs.items():
            decoder.use(choice)
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
            decoder.truncate(start)
    return {name: round(1e3 * statistics.median(timings), 3) for name, timings in seconds.items()}


def summarize(
    answers: dict[runtime.Mode, list[runtime.Generation]], parts: dict[str, float], read_gbps: float
) -> dict[str, Any]:
    """Turn answers and timings into figures."""
    pairs = zip(answers["dense"], answers["lossless"], strict=True)
    drafted = [answer.drafting for answer in answers["lossless"] if answer.drafting is not None]
    num_tried = sum(drafting.num_tried for drafting in drafted)
    acceptance = sum(drafting.num_accepted for drafting in drafted) / max(1, num_tried)
    return {
        "num_prompts": len(drafted),
        "num_tokens": sum(len(answer.token_ids) for answer in answers["dense"]),
        "num_equal": sum(dense.token_ids == lossless.token_ids for dense, lossless in pairs),
        "read_gbps": round(read_gbps, 2),
        "tok_s": {mode: quartiles([a.decode_tokens_per_second for a in answers[mode]]) for mode in MODES},
        "speedup": quartiles(
            [
                lossless.decode_tokens_per_second / dense.decode_tokens_per_second
                for dense, lossless in zip(answers["dense"], answers["lossless"], strict=True)
                if dense.decode_tokens_per_second
            ]
        ),
        "acceptance": round(acceptance, 3),
        "num_tried": num_tried,
        "mean_length": quartiles([drafting.mean_length for drafting in drafted]),
        "num_rounds": sum(drafting.num_rounds for drafting in drafted),
        "num_plain": sum(drafting.num_plain for drafting in drafted),
        "num_turned_off": sum(drafting.turned_off for drafting in drafted),
        "milliseconds": parts,
        "expected_speedup": expected_speedups(acceptance, parts),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(value, 2) for value in statistics.quantiles(values, n=4)]


def expected_speedups(acceptance: float, parts: dict[str, float]) -> dict[int, float]:
    """By draft length: tokens a second beside plain decoding, at this acceptance and these times."""
    return {
        num_rows - 1: round(
            expected_tokens(acceptance, num_rows - 1)
            * parts["plain"]
            / ((num_rows - 1) * parts["draft"] + parts[f"verify {num_rows}"]),
            3,
        )
        for num_rows in _NUM_ROWS
    }


def table(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    yield (
        f"{name}: {result['num_prompts']} prompts, {result['num_tokens']} dense tokens, "
        f"plain read {result['read_gbps']:.1f} GB/s"
    )
    yield f"lossless equals dense: {result['num_equal']} of {result['num_prompts']} prompts"
    for mode, (low, median, high) in result["tok_s"].items():
        yield f"  {mode:12s} {median:7.1f} tok/s (quartiles {low:.1f}, {high:.1f})"
    low, median, high = result["speedup"]
    yield f"  lossless beside dense, prompt by prompt: {median:.2f} (quartiles {low:.2f}, {high:.2f})"
    yield f"  acceptance {result['acceptance']:.3f} of {result['num_tried']} drafts looked at"
    low, median, high = result["mean_length"]
    yield (
        f"  mean draft length {median:.1f} (quartiles {low:.1f}, {high:.1f}); {result['num_rounds']} rounds, "
        f"{result['num_plain']} tokens without; turned off in {result['num_turned_off']} generations"
    )
    yield "part                ms"
    for part, milliseconds in result["milliseconds"].items():
        yield f"  {part:17s} {milliseconds:6.2f}"
    yield "draft length, expected tokens a second beside plain decoding:"
    yield "  " + ", ".join(f"{length}: {ratio:.2f}" for length, ratio in result["expected_speedup"].items())


if __name__ == "__main__":
    main()
