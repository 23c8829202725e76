"""Compile a model into a bundle: the compiler's main path."""

import logging
from collections.abc import Iterator, Mapping, Sequence
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
from coreinfer.bundles.machine import usable_cores
from coreinfer.bundles.manifest import Manifest, Quality, Score
from coreinfer.bundles.writer import check_target, disk_errors, existing_parent, finish_manifest, stage_bundle

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
from .narrowing import CLUSTERS, Assignment, Cut, NarrowModel, choose_all
from .packing import Packer, write_router, write_tokenizer
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
from .stored import StoredModel, StoredPacks, dense_cut, store_model, stored_packs

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
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    faiss.omp_set_num_threads(config.threads or min(faiss.omp_get_max_threads(), usable_cores()))
    with progress.stage("load", 1) as advance:
        mapped = config.max_memory is not None
        loaded = load_model(source, family, model_config, device=config.device, dtype=config.dtype, mapped=mapped)
        model_sha256 = source.sha256(model_config.to_dict())
        advance()
    return compile_loaded(config, loaded, model_sha256, progress)


def compile_loaded(config: CompileConfig, loaded: LoadedModel, model_sha256: str, progress: Progress) -> Manifest:
    """Compile a model that is in memory; `model_sha256` stands for it in the cache and in the manifest."""
    config = fit_budget(config, loaded)
    with _scratch_folder(config) as scratch:
        if config.max_memory is not None and config.cache_dir is None:
            # Stage results, the packs among them, are mapped from files too where memory is short.
            config = replace(config, cache_dir=scratch / "cache")
        text = _read_text(config, loaded, model_sha256, scratch, progress)
        num_documents = len(text.corpus.calibration) if text.corpus.held_out else 0
        config = fit_clusters(config, partial(_measure_clusters, text, progress), num_documents=num_documents)
        ground = _prepare(config, text, progress)
        config, keeps = fit_quality(
            config,
            partial(_measure, ground, config, progress),
            partial(_measure_dense, text, progress),
            ground.num_held_out_tokens,
        )
        narrow_key, narrow = _narrow(ground, config, keeps, ground.assignments, progress)
        if config.heals:
            narrow[CLUSTERS] = _heal(config, ground, narrow[CLUSTERS], narrow_key, progress)
        with stored_packs(text.stored, narrow, progress) as packs:
            quality = _final_quality(config, ground, packs, progress, healed=narrow[CLUSTERS].inner is not None)
            compiled = Compiled(
                config=config,
                loaded=loaded,
                corpus=text.corpus,
                routing=ground.routing,
                budgets=ground.budgets(config, config.keep),
                narrow=narrow[CLUSTERS],
                quality=quality,
                model_sha256=model_sha256,
            )
            return write_bundle(compiled, text.stored, packs[CLUSTERS], progress)


@contextmanager
def _scratch_folder(config: CompileConfig) -> Iterator[Path]:
    """Make a folder on the bundle's disk for the block, from where files can be moved into the bundle."""
    with disk_errors(config.output):
        folder = TemporaryDirectory(dir=existing_parent(config.output), prefix=f".{config.output.name}.scratch-")
    with folder as name:
        yield Path(name)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A model and the text that it is compiled for.

    Attributes:
        moments: of `input_moments`, for formats that round.
        stored: the model's files.
        key: of all that depends on these alone.
    """

    loaded: LoadedModel
    corpus: Corpus
    moments: Moments
    stored: StoredModel
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
        key: of the profile; later stages' keys go on from it.
    """

    text: _Text
    routing: Routing
    assignments: list[Assignment]
    profile: Profile
    metrics: torch.Tensor
    curves: npt.NDArray[np.float32] | None
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


