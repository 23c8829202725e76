"""Quality of each way to choose and repair neurons, side by side at the same bytes.

    python benchmarks/selection.py --calibration CALIB --data 'DEV/lm_*' --data 'DEV/completion_*' ...

Every row has the same keep ratio and layer budgets. Calibration and evaluation text are different files; each text is
routed by its first half, read dense to there, and decoded narrow after it under teacher forcing. Prints a Markdown
table, then one JSON line.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import click
import numpy as np
import torch
from bench_inputs import BenchInputs, input_options
from coreinfer.bundles.manifest import Score
from coreinfer.bundles.statistics import (
    Selection,
    document_statistic,
    mix_scores,
    scores_from_statistic,
    select_neurons,
)
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.carrying import NarrowInputs, narrow_all
from coreinfer.compiler.config import Budgets, CompileConfig, Removal
from coreinfer.compiler.corpus import Corpus, Document, build_corpus, split_into_documents, split_point
from coreinfer.compiler.evaluating import evaluate
from coreinfer.compiler.layerwise import walk_layers
from coreinfer.compiler.models import LoadedModel, load_model, read_config
from coreinfer.compiler.narrowing import CLUSTERS, Assignment, NarrowModel, choose_all, cut_of
from coreinfer.compiler.primitives import keep_few_primitives
from coreinfer.compiler.profiling import Profile, profile_model
from coreinfer.compiler.progress import TqdmProgress
from coreinfer.compiler.routing import build_routing, control_assignments, nearest
from coreinfer.compiler.selecting import Choice, layer_budgets
from coreinfer.compiler.sensitivity import output_metrics, removal_curves
from coreinfer.compiler.sources import find_source

HALF_TOKENS = 100
REPAIRS: dict[str, tuple[Removal, bool]] = {
    "top-k, repaired": ("top-k", False),
    "second-order, repaired": ("second-order", False),
    "second-order, repaired, carried": ("second-order", True),
}
SELECTIONS: tuple[Selection, ...] = ("coreinfer", "griffin", "output-aware")


class Bench:
    """A loaded model, a clustered corpus and the texts to evaluate on."""

    def __init__(self, config: CompileConfig, texts: Sequence[str]) -> None:
        keep_few_primitives()
        self.config = config
        self.cache = Cache(config.cache_dir)
        self.progress = TqdmProgress()
        source = find_source(config.model)
        family, model_config = read_config(source)
        self.loaded: LoadedModel = load_model(source, family, model_config, device=config.device, dtype=config.dtype)
        self.model_key = source.sha256(model_config.to_dict())
        self.corpus: Corpus = build_corpus(config, self.loaded, self.cache, self.model_key, self.progress)
        self.routing = build_routing(config, self.loaded, self.corpus, self.cache, self.progress)
        documents = [split_into_documents([text], self.loaded.tokenizer, config.document_tokens)[:1] for text in texts]
        self.documents = [document for found in documents for document in found]
        self.assignments = self._assignments()

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the texts to evaluate on."""
        return [document.token_ids for document in self.documents]

    def _assignments(self) -> list[Assignment]:
        """The clusters and the controls, with the evaluation texts in place of the corpus's own held-out part."""
        halves = [self.loaded.tokenizer.decode(list(ids[: split_point(len(ids))])) for ids in self.token_ids]
        routed = nearest(self.routing.encoder.embed(halves), self.routing.centroids)
        clusters = replace(self.routing.assignment, held_out=routed)
        return [clusters, *(control_assignments(clusters, seed=self.config.seed) if self.config.controls else ())]

    def profile(self, config: CompileConfig) -> Profile:
        """Profile the corpus with one selection's statistic."""
        return profile_model(
            config,
            self.loaded,
            self.corpus.calibration,
            {item.name: item.calibration for item in self.assignments},
            self.cache,
            self.key(config, "profile"),
            self.progress,
        )

    def key(self, config: CompileConfig, stage: str, budgets: Sequence[int] = ()) -> str:
        """Key of a stage's result."""
        return stage_key(
            f"bench-{stage}",
            model=self.model_key,
            corpus=self.corpus.sha256,
            clusters=self.routing.clustering.labels.tolist(),
            selection=config.selection,
            alpha=config.alpha,
            beta=config.beta,
            weight=config.cluster_weight,
            assignments=[item.name for item in self.assignments],
            budgets=list(budgets),
            ridge=config.ridge,
            reconstruct=config.reconstruct,
            removal=config.effective_removal,
            carry=config.carry,
        )

    def narrow(self, config: CompileConfig, budgets: list[int], profile: Profile) -> dict[str, NarrowModel]:
        """Choose neurons for the clusters and the controls, and repair where the options say so."""
        everywhere = {item.name: [budgets] * profile.num_clusters(item.name) for item in self.assignments}
        choices = choose_all(config, profile, self.loaded, self.assignments, everywhere)
        inputs = NarrowInputs(
            config=config,
            loaded=self.loaded,
            calibration=self.corpus.calibration,
            validation=self.corpus.validation,
            assignments=self.assignments,
            choices=choices,
            budgets=everywhere,
            metrics=self.metrics(config),
        )
        return narrow_all(inputs, self.cache, self.key(config, "packs", budgets), self.progress)

    def metrics(self, config: CompileConfig) -> torch.Tensor:
        """What output errors cost."""
        key = stage_key("bench-metrics", model=self.model_key, corpus=self.corpus.sha256)
        return output_metrics(config, self.loaded, self.corpus.calibration, self.cache, key, self.progress)

    def budgets(self, config: CompileConfig, profile: Profile) -> list[int]:
        """Layer budgets, the same for every row."""
        curves = None
        if config.budgets == "sensitivity":
            key = stage_key("bench-curves", model=self.model_key, corpus=self.corpus.sha256)
            metrics = self.metrics(config)
            curves = removal_curves(self.loaded, self.corpus.calibration, metrics, self.cache, key, self.progress)
        return layer_budgets(config, profile, self.loaded.column_norms, curves)

    def prompt_scores(self, config: CompileConfig) -> np.ndarray[Any, Any]:
        """Scores of each text's own first half: (texts, layers, ffn_dim)."""
        halves = [Document(text="", routing_text="", token_ids=ids[: split_point(len(ids))]) for ids in self.token_ids]
        shape = (len(halves), self.loaded.record.num_layers, self.loaded.record.ffn_dim)
        scores = np.zeros(shape, dtype=np.float32)
        with self.progress.stage("prompts", shape[1]) as advance:
            for layer in walk_layers(self.loaded, halves, advance):
                for text in range(len(halves)):
                    statistic = document_statistic(
                        config.selection,
                        layer.document(text).float().numpy(),
                        alpha=config.alpha,
                        beta=config.beta,
                        sentence=False,
                    )
                    scores[text, layer.layer] = scores_from_statistic(
                        config.selection,
                        statistic,
                        len(halves[text].token_ids),
                        self.loaded.column_norms[layer.layer],
                    )
        return scores

    def own_neurons(self, scores: np.ndarray[Any, Any], budgets: list[int]) -> NarrowModel:
        """Give every text neurons of its own, as a narrow model with one cluster a text."""
        num_layers = self.loaded.record.num_layers
        ids = [select_neurons(layers, budgets) for layers in scores]
        own: list[list[Any]] = [[None] * len(scores)] * num_layers
        return NarrowModel(
            choice=Choice(scores=scores, neuron_ids=ids), downs=own, biases=own, ridges=(None,) * num_layers
        )

    def fused(self, prompt: np.ndarray[Any, Any], clusters: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Mix each text's own scores with its cluster's."""
        routed = self.assignments[0].held_out
        mixed = [
            mix_scores(
                prompt[text],
                clusters[routed[text]],
                num_prompt_tokens=split_point(len(ids)),
                half_tokens=HALF_TOKENS,
            )
            for text, ids in enumerate(self.token_ids)
        ]
        return np.stack(mixed)


def rows(bench: Bench, *, repaired_only: bool) -> list[Score]:
    """Measure every row of the table."""
    models: dict[str, tuple[NarrowModel, Any]] = {}
    every_text = np.arange(len(bench.documents))
    budgets = bench.budgets(bench.config, bench.profile(bench.config))
    for selection in () if repaired_only else SELECTIONS:
        config = replace(bench.config, selection=selection, reconstruct=False)
        profile = bench.profile(config)
        narrow = bench.narrow(config, budgets, profile)
        prompt = bench.prompt_scores(config)
        models[f"{selection}, prompt's own neurons"] = bench.own_neurons(prompt, budgets), every_text
        if selection == "output-aware":
            mixed = bench.fused(prompt, narrow[CLUSTERS].choice.scores)
            models["output-aware, fused"] = bench.own_neurons(mixed, budgets), every_text
        _add(models, selection, narrow, bench.assignments)
    for name, (removal, carry) in REPAIRS.items():
        config = replace(bench.config, removal=removal, carry=carry)
        _add(models, name, bench.narrow(config, budgets, bench.profile(config)), bench.assignments)
    # `evaluate` sums up what is called "clusters" apart from the controls; any row may take that place.
    first = next(iter(models))
    rows = {CLUSTERS: models.pop(first), **models}
    cuts = {name: (cut_of(bench.loaded, narrow), labels) for name, (narrow, labels) in rows.items()}
    quality = evaluate(bench.loaded, bench.token_ids, cuts, bench.progress)
    return [quality.dense, replace(quality.clusters, name=first), *quality.controls]


def _add(
    models: dict[str, tuple[NarrowModel, Any]],
    name: str,
    narrow: dict[str, NarrowModel],
    assignments: Sequence[Assignment],
) -> None:
    for item in assignments:
        models[f"{name}, {item.name}"] = narrow[item.name], item.held_out


@click.command(context_settings={"show_default": True})
@click.option("--keep", default=0.7)
@click.option("--budgets", type=click.Choice(get_args(Budgets)), default="sensitivity")
@click.option("--repaired-only", is_flag=True, help="Leave out the rows without a repair.")
@input_options(clusters=8, calibration_tokens=100_000, limit=25)
def main(inputs: BenchInputs, keep: float, budgets: Any, *, repaired_only: bool) -> None:
    """Compare selections at the same bytes; a folder stands for the .jsonl files in it, and patterns are expanded."""
    bench = Bench(replace(inputs.config, keep=keep, budgets=budgets), inputs.texts)
    scores = rows(bench, repaired_only=repaired_only)
    size = f"{scores[0].num_texts} texts, {scores[0].num_tokens} tokens"
    print(f"{size}, keep {keep}, budgets {budgets}, torch {torch.__version__}\n")
    print("| decoded with | perplexity | KL to dense | top-1 agreement |\n|---|---|---|---|")
    for score in scores:
        print(f"| {score.name} | {score.perplexity:.1f} | {score.kl:.3f} | {score.top1:.3f} |")
    print()
    print(json.dumps({"keep": keep, "budgets": budgets, "rows": [asdict(score) for score in scores]}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
