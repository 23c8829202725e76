"""What narrowing costs at several keep ratios, with and without healing, beside the controls.

    python benchmarks/quality.py --calibration CALIB --data 'DEV/lm_*' --data 'DEV/completion_*' --keep 0.4 --keep 0.8

Narrows as coreinfer-compile does and scores what it stores on texts of other files: routed by their first half, read
dense to there, decoded narrow after it under teacher forcing. Prints a Markdown table, then one JSON line.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Literal, get_args

import click
from choices.compiled import Bench, open_bench
from choices.inputs import BenchInputs, input_options
from coreinfer.bundles.manifest import Quality
from coreinfer.bundles.shared.command_options import NumberOr
from coreinfer.compiler.config import CompileConfig, HealOptimizer
from coreinfer.compiler.healing import heal_packs
from coreinfer.compiler.prune.narrow import CLUSTERS


@click.command(context_settings={"show_default": True})
@click.option("--keep", "keeps", type=float, multiple=True, required=True, help="Keep ratio; repeatable.")
@click.option("--cluster-weight", type=NumberOr(float, "auto"), default=None, help="As coreinfer-compile has it.")
@click.option("--heal-steps", default=0, help="Heal the clusters' packs too.")
@click.option("--heal-cluster-steps", default=0)
@click.option("--heal-rate", default=CompileConfig.heal_rate)
@click.option("--heal-optimizer", type=click.Choice(get_args(HealOptimizer)), default=CompileConfig.heal_optimizer)
@click.option("--controls/--no-controls", default=True)
@input_options(clusters=16, calibration_tokens=200_000, limit=20)
def main(
    inputs: BenchInputs,
    keeps: tuple[float, ...],
    cluster_weight: float | Literal["auto"] | None,
    heal_steps: int,
    heal_cluster_steps: int,
    heal_rate: float,
    heal_optimizer: HealOptimizer,
    *,
    controls: bool,
) -> None:
    """Print the table of the module's docstring; a folder stands for the .jsonl files in it, patterns are expanded."""
    config = replace(
        inputs.config,
        cluster_weight=cluster_weight,
        heal_steps=heal_steps,
        heal_cluster_steps=heal_cluster_steps,
        heal_rate=heal_rate,
        heal_optimizer=heal_optimizer,
        controls=controls,
    )
    print("| keep | decoded with | perplexity | KL to dense | top-1 agreement |\n|---|---|---|---|---|")
    results = []
    with open_bench(config, inputs.texts) as bench:
        for keep in keeps:
            start = time.monotonic()
            for quality, healed in measure(bench, replace(config, keep=keep)):
                print("\n".join(rows(keep, quality, healed)), flush=True)
                seconds = round(time.monotonic() - start, 1)
                results.append({"keep": keep, "healed": healed, "seconds": seconds, **asdict(quality)})
    stages = {"stage_seconds": bench.progress.stage_seconds, "stage_peak_bytes": bench.progress.stage_peak_bytes}
    print("\n" + json.dumps({"num_texts": len(bench.documents), "results": results, **stages}))


def measure(bench: Bench, config: CompileConfig) -> Iterator[tuple[Quality, bool]]:
    """Narrow and score; heal and score again, where that is asked for."""
    ground = bench.ground(config)
    key, narrow = bench.narrow(config, ground, ground.layer_budgets(config, config.effective_keep))
    yield bench.score(narrow), False
    if config.heals:
        _, healed = heal_packs(config, ground, narrow[CLUSTERS], key, bench.progress)
        yield bench.score({CLUSTERS: healed}), True


def rows(keep: float, quality: Quality, healed: bool) -> Iterator[str]:
    """Lines of the table."""
    scores = (quality.clusters,) if healed else (quality.dense, quality.clusters, *quality.controls)
    for score in scores:
        name = f"{score.name}, healed" if healed else score.name
        yield f"| {keep:g} | {name} | {score.perplexity:.1f} | {score.kl:.3f} | {score.top1:.3f} |"


if __name__ == "__main__":
    main()
