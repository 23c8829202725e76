"""The stages of a compile, one function each, for the pipeline that calls them in order and for other callers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from coreinfer.bundles.formats import ffn_formats
from coreinfer.bundles.manifest import Quality
from coreinfer.bundles.zero_neurons import ffn_kind, has_zero_neurons

from .cache import Cache, stage_key
from .checks import check_zero_neurons
from .clusters.route import Routing, build_routing, control_assignments
from .config import CompileConfig
from .efforts import shares_profile
from .models.layerwise import READING
from .models.load import LoadedModel
from .models.memory import check_memory
from .progress import Progress
from .prune.candidates import layer_candidates
from .prune.dealt import deal_text
from .prune.layer_repair import NarrowInputs
from .prune.mixtures.expert_losses import split_losses
from .prune.mixtures.expert_splits import SplitLosses, mean_splits
from .prune.mixtures.experts import profile_experts
from .prune.narrow import CLUSTERS, Assignment, CutOf, Labels, NarrowModel, choose_all
from .prune.profile import Profile, profile_model
from .prune.reconstruct import REVISION, narrow_all
from .prune.repair_text import few_validated
from .prune.select import layer_budgets
from .prune.sensitivity import RemovalCurves, output_metrics, removal_curves
from .prune.sums import Sums, keep_sums, sums_fit
from .quality.reference import Reference, read_reference
from .quality.score import evaluate
from .quality.search import searches
from .quality.stored import StoredModel, store_model
from .quantize.moments import Moments, input_moments
from .quantize.pack import Packer
from .quantize.rounding import Rounding
from .report.describe import PACKAGES, formats_of
from .team.team import Team
from .text.builtin import builtin_documents
from .text.corpus import SAMPLING, Corpus, build_corpus, split_point
from .text.given import given_documents

__all__ = [
    "Ground",
    "Material",
    "budgets_at",
    "build_ground",
    "find_routing",
    "gather_material",
    "held_out_reference",
    "held_out_tokens",
    "narrow_packs",
    "prepare",
    "score_packs",
]

Budgets = Mapping[str, Sequence[Sequence[int]]]
"""budgets[assignment name][cluster][layer], how many neurons are kept."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model and the text that it is compiled for.

    Attributes:
        team: who does the work; each of them has the model.
        moments: of `input_moments`, for formats that round.
        stored: the model's files.
        key: of all that depends on these alone.
    """

    team: Team
    corpus: Corpus
    moments: Moments
    stored: StoredModel
    cache: Cache
    key: str

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.team.loaded

    @property
    def held_out_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the held-out texts."""
        return [document.token_ids for document in self.corpus.held_out]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Everything that does not depend on how much is kept.

    Attributes:
        assignments: the clusters and the controls.
        metrics: of `output_metrics`.
        curves: of `removal_curves`, for budgets by sensitivity.
        key: key of the profile; later stages' keys extend it.
        sums: where what repairs sum over the text is kept.
        split_losses: assignment name -> what fewer experts and narrower ones cost; empty where packs have not both.
    """

    material: Material
    routing: Routing
    assignments: Sequence[Assignment]
    profile: Profile
    metrics: torch.Tensor
    curves: RemovalCurves | None
    key: str
    sums: Sums
    split_losses: Mapping[str, SplitLosses]

    @property
    def num_held_out_tokens(self) -> list[int]:
        """Of each cluster; see `held_out_tokens`."""
        return held_out_tokens(self.material, self.routing)

    def layer_budgets(self, config: CompileConfig, keep: float) -> list[int]:
        """Layer budgets at a keep ratio."""
        loaded, costs = self.material.loaded, None if self.curves is None else self.curves.costs
        return layer_budgets(config, keep, self.profile, loaded.column_norms, costs, loaded.record)

    def plan_sizes(self, config: CompileConfig, keep: float) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Layer budgets of the plan at a keep ratio, and into how many experts they are divided, where they are."""
        budgets = self.layer_budgets(config, keep)
        if not self.split_losses:
            return tuple(budgets), None
        splits = mean_splits(config, self.split_losses[CLUSTERS], budgets)
        return tuple(split.num_neurons for split in splits), tuple(split.num_experts for split in splits)


