"""What compiling larger models on workers would take; writes the Markdown tables of docs/scaling.md.

    python benchmarks/scaling_workers.py stages      products, memory, bytes and hours of each stage, by the cost model
    python benchmarks/scaling_workers.py schedule    one layer's repair on up to 1,000 workers, on a virtual clock

Nothing is compiled. `schedule` runs the compiler's own code that deals text, asks places and adds sums; its tasks take
the time that the cost model gives them (`virtual_team.py`), on machines of 16 cores with links of 10 Gbit/s.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from coreinfer.compiler.budget import moment_bytes
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.estimate.plan import memory_needs
from coreinfer.compiler.estimate.sizes import ffn_token_bytes
from coreinfer.compiler.estimate.speeds import stage_seconds
from coreinfer.compiler.estimate.stage_works import stage_works
from coreinfer.compiler.estimate.work import Case, Work, moment_values, removal_work, repair_flop
from coreinfer.compiler.prune.dealt import deal_text
from coreinfer.compiler.prune.narrow import Assignment
from coreinfer.compiler.prune.repair import RIDGES, RepairTask, repair_layer
from coreinfer.compiler.samples import VALIDATION_TOKENS
from coreinfer.compiler.team.dealing import finish
from coreinfer.compiler.text.corpus import Document
from scaling import DOCUMENT_TOKENS, MACHINES, MODELS, Cluster, case_of, duration
from virtual_team import MAIN, Cost, VirtualTeam

MACHINE = MACHINES["16 cores"].machine
LINK_GBPS = Cluster(machine=MACHINE).link_gbps
JOBS = {"7B (Llama 2)": (64, 10_000_000), "70B (Llama 3)": (256, 100_000_000)}
"""Model -> clusters and tokens."""
KEEP, FLOAT_BYTES = 0.4, 4


@click.group()
def main() -> None:
    """Say what larger compiles would take."""


def config_of(clusters: int, tokens: int, workers: int) -> CompileConfig:
    """Options of a compile without controls."""
    return CompileConfig(
        model="none",
        output=Path("none"),
        clusters=clusters,
        keep=KEEP,
        calibration_tokens=tokens,
        controls=False,
        ray="auto",
        workers=workers,
        threads=MACHINE.num_threads,
    )


@main.command()
def stages() -> None:
    """Print a table for each model and number of workers."""
    for name, (clusters, tokens) in JOBS.items():
        case = case_of(config_of(clusters, tokens, 1), MODELS[name], tokens)
        side = case.shapes.ffn_dim
        click.echo(f"\n### {name}, {clusters} clusters, {tokens / 1e6:,.0f} M tokens\n")
        click.echo(f"Largest matrix: {side:,} x {side:,}, {FLOAT_BYTES * side**2 / 1e9:.2f} GB in float32.\n")
        click.echo(stage_table(clusters, tokens, case, (8, 64)))


def stage_table(clusters: int, tokens: int, case: Case, all_workers: Sequence[int]) -> str:
    """One row a stage."""
    works: dict[str, Work] = defaultdict(Work)
    for name, _, work in stage_works(config_of(clusters, tokens, 1), case, None):
        works[name] += work
    head = ["stage", "products, TFLOP"]
    head += [
        text for n in all_workers for text in (f"{n}: memory a worker, GB", f"{n}: sent a worker, GB", f"{n}: time")
    ]
    lines, totals = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)], dict.fromkeys(all_workers, 0.0)
    most = dict.fromkeys(all_workers, 0.0)
    for name, work in works.items():
        cells = [name, f"{(work.model_flop + work.float_flop) / 1e12:,.0f}"]
        for number in all_workers:
            config, own = config_of(clusters, tokens, number), one_worker(case, number)
            gigabytes, sent = memory_needs(config, own, 2).get(name, 0) / 1e9, sent_bytes(name, case, number)
            taken = sums_twice(name, work, config, case)
            seconds = stage_seconds(name, taken, MACHINE, model_dtype="bfloat16", num_workers=number)
            seconds += sent / (LINK_GBPS * 1e9)
            totals[number] += seconds
            most[number] = max(most[number], gigabytes)
            cells += [f"{gigabytes:,.0f}" if gigabytes else "", f"{sent / 1e9:,.1f}", duration(seconds)]
        lines.append(f"| {' | '.join(cells)} |")
    ends = [text for n in all_workers for text in (f"{most[n]:,.0f}", "", duration(totals[n]))]
    lines.append(f"| all | | {' | '.join(ends)} |")
    return "\n".join(lines)


def one_worker(case: Case, num_workers: int) -> Case:
    """A worker's share of the text."""
    return replace(
        case,
        calibration_tokens=case.calibration_tokens // num_workers,
        validation_tokens=case.validation_tokens // num_workers,
        held_out_tokens=case.held_out_tokens // num_workers,
    )


