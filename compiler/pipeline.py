"""Compile a model into a bundle: the compiler's main path."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, Quality, Score
from coreinfer.bundles.writer import check_target, finish_manifest, stage_bundle

from .cache import Cache, stage_key
from .carrying import NarrowInputs, narrow_all
from .config import CompileConfig
from .corpus import Corpus, build_corpus, split_point, text_sources
from .describing import PACKAGES, Compiled, formats_of, manifest_of
from .evaluating import evaluate
from .healing import HealInputs, heal, healing_text
from .mapping import map_points
from .memory import check_memory
from .models import LoadedModel, load_model, read_config
from .moments import Moments, input_moments
from .narrowing import CLUSTERS, Assignment, NarrowModel, choose_all
from .packing import Packer, write_base, write_cluster, write_dense, write_router, write_tokenizer
from .profiling import Profile, profile_model
from .progress import Progress
from .report import file_sizes, write_report
from .rounding import Rounding
from .routing import Routing, build_routing, control_assignments
from .searching import fit_clusters, fit_quality
from .selecting import layer_budgets
from .sensitivity import output_metrics, removal_curves
from .sizing import fit_budget
from .sources import find_source

__all__ = ["compile_loaded", "compile_model"]

_log = logging.getLogger(__name__)


def compile_model(config: CompileConfig, progress: Progress | None = None) -> Manifest:
    """Compile a model into the bundle `config.output`.

    Args:
        progress: is told of stages as they run; None for none.
    Returns:
        The manifest that was written.
    Raises:
        CoreInferError: the options, the model, the text or the target are wrong; nothing is left behind.
    """
    progress = progress or Progress()
    check_target(config.output, force=config.force)
    # Loading takes long enough for a wrong path to be told before it.
    text_sources(config.calibration)
    source = find_source(config.model)
    family, model_config = read_config(source)
    if config.threads:
        torch.set_num_threads(config.threads)
        faiss.omp_set_num_threads(config.threads)
    with progress.stage("load", 1) as advance:
        mapped = config.max_memory is not None
        loaded = load_model(source, family, model_config, device=config.device, dtype=config.dtype, mapped=mapped)
        model_sha256 = source.sha256(model_config.to_dict())
        advance()
    with _results_in_files(config) as config:
        return compile_loaded(config, loaded, model_sha256, progress)


@contextmanager
def _results_in_files(config: CompileConfig) -> Iterator[CompileConfig]:
    """Stage results, the packs among them, are mapped from files too where memory is short."""
    if config.max_memory is None or config.cache_dir is not None:
        yield config
        return
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=config.output.parent, prefix=f".{config.output.name}-") as folder:
        yield replace(config, cache_dir=Path(folder))


def compile_loaded(config: CompileConfig, loaded: LoadedModel, model_sha256: str, progress: Progress) -> Manifest:
    """Compile a model that is in memory; `model_sha256` stands for it in the cache and in the manifest."""
    config = fit_budget(config, loaded)
    text = _read_text(config, loaded, model_sha256, progress)
    corpus = text.corpus
    check_memory(config, loaded, corpus)
    num_documents = len(corpus.calibration) if corpus.held_out else 0
    config = fit_clusters(config, partial(_measure_clusters, text, progress), num_documents=num_documents)
    ground = _prepare(config, text, progress)
    config, keeps = fit_quality(config, partial(_measure, ground, config, progress), ground.num_held_out_tokens)
    narrow_key, narrow = _narrow(ground, config, keeps, ground.assignments, progress)
    if config.heals:
        narrow[CLUSTERS] = _heal(config, ground, narrow[CLUSTERS], narrow_key, progress)
    quality = None
    if config.evaluate and corpus.held_out:
        healed = narrow[CLUSTERS].inner is not None
        models = {_score_name(item.name, healed): (narrow[item.name], item.held_out) for item in ground.assignments}
        quality = evaluate(loaded, text.held_out_ids, models, progress)
    compiled = Compiled(
        config=config,
        loaded=loaded,
        corpus=corpus,
        routing=ground.routing,
        budgets=ground.budgets(config, config.keep),
        narrow=narrow[CLUSTERS],
        moments=ground.moments,
        quality=quality,
        model_sha256=model_sha256,
    )
    return write_bundle(compiled, progress)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A model and the text that it is compiled for.

    Attributes:
        key: of all that depends on these two alone.
    """

    loaded: LoadedModel
    corpus: Corpus
    cache: Cache
    key: str

    @property
    def held_out_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the held-out texts."""
        return [document.token_ids for document in self.corpus.held_out]


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What does not depend on how much is kept.

    Attributes:
        assignments: the clusters and the controls.
        metrics: of `output_metrics`.
        curves: of `removal_curves`, for budgets by sensitivity.
        moments: of `input_moments`, for formats that round.
        key: of the profile; later stages' keys go on from it.
    """

    text: _Text
    routing: Routing
    assignments: list[Assignment]
    profile: Profile
    metrics: torch.Tensor
    curves: npt.NDArray[np.float32] | None
    moments: Moments
    key: str

    @property
    def num_held_out_tokens(self) -> list[int]:
        """Held-out tokens of each cluster that are decoded narrow and scored: (clusters,)."""
        counts = [max(0, len(ids) - split_point(len(ids)) - 1) for ids in self.text.held_out_ids]
        routed, num_clusters = self.routing.assignment.held_out, self.routing.clustering.num_clusters
        totals = np.bincount(routed, weights=counts, minlength=num_clusters)
        return [int(total) for total in totals]

    def budgets(self, config: CompileConfig, keep: float) -> list[int]:
        """Layer budgets at a keep ratio."""
        return layer_budgets(replace(config, keep=keep), self.profile, self.text.loaded.column_norms, self.curves)


