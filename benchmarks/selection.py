"""Quality of each way to choose and repair neurons, side by side at the same bytes.

    python benchmarks/selection.py --calibration CALIB --data 'DEV/lm_*' --data 'DEV/completion_*' ...

Every row has the same keep ratio and layer budgets, and is read as it is stored. Calibration and evaluation text are
different files; each text is routed by its first half, read dense to there, and decoded narrow after it under teacher
forcing. Prints a Markdown table, then one JSON line.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, get_args

import click
import torch
from choices.compiled import Bench, choose_each, open_bench
from choices.inputs import BenchInputs, input_options
from coreinfer.bundles.manifest import Quality, Score
from coreinfer.bundles.statistics import Selection
from coreinfer.compiler.config import Budgets, Removal
from coreinfer.compiler.prune.narrow import CLUSTERS

REPAIRS: dict[str, tuple[Removal, bool]] = {
    "top-k, repaired": ("top-k", False),
    "second-order, repaired": ("second-order", False),
    "second-order, repaired, carried": ("second-order", True),
}
SELECTIONS: tuple[Selection, ...] = ("coreinfer", "griffin", "output-aware")


def scores(bench: Bench, *, repaired_only: bool) -> Iterator[Score]:
    """Measure every row of the table, the dense model first."""
    ground = bench.ground(bench.config)
    budgets = ground.layer_budgets(bench.config, bench.config.effective_keep)
    is_first = True
    for name, quality in qualities(bench, budgets, repaired_only=repaired_only):
        yield from [quality.dense] if is_first else []
        is_first = False
        for score in (*quality.controls, quality.clusters):
            yield replace(score, name=f"{name}, {score.name}")


def qualities(bench: Bench, budgets: list[int], *, repaired_only: bool) -> Iterator[tuple[str, Quality]]:
    """Measure selections without a repair, then repairs; the packs of all together would take too much of the disk."""
    for selection in () if repaired_only else SELECTIONS:
        config = replace(bench.config, selection=selection, reconstruct=False)
        _, narrow = bench.narrow(config, bench.ground(config), budgets)
        prompt = bench.prompt_scores(config)
        chosen = {"prompt's own neurons": choose_each(prompt, budgets)}
        if selection == "output-aware":
            chosen["fused"] = choose_each(bench.fused_scores(prompt, narrow[CLUSTERS].choice.scores), budgets)
        yield selection, bench.score(narrow, chosen)
    for name, (removal, carry) in REPAIRS.items():
        config = replace(bench.config, removal=removal, carry=carry)
        yield name, bench.score(bench.narrow(config, bench.ground(config), budgets)[1])


@click.command(context_settings={"show_default": True})
@click.option("--keep", default=0.7)
@click.option("--budgets", type=click.Choice(get_args(Budgets)), default="sensitivity")
@click.option("--repaired-only", is_flag=True, help="Leave out the rows without a repair.")
@input_options(clusters=8, calibration_tokens=100_000, limit=25)
def main(inputs: BenchInputs, keep: float, budgets: Any, *, repaired_only: bool) -> None:
    """Compare selections at the same bytes; a folder stands for the .jsonl files in it, and patterns are expanded."""
    with open_bench(replace(inputs.config, keep=keep, budgets=budgets), inputs.texts) as bench:
        rows = list(scores(bench, repaired_only=repaired_only))
    size = f"{rows[0].num_texts} texts, {rows[0].num_tokens} tokens"
    print(f"{size}, keep {keep}, budgets {budgets}, torch {torch.__version__}\n")
    print("| decoded with | perplexity | KL to dense | top-1 agreement |\n|---|---|---|---|")
    for score in rows:
        print(f"| {score.name} | {score.perplexity:.1f} | {score.kl:.3f} | {score.top1:.3f} |")
    print()
    print(json.dumps({"keep": keep, "budgets": budgets, "rows": [asdict(score) for score in rows]}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