def layer_moments(case: Case) -> float:
    """Bytes of one cluster's moments in one layer."""
    return FLOAT_BYTES * moment_values(case.shapes)


def sums_twice(name: str, work: Work, config: CompileConfig, case: Case) -> Work:
    """Work of `reconstruct` where a layer's moments of all clusters are more than the workers hold."""
    if name != "reconstruct" or case.num_packs * layer_moments(case) <= moment_bytes(config) * config.num_places:
        return work
    shapes = case.shapes
    sums = 2 * case.calibration_tokens * shapes.ffn_dim * (shapes.ffn_dim / 2 + shapes.hidden_size)
    return work + Work(model_flop=shapes.num_layers * sums)


def sent_bytes(name: str, case: Case, num_workers: int) -> float:
    """Bytes that a worker sends or reads over the network in a stage, whichever is more."""
    shapes, layers = case.shapes, case.shapes.num_layers
    packs = case.num_clusters / num_workers
    down = case.kept * shapes.hidden_size
    found = {
        # Statistics of all clusters, once up the tree.
        "profile": FLOAT_BYTES * layers * case.num_clusters * shapes.ffn_dim,
        # Of the gradients' products of each layer one triangle, up the tree.
        "sensitivity": FLOAT_BYTES * layers * shapes.hidden_size**2 / 2,
        # A Gram matrix of each layer up the tree, and to the place that removes: one triangle.
        "curves": FLOAT_BYTES * layers * shapes.ffn_dim**2 / 2 * (1 + 1 / num_workers),
        # Of each layer: its share of the clusters' moments to their homes, what is cut between two places, the overall
        # moments up the tree and back; the metric; solutions to the validation text, and the chosen one in bfloat16.
        "reconstruct": layers
        * (
            (packs + 3) * layer_moments(case)
            + FLOAT_BYTES * shapes.hidden_size**2
            + packs * FLOAT_BYTES * down * (len(RIDGES) + 1 / 2)
        ),
        "pack": packs * layers * 2 * down,
        # Held-out texts are dealt by their clusters: each worker reads its own packs from the shared folder, and one
        # that it shares with a neighbour.
        "evaluate": min(packs + 1, case.num_clusters) * ffn_token_bytes(shapes, "int4", case.kept),
        "load": 2 * shapes.all_weights,
    }
    return float(found.get(name, 0.0))


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What the tasks of one layer's repair take.

    Attributes:
        case: of the whole compile.
        lengths: place -> tokens of its text.
    """

    case: Case
    lengths: dict[int, int]
    passed: set[int]

    def __call__(self, place: int, name: str, arguments: Sequence[Any]) -> Cost:
        """Cost of a task by the name of its function."""
        shapes, moments = self.case.shapes, layer_moments(self.case)
        if name in ("_cluster_moments", "_place_moments"):
            tokens = arguments[1] if name == "_place_moments" else arguments[2]
            own = self.lengths[place] if name == "_place_moments" else min(tokens, self.lengths[place])
            flop = 2 * own * shapes.ffn_dim * (shapes.ffn_dim / 2 + shapes.hidden_size)
            return Cost(seconds=self._arrive(place) + self._seconds(Work(model_flop=flop)), bytes=moments)
        if name == "add_moments":
            return Cost(seconds=3 * moments / (MACHINE.read_gbps * 1e9), bytes=moments)
        if name == "_same":
            return Cost(seconds=2 * moments / (MACHINE.read_gbps * 1e9), bytes=moments)
        if name == "_weigh":
            return Cost(seconds=3 * moments * (len(arguments) - 1) / (MACHINE.read_gbps * 1e9), bytes=moments)
        if name == "_solve_cluster":
            down = FLOAT_BYTES * self.case.kept * shapes.hidden_size
            work = removal_work(shapes, self.case.kept) + Work(float_flop=repair_flop(self.case, len(RIDGES)))
            return Cost(seconds=self._seconds(work), bytes=down * len(RIDGES))
        if name == "_validation_costs":
            tokens = min(VALIDATION_TOKENS, self.case.validation_tokens) / 2 / self.case.num_clusters
            flop = 2 * tokens * shapes.hidden_size * (self.case.kept + shapes.hidden_size) * (len(RIDGES) + 1)
            return Cost(
                seconds=self._arrive(place) + self._seconds(Work(float_flop=flop)),
                value=[[[0.0] * (len(RIDGES) + 1)]],
            )
        if name == "_choose":
            nothing = torch.zeros((0, 0))
            value = (np.zeros(0, dtype=np.int32), (nothing, nothing))
            return Cost(seconds=0.0, bytes=2 * self.case.kept * shapes.hidden_size, value=value)
        raise ValueError(f"no cost of {name}")

    def _seconds(self, work: Work) -> float:
        return stage_seconds("reconstruct", work, MACHINE, model_dtype="bfloat16")

    def _arrive(self, place: int) -> float:
        """Run the place's text through the layer, for the first task that wants it: dense, and narrow as far."""
        if place in self.passed:
            return 0.0
        self.passed.add(place)
        shapes = self.case.shapes
        narrow = shapes.attention_weights + shapes.inner_weights + self.case.kept * shapes.hidden_size
        return self._seconds(Work(model_flop=self.lengths[place] * (self.case.token_flop / shapes.num_layers + narrow)))


