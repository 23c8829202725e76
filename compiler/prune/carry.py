"""Stages `select` and `reconstruct`: narrow a model layer after layer, on the hidden states that it will really have.

The calibration text runs through the dense model and, in parallel, each narrow model as far as it is made: as
at run time, the first half of every document is read dense and the second half narrow. A layer is therefore fitted on
what the narrow layers before it hand on, and where hidden states are sums of what the layers add, towards the hidden
state of the dense model: it also makes up for what the layers before it got wrong. GPTAQ (arXiv 2504.02692) does so
for rounding.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from coreinfer.compiler.budget import moment_bytes
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.layerwise import pick
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quantize.rounding import Rounding
from coreinfer.compiler.samples import VALIDATION_TOKENS
from coreinfer.compiler.text.corpus import Document

from .layer_results import LayerResult, arrays_of, results_of
from .narrow import CLUSTERS, Assignment, NarrowModel, bf16_bits, from_bits
from .repair import CLUSTER_WEIGHTS, RIDGES, LayerTokens, Repaired, RepairTask, repair_layer
from .select import Choice
from .streams import Stream, Text, begin_stream, begin_text, move, read_dense, read_narrow

__all__ = ["REVISION", "NarrowInputs", "narrow_all"]

REVISION = 3
"""Part of the packs' keys; one more as soon as the same inputs give other results, if only by rounding."""

Results = dict[str, LayerResult]
"""Assignment name -> one layer's result."""


@dataclass(frozen=True, kw_only=True)
class NarrowInputs:
    """What the narrow models are made from.

    Attributes:
        calibration, validation: documents; the assignments say which cluster each belongs to.
        assignments: the clusters first, then the controls.
        choices: assignment name -> scores, and the neurons that the scores alone would keep.
        budgets: budgets[assignment name][cluster][layer], how many neurons are kept.
        metrics: (layers, hidden size, hidden size) what errors in the FFN outputs cost.
        rounding: how matrices will be stored, so that a layer makes up for the rounding of those before it too; None
            to leave it out of account.
    """

    config: CompileConfig
    loaded: LoadedModel
    calibration: Sequence[Document]
    validation: Sequence[Document]
    assignments: Sequence[Assignment]
    choices: dict[str, Choice]
    budgets: Mapping[str, Sequence[Sequence[int]]]
    metrics: torch.Tensor
    rounding: Rounding | None = None


