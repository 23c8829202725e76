"""Whether the choice of mode "fused" is worth a repair at run time, beside repaired packs of clusters.

    python benchmarks/fused.py --calibration CALIB --data 'DEV/lm_*' --data 'DEV/completion_*' --keep 0.4

A pack's down projection is refitted in the compiler; what a prompt chooses could only be refitted after its prefill,
from stored Gram matrices. Every row keeps the same neurons a layer; each text is routed by its first half, read dense
to there, and decoded narrow after it under teacher forcing. The Gram matrices are the dense model's on the second
halves of the calibration documents: nothing is carried from layer to layer, for packs neither. Only for models whose
down projection has no bias. All is read as it is stored. Prints a Markdown table, then one JSON line.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import click
import numpy as np
import torch
from choices.compiled import Bench, choose_each, chosen_cut, open_bench
from choices.inputs import BenchInputs, input_options
from coreinfer.bundles.manifest import Score
from coreinfer.compiler.config import Budgets
from coreinfer.compiler.models.layerwise import document_starts
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.walking import walk_layers
from coreinfer.compiler.progress import Progress, peak_memory_bytes
from coreinfer.compiler.prune.narrow import CLUSTERS, CutOf, NarrowModel, bf16_bits, choose_all
from coreinfer.compiler.prune.products import gram_matrix
from coreinfer.compiler.prune.select import Choice, choose_neurons
from coreinfer.compiler.quality.reference import read_reference
from coreinfer.compiler.quality.stored import StoredPacks, stored_packs
from coreinfer.compiler.quality.tally import Tally
from coreinfer.compiler.stages import Ground, score_packs
from coreinfer.compiler.text.corpus import split_point

REFERENCE = "clusters, top-k, repaired"
STATIC = "one static mask, repaired"
ONLY_PLACE = np.zeros(1, dtype=np.int64)

Grams = list[torch.Tensor]
"""Of each layer, (ffn_dim, ffn_dim) float16: mean of h h^T over its own mean diagonal."""


class Repair:
    """Refits the down projection on any neurons from Gram matrices, and counts the seconds."""

    def __init__(self, loaded: LoadedModel, ridge: float, *, pull: bool) -> None:
        self.ridge = ridge
        self.pull = pull
        layers = range(loaded.record.num_layers)
        self.weights = [loaded.projection(layer, "down").weight.detach().float().T.contiguous() for layer in layers]
        self.product_seconds: list[float] = []
        self.solve_seconds: list[float] = []

    def narrow(self, grams: Grams, scores: np.ndarray[Any, Any], neuron_ids: list[Any]) -> NarrowModel:
        """Make a narrow model with one cluster.

        Args:
            scores: (layers, ffn_dim), which are only passed on.
            neuron_ids: of each layer.
        """
        downs: list[list[Any]] = []
        product_seconds = solve_seconds = 0.0
        for gram, weights, ids in zip(grams, self.weights, neuron_ids, strict=True):
            index = torch.from_numpy(ids).long()
            start = time.perf_counter()
            right = gram[index].float() @ weights
            middle = time.perf_counter()
            down = self._solve(gram[index][:, index].float(), right, weights[index])
            solve_seconds += time.perf_counter() - middle
            product_seconds += middle - start
            downs.append([bf16_bits(down)])
        self.product_seconds.append(product_seconds)
        self.solve_seconds.append(solve_seconds)
        nothing: list[list[Any]] = [[None]] * len(downs)
        choice = Choice(scores=scores[None], neuron_ids=[neuron_ids])
        return NarrowModel(choice=choice, downs=downs, biases=nothing, ridges=(self.ridge,) * len(downs))

    def _solve(self, kept: torch.Tensor, right: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        lam = self.ridge * kept.diagonal().mean()
        kept.diagonal().add_(lam)
        if self.pull:
            right = right + lam * own
        return torch.cholesky_solve(right, torch.linalg.cholesky(kept))


def collect_grams(bench: Bench) -> tuple[Grams, list[Grams]]:
    """Gather the Gram matrices of all text, and each cluster's mixed with them as the compiler mixes."""
    rows = second_halves(bench)
    shares = [len(part) / sum(map(len, rows)) for part in rows]
    weight = bench.config.effective_cluster_weight
    overall: Grams = []
    mixed: list[Grams] = [[] for _ in rows]
    with bench.progress.stage("grams", bench.loaded.record.num_layers) as advance:
        for layer in walk_layers(bench.loaded, bench.material.corpus.calibration, advance):
            own = [gram_matrix(layer.activations[part]).div_(max(1, len(part))) for part in rows]
            total = sum((gram * share for gram, share in zip(own, shares, strict=True)), torch.zeros(()))
            overall.append(as_stored(total))
            for cluster, gram in enumerate(own):
                mixed[cluster].append(as_stored(gram.mul_(weight).add_(total, alpha=1 - weight)))
    return overall, mixed


