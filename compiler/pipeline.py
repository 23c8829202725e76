"""Compile a model into a bundle: the compiler's main path."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.formats import GROUP_SIZE, PACKED_FORMATS, matrix_bytes
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import (
    GROUPS,
    ClusterRecord,
    Manifest,
    Plan,
    Provenance,
    Quality,
    QuantizationRecord,
    RouterRecord,
    Score,
)
from coreinfer.bundles.writer import check_target, finish_manifest, stage_bundle

from .cache import Cache, stage_key
from .carrying import NarrowInputs, narrow_all
from .clustering import label_clusters, map_positions, typical_texts
from .config import CompileConfig
from .corpus import Corpus, build_corpus
from .evaluating import evaluate
from .healing import HealInputs, heal
from .models import LoadedModel, load_model, read_config
from .moments import Moments, input_moments
from .narrowing import CLUSTERS, Assignment, NarrowModel, choose_all
from .packing import Packer, write_base, write_cluster, write_dense, write_router, write_tokenizer
from .profiling import Profile, profile_model
from .progress import Progress
from .quantizing import QuantizeOptions
from .report import write_report
from .routing import Routing, build_routing, control_assignments
from .searching import fit_quality
from .selecting import layer_budgets
from .sensitivity import output_metrics, removal_curves
from .sizing import fit_budget
from .sources import find_source

__all__ = ["Compiled", "compile_loaded", "compile_model"]

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "model2vec")
_STABILITY_MIN_TOKENS = 200
_FUSED_HALF_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """All that a bundle is written from."""

    config: CompileConfig
    loaded: LoadedModel
    corpus: Corpus
    routing: Routing
    budgets: list[int]
    narrow: NarrowModel
    moments: Moments
    quality: Quality | None
    model_sha256: str


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
    source = find_source(config.model)
    family, model_config = read_config(source)
    if config.threads:
        torch.set_num_threads(config.threads)
        faiss.omp_set_num_threads(config.threads)
    with progress.stage("load", 1) as advance:
        loaded = load_model(source, family, model_config, device=config.device, dtype=config.dtype)
        model_sha256 = source.sha256(model_config.to_dict())
        advance()
    return compile_loaded(config, loaded, model_sha256, progress)


def compile_loaded(config: CompileConfig, loaded: LoadedModel, model_sha256: str, progress: Progress) -> Manifest:
    """Compile a model that is in memory; `model_sha256` stands for it in the cache and in the manifest."""
    config = fit_budget(config, loaded)
    ground = _prepare(config, loaded, model_sha256, progress)
    corpus = ground.corpus
    config = fit_quality(config, partial(_measure, ground, progress), has_held_out=bool(corpus.held_out))
    budgets, narrow_key, narrow = _narrow(ground, config, ground.assignments, progress)
    if config.heal_steps:
        narrow[CLUSTERS] = _heal(config, ground, narrow[CLUSTERS], narrow_key, progress)
    quality = None
    if config.evaluate and corpus.held_out:
        models = {_score_name(config, item.name): (narrow[item.name], item.held_out) for item in ground.assignments}
        quality = evaluate(loaded, ground.held_out_ids, models, progress)
    moments = {}
    if config.quantize != "bf16":
        key = stage_key("moments", upstream=ground.key)
        moments = input_moments(loaded, corpus.calibration, ground.cache, key, progress)
    compiled = Compiled(
        config=config,
        loaded=loaded,
        corpus=corpus,
        routing=ground.routing,
        budgets=budgets,
        narrow=narrow[CLUSTERS],
        moments=moments,
        quality=quality,
        model_sha256=model_sha256,
    )
    return write_bundle(compiled, progress)


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What does not depend on how much is kept.

    Attributes:
        assignments: the clusters and the controls.
        curves: of `removal_curves`, for budgets by sensitivity.
        key: of the profile; later stages' keys go on from it.
    """

    loaded: LoadedModel
    corpus: Corpus
    routing: Routing
    assignments: list[Assignment]
    profile: Profile
    metrics: torch.Tensor
    curves: npt.NDArray[np.float32] | None
    cache: Cache
    key: str

    @property
    def held_out_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the held-out texts."""
        return [document.token_ids for document in self.corpus.held_out]


def _prepare(config: CompileConfig, loaded: LoadedModel, model_sha256: str, progress: Progress) -> _Ground:
    cache = Cache(config.cache_dir)
    corpus = build_corpus(config, loaded, cache, model_sha256, progress)
    routing = build_routing(config, loaded, corpus, cache, progress)
    assignments = [routing.assignment]
    if config.evaluate and corpus.held_out:
        assignments += control_assignments(routing.assignment, seed=config.seed)
    key = _stage_key(config, loaded, corpus, routing, model_sha256, [item.name for item in assignments])
    profile = profile_model(
        config, loaded, corpus.calibration, {a.name: a.calibration for a in assignments}, cache, key, progress
    )
    metrics = output_metrics(config, loaded, corpus.calibration, cache, key, progress)
    curves = None
    if config.budgets == "sensitivity" and config.keep < 1:
        curves_key = stage_key("curves", upstream=key)
        curves = removal_curves(loaded, corpus.calibration, metrics, cache, curves_key, progress)
    return _Ground(
        loaded=loaded,
        corpus=corpus,
        routing=routing,
        assignments=assignments,
        profile=profile,
        metrics=metrics,
        curves=curves,
        cache=cache,
        key=key,
    )


def _narrow(
    ground: _Ground, config: CompileConfig, assignments: Sequence[Assignment], progress: Progress
) -> tuple[list[int], str, dict[str, NarrowModel]]:
    """Narrow at the options' keep ratio: budgets, the stage's key, assignment name -> narrow model."""
    budgets = layer_budgets(config, ground.profile, ground.loaded.column_norms, ground.curves)
    inputs = NarrowInputs(
        config=config,
        loaded=ground.loaded,
        calibration=ground.corpus.calibration,
        validation=ground.corpus.validation,
        assignments=assignments,
        choices=choose_all(config, ground.profile, ground.loaded, assignments, budgets),
        budgets=budgets,
        metrics=ground.metrics,
    )
    key = stage_key(
        "packs",
        upstream=ground.key,
        budgets=budgets,
        ridge=config.ridge,
        removal=config.effective_removal,
        carry=config.carry,
        assignments=[item.name for item in assignments],
    )
    return budgets, key, dict(narrow_all(inputs, ground.cache, key, progress))


def _measure(ground: _Ground, progress: Progress, config: CompileConfig) -> Score:
    """Narrow the clusters alone, and score them on held-out text."""
    clusters = ground.assignments[:1]
    _, _, narrow = _narrow(ground, config, clusters, progress)
    models = {CLUSTERS: (narrow[CLUSTERS], clusters[0].held_out)}
    return evaluate(ground.loaded, ground.held_out_ids, models, progress).clusters


def _score_name(config: CompileConfig, name: str) -> str:
    """Only the clusters are healed: a control must not look as if it were."""
    return f"{name}, not healed" if config.heal_steps and name != CLUSTERS else name


def _heal(
    config: CompileConfig, ground: _Ground, narrow: NarrowModel, upstream: str, progress: Progress
) -> NarrowModel:
    inputs = HealInputs(
        config=config,
        loaded=ground.loaded,
        documents=ground.corpus.calibration,
        labels=ground.routing.assignment.calibration,
        narrow=narrow,
    )
    key = stage_key("heal", upstream=upstream, steps=config.heal_steps, rate=config.heal_rate)
    return heal(inputs, ground.cache, key, progress)


def write_bundle(compiled: Compiled, progress: Progress) -> Manifest:
    """Write the bundle beside its target and move it there when it is whole."""
    config, loaded = compiled.config, compiled.loaded
    num_clusters = compiled.routing.clustering.num_clusters
    with progress.stage("write", num_clusters + 3) as advance, stage_bundle(config.output, force=config.force) as stage:
        packer = Packer(formats=_formats(config), moments=compiled.moments)
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
        manifest = _manifest(compiled, base_tensors)
        write_report(stage / LAYOUT.report, manifest)
        manifest = finish_manifest(stage, manifest)
        advance()
    return manifest


def _stage_key(
    config: CompileConfig, loaded: LoadedModel, corpus: Corpus, routing: Routing, model_sha256: str, names: list[str]
) -> str:
    """Key of the profile: everything that shapes the sums."""
    return stage_key(
        "profile",
        model=model_sha256,
        corpus=corpus.sha256,
        clusters=routing.clustering.labels.tolist(),
        validation=routing.assignment.validation.tolist(),
        assignments=names,
        selection=config.selection,
        alpha=config.alpha,
        beta=config.beta,
        cluster_weight=config.cluster_weight,
        seed=config.seed,
        device=str(loaded.device),
        dtype=str(next(loaded.model.parameters()).dtype),
        threads=torch.get_num_threads(),
        packages={name: version(name) for name in _PACKAGES},
        coreinfer=version("coreinfer"),
    )


def _manifest(compiled: Compiled, base_tensors: dict[str, Any]) -> Manifest:
    config, routing = compiled.config, compiled.routing
    return Manifest(
        model=compiled.loaded.record,
        quantization={group: _quantization(config, group) for group in GROUPS},
        clusters=_cluster_records(compiled),
        router=RouterRecord(
            encoder="static",
            dimension=routing.centroids.shape[1],
            distance_p99=routing.distance_p99,
            agreement=routing.agreement,
            num_agreement_sentences=len(compiled.corpus.held_out),
        ),
        plan=Plan(
            selection=config.selection,
            keep=config.keep,
            alpha=config.alpha,
            beta=config.beta,
            cluster_weight=config.effective_cluster_weight,
            budgets=config.budgets,
            layer_budgets=tuple(compiled.budgets),
            reconstruct=config.reconstruct,
            ridges=compiled.narrow.ridges,
            dense=config.dense,
            stability_min_tokens=_STABILITY_MIN_TOKENS,
            fused_half_tokens=_FUSED_HALF_TOKENS,
        ),
        quality=compiled.quality,
        provenance=_provenance(compiled),
        base_tensors=base_tensors,
    )


def _formats(config: CompileConfig) -> QuantizeOptions:
    """Formats as they are stored: an int8 head can be screened."""
    head = config.effective_head_quantize
    return QuantizeOptions(body=config.quantize, head="int8-planes" if head == "int8" else head)


def _quantization(config: CompileConfig, group: str) -> QuantizationRecord:
    if group == "norm":
        return QuantizationRecord(format="f32")
    formats = _formats(config)
    kind = formats.head if group in ("embedding", "head") else formats.body
    return QuantizationRecord(format=kind, group_size=GROUP_SIZE if kind in PACKED_FORMATS else None)


def _cluster_records(compiled: Compiled) -> tuple[ClusterRecord, ...]:
    clustering, documents = compiled.routing.clustering, compiled.corpus.calibration
    texts = [document.routing_text for document in documents]
    labels = label_clusters(texts, clustering.labels)
    examples = typical_texts(texts, compiled.routing.embeddings, clustering)
    positions = map_positions(clustering.centroids)
    record = compiled.loaded.record
    keep_ratio = sum(compiled.budgets) / (record.num_layers * record.ffn_dim)
    return tuple(
        ClusterRecord(
            file=LAYOUT.cluster(cluster),
            label=labels[cluster],
            num_sentences=int((clustering.labels == cluster).sum()),
            num_tokens=sum(
                len(d.token_ids) for d, label in zip(documents, clustering.labels, strict=True) if label == cluster
            ),
            examples=examples[cluster],
            keep_ratio=round(keep_ratio, 5),
            ffn_bytes=_ffn_bytes(compiled),
            map_x=float(positions[cluster][0]),
            map_y=float(positions[cluster][1]),
        )
        for cluster in range(clustering.num_clusters)
    )


def _ffn_bytes(compiled: Compiled) -> int:
    """Bytes of a pack's weights that are read for one token."""
    record, kind = compiled.loaded.record, compiled.config.quantize
    num_inner = 2 if record.gated else 1
    return sum(
        num_inner * matrix_bytes(kind, (budget, record.hidden_size)) + matrix_bytes(kind, (record.hidden_size, budget))
        for budget in compiled.budgets
    )


def _provenance(compiled: Compiled) -> Provenance:
    options = {
        name: _plain(value) for name, value in asdict(compiled.config).items() if name not in _UNRECORDED_OPTIONS
    }
    return Provenance(
        coreinfer=version("coreinfer"),
        packages={name: version(name) for name in _PACKAGES},
        model_sha256=compiled.model_sha256,
        corpus_sha256=compiled.corpus.sha256,
        encoder=compiled.routing.encoder_name,
        config=options,
    )


# Where a bundle was written and cached says nothing of what it is, and would make equal bundles differ.
_UNRECORDED_OPTIONS = frozenset({"output", "force", "cache_dir", "model", "encoder"})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # Calibration files are recorded by name, not by this machine's paths.
    return Path(value).name if isinstance(value, str) and "/" in value else value