@main.command()
@click.option("--workers", "all_workers", multiple=True, type=int, default=(1, 8, 64, 256, 1000), show_default=True)
def schedule(all_workers: Sequence[int]) -> None:
    """Print how long one layer's repair takes, and how much of it places are at work."""
    for name, (clusters, tokens) in JOBS.items():
        click.echo(f"\n{name}, {clusters} clusters, {tokens / 1e6:,.0f} M tokens: one layer\n")
        click.echo(
            "| workers | time | at work | speedup | adds of a cluster's sum, at most | sent a worker, at most, GB |"
        )
        click.echo("|---|---|---|---|---|---|")
        alone = 0.0
        for number in all_workers:
            team, depth = repair_one_layer(name, clusters, tokens, number)
            busy = sum(clock.busy for place, clock in team.clocks.items() if place != MAIN)
            alone = alone or team.now
            sent = max(clock.sent_bytes for place, clock in team.clocks.items() if place != MAIN)
            share = busy / (team.now * number)
            speedup = f"{alone / team.now:,.1f}"
            click.echo(f"| {number:,} | {duration(team.now)} | {share:.0%} | {speedup} | {depth} | {sent / 1e9:,.1f} |")


def repair_one_layer(name: str, clusters: int, tokens: int, num_workers: int) -> tuple[VirtualTeam, int]:
    """Deal text and repair one layer by the compiler's own code, on the virtual clock."""
    case = case_of(config_of(clusters, tokens, num_workers), MODELS[name], tokens)
    shapes = case.shapes
    generator = np.random.default_rng(0)
    # Clusters are of unlike sizes, the first the largest.
    shares = np.sort(generator.dirichlet(np.full(clusters, 8.0)))[::-1]
    calibration = documents(case.calibration_tokens, generator)
    validation = documents(VALIDATION_TOKENS, generator)
    labels = np.sort(generator.choice(clusters, len(calibration), p=shares))
    # Each cluster has text.
    labels[:: max(1, len(labels) // clusters)][:clusters] = np.arange(clusters)
    item = Assignment(
        name="clusters",
        calibration=labels,
        validation=generator.choice(clusters, len(validation), p=shares),
        held_out=np.zeros(0, dtype=np.int64),
    )
    costs = LayerCosts(case=case, lengths={}, passed=set())
    team = VirtualTeam(num_workers, costs, link_gbps=LINK_GBPS)
    text = deal_text(cast("Any", team), calibration, validation, [item])
    for place, ids in text.calibration.items():
        costs.lengths[place] = sum(len(calibration[index].token_ids) for index in ids)
    for place in range(num_workers):
        costs.lengths.setdefault(place, 0)
    task = RepairTask(
        calibration=text.calibration_tokens["clusters"],
        validation=text.validation_tokens["clusters"],
        own=cast("Any", None),
        shape=(shapes.ffn_dim, shapes.hidden_size),
        has_bias=False,
        metric=torch.empty(0),
        keeps=[case.kept] * clusters,
        neuron_ids=None,
        cluster_weights=(0.3,),
        ridges=(*RIDGES, None),
        dtype=torch.bfloat16,
    )
    finds: Any = dict.fromkeys(range(num_workers))
    finish(repair_layer(cast("Any", team), finds, task))
    return team, max(math.ceil(math.log2(len(places))) for places in text.calibration_tokens["clusters"])


def documents(tokens: int, generator: np.random.Generator) -> list[Document]:
    """Documents of unlike lengths; the tokens themselves take no room."""
    lengths = generator.integers(DOCUMENT_TOKENS // 2, DOCUMENT_TOKENS * 3 // 2, max(1, tokens // DOCUMENT_TOKENS))
    return [Document(text="", routing_text="", token_ids=cast("Any", range(length))) for length in lengths.tolist()]


if __name__ == "__main__":
    main()
