"""Decoding beside a busy neighbour: python benchmarks/neighbour.py DIR [--rounds 5].

The native engine decodes on free cores and, in turn, while another process keeps every core busy. Fair shares would
leave half of the speed; what is lost beyond that is lost at barriers. A line for people, then one JSON line.
"""

import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import click
from coreinfer.bundles import open_bundle
from coreinfer.runtime import _native
from coreinfer.runtime.native_decoder import NativeDecoder

_READ_BYTES = 1 << 28


def _spin() -> None:
    while True:
        pass


def decode_speed(decoder: NativeDecoder, num_tokens: int) -> float:
    """Tokens a second, greedily, after a short prompt."""
    decoder.truncate(0)
    token_id = int(decoder.forward(list(range(1, 17)), greedy=True)[-1].argmax())
    start = time.perf_counter()
    for _ in range(num_tokens):
        token_id = int(decoder.forward([token_id], greedy=True)[-1].argmax())
    return num_tokens / (time.perf_counter() - start)


def busy_speed(decoder: NativeDecoder, num_tokens: int) -> float:
    """The same while every core has a process that never sleeps."""
    neighbours = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for neighbour in neighbours:
        neighbour.start()
    try:
        time.sleep(0.2)
        return decode_speed(decoder, num_tokens)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=5)
@click.option("--tokens", type=int, default=256)
def main(bundle_dir: Path, rounds: int, tokens: int) -> None:
    """Compare decoding on free and on busy cores."""
    decoder = NativeDecoder(open_bundle(bundle_dir, lazy_packs=True))
    reads, free, busy = [], [], []
    for _ in range(rounds):
        reads.append(_native.read_bandwidth(decoder.num_threads, _READ_BYTES))
        free.append(decode_speed(decoder, tokens))
        busy.append(busy_speed(decoder, tokens))
    figures = {
        "read_gbps": statistics.median(reads),
        "free_tok_s": statistics.median(free),
        "busy_tok_s": statistics.median(busy),
    }
    share = figures["busy_tok_s"] / figures["free_tok_s"]
    click.echo(f"free {figures['free_tok_s']:.1f} tok/s, busy {figures['busy_tok_s']:.1f} tok/s: {share:.0%}")
    click.echo(json.dumps(figures | {"share": share}))


if __name__ == "__main__":
    main()
