"""Stage `reconstruct` without carrying: each layer is narrowed for itself, on the hidden states of the dense model."""

from collections.abc import Iterator, Sequence

import torch
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.layerwise import LayerActivations, walk_layers
from coreinfer.compiler.progress import Advance, Progress

from .layer_repair import NarrowInputs, Results, find_results, repair_assignment, store_results
from .narrow import CLUSTERS
from .repair import LayerTokens, MixedMoments, overall_moments
from .rows import Rows, rows_of
from .sums import AssignmentSums, Sums, find_sums, find_validation, sums_fit, watch_sums

__all__ = ["narrow_apart"]


def narrow_apart(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    sums = inputs.sums
    if sums is None:
        return _narrow_once(inputs, cache, keys, progress)
    # Sums that are there have taken their room already.
    if not all(_has_sums(inputs, sums, layer) for layer in range(len(keys))):
        if not sums_fit(inputs.loaded, inputs.assignments, sums):
            return _narrow_once(inputs, cache, keys, progress)
        _sum(inputs, sums, progress)
    results = []
    with progress.stage("reconstruct", len(keys)) as advance, torch.inference_mode():
        for layer, key in enumerate(keys):
            found = find_results(inputs, cache, key)
            results.append(found or store_results(cache, key, _narrow_by(inputs, sums, layer)))
            advance()
    return results


def _narrow_once(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow each layer as soon as the text has run through it, and keep nothing of what was summed."""
    results = []
    with progress.stage("reconstruct", len(keys)) as advance:
        for layer in _walk(inputs, advance):
            assert layer.ffn_outputs is not None
            tokens = LayerTokens(activations=layer.activations, targets=layer.ffn_outputs)
            found: Results = {}
            for item in inputs.assignments:
                rows = rows_of(item, layer.starts, inputs.loaded.device)
                clusters = found.get(CLUSTERS)
                found[item.name] = repair_assignment(inputs, layer.layer, item.name, rows, tokens, clusters)
            results.append(store_results(cache, keys[layer.layer], found))
    return results


def _walk(inputs: NarrowInputs, advance: Advance) -> Iterator[LayerActivations]:
    return walk_layers(inputs.loaded, [*inputs.calibration, *inputs.validation], advance, outputs=True)


def _has_sums(inputs: NarrowInputs, sums: Sums, layer: int) -> bool:
    device, names = inputs.loaded.device, [item.name for item in inputs.assignments]
    return all(find_sums(sums, name, layer, device) for name in names)


def _sum(inputs: NarrowInputs, sums: Sums, progress: Progress) -> None:
    watch = watch_sums(sums, inputs.loaded, inputs.assignments)
    with progress.stage("sums", inputs.loaded.record.num_layers) as advance:
        for layer in _walk(inputs, advance):
            watch(layer)


def _narrow_by(inputs: NarrowInputs, sums: Sums, layer: int) -> Results:
    """Narrow one layer for every assignment by its sums."""
    device, results = inputs.loaded.device, Results()
    tokens = find_validation(sums, layer, device)
    for item in inputs.assignments:
        own = find_sums(sums, item.name, layer, device)
        assert tokens is not None
        assert own is not None
        rows = Rows(validation=own.validation)
        clusters = results.get(CLUSTERS)
        results[item.name] = repair_assignment(inputs, layer, item.name, rows, tokens, clusters, _mixed(own))
    return results


def _mixed(sums: AssignmentSums) -> Iterator[MixedMoments]:
    overall = overall_moments(sums.moments, sums.counts)
    for own in sums.moments:
        yield own, overall
