"""Decoding beside a busy neighbour: python benchmarks/neighbour.py DIR [--rounds 5].

The native engine decodes on free cores and, in turn, while another process keeps every core busy, and while another
engine decodes the same bundle. Fair shares would leave half of the speed beside the first, and all of it to the two
engines together; what is lost beyond that is lost at barriers. A line for people, then one JSON line.
"""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import click
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder

_READ_BYTES = 1 << 28
_COUNTED_TOKENS = 16
_SPAWN = multiprocessing.get_context("spawn")


def _spin(ready: Event) -> None:
    ready.set()
    while True:
        pass


def _decode(ready: Event, bundle_dir: Path, num_decoded: Any) -> None:
    decoder = NativeDecoder(open_bundle(bundle_dir, lazy_packs=True))
    while True:
        decode_speed(decoder, _COUNTED_TOKENS)
        num_decoded.value += _COUNTED_TOKENS
        ready.set()


def decode_speed(decoder: NativeDecoder, num_tokens: int) -> float:
    """Tokens a second, greedily, after a short prompt."""
    decoder.truncate(0)
    token_id = int(decoder.forward(list(range(1, 17)), greedy=True)[-1].argmax())
    start = time.perf_counter()
    for _ in range(num_tokens):
        token_id = int(decoder.forward([token_id], greedy=True)[-1].argmax())
    return num_tokens / (time.perf_counter() - start)


@contextmanager
def neighbours(target: Callable[..., None], arguments: Sequence[Any], *, num_processes: int) -> Iterator[None]:
    """Run processes of a function whose first argument is an event that it sets when it is under way."""
    events = [_SPAWN.Event() for _ in range(num_processes)]
    processes = [_SPAWN.Process(target=target, args=(event, *arguments), daemon=True) for event in events]
    for process in processes:
        process.start()
    try:
        for event in events:
            event.wait()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def speed_together(decoder: NativeDecoder, num_tokens: int, bundle_dir: Path) -> float:
    """Tokens a second of this engine and another."""
    num_decoded = _SPAWN.Value("q", 0)
    with neighbours(_decode, (bundle_dir, num_decoded), num_processes=1):
        num_before = num_decoded.value
        speed = decode_speed(decoder, num_tokens)
        num_beside: int = num_decoded.value - num_before
        return speed * (1 + num_beside / num_tokens)


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=5)
@click.option("--tokens", type=int, default=256)
def main(bundle_dir: Path, rounds: int, tokens: int) -> None:
    """Compare decoding on free cores, on busy ones and beside another engine."""
    decoder = NativeDecoder(open_bundle(bundle_dir, lazy_packs=True))
    reads, free, busy, together = [], [], [], []
    for _ in range(rounds):
        reads.append(_native.read_bandwidth(decoder.num_threads, _READ_BYTES))
        free.append(decode_speed(decoder, tokens))
        with neighbours(_spin, (), num_processes=os.cpu_count() or 1):
            busy.append(decode_speed(decoder, tokens))
        together.append(speed_together(decoder, tokens, bundle_dir))
    figures = {
        "read_gbps": statistics.median(reads),
        "free_tok_s": statistics.median(free),
        "busy_tok_s": statistics.median(busy),
        "together_tok_s": statistics.median(together),
    }
    share, together_share = (figures[name] / figures["free_tok_s"] for name in ("busy_tok_s", "together_tok_s"))
    click.echo(
        f"free {figures['free_tok_s']:.1f} tok/s, cores busy {figures['busy_tok_s']:.1f} ({share:.0%}), "
        f"two engines together {figures['together_tok_s']:.1f} ({together_share:.0%})"
    )
    click.echo(json.dumps(figures | {"share": share, "together_share": together_share}))


if __name__ == "__main__":
    main()
