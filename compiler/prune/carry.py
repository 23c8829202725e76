"""Stage `reconstruct` with carrying: narrow a model layer after layer, on the hidden states that it will really have.

The calibration text runs through the dense model and, in parallel, each narrow model as far as it is made: as
at run time, the first half of every document is read dense and the second half narrow. A layer is therefore fitted on
what the narrow layers before it hand on, and where hidden states are sums of what the layers add, towards the hidden
state of the dense model: it also makes up for what the layers before it got wrong. GPTAQ (arXiv 2504.02692) does so
for rounding.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.layerwise import pick
from coreinfer.compiler.progress import Progress

from .layer_repair import NarrowInputs, Results, find_results, own_result, repair_assignment, store_results
from .layer_results import LayerResult
from .narrow import CLUSTERS, from_bits
from .repair import LayerTokens
from .streams import Stream, Text, begin_stream, begin_text, move, read_dense, read_narrow

__all__ = ["narrow_carried"]


def narrow_carried(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    loaded, results = inputs.loaded, []
    with progress.stage("reconstruct", len(keys)) as advance, torch.inference_mode():
        text = begin_text(loaded, [*inputs.calibration, *inputs.validation])
        tokens = text.empty_tokens(loaded)
        streams = [begin_stream(item, text) for item in inputs.assignments]
        for layer, key in enumerate(keys):
            results.append(_narrow_one_layer(inputs, cache, key, layer, text, streams, tokens))
            advance()
    return results


def _narrow_one_layer(
    inputs: NarrowInputs,
    cache: Cache,
    key: str,
    layer: int,
    text: Text,
    streams: Sequence[Stream],
    tokens: LayerTokens,
) -> Results:
    """Narrow one layer for every assignment and move all hidden states past it."""
    loaded, still_dense = inputs.loaded, _still_dense(inputs, layer)
    # Narrow runs through rounded weights have keys and values of their own.
    begins = not still_dense and inputs.rounding is None
    readings = [read_dense(loaded, layer, part, tokens, begins=begins) for part in text.parts]
    if still_dense:
        for stream in streams:
            stream.hidden = [pick(part.batch.hidden, part.places) for part in text.parts]
        own = {item.name: own_result(inputs, item.name, layer) for item in inputs.assignments}
        return store_results(cache, key, own)
    stored = find_results(inputs, cache, key)
    results = dict(stored or {})
    with inputs.rounding.layer(loaded, layer) if inputs.rounding else nullcontext():
        for stream in streams:
            name = stream.item.name
            runs = [
                read_narrow(loaded, layer, part, reading, own, tokens)
                for part, reading, own in zip(text.parts, readings, stream.hidden, strict=True)
            ]
            if stored is None:
                results[name] = repair_assignment(inputs, layer, name, stream.rows, tokens, results.get(CLUSTERS))
            outputs = _narrow_outputs(inputs, layer, stream, tokens, results[name])
            stream.hidden = [
                move(loaded, layer, part, reading, own, run, outputs)
                for part, reading, own, run in zip(text.parts, readings, stream.hidden, runs, strict=True)
            ]
    return store_results(cache, key, results)


def _still_dense(inputs: NarrowInputs, layer: int) -> bool:
    """Whether every narrow model is still the dense one after this layer: no layer so far leaves anything out."""
    by_layer = (budgets for clusters in inputs.budgets.values() for budgets in clusters)
    return inputs.rounding is None and all(
        min(budgets[: layer + 1]) == inputs.loaded.record.ffn_dim for budgets in by_layer
    )


def _narrow_outputs(
    inputs: NarrowInputs, layer: int, stream: Stream, tokens: LayerTokens, result: LayerResult
) -> torch.Tensor:
    """What the narrow FFN puts out: (tokens, hidden size), of which only what is read narrow is filled in."""
    module = inputs.loaded.projection(layer, "down")
    # Each stream sets its own targets where they are what is missing from the sum: their memory is free by now.
    outputs = tokens.targets if inputs.loaded.family.adds_ffn_output else torch.empty_like(tokens.targets)
    for cluster, rows in enumerate(stream.rows.narrow):
        ids = torch.from_numpy(result.neuron_ids[cluster]).long().to(outputs.device)
        down: torch.Tensor = module.weight.T[ids].to(outputs)
        bias: torch.Tensor | None = None if module.bias is None else module.bias.to(outputs)
        if (bits := result.down(cluster)) is not None:
            down = from_bits(bits).to(outputs)
        if (repaired := result.bias(cluster)) is not None:
            bias = torch.from_numpy(repaired).to(outputs)
        if inputs.rounding:
            down = inputs.rounding.down(inputs.loaded, layer, down, result.neuron_ids[cluster])
        product = tokens.activations.index_select(0, rows).index_select(1, ids) @ down
        outputs.index_copy_(0, rows, product if bias is None else product + bias)
    return outputs
