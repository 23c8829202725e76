"""Compile a model into a bundle: the compiler's main path."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import faiss
import torch
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, Quality, Score
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.shared.ray_cluster import LOCAL
from coreinfer.bundles.writer import finish_manifest, scratch_folder, stage_bundle
from coreinfer.runtime.engines.torch.mixture import experts_of

from .cache import Cache
from .checks import Inputs
from .clusters.route import Routing
from .config import CompileConfig
from .expert_options import check_no_expert_options, with_expert_options
from .finished import Identity, identify, keep_finished, take_finished
from .healing import better_packs, heal_packs
from .models.load import LoadedModel, hub_revision, load_model, read_config
from .models.sources import ModelSource
from .progress import Progress
from .prune.narrow import CLUSTERS
from .quality.reference import Reference
from .quality.search import fit_clusters, fit_quality
from .quality.sizes import Sizes, fit_budget
from .quality.stored import StoredModel, StoredPacks, stored_packs
from .quantize.pack import write_router, write_tokenizer
from .report.describe import Compiled, manifest_of
from .report.map_points import map_points
from .report.write import file_sizes, write_report
from .shares.choice import ChosenPacks, chosen_packs
from .shares.gains import warn_of_no_gain
from .shares.halves import warn_of_no_halves
from .shares.healing import heal_with_shares
from .shares.search import check_aim
from .shares.stage import keep_token_shares, set_token_shares, share_inputs, thin_key
from .shares.token_shares import find_token_shares
from .stage_store import local_folder, store_of
from .stages import (
    Ground,
    Material,
    budgets_at,
    build_ground,
    find_routing,
    gather_material,
    held_out_reference,
    narrow_packs,
    score_packs,
)
from .storage import address_of
from .stream_options import check_stream_options
from .team.alone import Alone
from .team.folder import check_folder
from .team.team import Team

__all__ = ["compile_by", "compile_inputs"]


def compile_inputs(config: CompileConfig, inputs: Inputs, identity: Identity | None, progress: Progress) -> Manifest:
    """Compile a model into the bundle `config.output`; see `coreinfer.compiler.compile_model`.

    Args:
        inputs: what `find_inputs` returned for the same options.
        identity: of what is compiled, where the cache was found to lack it; None for a model that is on the Hub.
    """
    source = inputs.model
    family, model_config = read_config(source)
    check_stream_options(config, family, source.name)
    asked = config
    if (experts := experts_of(family, model_config)) is not None:
        config = with_expert_options(config, experts.num_chosen, experts.num_experts, source.name)
    else:
        check_no_expert_options(config, source.name)
    if identity is None:
        identity = identify(asked, inputs, {**model_config.to_dict(), "revision": hub_revision(source)})
        if (manifest := take_finished(asked, identity, progress)) is not None:
            return manifest
    if config.ray is not None:
        config, source = _for_workers(config), source.absolute()
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    faiss.omp_set_num_threads(config.threads or min(faiss.omp_get_max_threads(), usable_cores()))

    def load() -> LoadedModel:
        with progress.stage("load", 1) as advance:
            mapped = config.max_memory is not None
            loaded = load_model(source, family, model_config, device=config.device, dtype=config.dtype, mapped=mapped)
            advance()
        return loaded

    with _team(config, load, source, identity, progress) as team:
        return compile_by(config, team, identity, progress)


def _for_workers(config: CompileConfig) -> CompileConfig:
    """Fill in the threads of each of several workers, and paths that hold wherever a worker's own folder is."""
    cache_dir = config.cache_dir
    shared = max(1, usable_cores() // config.num_places) if config.num_places > 1 else None
    return replace(
        config,
        threads=config.threads or shared,
        output=config.output.absolute(),
        cache_dir=cache_dir if cache_dir is None or address_of(cache_dir) else cache_dir.absolute(),
    )


@contextmanager
def _team(
    config: CompileConfig,
    load: Callable[[], LoadedModel],
    source: ModelSource,
    identity: Identity,
    progress: Progress,
) -> Iterator[Team]:
    """Find who does the work."""
    if config.ray is None:
        yield Alone(load())
        return
    # Here, not above: only the extra `ray` has it.
    from .team.on_ray import ray_team
    from .team.place import Setup, arithmetic

    setup = Setup(
        config=config,
        source=source,
        model_sha256=identity.model_sha256 if source.path is not None and config.ray != LOCAL else None,
        threads=torch.get_num_threads(),
        arithmetic=arithmetic(),
    )
    with ray_team(config.ray, config.num_places, setup, load, progress) as team:
        yield team


def compile_by(config: CompileConfig, team: Team, identity: Identity, progress: Progress) -> Manifest:
    """Compile a model that a team has in memory; `identity` stands for it in the cache and in the manifest."""
    asked_keep = fit_budget(config, team.loaded)
    if config.token_share is not None:
        warn_of_no_gain(config, team.loaded)
        warn_of_no_halves(config, team.loaded)
    with scratch_folder(config.output) as scratch:
        check_folder(team, scratch)
        cache = _cache(config, scratch)
        material = gather_material(config, team, identity.model_sha256, cache, scratch, progress)
        routing = None if config.clusters == "auto" else find_routing(config, material, config.clusters, progress)
        with held_out_reference(config, material, routing, progress) as reference:
            # Thresholds take minutes, and packs hours.
            check_aim(config, reference)
            if config.packs == "thin":
                assert routing is not None
                return _compile_thin(config, material, routing, reference, identity, progress)
            if config.packs == "auto":
                assert routing is not None
                return _compile_chosen(config, material, routing, reference, identity, progress)
            return _compile_measured(config, material, routing, reference, asked_keep, identity, progress)


def _compile_thin(
    config: CompileConfig,
    material: Material,
    routing: Routing,
    reference: Reference | None,
    identity: Identity,
    progress: Progress,
) -> Manifest:
    """Set the clusters' token shares and write: nothing is narrowed."""
    record, num_clusters = material.loaded.record, routing.clustering.num_clusters
    inputs = share_inputs(config, material, routing, None)
    arrays = find_token_shares(inputs, material.cache, thin_key(material, routing), progress)
    found = set_token_shares(config, material, routing, reference, inputs, arrays, progress)
    sizes = Sizes(
        clusters=config.clusters,
        keep=1.0,
        keeps=(1.0,) * num_clusters,
        layer_budgets=(record.ffn_dim,) * record.num_layers,
    )
    compiled = Compiled(
        config=config,
        sizes=sizes,
        loaded=material.loaded,
        corpus=material.corpus,
        routing=routing,
        narrow=None,
        quality=found.quality,
        model_sha256=identity.model_sha256,
        token_shares=found.record,
    )
    return write_bundle(compiled, identity, material.stored, None, progress)


def _compile_chosen(
    config: CompileConfig,
    material: Material,
    routing: Routing,
    reference: Reference | None,
    identity: Identity,
    progress: Progress,
) -> Manifest:
    """Choose thin clusters and packs by what they read at the quality, and write."""
    ground = build_ground(config, material, routing, config.effective_keep, progress, with_controls=False)
    with chosen_packs(config, ground, reference, progress) as chosen:
        shared, num_tokens = chosen.shared, ground.num_held_out_tokens
        found = keep_token_shares(
            config, material, reference, shared, chosen.shares, num_tokens, progress, chosen.choices
        )
        quality = found.quality
        if quality is None and config.evaluate and reference and shared.packs is not None:
            quality = _final_quality(ground, reference, {CLUSTERS: shared.packs}, progress, healed=False)
        compiled = Compiled(
            config=config,
            sizes=_chosen_sizes(config, ground, chosen),
            loaded=material.loaded,
            corpus=material.corpus,
            routing=routing,
            narrow=chosen.narrow,
            thin=chosen.thin,
            quality=quality,
            model_sha256=identity.model_sha256,
            token_shares=found.record,
        )
        return write_bundle(compiled, identity, material.stored, shared.packs, progress)


def _chosen_sizes(config: CompileConfig, ground: Ground, chosen: ChosenPacks) -> Sizes:
    record = ground.material.loaded.record
    whole = (record.ffn_dim,) * record.num_layers
    budgets = whole if chosen.narrow is None else tuple(ground.layer_budgets(config, chosen.keep))
    return Sizes(clusters=config.clusters, keep=chosen.keep, keeps=chosen.keeps, layer_budgets=budgets)


def _compile_measured(
    config: CompileConfig,
    material: Material,
    routing: Routing | None,
    reference: Reference | None,
    asked_keep: float,
    identity: Identity,
    progress: Progress,
) -> Manifest:
    """Decide how much is kept, by measuring on the reference where that was asked for, and compile.

    Args:
        routing: None where the number of clusters is to be found.
    """
    clusters = fit_clusters(
        config,
        partial(_measure_clusters, config, material, reference, asked_keep, progress),
        num_documents=len(material.corpus.calibration) if reference else 0,
    )
    with_controls = config.evaluate and config.effective_controls and reference is not None
    if routing is None:
        routing = find_routing(config, material, clusters, progress)
    ground = build_ground(config, material, routing, asked_keep, progress, with_controls=with_controls)
    keep, keeps = fit_quality(
        config,
        asked_keep,
        partial(_measure, config, ground, reference, asked_keep, progress),
        reference.dense if reference else None,
        ground.num_held_out_tokens,
    )
    layer_budgets, layer_experts = ground.plan_sizes(config, keep)
    sizes = Sizes(clusters=clusters, keep=keep, keeps=keeps, layer_budgets=layer_budgets, layer_experts=layer_experts)
    return _compile_at(config, sizes, ground, reference, identity, progress)


def _compile_at(
    config: CompileConfig,
    sizes: Sizes,
    ground: Ground,
    reference: Reference | None,
    identity: Identity,
    progress: Progress,
) -> Manifest:
    """Narrow, heal, score and write, once it is known how much is kept."""
    material = ground.material
    budgets = budgets_at(config, ground, sizes.keep, sizes.keeps, ground.assignments)
    narrow_key, narrow = narrow_packs(config, ground, budgets, ground.assignments, progress)
    arrays = None
    if config.heals and config.token_share is not None:
        narrow[CLUSTERS], arrays = heal_with_shares(config, ground, narrow[CLUSTERS], reference, narrow_key, progress)
    elif config.heals:
        _, healed = heal_packs(config, ground, narrow[CLUSTERS], narrow_key, progress)
        narrow[CLUSTERS] = better_packs(ground, narrow[CLUSTERS], healed, progress)
    with stored_packs(material.team, material.stored, narrow, progress) as packs:
        shares = None
        if config.token_share is not None:
            inputs = share_inputs(config, material, ground.routing, packs[CLUSTERS])
            arrays = arrays or find_token_shares(inputs, material.cache, narrow_key, progress)
            shares = set_token_shares(config, material, ground.routing, reference, inputs, arrays, progress).record
        compiled = Compiled(
            config=config,
            sizes=sizes,
            loaded=material.loaded,
            corpus=material.corpus,
            routing=ground.routing,
            narrow=narrow[CLUSTERS],
            quality=_final_quality(ground, reference, packs, progress, healed=narrow[CLUSTERS].inner is not None)
            if config.evaluate and reference
            else None,
            model_sha256=identity.model_sha256,
            token_shares=shares,
        )
        return write_bundle(compiled, identity, material.stored, packs[CLUSTERS], progress)


def _cache(config: CompileConfig, scratch: Path) -> Cache:
    """Stage results, the packs among them, are mapped from files too where memory is short, or workers read them.

    Raises:
        ConfigError: shared storage was named for them and cannot be written.
    """
    if config.cache_dir is None:
        return Cache(scratch / "cache" if config.max_memory is not None or config.ray is not None else None)
    store = store_of(config.cache_dir)
    if store is not None:
        store.check()
    return Cache(local_folder(config.cache_dir), store)


def _measure(
    config: CompileConfig,
    ground: Ground,
    reference: Reference | None,
    keep: float,
    progress: Progress,
    keeps: Sequence[float],
) -> Quality:
    """Narrow the clusters alone, each at its keep ratio, and score them on held-out text, of which there is some."""
    assert reference is not None
    clusters = ground.assignments[:1]
    _, narrow = narrow_packs(config, ground, budgets_at(config, ground, keep, keeps, clusters), clusters, progress)
    with stored_packs(ground.material.team, ground.material.stored, narrow, progress) as packs:
        models = {CLUSTERS: (packs[CLUSTERS].cut, clusters[0].held_out)}
        return score_packs(ground.material, reference, models, progress)


def _measure_clusters(
    config: CompileConfig,
    material: Material,
    reference: Reference | None,
    keep: float,
    progress: Progress,
    num_clusters: int,
) -> Score:
    """Score the packs of a number of clusters, without controls."""
    routing = find_routing(config, material, num_clusters, progress)
    ground = build_ground(config, material, routing, keep, progress, with_controls=False)
    keeps = (keep,) * ground.routing.clustering.num_clusters
    return _measure(config, ground, reference, keep, progress, keeps).clusters


def _final_quality(
    ground: Ground, reference: Reference, packs: Mapping[str, StoredPacks], progress: Progress, *, healed: bool
) -> Quality:
    """Score the packs and the controls, which are not healed and must not look as if they were."""
    models = {}
    for item in ground.assignments:
        name = f"{item.name}, not healed" if healed and item.name != CLUSTERS else item.name
        models[name] = (packs[item.name].cut, item.held_out)
    return score_packs(ground.material, reference, models, progress)


def write_bundle(
    compiled: Compiled, identity: Identity, stored: StoredModel, packs: StoredPacks | None, progress: Progress
) -> Manifest:
    """Write the bundle next to its target, keep it in the cache, and move it to its place when it is complete.

    Args:
        packs: None where clusters are thin.
    """
    config, loaded = compiled.config, compiled.loaded
    with progress.stage("write", 2) as advance, stage_bundle(config.output, force=config.force) as stage:
        (stored.folder / LAYOUT.base).rename(stage / LAYOUT.base)
        if config.dense:
            (stored.folder / LAYOUT.dense).rename(stage / LAYOUT.dense)
        if packs is not None:
            (packs.folder / LAYOUT.clusters).rename(stage / LAYOUT.clusters)
        if compiled.token_shares is not None:
            (stored.folder / LAYOUT.token_shares).rename(stage / LAYOUT.token_shares)
        write_tokenizer(stage, loaded)
        write_router(stage, compiled.routing.encoder, compiled.routing.centroids)
        advance()
        manifest = manifest_of(compiled, stored.base_tensors)
        points = map_points(config, compiled.routing, compiled.corpus.calibration)
        write_report(stage / LAYOUT.report, manifest, points, file_sizes(stage))
        manifest = finish_manifest(stage, manifest)
        keep_finished(config, identity, stage)
        advance()
    return manifest