def _read_text(config: CompileConfig, loaded: LoadedModel, model_sha256: str, progress: Progress) -> _Text:
    cache = Cache(config.cache_dir)
    corpus = build_corpus(config, loaded, cache, model_sha256, progress)
    key = stage_key(
        "text",
        model=model_sha256,
        corpus=corpus.sha256,
        seed=config.seed,
        device=str(loaded.device),
        dtype=str(loaded.dtype),
        threads=torch.get_num_threads(),
        packages={name: version(name) for name in PACKAGES},
        coreinfer=version("coreinfer"),
    )
    return _Text(loaded=loaded, corpus=corpus, cache=cache, key=key)


def _prepare(config: CompileConfig, text: _Text, progress: Progress) -> _Ground:
    loaded, calibration, cache = text.loaded, text.corpus.calibration, text.cache
    routing = build_routing(config, loaded, text.corpus, cache, progress)
    assignments = [routing.assignment]
    if config.evaluate and config.controls and text.corpus.held_out:
        assignments += control_assignments(routing.assignment, seed=config.seed)
    key = _profile_key(config, text, routing, [item.name for item in assignments])
    labels = {item.name: item.calibration for item in assignments}
    profile = profile_model(config, loaded, calibration, labels, cache, key, progress)
    metrics = output_metrics(config, loaded, calibration, cache, text.key, progress)
    curves = None
    if config.budgets == "sensitivity" and config.keep < 1:
        curves_key = stage_key("curves", upstream=text.key)
        curves = removal_curves(loaded, calibration, metrics, cache, curves_key, progress)
    moments: Moments = {}
    if config.quantize != "bf16":
        moments = input_moments(loaded, calibration, cache, stage_key("moments", upstream=text.key), progress)
    return _Ground(
        text=text,
        routing=routing,
        assignments=assignments,
        profile=profile,
        metrics=metrics,
        curves=curves,
        moments=moments,
        key=key,
    )


def _narrow(
    ground: _Ground,
    config: CompileConfig,
    keeps: Sequence[float],
    assignments: Sequence[Assignment],
    progress: Progress,
) -> tuple[str, dict[str, NarrowModel]]:
    """Narrow the clusters at their keep ratios, controls at the options'.

    Returns:
        The stage's key, and assignment name -> narrow model.
    """
    at = {keep: ground.budgets(config, keep) for keep in {config.keep, *keeps}}
    budgets = {item.name: [at[config.keep]] * ground.profile.num_clusters(item.name) for item in assignments}
    budgets[CLUSTERS] = [at[keep] for keep in keeps]
    inputs = NarrowInputs(
        config=config,
        loaded=ground.text.loaded,
        calibration=ground.text.corpus.calibration,
        validation=ground.text.corpus.validation,
        assignments=assignments,
        choices=choose_all(config, ground.profile, ground.text.loaded, assignments, budgets),
        budgets=budgets,
        metrics=ground.metrics,
        rounding=Rounding(kind=config.quantize, moments=ground.moments) if config.repairs_rounding else None,
    )
    key = stage_key(
        "packs",
        upstream=ground.key,
        budgets=budgets,
        ridge=config.ridge,
        removal=config.effective_removal,
        carry=config.carry,
        rounding=config.quantize if config.repairs_rounding else None,
        assignments=[item.name for item in assignments],
    )
    return key, dict(narrow_all(inputs, ground.text.cache, key, progress))