def narrow_all(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> dict[str, NarrowModel]:
    """Narrow the model for every assignment; each layer's result is cached as soon as it is computed."""
    num_layers = inputs.loaded.record.num_layers
    if not inputs.config.reconstruct:
        results = [
            {item.name: _own(inputs, item.name, layer) for item in inputs.assignments} for layer in range(num_layers)
        ]
    else:
        results = _narrow_layers(inputs, cache, key, progress)
    return {
        item.name: _collect(inputs, item.name, [layer[item.name] for layer in results]) for item in inputs.assignments
    }


def _narrow_layers(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> list[Results]:
    loaded, num_layers = inputs.loaded, inputs.loaded.record.num_layers
    keys = [stage_key("narrow-layer", upstream=key, layer=layer) for layer in range(num_layers)]
    stored = [_find_results(inputs, cache, layer_key) for layer_key in keys]
    if all(stored):
        return [results for results in stored if results is not None]
    inputs = _with_few_validated(inputs)
    documents = [*inputs.calibration, *inputs.validation]
    results = []
    with progress.stage("reconstruct", num_layers) as advance, torch.inference_mode():
        text = begin_text(loaded, documents)
        tokens = text.empty_tokens(loaded)
        streams = [begin_stream(item, text) for item in inputs.assignments]
        for layer in range(num_layers):
            results.append(_narrow_one_layer(inputs, cache, keys[layer], layer, text, streams, tokens))
            advance()
    return results


def _with_few_validated(inputs: NarrowInputs) -> NarrowInputs:
    """Leave evenly spread documents of the validation text, of about as many tokens as a choice of ridges needs."""
    num_tokens = sum(len(document.token_ids) for document in inputs.validation)
    step = max(1, num_tokens // VALIDATION_TOKENS)
    return replace(
        inputs,
        validation=inputs.validation[::step],
        assignments=[replace(item, validation=item.validation[::step]) for item in inputs.assignments],
    )


def _find_results(inputs: NarrowInputs, cache: Cache, key: str) -> Results | None:
    arrays = cache.find_arrays(key)
    return None if arrays is None else results_of(arrays, [item.name for item in inputs.assignments])


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
    loaded, carries, still_dense = inputs.loaded, inputs.config.effective_carry, _still_dense(inputs, layer)
    # Narrow runs through rounded weights have keys and values of their own.
    begins = carries and not still_dense and inputs.rounding is None
    readings = [read_dense(loaded, layer, part, tokens, carries=carries, begins=begins) for part in text.parts]
    if still_dense:
        for stream in streams:
            stream.hidden = [pick(part.batch.hidden, part.places) for part in text.parts]
        return _stored(cache, key, {item.name: _own(inputs, item.name, layer) for item in inputs.assignments})
    stored = _find_results(inputs, cache, key)
    results = dict(stored or {})
    with inputs.rounding.layer(loaded, layer) if inputs.rounding else nullcontext():
        for stream in streams:
            runs = []
            if carries:
                runs = [
                    read_narrow(loaded, layer, part, reading, own, tokens)
                    for part, reading, own in zip(text.parts, readings, stream.hidden, strict=True)
                ]
            if stored is None:
                results[stream.item.name] = _repair(inputs, layer, stream, tokens, results.get(CLUSTERS))
            if carries:
                outputs = _narrow_outputs(inputs, layer, stream, tokens, results[stream.item.name])
                stream.hidden = [
                    move(loaded, layer, part, reading, own, run, outputs)
                    for part, reading, own, run in zip(text.parts, readings, stream.hidden, runs, strict=True)
                ]
    return _stored(cache, key, results)


def _stored(cache: Cache, key: str, results: Results) -> Results:
    """Keep a layer's results, which are then read from their file."""
    arrays = cache.arrays(key, partial(arrays_of, results))
    return results_of(arrays, list(results))


def _still_dense(inputs: NarrowInputs, layer: int) -> bool:
    """Whether every narrow model is still the dense one after this layer: no layer so far leaves anything out."""
    by_layer = (budgets for clusters in inputs.budgets.values() for budgets in clusters)
    return inputs.rounding is None and all(
        min(budgets[: layer + 1]) == inputs.loaded.record.ffn_dim for budgets in by_layer
    )


def _repair(
    inputs: NarrowInputs, layer: int, stream: Stream, tokens: LayerTokens, clusters: LayerResult | None
) -> LayerResult:
    """Narrow one layer for one assignment; a control goes by what the clusters chose for themselves."""
    name, config = stream.item.name, inputs.config
    keeps = [budgets[layer] for budgets in inputs.budgets[name]]
    if min(keeps) == inputs.loaded.record.ffn_dim:
        return _own(inputs, name, layer)
    module = inputs.loaded.projection(layer, "down")
    chosen = RIDGES if (ridge := config.effective_ridge) == "auto" else (float(ridge),)
    # A repair that other text rejects is not shipped.
    ridges: tuple[float | None, ...] = (*chosen, None)
    cluster_weights = _repair_weights(config)
    if clusters is not None:
        # Asked to choose for themselves, controls chose the same ridge in nearly every layer (docs/dev/log.md).
        ridges, cluster_weights = (clusters.ridge,), (clusters.cluster_weight,)
    by_scores = [layers[layer] for layers in inputs.choices[name].neuron_ids]
    task = RepairTask(
        calibration=stream.calibration,
        validation=stream.validation,
        weights=module.weight.detach().float().T.contiguous(),
        bias=None if module.bias is None else module.bias.detach().float(),
        metric=inputs.metrics[layer].to(inputs.loaded.device),
        keeps=keeps,
        neuron_ids=None if config.effective_removal == "second-order" else by_scores,
        cluster_weights=cluster_weights,
        ridges=ridges,
        moment_bytes=moment_bytes(config),
    )
    return _result(repair_layer(tokens, task), has_bias=module.bias is not None)


def _repair_weights(config: CompileConfig) -> tuple[float, ...]:
    """Candidates: moments of one cluster alone are too few for a repair, for every kind of score."""
    if config.chooses_cluster_weight:
        return CLUSTER_WEIGHTS
    given = config.cluster_weight
    return CLUSTER_WEIGHTS[:1] if given is None or given == "auto" else (given,)


def _result(repaired: Repaired, *, has_bias: bool) -> LayerResult:
    solutions = repaired.solutions if repaired.ridge is not None else []
    return LayerResult(
        neuron_ids=tuple(repaired.neuron_ids),
        ridge=repaired.ridge,
        cluster_weight=repaired.cluster_weight,
        downs=tuple(bf16_bits(down) for down, _ in solutions),
        biases=tuple(bias.cpu().numpy() for _, bias in solutions) if has_bias else (),
    )


def _own(inputs: NarrowInputs, name: str, layer: int) -> LayerResult:
    """A layer that keeps its own weights, and the neurons that the scores choose."""
    return LayerResult(
        neuron_ids=tuple(layers[layer] for layers in inputs.choices[name].neuron_ids),
        ridge=None,
        cluster_weight=_repair_weights(inputs.config)[0],
    )


def _narrow_outputs(
    inputs: NarrowInputs, layer: int, stream: Stream, tokens: LayerTokens, result: LayerResult
) -> torch.Tensor:
    """What the narrow FFN puts out: (tokens, hidden size), of which only what is read narrow is filled in."""
    module = inputs.loaded.projection(layer, "down")
    # Each stream sets its own targets where they are what is missing from the sum: their memory is free by now.
    outputs = tokens.targets if inputs.loaded.family.adds_ffn_output else torch.empty_like(tokens.targets)
    for cluster, rows in enumerate(stream.narrow):
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


def _collect(inputs: NarrowInputs, name: str, layers: Sequence[LayerResult]) -> NarrowModel:
    scores = inputs.choices[name].scores
    clusters = range(len(scores))
    neuron_ids = [[layer.neuron_ids[cluster] for layer in layers] for cluster in clusters]
    return NarrowModel(
        choice=Choice(scores=scores, neuron_ids=neuron_ids),
        downs=[[layer.down(cluster) for cluster in clusters] for layer in layers],
        biases=[[layer.bias(cluster) for cluster in clusters] for layer in layers],
        ridges=tuple(layer.ridge for layer in layers),
    )
