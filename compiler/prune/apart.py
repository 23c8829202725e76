"""Stage `reconstruct` without carrying: each layer is narrowed for itself, on the hidden states of the dense model."""

from collections.abc import Mapping, Sequence
from functools import partial

from coreinfer.compiler.cache import Cache
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.dealing import Stepwise, finish, overlapped
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import forget

from .dealt import DealtText, Find, deal_text, find_dense
from .layer_repair import NarrowInputs, Results, find_results, repair_assignment, store_results
from .narrow import CLUSTERS
from .own_down import OWN_DOWN
from .sums import KeptSums, Sums, find_kept, has_sums, keep_sums, known_moments, sums_fit

__all__ = ["narrow_apart"]


def narrow_apart(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    text = deal_text(inputs.team, inputs.calibration, inputs.validation, inputs.assignments)
    sums = _sums_of_layers(inputs, text, len(keys), progress)

    def narrow(layer: int) -> Stepwise[Results]:
        if (found := find_results(inputs, cache, keys[layer])) is not None:
            return found
        steps = _narrow_layer(inputs, text, sums, layer)
        # Without sums, the text is at one layer at a time.
        results = finish(steps) if sums is None else (yield from steps)
        return store_results(cache, keys[layer], results)

    results = []
    with progress.stage("reconstruct", len(keys)) as advance:
        for _, found in overlapped(inputs.team, range(len(keys)), narrow):
            results.append(found)
            advance()
        for slot in (WALK, OWN_DOWN):
            forget(inputs.team, "reconstruct", slot)
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
        for _ in overlapped(inputs.team, range(num_layers), partial(_keep, inputs, kept)):
            advance()
        forget(inputs.team, "sums", WALK)
    return sums


def _keep(inputs: NarrowInputs, kept: KeptSums, layer: int) -> Stepwise[None]:
    keep_rest = kept.keep(inputs.team, "sums", layer)
    yield
    asked = keep_rest()
    yield
    for waiting in asked:
        waiting.result()


def _narrow_layer(inputs: NarrowInputs, text: DealtText, sums: Sums | None, layer: int) -> Stepwise[Results]:
    """Narrow one layer for every assignment, by sums that are kept or by the text itself."""
    results = Results()
    for item in inputs.assignments:
        finds = _dense_layer(text, item.name, layer) if sums is None else find_kept(sums, text, item.name, layer)
        known = None if sums is None else partial(known_moments, sums, item.name, layer)
        clusters = results.get(CLUSTERS)
        results[item.name] = yield from repair_assignment(inputs, layer, item.name, text, finds, clusters, known)
    return results


def _dense_layer(text: DealtText, name: str, layer: int) -> Mapping[int, Find]:
    return {place: partial(find_dense, text=own, name=name, layer=layer) for place, own in text.texts.items()}