def second_halves(bench: Bench) -> list[torch.Tensor]:
    """Rows of each cluster's calibration tokens that would be decoded narrow."""
    starts = document_starts(bench.material.corpus.calibration)
    labels = bench.routing.assignment.calibration
    rows: list[list[torch.Tensor]] = [[] for _ in range(int(labels.max()) + 1)]
    for label, start, end in zip(labels, starts[:-1], starts[1:], strict=True):
        rows[label].append(torch.arange(start + split_point(int(end - start)), end))
    return [torch.cat(parts) for parts in rows]


def as_stored(gram: torch.Tensor) -> torch.Tensor:
    """Round to float16 as a bundle would: what is lost below 6e-5 of the mean diagonal is far below any ridge."""
    return (gram / gram.diagonal().mean().clamp_min(1e-12)).half()


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is chosen and stored before any text is read, and what each text then chooses itself.

    Attributes:
        overall, mixed: the Gram matrices.
        packs: the clusters' and the static mask's, by `pack_name`.
        fused, prompt: each text's own neurons, not repaired.
    """

    bench: Bench
    repair: Repair
    overall: Grams
    mixed: list[Grams]
    packs: Mapping[str, NarrowModel]
    fused: Choice
    prompt: Choice

    def repaired(self, text: int) -> dict[str, NarrowModel]:
        """Repair what one text chooses itself: one narrow model a row, with one cluster."""
        cluster = int(self.bench.assignments[0].held_out[text])
        return {
            "fused, repaired, all text's Gram": self._repaired(self.fused, self.overall, text),
            "fused, repaired, cluster's mixed Gram": self._repaired(self.fused, self.mixed[cluster], text),
            "prompt's own neurons, repaired, all text's Gram": self._repaired(self.prompt, self.overall, text),
        }

    def _repaired(self, own: Choice, grams: Grams, text: int) -> NarrowModel:
        return self.repair.narrow(grams, own.scores[text], own.neuron_ids[text])

    def shipped(self, packs: Mapping[str, StoredPacks], text: int) -> dict[str, tuple[CutOf, Any]]:
        """Name the rows that are there before the text is read, and what it chooses without a repair."""
        cluster = int(self.bench.assignments[0].held_out[text])
        return {
            "fused, not repaired": (chosen_cut(self.bench.material.stored, self.fused), np.array([text])),
            # `evaluate` sums up what is called "clusters" apart from the others.
            CLUSTERS: (packs[pack_name(cluster)].cut, ONLY_PLACE),
            STATIC: (packs[STATIC].cut, ONLY_PLACE),
        }


def pack_name(cluster: int) -> str:
    """Name of a cluster's pack."""
    return f"cluster {cluster}"


def prepare(bench: Bench, repair: Repair, ground: Ground, budgets: list[int]) -> Contest:
    """Choose neurons for clusters, all text and every evaluation text, and repair the first two."""
    profile = ground.profile
    everywhere = {CLUSTERS: [budgets] * profile.num_clusters(CLUSTERS)}
    chosen = choose_all(bench.config, profile, bench.loaded, bench.assignments, everywhere, ground.split_losses)
    clusters = chosen[CLUSTERS]
    counts, sums = profile.num_tokens[CLUSTERS], profile.statistics[CLUSTERS]
    static = choose_neurons(
        bench.config, sums.sum(axis=0)[None], counts.sum()[None], bench.loaded.column_norms, [budgets]
    )
    prompt = bench.prompt_scores(bench.config)
    overall, mixed = collect_grams(bench)
    choices = zip(mixed, clusters.scores, clusters.neuron_ids, strict=True)
    return Contest(
        bench=bench,
        repair=repair,
        overall=overall,
        mixed=mixed,
        packs={
            **{pack_name(cluster): repair.narrow(*choice) for cluster, choice in enumerate(choices)},
            STATIC: repair.narrow(overall, static.scores[0], static.neuron_ids[0]),
        },
        fused=choose_each(bench.fused_scores(prompt, clusters.scores), budgets),
        prompt=choose_each(prompt, budgets),
    )


def measure(contest: Contest) -> dict[str, list[Score]]:
    """Score every row, text by text: the packs of all texts together would not fit into memory."""
    scores: dict[str, list[Score]] = {}
    bench, stored = contest.bench, contest.bench.material.stored
    with stored_packs(bench.material.team, stored, contest.packs, bench.progress) as shipped:
        for text, ids in enumerate(bench.token_ids):
            with (
                read_reference(bench.material.team, [ids], bench.progress, stored) as reference,
                stored_packs(bench.material.team, stored, contest.repaired(text), Progress()) as repaired,
            ):
                own = {name: (packs.cut, ONLY_PLACE) for name, packs in repaired.items()}
                quality = score_packs(bench.material, reference, own | contest.shipped(shipped, text), bench.progress)
            for score in (quality.dense, *quality.controls, quality.clusters):
                scores.setdefault(REFERENCE if score.name == CLUSTERS else score.name, []).append(score)
    return scores


