"""PowerInfer's scene without its weights: ReLU models of which a known share of neurons is active.

    python benchmarks/relu.py [--shape 1b] [--shares 0.1,0.2,0.3] [--rounds 5] [--limits 0.6,0.4]

Weights are random (contenders/relu_bundle.py). Rows by neuron read all gates, and of the other matrices what belongs
to neurons that are not zero: nothing is lost. Packs hold the active neurons, chosen once for a prompt. An equal share
of neurons is not an equal quality: in a trained model other neurons are active with each token, and a pack lacks some
of them. Beside the rows stand figures of PowerInfer that were measured earlier on another machine. Contenders take
turns in one process, in rounds that also measure the plain read bandwidth; medians. With --limits (as root) each runs
in a memory cgroup as benchmarks/memory.py has it. A table, then one JSON line.
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from contenders.relu_bundle import SHAPES, relu_bundle
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.formats import NEURON_FORMAT
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from memory import Contender, dense_size, disk_speed, kv_bytes, run_all

_READ_BYTES = 1 << 29
_CHECK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Cited:
    """A row of PowerInfer: Q4_0, 1B shape, 2 threads, predictors of rank 512 that are always right, 128 tokens.

    Commit d3ebd7c, built with gcc 12, on 2 cores with AVX2, 28 November 2026, medians of 5 rounds. Of its dense path
    where `share` is None.
    """

    share: float | None
    mb_a_token: float
    tok_s: float


CITED_READ_GBPS = 14.9
"""The plain read bandwidth in the rounds of the cited rows."""
CITED = {
    "1b": (
        Cited(share=None, mb_a_token=633, tok_s=14.9),
        Cited(share=0.1, mb_a_token=272, tok_s=22.7),
        Cited(share=0.2, mb_a_token=318, tok_s=17.8),
        Cited(share=0.3, mb_a_token=363, tok_s=13.9),
    )
}


@dataclass(kw_only=True)
class Row:
    """What is timed, and what was found."""

    name: str
    choice: FfnChoice
    share: float | None
    kind: int = 0
    """Of the text that is read: this share of neurons is active."""
    by_neuron: bool = False
    tok_s: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shape_name", type=click.Choice(sorted(SHAPES)), default="1b")
@click.option("--layers", type=int, default=None, help="Fewer than the shape has, where the whole does not fit.")
@click.option("--shares", default="0.1,0.2,0.3", help="Of the neurons that are active.")
@click.option("--rounds", default=5)
@click.option("--tokens", default=64)
@click.option("--prompt-tokens", default=64)
@click.option("--threads", default=os.cpu_count() or 1)
@click.option("--limits", default="", help="Shares of the dense int4 size; none without.")
@click.option("--seconds", default=20.0, help="Of decoding under a limit, at most.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/relu"))
def main(
    shape_name: str,
    layers: int | None,
    shares: str,
    rounds: int,
    tokens: int,
    prompt_tokens: int,
    threads: int,
    limits: str,
    seconds: float,
    work: Path,
) -> None:
    """Time packs of the active neurons beside the dense model."""
    shape = SHAPES[shape_name]
    shape = shape if layers is None else replace(shape, num_layers=layers)
    active = sorted(float(share) for share in shares.split(","))
    work.mkdir(parents=True, exist_ok=True)
    name = f"{shape.name}-{shape.num_layers}-layers-{'-'.join(f'{share:g}' for share in active)}"
    bundle_dir = relu_bundle(work / name, shape, active)
    neuron_dir = relu_bundle(work / f"{name}-by-neuron", shape, active, ffn_format=NEURON_FORMAT)
    limited = None
    if limits:
        # Before this process maps the bundle: pages that it holds would be charged to nobody.
        timing = {"threads": threads, "num_tokens": tokens, "prompt_tokens": prompt_tokens, "warm_tokens": 16}
        limited = run_limits(bundle_dir, make_rows(active), limits, timing | {"seconds": seconds})
    rows = [*make_rows(active), *neuron_rows(active)]
    bundles = {False: open_bundle(bundle_dir), True: open_bundle(neuron_dir)}
    gbps, isa = time_in_memory(bundles, rows, rounds=rounds, tokens=tokens, threads=threads)
    cited = CITED.get(shape_name, ()) if layers is None else ()
    click.echo("\n".join(table(rows, gbps, isa, cited)))
    result = {"shape": name, "isa": isa, "read_gbps": gbps, "rows": [row.figures for row in rows]}
    result |= {"cited": {"read_gbps": CITED_READ_GBPS, "rows": [vars(row) for row in cited]}, "limited": limited}
    click.echo(json.dumps(result))


def make_rows(shares: Sequence[float]) -> list[Row]:
    """The dense FFN, and the pack of each share."""
    packs = [
        Row(name=f"pack of {share:.0%} active", choice=FfnChoice(cluster=number), share=share, kind=number)
        for number, share in enumerate(shares)
    ]
    return [Row(name="dense", choice=DENSE, share=None), *packs]


def neuron_rows(shares: Sequence[float]) -> list[Row]:
    """The dense FFN by neuron, with text that activates each share."""
    return [
        Row(name=f"by neuron, {share:.0%} active", choice=DENSE, share=share, kind=number, by_neuron=True)
        for number, share in enumerate(shares)
    ]


def time_in_memory(
    bundles: Mapping[bool, Bundle], rows: Sequence[Row], *, rounds: int, tokens: int, threads: int
) -> tuple[float, str]:
    """Decode with each row in turn; its figures are added.

    Args:
        bundles: the two, by whether the FFN is stored neuron by neuron.
    Returns:
        The plain read in GB/s, and the kernels' name.
    """
    decoders = {by_neuron: NativeDecoder(bundle, threads=threads) for by_neuron, bundle in bundles.items()}
    for row in rows:
        if row.share is not None:
            row.figures |= check_pack(decoders[row.by_neuron], bundles[row.by_neuron], row.kind)
    reads = []
    # The first round warms caches up.
    for number in range(rounds + 1):
        gbps = _native.read_bandwidth(threads, _READ_BYTES)
        speeds = [decode(decoders[row.by_neuron], row, kind_ids(bundles[False], row.kind, tokens)) for row in rows]
        if number:
            reads.append(gbps)
            for row, speed in zip(rows, speeds, strict=True):
                row.tok_s.append(speed)
    dense_tok_s = statistics.median(rows[0].tok_s)
    for row in rows:
        # What is read by neuron depends on what was decoded last.
        decode(decoders[row.by_neuron], row, kind_ids(bundles[False], row.kind, 1))
        num_bytes = decoders[row.by_neuron].bytes_per_token(_CHECK_TOKENS + tokens // 2, greedy=True)
        speed = statistics.median(row.tok_s)
        row.figures |= {"name": row.name, "share": row.share, "decode_tok_s": speed, "bytes_per_token": num_bytes}
        row.figures["share_of_read"] = num_bytes * speed / 1e9 / statistics.median(reads)
        row.figures["times_dense"] = speed / dense_tok_s
    return statistics.median(reads), decoders[False].isa


def kind_ids(bundle: Bundle, kind: int, count: int) -> list[int]:
    """Some tokens of a kind of text."""
    num_kinds = len(bundle.manifest.clusters)
    of_kind = np.arange(kind, bundle.manifest.model.vocab_size, num_kinds)
    return [int(number) for number in np.random.default_rng(kind).choice(of_kind, count)]


def decode(decoder: NativeDecoder, row: Row, ids: Sequence[int]) -> float:
    """Tokens a second behind a prompt that is read with the dense FFN; the likeliest token is found, and not taken."""
    decoder.truncate(0)
    decoder.use(DENSE)
    decoder.forward(list(range(1, 1 + _CHECK_TOKENS)), greedy=True)
    decoder.use(row.choice)
    begin = time.perf_counter()
    for token_id in ids:
        decoder.forward([token_id], greedy=True)[-1].argmax()
    return len(ids) / (time.perf_counter() - begin)


def check_pack(decoder: NativeDecoder, bundle: Bundle, cluster: int) -> dict[str, float]:
    """Measure what a kind of text activates in the dense model, and what its pack lacks.

    Returns:
        `active`: share of neurons that the text activates at all; `covered`: share of these that the pack has;
        `logits_off`: distance of logits, with and without the pack, relative to their norm.
    """
    ids = kind_ids(bundle, cluster, _CHECK_TOKENS)
    decoder.truncate(0)
    decoder.use(DENSE)
    statistic = decoder.prompt_statistics(ids, ["output-aware"])[1]["output-aware"] > 0
    held = np.zeros_like(statistic)
    for layer in range(len(held)):
        held[layer, bundle.pack(cluster)[f"layers.{layer}.neuron_ids"].array] = True
    logits = []
    for choice in (DENSE, FfnChoice(cluster=cluster)):
        decoder.truncate(0)
        decoder.use(choice)
        logits.append(decoder.forward(ids, all_logits=True))
    off = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    covered = (statistic & held).sum() / max(1, statistic.sum())
    return {"active": float(statistic.mean()), "covered": float(covered), "logits_off": float(off)}


def table(rows: Sequence[Row], gbps: float, isa: str, cited: Sequence[Cited]) -> list[str]:
    """Lines for people; PowerInfer's figures beside ours of the same share, and the ratio at an equal plain read."""
    lines = [
        f"{isa}, plain read {gbps:.1f} GB/s; PowerInfer's figures are of another machine, at {CITED_READ_GBPS} GB/s",
        f"{'':22s} {'tok/s':>8s} {'MB/token':>9s} {'of read':>8s} {'x dense':>8s} {'active':>7s} {'covered':>8s} "
        f"{'logits off':>10s}"
        f" | {'PowerInfer':>10s} {'MB/token':>9s} {'of read':>8s} | {'x, equal read':>13s}",
    ]
    theirs = {row.share: row for row in cited}
    for row in rows:
        found = row.figures
        cells = [f"{found[key]:{width}.3f}" if key in found else f"{'':{width}s}" for key, width in _CHECKED]
        line = f"{row.name:22s} {found['decode_tok_s']:8.1f} {found['bytes_per_token'] / 1e6:9.1f}"
        line += f" {found['share_of_read']:8.2f} {found['times_dense']:8.2f} " + " ".join(cells)
        if (other := theirs.get(row.share)) and not row.by_neuron:
            reached = other.mb_a_token * other.tok_s / 1e3 / CITED_READ_GBPS
            ratio = (found["decode_tok_s"] / gbps) / (other.tok_s / CITED_READ_GBPS)
            found["times_cited_at_equal_read"] = ratio
            line += f" | {other.tok_s:10.1f} {other.mb_a_token:9.0f} {reached:8.2f} | {ratio:13.2f}"
        lines.append(line)
    return lines


