"""Stages `select` and `reconstruct`: narrow a model's layers for every assignment."""

from collections.abc import Sequence
from dataclasses import replace

from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.progress import Progress

from .apart import narrow_apart
from .carry import narrow_carried
from .layer_repair import NarrowInputs, Results, find_results, own_result
from .layer_results import LayerResult
from .mixtures.expert_layers import narrow_experts
from .narrow import NarrowModel
from .repair_text import few_calibrated, few_validated

__all__ = ["REVISION", "narrow_all"]

REVISION = 6
"""Part of the packs' keys; one more as soon as the same inputs give other results, if only by rounding."""


def narrow_all(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> dict[str, NarrowModel]:
    """Narrow the model for every assignment; each layer's result is cached as soon as it is computed."""
    results = _narrow_layers(inputs, cache, key, progress)
    return {
        item.name: _collect(inputs, item.name, [layer[item.name] for layer in results]) for item in inputs.assignments
    }


def _narrow_layers(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> list[Results]:
    layers = range(inputs.loaded.record.num_layers)
    if not inputs.config.reconstruct:
        return [{item.name: own_result(inputs, item.name, layer) for item in inputs.assignments} for layer in layers]
    keys = [stage_key("narrow-layer", upstream=key, layer=layer) for layer in layers]
    stored = [find_results(inputs, cache, layer_key) for layer_key in keys]
    if all(stored):
        return [results for results in stored if results is not None]
    validation, assignments = few_validated(inputs.validation, inputs.assignments)
    if inputs.loaded.record.experts is not None:
        narrow = narrow_experts
    else:
        narrow = narrow_carried if inputs.config.effective_carry else narrow_apart
    calibration, most = inputs.calibration, inputs.config.tokens_a_neuron
    if narrow is narrow_carried and most is not None:
        calibration, assignments = few_calibrated(calibration, assignments, most * inputs.loaded.record.ffn_dim)
    text = replace(inputs, calibration=calibration, validation=validation, assignments=assignments)
    return narrow(text, cache, keys, progress)


def _collect(inputs: NarrowInputs, name: str, layers: Sequence[LayerResult]) -> NarrowModel:
    chosen = inputs.choices[name]
    clusters = range(len(chosen.scores))
    neuron_ids = [[layer.neuron_ids[cluster] for layer in layers] for cluster in clusters]
    return NarrowModel(
        choice=replace(chosen, neuron_ids=neuron_ids),
        downs=[[layer.down(cluster) for cluster in clusters] for layer in layers],
        biases=[[layer.bias(cluster) for cluster in clusters] for layer in layers],
        ridges=tuple(layer.ridge for layer in layers),
    )