def pooled(name: str, scores: Sequence[Score]) -> Score:
    """Mean over the tokens of all texts."""
    total = Tally()
    for text, score in enumerate(scores):
        count = score.num_tokens
        nll, agreements = math.log(score.perplexity) * count, round(score.top1 * count)
        total.add(Tally(nll=nll, kl=score.kl * count, agreements=agreements, num_tokens=count, texts={text}))
    return total.score(name)


def difference(scores: Sequence[Score], others: Sequence[Score]) -> tuple[float, float]:
    """Mean KL over tokens less the others', and its standard error over texts."""
    counts = np.array([score.num_tokens for score in scores])
    sums = counts * np.array([score.kl - other.kl for score, other in zip(scores, others, strict=True)])
    mean = float(sums.sum() / counts.sum())
    return mean, float(np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum())


def stored_bytes(loaded: LoadedModel) -> dict[str, int]:
    """Count the float16 bytes of one Gram matrix a layer, lower triangle, and of its product with the weights."""
    layers, ffn_dim, hidden_size = loaded.record.num_layers, loaded.record.ffn_dim, loaded.record.hidden_size
    return {"gram": layers * ffn_dim * (ffn_dim + 1), "product": layers * ffn_dim * hidden_size * 2}


@click.command(context_settings={"show_default": True})
@click.option("--keep", default=0.4)
@click.option("--budgets", type=click.Choice(get_args(Budgets)), default="uniform")
@click.option("--ridge", default=0.01, help="Relative to the mean diagonal of the kept neurons' Gram matrix.")
@click.option(
    "--pull", is_flag=True, help="Let the ridge pull towards the model's own weights, as the compiler's does."
)
@click.option("--threads", default=2, help="Of torch.")
@input_options(clusters=4, calibration_tokens=100_000, limit=5)
def main(inputs: BenchInputs, keep: float, budgets: Any, ridge: float, threads: int, *, pull: bool) -> None:
    """Print the table of the module's docstring; a folder stands for the .jsonl files in it, patterns are expanded."""
    torch.set_num_threads(threads)
    # Neurons are chosen by scores here, and `Repair` repairs.
    config = replace(inputs.config, keep=keep, budgets=budgets, reconstruct=False, controls=False)
    settings = {"keep": keep, "budgets": budgets, "ridge": ridge, "pull": pull, "threads": threads}
    with open_bench(config, inputs.texts) as bench:
        ground = bench.ground(config)
        repair = Repair(bench.loaded, ridge, pull=pull)
        scores = measure(prepare(bench, repair, ground, ground.layer_budgets(config, keep)))
        report(scores, repair, stored_bytes(bench.loaded), settings)


def report(scores: dict[str, list[Score]], repair: Repair, num_bytes: dict[str, int], settings: dict[str, Any]) -> None:
    """Print the table, what the repair costs, and the JSON line."""
    rows = [pooled(name, by_text) for name, by_text in scores.items()]
    against = {name: difference(by_text, scores[REFERENCE]) for name, by_text in scores.items()}
    described = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{rows[0].num_texts} texts, {rows[0].num_tokens} tokens, {described}, torch {torch.__version__}\n")
    print(
        "| decoded with | perplexity | KL to dense | less that of clusters | top-1 agreement |\n|---|---|---|---|---|"
    )
    for row in rows:
        mean, error = against[row.name]
        print(f"| {row.name} | {row.perplexity:.1f} | {row.kl:.3f} | {mean:+.3f} ± {error:.3f} | {row.top1:.3f} |")
    costs = {"product": repair.product_seconds, "solve": repair.solve_seconds}
    for name, seconds in costs.items():
        print(f"\n{name}: median {statistics.median(seconds):.3f} s, least {min(seconds):.3f} s over all layers")
    print(f"\nfloat16 bytes: {num_bytes['gram']:,} of one lower triangle a layer, {num_bytes['product']:,} of G W\n")
    medians = {f"{name}_seconds": statistics.median(seconds) for name, seconds in costs.items()}
    least = {f"{name}_least_seconds": min(seconds) for name, seconds in costs.items()}
    rest = {"bytes": num_bytes, "peak_bytes": peak_memory_bytes(), "against_clusters": against}
    print(json.dumps(settings | medians | least | rest | {"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
