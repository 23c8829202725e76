"""`coreinfer-bench`: how fast a bundle decodes on this machine, beside what its memory can deliver."""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.command import command_errors

from . import _native
from .decoder import DENSE, FfnChoice
from .native_decoder import NativeDecoder

__all__ = ["BenchOptions", "main", "measure_isa"]

_READ_BYTES = 1 << 29
_START_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is timed.

    Attributes:
        tokens: tokens to decode in each round.
        prompt_tokens: tokens to read in each round.
        rounds: of which medians are taken.
    """

    tokens: int
    prompt_tokens: int
    rounds: int
    threads: int | None


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--isa", default="auto", help="Kernels, such as avx2; auto for the CPU's best, all for each in turn.")
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: one a core]")
@click.option("--tokens", type=click.IntRange(min=1), default=128, help="Decode so many tokens a round.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, help="Read so many tokens a round.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Medians are over so many rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead of the table.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(
    bundle_dir: Path,
    isa: str,
    threads: int | None,
    tokens: int,
    prompt_tokens: int,
    rounds: int,
    *,
    as_json: bool,
) -> None:
    """Time the native engine with the bundle in DIR: decoding and reading, dense and with a cluster pack.

    Rounds of all measurements interleave, and the plain read bandwidth is measured in each of them.
    """
    options = BenchOptions(tokens=tokens, prompt_tokens=prompt_tokens, rounds=rounds, threads=threads)
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    _check_room(bundle, options)
    results = [measure_isa(bundle, name, options) for name in (_native.available_isas() if isa == "all" else [isa])]
    if as_json:
        click.echo(json.dumps({"bundle": bundle.manifest.model.name, "results": results}))
    else:
        click.echo("\n".join(_table(results)))


def _check_room(bundle: Bundle, options: BenchOptions) -> None:
    room = bundle.manifest.model.max_positions
    for name, needed in (("--tokens", options.tokens + _START_TOKENS), ("--prompt-tokens", options.prompt_tokens)):
        if needed > room:
            raise ConfigError(f"{name}: the model has {room} positions, {needed} would be needed")


def measure_isa(bundle: Bundle, isa: str, options: BenchOptions) -> dict[str, Any]:
    """Time one set of kernels.

    Returns:
        Medians: "read_gbps", and for each of "runs" name, decode_tok_s, bytes_per_token, gbps, share_of_read and
        prefill_tok_s.
    """
    decoder = NativeDecoder(bundle, threads=options.threads, isa=isa)
    choices = {"pack": FfnChoice(cluster=0)} if bundle.dense is None else {"dense": DENSE, "pack": FfnChoice(cluster=0)}
    reads: list[float] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in choices}
    for _ in range(options.rounds):
        reads.append(_native.read_bandwidth(decoder.num_threads, _READ_BYTES))
        for name, choice in choices.items():
            decoder.use(choice)
            prefill_seconds = time_prefill(decoder, options.prompt_tokens)
            seconds[name].append((time_decode(decoder, options.tokens), prefill_seconds))
    read_gbps = statistics.median(reads)
    runs = []
    for name, choice in choices.items():
        decoder.use(choice)
        num_bytes = decoder.bytes_per_token(_START_TOKENS + options.tokens // 2)
        runs.append(_run(name, num_bytes, seconds[name], read_gbps, options))
    return {"isa": decoder.isa, "threads": decoder.num_threads, "options": asdict(options), "read_gbps": read_gbps} | {
        "runs": runs
    }


def _run(
    name: str, num_bytes: int, seconds: Sequence[tuple[float, float]], read_gbps: float, options: BenchOptions
) -> dict[str, Any]:
    token_seconds = statistics.median(decode for decode, _ in seconds)
    gbps = num_bytes / token_seconds / 1e9
    return {
        "name": name,
        "decode_tok_s": 1 / token_seconds,
        "bytes_per_token": num_bytes,
        "gbps": gbps,
        "share_of_read": gbps / read_gbps,
        "prefill_tok_s": options.prompt_tokens / statistics.median(prefill for _, prefill in seconds),
    }


def time_decode(decoder: NativeDecoder, num_tokens: int) -> float:
    """Decode greedily after a short prompt; seconds a token."""
    decoder.truncate(0)
    token_id = int(decoder.forward(list(range(1, _START_TOKENS + 1)))[-1].argmax())
    start = time.perf_counter()
    for _ in range(num_tokens):
        token_id = int(decoder.forward([token_id])[-1].argmax())
    return (time.perf_counter() - start) / num_tokens


def time_prefill(decoder: NativeDecoder, num_tokens: int) -> float:
    """Read a prompt; seconds for all of it."""
    decoder.truncate(0)
    start = time.perf_counter()
    decoder.forward([1 + number % 100 for number in range(num_tokens)])
    return time.perf_counter() - start


def _table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'kernels':12s} {'FFN':6s} {'tok/s':>8s} {'MB/token':>9s} {'GB/s':>6s} {'of read':>8s} "
        f"{'prefill tok/s':>14s} {'plain read GB/s':>16s}"
    )
    for result in results:
        for run in result["runs"]:
            yield (
                f"{result['isa']:12s} {run['name']:6s} {run['decode_tok_s']:8.1f} {run['bytes_per_token'] / 1e6:9.1f} "
                f"{run['gbps']:6.1f} {run['share_of_read']:8.0%} {run['prefill_tok_s']:14.0f} "
                f"{result['read_gbps']:16.1f}"
            )