def held_out_tokens(material: Material, routing: Routing) -> list[int]:
    """Count the held-out tokens of each cluster that are decoded and scored: (clusters,)."""
    counts = [max(0, len(ids) - split_point(len(ids)) - 1) for ids in material.held_out_ids]
    routed, num_clusters = routing.assignment.held_out, routing.clustering.num_clusters
    totals = np.bincount(routed, weights=counts, minlength=num_clusters)
    return [int(total) for total in totals]


def gather_material(
    config: CompileConfig, team: Team, model_sha256: str, cache: Cache, folder: Path, progress: Progress
) -> Material:
    """Read the text, and store the model's files in a folder."""
    loaded = team.loaded
    check_zero_neurons(config, loaded.record.activation, has_zero_neurons(loaded.record))
    write_builtin = partial(builtin_documents, config, team, cache, model_sha256, folder, progress)
    corpus = build_corpus(
        config, loaded.record.max_positions, partial(given_documents, config, team, progress), write_builtin
    )
    check_memory(config, loaded, corpus)
    key = stage_key(
        "text",
        model=model_sha256,
        corpus=corpus.sha256,
        seed=config.seed,
        device=str(loaded.device),
        dtype=str(loaded.dtype),
        reading=READING,
        # The same file, read as another model than before, gives other results.
        config=loaded.record.config,
        threads=torch.get_num_threads(),
        # One place sums as a process alone does.
        **({"places": team.size} if team.size > 1 else {}),
        packages={name: version(name) for name in PACKAGES},
        coreinfer=version("coreinfer"),
    )
    moments: Moments = {}
    if config.quantize != "bf16":
        moments_key = stage_key("moments", upstream=key, sampling=SAMPLING)
        moments = input_moments(team, corpus.calibration, cache, moments_key, progress)
    packer = Packer(formats=formats_of(config), moments=moments, with_norms=config.token_share is not None)
    stored = store_model(loaded, packer, folder, config.output, progress)
    return Material(team=team, corpus=corpus, moments=moments, stored=stored, cache=cache, key=key)


def find_routing(
    config: CompileConfig, material: Material, clusters: int | Literal["auto"], progress: Progress
) -> Routing:
    """Cluster the text.

    Args:
        clusters: how many; "auto" to count them by their embeddings.
    """
    return build_routing(config, clusters, material.team, material.corpus, material.cache, progress)


def build_ground(
    config: CompileConfig,
    material: Material,
    routing: Routing,
    keep: float,
    progress: Progress,
    *,
    with_controls: bool,
) -> Ground:
    """Measure what narrowing for the clusters, and for the controls, needs.

    Args:
        keep: 1 where nothing will be narrowed, which leaves out what only narrowing needs.
    """
    assignments = [routing.assignment]
    if with_controls:
        assignments += control_assignments(routing.assignment, seed=config.seed)
    return prepare(config, material, routing, assignments, keep, progress)


def prepare(
    config: CompileConfig,
    material: Material,
    routing: Routing,
    assignments: Sequence[Assignment],
    keep: float,
    progress: Progress,
) -> Ground:
    """Measure what narrowing for the assignments needs; see `build_ground`."""
    team, calibration, cache = material.team, material.corpus.calibration, material.cache
    key = _profile_key(config, material, routing, [item.name for item in assignments])
    labels = {item.name: item.calibration for item in assignments}
    sums = Sums(cache=Cache(material.stored.folder / "sums"), key=key)
    if team.loaded.record.experts is not None:
        profile = profile_experts(config, team, calibration, labels, cache, key, progress)
    else:
        kept = None
        if keep < 1 and shares_profile(config) and sums_fit(team.loaded, assignments, sums):
            text = deal_text(team, calibration, *few_validated(material.corpus.validation, assignments))
            kept = keep_sums(sums, text, team.loaded)
        profile = profile_model(config, team, calibration, labels, cache, key, progress, kept)
    metrics = output_metrics(config, keep, team, calibration, cache, material.key, progress)
    curves = None
    if config.effective_budgets == "sensitivity" and keep < 1 and team.loaded.record.experts is None:
        curves_key = stage_key("curves", upstream=material.key, sampling=SAMPLING)
        curves = removal_curves(team, calibration, metrics, cache, curves_key, progress)
    return Ground(
        material=material,
        routing=routing,
        assignments=assignments,
        profile=profile,
        metrics=metrics,
        curves=curves,
        key=key,
        sums=sums,
        split_losses=split_losses(config, team, calibration, labels, profile, metrics, cache, key, progress),
    )