def _measure(ground: _Ground, config: CompileConfig, progress: Progress, keeps: Sequence[float]) -> Quality:
    """Narrow the clusters alone, each at its keep ratio, and score them on held-out text."""
    clusters = ground.assignments[:1]
    _, narrow = _narrow(ground, config, keeps, clusters, progress)
    models = {CLUSTERS: (narrow[CLUSTERS], clusters[0].held_out)}
    return evaluate(ground.text.loaded, ground.text.held_out_ids, models, progress)


def _measure_clusters(text: _Text, progress: Progress, config: CompileConfig) -> Score:
    """Score the clusters' packs with another number of clusters, without controls."""
    config = replace(config, evaluate=False)
    ground = _prepare(config, text, progress)
    keeps = (config.keep,) * ground.routing.clustering.num_clusters
    return _measure(ground, config, progress, keeps).clusters


def _score_name(name: str, healed: bool) -> str:
    """Only the clusters are healed: a control must not look as if it were."""
    return f"{name}, not healed" if healed and name != CLUSTERS else name


def _heal(
    config: CompileConfig, ground: _Ground, narrow: NarrowModel, upstream: str, progress: Progress
) -> NarrowModel:
    documents, labels = healing_text(config, ground.text.corpus, ground.routing)
    inputs = HealInputs(config=config, loaded=ground.text.loaded, documents=documents, labels=labels, narrow=narrow)
    key = stage_key(
        "heal",
        upstream=upstream,
        steps=config.heal_steps,
        relative_rate=config.heal_rate,
        optimizer=config.heal_optimizer,
        text=[document.token_ids for document in documents],
    )
    return _better(ground, narrow, heal(inputs, ground.text.cache, key, progress), progress)


def _better(ground: _Ground, narrow: NarrowModel, healed: NarrowModel, progress: Progress) -> NarrowModel:
    """Take the healed packs, unless text that nothing was trained on rejects them."""
    documents, labels = ground.text.corpus.validation, ground.routing.assignment.validation
    if not documents:
        _log.warning("healing is not checked: there is no validation text; give more calibration text")
        return healed
    token_ids = [document.token_ids for document in documents]
    models = {CLUSTERS: (narrow, labels), "healed": (healed, labels)}
    quality = evaluate(ground.text.loaded, token_ids, models, progress)
    before, after = quality.clusters.kl, quality.controls[0].kl
    _log.info("healing: KL on validation text %.4f before, %.4f after", before, after)
    if after < before:
        return healed
    _log.warning(
        "healing is left out: KL on validation text rises from %.4f to %.4f; lower --heal-rate or raise --heal-steps",
        before,
        after,
    )
    return narrow


def write_bundle(compiled: Compiled, progress: Progress) -> Manifest:
    """Write the bundle beside its target and move it there when it is whole."""
    config, loaded = compiled.config, compiled.loaded
    num_clusters = compiled.routing.clustering.num_clusters
    with progress.stage("write", num_clusters + 3) as advance, stage_bundle(config.output, force=config.force) as stage:
        packer = Packer(formats=formats_of(config), moments=compiled.moments)
        base_tensors = write_base(stage, loaded, packer)
        advance()
        if config.dense:
            write_dense(stage, loaded, packer)
        advance()
        for cluster in range(num_clusters):
            write_cluster(stage, loaded, packer, compiled.narrow, cluster)
            advance()
        write_tokenizer(stage, loaded)
        write_router(stage, compiled.routing.encoder, compiled.routing.centroids)
        manifest = manifest_of(compiled, base_tensors)
        points = map_points(config, compiled.routing, compiled.corpus.calibration)
        write_report(stage / LAYOUT.report, manifest, points, file_sizes(stage))
        manifest = finish_manifest(stage, manifest)
        advance()
    return manifest


def _profile_key(config: CompileConfig, text: _Text, routing: Routing, names: list[str]) -> str:
    """Key of the profile: everything that shapes the sums."""
    return stage_key(
        "profile",
        upstream=text.key,
        clusters=routing.clustering.labels.tolist(),
        validation=routing.assignment.validation.tolist(),
        assignments=names,
        selection=config.selection,
        alpha=config.alpha,
        beta=config.beta,
        cluster_weight=config.cluster_weight,
        removal=config.effective_removal,
    )
