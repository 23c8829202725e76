"""What compiling larger models would take, by the cost model of `coreinfer-compile --dry-run`; writes Markdown tables.

    python benchmarks/scaling.py [--tokens 200000] [--clusters 16] [--effort normal]

Nothing is compiled: shapes are those of the models' config.json, speeds are stated in `MACHINES`.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import Effort
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import memory_needs
from coreinfer.compiler.estimate.shapes import Shapes
from coreinfer.compiler.estimate.sizes import kept_neurons
from coreinfer.compiler.estimate.speeds import stage_seconds
from coreinfer.compiler.estimate.stage_works import stage_works
from coreinfer.compiler.estimate.work import Case, Work

PART_SHARE = 0.1
DOCUMENT_TOKENS = 200
ENCODER_WEIGHTS, ENCODER_VOCABULARY = 10_600_000, 30_522
"""Of all-MiniLM-L6-v2, embeddings not counted."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that compile together.

    Attributes:
        num_machines: among which documents are divided, and for removal and repair the packs.
        link_gbps: gigabytes a second that a machine sends or receives.
    """

    machine: Machine
    num_machines: int = 1
    link_gbps: float = 1.25


def machine(num_threads: int, float32_gflops: float, bfloat16_gflops: float, read_gbps: float) -> Machine:
    """State a machine."""
    return Machine(
        num_threads=num_threads,
        float32_gflops=float32_gflops,
        bfloat16_gflops=bfloat16_gflops,
        read_gbps=read_gbps,
    )


MACHINES: Mapping[str, Cluster] = {
    "2 cores": Cluster(machine=machine(2, 180, 405, 33)),
    "16 cores": Cluster(machine=machine(16, 1400, 3200, 150)),
    "one GPU": Cluster(machine=machine(1, 50_000, 600_000, 2500)),
    "8 machines of 16 cores": Cluster(machine=machine(16, 1400, 3200, 150), num_machines=8),
}
"""2 cores: as measured (AVX-512 bf16). 16 cores: 8 times the products. GPU: as an H100, at two thirds
of its peaks, float32 on its ordinary units. Nothing was run on the last two."""


def shapes(sizes: tuple[int, ...], *, tied_head: bool) -> Shapes:
    """Shapes of a gated model: layers, hidden size, FFN, heads, heads of keys, head size, vocabulary."""
    num_layers, hidden_size, ffn_dim, num_heads, num_kv_heads, head_dim, vocab_size = sizes
    return Shapes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        gated=True,
        tied_head=tied_head,
    )


MODELS: Mapping[str, Shapes] = {
    "SmolLM2-135M": shapes((30, 576, 1536, 9, 3, 64, 49_152), tied_head=True),
    "Qwen2.5-0.5B": shapes((24, 896, 4864, 14, 2, 64, 151_936), tied_head=True),
    "7B (Llama 2)": shapes((32, 4096, 11_008, 32, 32, 128, 32_000), tied_head=False),
    "70B (Llama 3)": shapes((80, 8192, 28_672, 64, 8, 128, 128_256), tied_head=False),
}


@click.command()
@click.option("--tokens", default=200_000, show_default=True, help="Calibration tokens.")
@click.option("--clusters", default=16, show_default=True)
@click.option("--keep", default=0.4, show_default=True)
@click.option("--effort", type=click.Choice(get_args(Effort)), default="normal", show_default=True)
def main(tokens: int, clusters: int, keep: float, effort: Effort) -> None:
    """Print what each stage computes and moves, and how long machines would take for it."""
    config = CompileConfig(
        model="none",
        output=Path("none"),
        clusters=clusters,
        keep=keep,
        calibration_tokens=tokens,
        controls=False,
        effort=effort,
    )
    for name, sizes in MODELS.items():
        case = case_of(config, sizes, tokens)
        click.echo(f"\n{name}: {tokens:,} tokens, {clusters} clusters, keep {keep:g}, {effort}\n")
        click.echo(table(config, case))


def case_of(config: CompileConfig, sizes: Shapes, tokens: int) -> Case:
    """Size up a compile with text of documents of a fixed length."""
    part, clusters = round(tokens * PART_SHARE), config.clusters
    assert isinstance(clusters, int)
    return Case(
        shapes=sizes,
        calibration_tokens=tokens - 2 * part,
        validation_tokens=part,
        held_out_tokens=part,
        document_tokens=DOCUMENT_TOKENS,
        num_prompts=0,
        prompt_tokens=0,
        new_tokens=0,
        routing_tokens=tokens,
        kept=kept_neurons(config, sizes),
        num_clusters=clusters,
        num_assigned=(clusters,),
        encoder_weights=ENCODER_WEIGHTS,
        encoder_vocabulary=ENCODER_VOCABULARY,
    )


def table(config: CompileConfig, case: Case) -> str:
    """One row a stage, and their sum."""
    works: dict[str, Work] = defaultdict(Work)
    for name, _, work in stage_works(config, case, None):
        works[name] += work
    needs = memory_needs(config, case, 2)
    columns = ("stage", "products, TFLOP", "moved, GB", "memory, GB", *MACHINES)
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---|" * (len(columns) - 1)]
    totals = dict.fromkeys(MACHINES, 0.0)
    for name, work in works.items():
        seconds = {label: seconds_of(name, work, case, cluster) for label, cluster in MACHINES.items()}
        totals = {label: totals[label] + seconds[label] for label in MACHINES}
        flop = (work.model_flop + work.float_flop) / 1e12
        cells = " | ".join(duration(seconds[label]) for label in MACHINES)
        gigabytes = f"{needs.get(name, 0) / 1e9:,.1f}"
        lines.append(f"| {name} | {flop:,.1f} | {work.moved_bytes / 1e9:,.1f} | {gigabytes} | {cells} |")
    lines.append(
        f"| all | | | {max(needs.values()) / 1e9:,.1f} | {' | '.join(duration(total) for total in totals.values())} |"
    )
    return "\n".join(lines)


def seconds_of(stage: str, work: Work, case: Case, cluster: Cluster) -> float:
    """Seconds of a stage: divided among the machines, with sums of each layer sent where they are narrowed."""
    alone = stage_seconds(stage, work, cluster.machine, model_dtype="bfloat16")
    if cluster.num_machines == 1:
        return alone
    sent = 0.0
    if stage == "reconstruct":
        sizes = case.shapes
        sent = 4 * sizes.num_layers * case.num_packs * sizes.ffn_dim * (sizes.ffn_dim + sizes.hidden_size)
    return alone / cluster.num_machines + sent / (cluster.link_gbps * 1e9 * cluster.num_machines)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