def budgets_at(
    config: CompileConfig, ground: Ground, keep: float, keeps: Sequence[float], assignments: Sequence[Assignment]
) -> Budgets:
    """Budget the clusters at their own keep ratios, and controls at the one of all."""
    at = {ratio: ground.layer_budgets(config, ratio) for ratio in {keep, *keeps}}
    budgets = {item.name: [at[keep]] * ground.profile.num_clusters(item.name) for item in assignments}
    return {**budgets, CLUSTERS: [at[ratio] for ratio in keeps]}


def narrow_packs(
    config: CompileConfig, ground: Ground, budgets: Budgets, assignments: Sequence[Assignment], progress: Progress
) -> tuple[str, dict[str, NarrowModel]]:
    """Narrow the model for some of the assignments, the clusters first.

    Returns:
        The stage's key, and assignment name -> narrow model.
    """
    material = ground.material
    choices = choose_all(config, ground.profile, material.loaded, assignments, budgets, ground.split_losses)
    inputs = NarrowInputs(
        config=config,
        team=material.team,
        calibration=material.corpus.calibration,
        validation=material.corpus.validation,
        assignments=assignments,
        choices=choices,
        budgets=budgets,
        metrics=ground.metrics,
        sums=ground.sums,
        candidates=layer_candidates(config, material.loaded, ground.curves, choices, budgets),
        rounding=_rounding(config, material) if config.repairs_rounding else None,
    )
    key = stage_key(
        "packs",
        upstream=ground.key,
        revision=REVISION,
        budgets=budgets,
        ridge=config.effective_ridge,
        removal=config.effective_removal,
        carry=config.effective_carry,
        tokens_a_neuron=config.tokens_a_neuron,
        rounding=formats_of(config).ffn if config.repairs_rounding else None,
        assignments=[item.name for item in assignments],
        # Efforts that differ in nothing else would have found each other's layers.
        **({"cluster_weights": "auto"} if config.chooses_cluster_weight else {}),
        **({"experts": "both"} if config.experts == "both" else {}),
    )
    return key, dict(narrow_all(inputs, material.cache, key, progress))


def _rounding(config: CompileConfig, material: Material) -> Rounding:
    record, kind = material.loaded.record, formats_of(config).ffn
    kinds = [ffn_kind(record, kind, layer) for layer in range(record.num_layers)]
    down_kinds = tuple(ffn_formats(own, gated=record.gated)["down"] for own in kinds)
    return Rounding(kind=config.quantize, down_kinds=down_kinds, moments=material.moments)


@contextmanager
def held_out_reference(
    config: CompileConfig, material: Material, routing: Routing | None, progress: Progress
) -> Iterator[Reference | None]:
    """Read the held-out text for the time of the block; None where there is none, or nothing is measured on it.

    Args:
        routing: puts texts of a cluster where others of it are; None where it is not known yet.
    """
    searched = searches(config) or config.searches_share
    measures = config.evaluate or searched or config.clusters == "auto"
    if not (measures and material.corpus.held_out):
        yield None
        return
    labels = None if routing is None else routing.assignment.held_out
    with read_reference(material.team, material.held_out_ids, progress, material.stored, labels) as reference:
        yield reference


def score_packs(
    material: Material, reference: Reference, models: Mapping[str, tuple[CutOf, Labels]], progress: Progress
) -> Quality:
    """Score FFNs on texts, with all other weights as stored; see `evaluate`."""
    return evaluate(material.team, reference, models, progress, material.stored)


def _profile_key(config: CompileConfig, material: Material, routing: Routing, names: list[str]) -> str:
    """Key of the profile: everything that shapes the sums."""
    return stage_key(
        "profile",
        upstream=material.key,
        clusters=routing.clustering.labels.tolist(),
        validation=routing.assignment.validation.tolist(),
        assignments=names,
        selection=config.selection,
        alpha=config.alpha,
        beta=config.beta,
        cluster_weight=config.cluster_weight,
        removal=config.effective_removal,
        sampling=SAMPLING,
        **({"narrowed": "experts, their tokens counted and weighed"} if config.experts != "whole" else {}),
    )