_CHECKED = (("active", 7), ("covered", 8), ("logits_off", 10))


def run_limits(bundle_dir: Path, rows: Sequence[Row], limits: str, timing: dict[str, Any]) -> dict[str, Any]:
    """Run each row under limits of memory."""
    contenders = []
    num_positions = sum(timing[name] for name in ("prompt_tokens", "warm_tokens", "num_tokens"))
    cache_bytes = kv_bytes(open_bundle(bundle_dir).manifest.model, num_positions)
    for row in rows:
        variant = "dense" if row.share is None else "pack"
        spec = {"engine": "coreinfer", "path": str(bundle_dir), "variant": variant, "kv_bytes": cache_bytes}
        contenders.append(Contender(name=row.name, spec=spec | {"cluster": row.choice.cluster}))
    disk, dense_bytes = disk_speed(bundle_dir / LAYOUT.base), dense_size(bundle_dir)
    click.echo(
        f"dense int4 {dense_bytes / 1e6:.1f} MB; disk {disk['sequential_mb_s']:.0f} MB/s in a row, "
        f"{disk['random_mb_s']:.1f} MB/s in 4k reads"
    )
    runs = list(run_all(contenders, [float(share) for share in limits.split(",")], dense_bytes, timing, {}))
    return {"dense_mb": dense_bytes / 1e6, "disk": disk, "runs": runs}


if __name__ == "__main__":
    main()
