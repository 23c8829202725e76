"""When a router is unsure, and how fast packs should follow a text: what two constants of the runtime rest on.

    python benchmarks/routing.py DIR --texts FOLDER

First, by the margin between the two nearest clusters: how often the first half of a text routes as the whole text and
as the second half. Then, for several rules of drift: how often packs are swapped within one text, and how often and
after how many tokens they follow a change of text. No model runs. Two tables, then one JSON line.
"""

import json
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.routing.router import Router, lead
from tokenizers import Tokenizer

Distances = npt.NDArray[np.float64]
EDGES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 1.01)
STRETCH_TOKENS = 64
TEXT_TOKENS = 6 * STRETCH_TOKENS


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path))
@click.option("--texts", type=click.Path(path_type=Path), required=True, help="Folder of JSON Lines files.")
def main(bundle_dir: Path, texts: Path) -> None:
    """Measure margins and drift."""
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    router = Router(bundle)
    tokenizer = Tokenizer.from_str(bundle.read_bytes(LAYOUT.tokenizer).decode())
    files = [
        [str(json.loads(line)["text"]) for line in path.open(encoding="utf-8")]
        for path in sorted(texts.glob("*.jsonl"))
    ]
    margins, drift = margin_rows(router, files), drift_rows(long_texts(router, tokenizer, files))
    click.echo(f"{'margin':>13s} {'share':>6s} {'as the whole':>13s} {'as the second half':>19s}")
    for row in margins:
        between = f"{row['least']:.3f}-{row['most']:.3f}"
        click.echo(f"{between:>13s} {row['share']:6.3f} {row['whole']:13.3f} {row['second']:19.3f}")
    click.echo(f"{'in a row':>8s} {'lead':>5s} {'swaps in a text':>16s} {'follows':>8s} {'after tokens':>13s}")
    for row in drift:
        click.echo(
            f"{row['times']:8d} {row['lead']:5.2f} {row['swaps']:16.2f} {row['follows']:8.2f} {row['tokens']:13.0f}"
        )
    click.echo(json.dumps({"bundle": bundle_dir.name, "margins": margins, "drift": drift}))


def margin_rows(router: Router, files: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Sort texts by the margin of their first half."""
    generator, seen = random.Random(0), []
    for lines in files:
        whole = [text for text in generator.sample(lines, len(lines)) if len(text.split()) >= 20]
        for text in whole[:150]:
            words = text.split(" ")
            first, second = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
            route = router.route(first)
            seen.append([route.margin, *(router.route(other).cluster == route.cluster for other in (text, second))])
    table = np.array(seen, dtype=np.float64)
    rows = []
    for least, most in pairwise(EDGES):
        inside = table[(table[:, 0] >= least) & (table[:, 0] < most)]
        if len(inside):
            whole, second = inside[:, 1:].mean(axis=0).tolist()
            rows.append(
                {"least": least, "most": most, "share": len(inside) / len(table), "whole": whole, "second": second}
            )
    return rows


def long_texts(router: Router, tokenizer: Tokenizer, files: Sequence[Sequence[str]]) -> list[list[Distances]]:
    """Take texts of at least 384 tokens apart: distances of each stretch of 64 tokens to all clusters."""
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for lines in files for text in lines]
    long = [ids for ids in encoded if len(ids) >= TEXT_TOKENS]
    random.Random(0).shuffle(long)
    starts = range(0, TEXT_TOKENS, STRETCH_TOKENS)
    return [
        [router.distances(tokenizer.decode(ids[start : start + STRETCH_TOKENS])) for start in starts]
        for ids in long[:600]
    ]


def drift_rows(texts: Sequence[Sequence[Distances]]) -> list[dict[str, Any]]:
    """Try rules of drift on texts, and on pairs of texts: half of one, then two thirds of another."""
    pairs = [(a[:3], b[:4]) for a, b in zip(texts[::2], texts[1::2], strict=False) if nearest(a) != nearest(b)]
    rows = []
    for times in (1, 2, 3):
        for least in (0.0, 0.02, 0.05, 0.1, 0.15):
            within = [len(swaps(int(text[0].argmin()), text[1:], times, least)) for text in texts]
            followed = [(swaps(nearest(a), [*a, *b], times, least), nearest(a), nearest(b)) for a, b in pairs]
            ends = [(found[-1][1] if found else start) == goal for found, start, goal in followed]
            after = [number - 2 for found, *_ in followed for number, _ in found if number > 2]
            rows.append(
                {
                    "times": times,
                    "lead": least,
                    "swaps": statistics.mean(within),
                    "follows": statistics.mean(ends),
                    "tokens": STRETCH_TOKENS * statistics.median(after),
                }
            )
    return rows


def nearest(stretches: Sequence[Distances]) -> int:
    """Give the cluster that is nearest to stretches together."""
    return int(np.mean(stretches, axis=0).argmin())


def swaps(cluster: int, stretches: Sequence[Distances], times: int, least: float) -> list[tuple[int, int]]:
    """List the swaps, (stretch, cluster), of a rule: so many stretches in a row with such a lead."""
    found: list[tuple[int, int]] = []
    in_row: list[int] = []
    for number, distances in enumerate(stretches):
        other = int(distances.argmin())
        leaves = other != cluster and lead(distances[other], distances[cluster]) >= least
        in_row = [*(in_row if in_row[-1:] == [other] else []), other] if leaves else []
        if len(in_row) == times:
            cluster, in_row = other, []
            found.append((number, cluster))
    return found


if __name__ == "__main__":
    main()