def _read_text(
    config: CompileConfig, loaded: LoadedModel, model_sha256: str, scratch: Path, progress: Progress
) -> _Text:
    cache = Cache(config.cache_dir)
    corpus = build_corpus(config, loaded, cache, model_sha256, progress)
    check_memory(config, loaded, corpus)
    key = stage_key(
        "text",
        model=model_sha256,
        corpus=corpus.sha256,
        seed=config.seed,
        device=str(loaded.device),
        dtype=str(loaded.dtype),
        # The same file, read as another model than before, gives other results.
        config=loaded.record.config,
        threads=torch.get_num_threads(),
        packages={name: version(name) for name in PACKAGES},
        coreinfer=version("coreinfer"),
    )
    moments: Moments = {}
    if config.quantize != "bf16":
        moments = input_moments(loaded, corpus.calibration, cache, stage_key("moments", upstream=key), progress)
    packer = Packer(formats=formats_of(config), moments=moments)
    stored = store_model(loaded, packer, scratch, config.output, progress)
    return _Text(loaded=loaded, corpus=corpus, moments=moments, stored=stored, cache=cache, key=key)


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
    return _Ground(
        text=text,
        routing=routing,
        assignments=assignments,
        profile=profile,
        metrics=metrics,
        curves=curves,
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
        rounding=Rounding(kind=config.quantize, moments=ground.text.moments) if config.repairs_rounding else None,
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
    with stored_packs(ground.text.stored, narrow, progress) as packs:
        return _score(ground.text, {CLUSTERS: (packs[CLUSTERS].cut, clusters[0].held_out)}, progress)


def _measure_dense(text: _Text, progress: Progress) -> Score:
    """Score the dense FFN as it is stored."""
    everywhere = np.zeros(len(text.held_out_ids), dtype=np.int64)
    return _score(text, {CLUSTERS: (dense_cut(text.stored), everywhere)}, progress).clusters


def _measure_clusters(text: _Text, progress: Progress, config: CompileConfig) -> Score:
    """Score the clusters' packs with another number of clusters, without controls."""
    config = replace(config, evaluate=False)
    ground = _prepare(config, text, progress)
    keeps = (config.keep,) * ground.routing.clustering.num_clusters
    return _measure(ground, config, progress, keeps).clusters


def _final_quality(
    config: CompileConfig, ground: _Ground, packs: Mapping[str, StoredPacks], progress: Progress, *, healed: bool
) -> Quality | None:
    """Score what is shipped beside the controls, which are not healed, and must not look as if they were."""
    if not config.evaluate or not ground.text.corpus.held_out:
        return None
    models = {}
    for item in ground.assignments:
        name = f"{item.name}, not healed" if healed and item.name != CLUSTERS else item.name
        models[name] = (packs[item.name].cut, item.held_out)
    return _score(ground.text, models, progress)


def _score(text: _Text, models: Mapping[str, tuple[Cut, npt.NDArray[np.int64]]], progress: Progress) -> Quality:
    """Score FFNs on held-out text, with everything beside them as it is stored."""
    return evaluate(text.loaded, text.held_out_ids, models, progress, text.stored)


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
    with stored_packs(ground.text.stored, {CLUSTERS: narrow, "healed": healed}, progress) as packs:
        models = {name: (pack.cut, labels) for name, pack in packs.items()}
        quality = evaluate(ground.text.loaded, token_ids, models, progress, ground.text.stored)
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


def write_bundle(compiled: Compiled, stored: StoredModel, packs: StoredPacks, progress: Progress) -> Manifest:
    """Put the bundle together beside its target and move it there when it is whole."""
    config, loaded = compiled.config, compiled.loaded
    with progress.stage("write", 2) as advance, stage_bundle(config.output, force=config.force) as stage:
        (stored.folder / LAYOUT.base).rename(stage / LAYOUT.base)
        if config.dense:
            (stored.folder / LAYOUT.dense).rename(stage / LAYOUT.dense)
        (packs.folder / LAYOUT.clusters).rename(stage / LAYOUT.clusters)
        write_tokenizer(stage, loaded)
        write_router(stage, compiled.routing.encoder, compiled.routing.centroids)
        advance()
        manifest = manifest_of(compiled, stored.base_tensors)
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
