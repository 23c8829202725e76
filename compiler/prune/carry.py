"""Stage `reconstruct` with carrying: narrow a model layer after layer, on the hidden states that it will really have.

The calibration text runs through the dense model and, in parallel, each narrow model as far as it is made: as
at run time, the first half of every document is read dense and the second half narrow. A layer is therefore fitted on
what the narrow layers before it hand on, and where hidden states are sums of what the layers add, towards the hidden
state of the dense model: it also makes up for what the layers before it got wrong. GPTAQ (arXiv 2504.02692) does so
for rounding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from uuid import uuid4

import torch
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.team.dealing import finish
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import Shared, forget

from .carrying import Found, Journey, find_carried
from .dealt import DealtText, deal_text
from .layer_repair import NarrowInputs, Results, find_results, own_result, repair_assignment, store_results
from .layer_results import LayerResult, results_of
from .narrow import CLUSTERS
from .own_down import OWN_DOWN

__all__ = ["narrow_carried"]

_STAGE = "reconstruct"


def narrow_carried(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    text = deal_text(inputs.team, inputs.calibration, inputs.validation, inputs.assignments)
    first, results = _first_narrow(inputs), list[Results]()
    journey = inputs.team.share(
        Journey(
            key=uuid4().hex,
            results=_lookup(inputs, cache, keys, results),
            first=first,
            candidates=[inputs.candidates_of(layer) for layer in range(len(keys))],
            rounding=inputs.rounding,
        )
    )
    with progress.stage(_STAGE, len(keys)) as advance:
        for layer, key in enumerate(keys):
            if layer < first:
                own = {item.name: own_result(inputs, item.name, layer) for item in inputs.assignments}
                results.append(store_results(cache, key, own))
            else:
                found = find_results(inputs, cache, key)
                results.append(found or store_results(cache, key, _narrow_layer(inputs, text, journey, layer)))
            advance()
        for slot in (WALK, OWN_DOWN):
            forget(inputs.team, _STAGE, slot)
    return results


def _first_narrow(inputs: NarrowInputs) -> int:
    """The first layer that leaves anything out, or that is rounded: before it every narrow model is the dense one."""
    if inputs.rounding is not None:
        return 0
    num_layers, ffn_dim = inputs.loaded.record.num_layers, inputs.loaded.record.ffn_dim
    by_cluster = [budgets for clusters in inputs.budgets.values() for budgets in clusters]
    narrow = (layer for layer in range(num_layers) if any(budgets[layer] < ffn_dim for budgets in by_cluster))
    return next(narrow, num_layers)


def _lookup(
    inputs: NarrowInputs, cache: Cache, keys: Sequence[str], results: Sequence[Results]
) -> Callable[[int], Found]:
    """How places look up results: in the cache's folder, which all of them see, or where there is none in memory."""
    if cache.folder is None:
        return results.__getitem__
    return partial(_cached, cache, keys, [item.name for item in inputs.assignments])


def _cached(cache: Cache, keys: Sequence[str], names: Sequence[str], layer: int) -> Found:
    arrays = cache.find_arrays(keys[layer])
    if arrays is None:
        raise FileNotFoundError(f"{cache.folder}: results of layer {layer} went away while they were in use")
    return results_of(arrays, names)


def _narrow_layer(inputs: NarrowInputs, text: DealtText, journey: Shared[Journey], layer: int) -> Results:
    """Narrow one layer for every assignment, on the hidden states that the layers before it leave."""
    results, shared = Results(), dict[str, Shared[LayerResult]]()
    with torch.inference_mode():
        for number, item in enumerate(inputs.assignments):
            finds = {
                place: partial(find_carried, text=own, journey=journey, layer=layer, number=number, found=dict(shared))
                for place, own in text.texts.items()
            }
            clusters = results.get(CLUSTERS)
            results[item.name] = finish(repair_assignment(inputs, layer, item.name, text, finds, clusters))
            shared[item.name] = inputs.team.share(results[item.name])
    return results
