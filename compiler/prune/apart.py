"""Stage `reconstruct` without carrying: each layer is narrowed for itself, on the hidden states of the dense model."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.dealing import in_turn
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import forget

from .dealt import DealtText, Find, deal_text, find_dense
from .layer_repair import NarrowInputs, Results, find_results, repair_assignment, store_results
from .narrow import CLUSTERS
from .sums import Sums, find_kept, has_sums, keep_sums, known_moments, sums_fit

__all__ = ["narrow_apart"]


def narrow_apart(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    text = deal_text(inputs.team, inputs.calibration, inputs.validation, inputs.assignments)
    sums = _sums_of_layers(inputs, text, len(keys), progress)
    results = []
    with progress.stage("reconstruct", len(keys)) as advance:
        for layer, key in enumerate(keys):
            found = find_results(inputs, cache, key)
            results.append(found or store_results(cache, key, _narrow_layer(inputs, text, sums, layer)))
            advance()
        forget(inputs.team, "reconstruct", WALK)
    return results


def _sums_of_layers(inputs: NarrowInputs, text: DealtText, num_layers: int, progress: Progress) -> Sums | None:
    """Where all layers' sums are kept, once they are; None where there is no room, and layers are summed in passing."""
    sums = inputs.sums
    # Sums that are there have taken their room already.
    if sums is None or all(has_sums(sums, inputs.assignments, layer) for layer in range(num_layers)):
        return sums
    if not sums_fit(inputs.loaded, inputs.assignments, sums):
        return None
    kept = keep_sums(sums, text, inputs.loaded)
    with progress.stage("sums", num_layers) as advance:
        for _, asked in in_turn(inputs.team, range(num_layers), partial(kept.keep, inputs.team, "sums")):
            for waiting in asked:
                waiting.result()
            advance()
        forget(inputs.team, "sums", WALK)
    return sums


def _narrow_layer(inputs: NarrowInputs, text: DealtText, sums: Sums | None, layer: int) -> Results:
    """Narrow one layer for every assignment, by sums that are kept or by the text itself."""
    results = Results()
    with torch.inference_mode():
        for item in inputs.assignments:
            finds = _dense_layer(text, item.name, layer) if sums is None else find_kept(sums, text, item.name, layer)
            known = None if sums is None else partial(known_moments, inputs.team, sums, item.name, layer)
            clusters = results.get(CLUSTERS)
            results[item.name] = repair_assignment(inputs, layer, item.name, text, finds, clusters, known)
    return results


def _dense_layer(text: DealtText, name: str, layer: int) -> Mapping[int, Find]:
    return {place: partial(find_dense, text=own, name=name, layer=layer) for place, own in text.texts.items()}
