"""Several prompts of one cluster decoded together: tokens a second of all of them, by their number.

    python benchmarks/batches.py DIR [--sizes 1,2,4,8] [--tokens 128] [--rounds 3] [--threads N]

Decoding alone is timed, which is what a batch speeds up; rounds are interleaved, medians are shown. Then all prompts
are answered one by one and together, and the answers must be equal. A table goes to stdout, then one JSON line; the
exit status is 1 if an answer differs.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from coreinfer import runtime
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.protocol import FfnChoice

MODES: tuple[runtime.Mode, ...] = ("dense", "similarity")
_READ_BYTES = 1 << 29
_TOPICS = ("soup", "a cat", "the sea", "winter", "my bicycle", "a lost key", "trains", "the moon", "bread", "an owl")
_OPTIONS: dict[str, Any] = {"drift_tokens": 0}
"""Packs stay what they are, so that every answer is decoded by the same."""


@click.command()
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--sizes", default="1,2,4,8")
@click.option("--tokens", type=int, default=128)
@click.option("--rounds", type=int, default=3)
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: one a physical core]")
def main(bundle_dir: Path, sizes: str, tokens: int, rounds: int, threads: int | None) -> None:
    """Decode batches of several sizes."""
    engine = runtime.load(bundle_dir, engine="native", threads=threads)
    numbers = [int(size) for size in sizes.split(",")]
    prompts = prompts_of_one_cluster(engine, max(numbers))
    seconds: dict[tuple[runtime.Mode, int], list[float]] = {(mode, size): [] for mode in MODES for size in numbers}
    reads = []
    for number in range(rounds):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        reads.append(_native.read_bandwidth(threads or 2, _READ_BYTES))
        for mode, size in seconds:
            seconds[mode, size].append(decode_seconds(engine, mode, prompts[:size], tokens))
    num_different = sum(differing(engine, mode, prompts, tokens) for mode in MODES)
    runs = [
        {"mode": mode, "size": size, "tok_s": round(size * tokens / statistics.median(timings), 1)}
        for (mode, size), timings in seconds.items()
    ]
    result = {"read_gbps": round(statistics.median(reads), 2), "num_different": num_different, "runs": runs}
    click.echo("\n".join(table(bundle_dir.name, result)))
    click.echo(json.dumps(result))
    sys.exit(1 if num_different else 0)


def prompts_of_one_cluster(engine: runtime.Engine, count: int) -> list[list[dict[str, str]]]:
    """Prompts that the router sends to the same cluster."""
    by_cluster: dict[int, list[list[dict[str, str]]]] = {}
    for style in ("Write a poem about", "Write a short poem on", "Tell a long story about", "Tell me a tale of"):
        for topic in _TOPICS:
            text = f"{style} {topic}."
            same = by_cluster.setdefault(engine.router.route(text).cluster, [])
            same.append([{"role": "user", "content": text}])
            if len(same) == count:
                return same
    sys.exit(f"error: no cluster has {count} of these prompts; give smaller --sizes")


def differing(
    engine: runtime.Engine, mode: runtime.Mode, prompts: Sequence[list[dict[str, str]]], num_tokens: int
) -> int:
    """Count the prompts whose answer in a batch is not the one that they get alone."""
    together = engine.generate(prompts, mode=mode, max_new_tokens=num_tokens, **_OPTIONS)
    alone = [engine.generate(prompt, mode=mode, max_new_tokens=num_tokens, **_OPTIONS) for prompt in prompts]
    return sum(a.token_ids != b.token_ids for a, b in zip(alone, together, strict=True))


def decode_seconds(
    engine: runtime.Engine, mode: runtime.Mode, prompts: Sequence[list[dict[str, str]]], num_tokens: int
) -> float:
    """Time the decoding of `num_tokens` tokens for each prompt, past the ends of texts, without what is around it."""
    decoder = engine.decoder
    cluster = engine.router.route(prompts[0][0]["content"]).cluster
    sequences, token_ids = [], []
    for prompt in prompts:
        sequences.append(decoder.add_sequence())
        decoder.select(sequences[-1])
        token_ids.append(int(decoder.forward(engine.prompt_ids(prompt), greedy=True)[-1].argmax()))
    decoder.use(FfnChoice(cluster=cluster if mode == "similarity" else None))
    begin = time.perf_counter()
    for _ in range(num_tokens):
        if len(sequences) == 1:
            logits = decoder.forward(token_ids, greedy=True)
        else:
            logits = decoder.forward_rows(sequences, token_ids)
        token_ids = logits.argmax(axis=1).tolist()
    seconds = time.perf_counter() - begin
    for number in sequences:
        decoder.drop_sequence(number)
    return seconds


def table(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    yield f"{name}: plain read {result['read_gbps']:.1f} GB/s; answers that differ from single ones: " + str(
        result["num_different"]
    )
    yield f"{'FFN':12s} {'prompts':>7s} {'tok/s':>8s} {'of one':>7s}"
    first = {run["mode"]: run["tok_s"] for run in result["runs"][::-1]}
    for run in result["runs"]:
        yield f"{run['mode']:12s} {run['size']:7d} {run['tok_s']:8.1f} {run['tok_s'] / first[run['mode']]:7.2f}"


if __name__ == "__main__":
    main()
