"""Stages `select` and `reconstruct`: narrow a model layer after layer, on the hidden states that it will really have.

The calibration text goes through the dense model and, beside it, through each narrow model as far as it is made: as
at run time, the first half of every document is read dense and the second half narrow. A layer is therefore fitted on
what the narrow layers before it hand on, and where hidden states are sums of what the layers add, towards the hidden
state of the dense model: it also makes up for what the layers before it got wrong. GPTAQ (arXiv 2504.02692) does so
for rounding.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .cache import Cache, stage_key
from .config import CompileConfig
from .corpus import Document, split_point
from .layerwise import Batch, document_starts, prepare_batches, run_layer, run_partly
from .models import LoadedModel
from .narrowing import CLUSTERS, Assignment, NarrowModel, bf16_bits
from .progress import Progress
from .repair import CLUSTER_WEIGHTS, RIDGES, LayerTokens, Repaired, RepairTask, repair_layer
from .rounding import Rounding
from .selecting import Choice

__all__ = ["NarrowInputs", "narrow_all"]

_OWN_WEIGHTS = np.array([np.nan])


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


@dataclass(kw_only=True)
class _Stream:
    """One assignment's narrow model on its way through the layers.

    Attributes:
        calibration, validation: rows of each cluster's tokens; validation rows are those that are read narrow.
        narrow: rows of each cluster's tokens that are read narrow.
        hidden: of each batch, (its tokens that are read narrow, hidden size); all other hidden states are the dense
            model's.
    """

    item: Assignment
    calibration: list[torch.Tensor]
    validation: list[torch.Tensor]
    narrow: list[torch.Tensor]
    hidden: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A batch, and its tokens that are read narrow.

    Attributes:
        places: (batch, length) bool, where they are.
        rows: (tokens,) their places in the order of all documents.
    """

    batch: Batch
    places: torch.Tensor
    rows: torch.Tensor


def narrow_all(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> dict[str, NarrowModel]:
    """Narrow the model for every assignment; each layer's result is cached as soon as it is there."""
    num_layers = inputs.loaded.record.num_layers
    if not inputs.config.reconstruct:
        results = [_unrepaired(inputs, layer) for layer in range(num_layers)]
    else:
        results = _narrow_layers(inputs, cache, key, progress)
    return {item.name: _collect(inputs, item.name, results) for item in inputs.assignments}


def _narrow_layers(inputs: NarrowInputs, cache: Cache, key: str, progress: Progress) -> list[dict[str, Any]]:
    loaded, num_layers = inputs.loaded, inputs.loaded.record.num_layers
    keys = [stage_key("narrow", upstream=key, layer=layer) for layer in range(num_layers)]
    stored = [cache.find_arrays(layer_key) for layer_key in keys]
    if all(stored):
        return [arrays for arrays in stored if arrays is not None]
    documents = [*inputs.calibration, *inputs.validation]
    starts = document_starts(documents)
    narrow_rows = _narrow_rows(starts).to(loaded.device)
    results = []
    with progress.stage("reconstruct", num_layers) as advance, torch.inference_mode():
        parts = [_part(batch, narrow_rows) for batch in prepare_batches(loaded, documents, starts)]
        tokens = _empty_tokens(loaded, parts[0].batch.hidden.dtype, len(narrow_rows))
        streams = [_stream(inputs, item, starts, narrow_rows, parts) for item in inputs.assignments]
        for layer in range(num_layers):
            results.append(_narrow_one_layer(inputs, cache, keys[layer], layer, parts, streams, tokens))
            advance()
    return results


def _part(batch: Batch, narrow_rows: torch.Tensor) -> _Part:
    is_narrow = narrow_rows[batch.rows]
    places = batch.mask.clone()
    places[batch.mask] = is_narrow
    return _Part(batch=batch, places=places, rows=batch.rows[is_narrow])


def _empty_tokens(loaded: LoadedModel, dtype: torch.dtype, num_tokens: int) -> LayerTokens:
    """Room for one layer's activations, which are by far the most that is in memory; layers and streams share it."""
    return LayerTokens(
        activations=torch.empty((num_tokens, loaded.record.ffn_dim), dtype=dtype, device=loaded.device),
        targets=torch.empty((num_tokens, loaded.record.hidden_size), dtype=dtype, device=loaded.device),
    )


def _narrow_rows(starts: npt.NDArray[np.int64]) -> torch.Tensor:
    """Which tokens are read narrow: (tokens,) bool."""
    parts = [np.arange(length) >= split_point(int(length)) for length in np.diff(starts)]
    return torch.from_numpy(np.concatenate(parts))


def _stream(
    inputs: NarrowInputs,
    item: Assignment,
    starts: npt.NDArray[np.int64],
    narrow_rows: torch.Tensor,
    parts: Sequence[_Part],
) -> _Stream:
    labels = np.concatenate([item.calibration, item.validation])
    token_labels = torch.from_numpy(np.repeat(labels, np.diff(starts))).to(narrow_rows.device)
    first_validation = int(starts[len(item.calibration)])
    calibration, validation, narrow = [], [], []
    for cluster in range(int(item.calibration.max()) + 1):
        rows = (token_labels == cluster).nonzero()[:, 0]
        narrow.append(rows[narrow_rows[rows]])
        calibration.append(rows[rows < first_validation])
        validation.append(narrow[-1][narrow[-1] >= first_validation])
    return _Stream(
        item=item,
        calibration=calibration,
        validation=validation,
        narrow=narrow,
        hidden=[part.batch.hidden[part.places] for part in parts],
    )


def _narrow_one_layer(
    inputs: NarrowInputs,
    cache: Cache,
    key: str,
    layer: int,
    parts: Sequence[_Part],
    streams: Sequence[_Stream],
    tokens: LayerTokens,
) -> dict[str, Any]:
    """Narrow one layer for every assignment and move all hidden states past it."""
    entering = [part.batch.hidden for part in parts]
    for part in parts:
        _read_dense(inputs, layer, part, tokens)
    stored = cache.find_arrays(key)
    arrays: dict[str, Any] = dict(stored or {})
    with inputs.rounding.layer(inputs.loaded, layer) if inputs.rounding else nullcontext():
        for stream in streams:
            runs = []
            if inputs.config.carry:
                runs = [
                    _read_narrow(inputs, layer, part, hidden, own, tokens)
                    for part, hidden, own in zip(parts, entering, stream.hidden, strict=True)
                ]
            if stored is None:
                arrays |= _repair(inputs, layer, stream, tokens, arrays)
            if inputs.config.carry:
                outputs = _narrow_outputs(inputs, layer, stream, tokens, arrays)
                stream.hidden = [
                    _move(inputs, layer, part, hidden, own, run, outputs)
                    for part, hidden, own, run in zip(parts, entering, stream.hidden, runs, strict=True)
                ]
    return cache.arrays(key, partial(dict, arrays))


def _read_dense(inputs: NarrowInputs, layer: int, part: _Part, tokens: LayerTokens) -> None:
    """Run a batch through the dense layer: its hidden states move on, and its tokens are the layer's to begin with."""
    batch = part.batch
    run = run_layer(inputs.loaded, layer, batch, batch.hidden)
    tokens.activations[batch.rows] = batch.real(run.activations)
    tokens.targets[batch.rows] = batch.real(run.ffn_output)
    batch.hidden = run.output


def _read_narrow(
    inputs: NarrowInputs, layer: int, part: _Part, entering: torch.Tensor, own: torch.Tensor, tokens: LayerTokens
) -> torch.Tensor:
    """Run a batch behind a stream's narrowed layers: what is read narrow takes its place among the layer's tokens.

    Args:
        entering: (batch, length, hidden size) the dense model's hidden states.
        own: (tokens that are read narrow, hidden size) the stream's.
    Returns:
        Their hidden states behind the layer but for what its FFN adds, where that is just added.
    """
    hidden = _put(entering, part.places, own)
    run = run_partly(inputs.loaded, layer, part.batch, hidden, part.places, torch.zeros_like(hidden))
    without_ffn = run.output[part.places]
    tokens.activations[part.rows] = run.activations
    if inputs.loaded.family.adds_ffn_output:
        target = part.batch.hidden[part.places].float() - without_ffn.float()
        tokens.targets[part.rows] = target.to(tokens.targets.dtype)
    return without_ffn


def _put(values: torch.Tensor, places: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Copy (batch, length, n) values with others at some places."""
    result = values.clone()
    result[places] = own
    return result


def _repair(
    inputs: NarrowInputs, layer: int, stream: _Stream, tokens: LayerTokens, found: dict[str, Any]
) -> dict[str, Any]:
    """Narrow one layer for one assignment: arrays for the cache, named after the assignment."""
    name, config = stream.item.name, inputs.config
    keeps = [budgets[layer] for budgets in inputs.budgets[name]]
    if min(keeps) == inputs.loaded.record.ffn_dim:
        return _own(inputs, name, layer)
    module = inputs.loaded.projection(layer, "down")
    chosen = RIDGES if config.ridge == "auto" else (float(config.ridge),)
    # A repair that other text rejects is not shipped.
    ridges: tuple[float | None, ...] = (*chosen, None)
    cluster_weights = _repair_weights(config)
    if name != CLUSTERS:
        # Asked to choose for themselves, controls chose the same ridge in nearly every layer (docs/dev/log.md).
        shared = float(found[f"{CLUSTERS}.ridge"][0])
        ridges = (None if np.isnan(shared) else shared,)
        cluster_weights = (float(found[f"{CLUSTERS}.weight"][0]),)
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
        moment_bytes=config.moment_bytes,
    )
    return _as_arrays(name, repair_layer(tokens, task))


def _repair_weights(config: CompileConfig) -> tuple[float, ...]:
    """Candidates: moments of one cluster alone are too thin for a repair, whatever the scores are made of."""
    if config.cluster_weight == "auto":
        return CLUSTER_WEIGHTS
    return CLUSTER_WEIGHTS[:1] if config.cluster_weight is None else (config.cluster_weight,)


def _as_arrays(name: str, repaired: Repaired) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"{name}.ids.{cluster}": ids for cluster, ids in enumerate(repaired.neuron_ids)}
    arrays[f"{name}.weight"] = np.array([repaired.cluster_weight])
    if repaired.ridge is None:
        return {**arrays, f"{name}.ridge": _OWN_WEIGHTS}
    for cluster, (down, bias) in enumerate(repaired.solutions):
        arrays[f"{name}.down.{cluster}"] = bf16_bits(down)
        arrays[f"{name}.bias.{cluster}"] = bias.cpu().numpy()
    return {**arrays, f"{name}.ridge": np.array([repaired.ridge])}


def _own(inputs: NarrowInputs, name: str, layer: int) -> dict[str, Any]:
    """A layer that keeps its own weights, and the neurons that the scores choose."""
    ids = {f"{name}.ids.{c}": layers[layer] for c, layers in enumerate(inputs.choices[name].neuron_ids)}
    weight = np.array(_repair_weights(inputs.config)[:1])
    return {**ids, f"{name}.ridge": _OWN_WEIGHTS, f"{name}.weight": weight}


def _unrepaired(inputs: NarrowInputs, layer: int) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for item in inputs.assignments:
        arrays |= _own(inputs, item.name, layer)
    return arrays


def _narrow_outputs(
    inputs: NarrowInputs, layer: int, stream: _Stream, tokens: LayerTokens, arrays: dict[str, Any]
) -> torch.Tensor:
    """What the narrow FFN puts out: (tokens, hidden size), of which only what is read narrow is filled in."""
    module, name = inputs.loaded.projection(layer, "down"), stream.item.name
    # Each stream sets its own targets where they are what is missing from the sum: their memory is free by now.
    outputs = tokens.targets if inputs.loaded.family.adds_ffn_output else torch.empty_like(tokens.targets)
    for cluster, rows in enumerate(stream.narrow):
        ids = torch.from_numpy(arrays[f"{name}.ids.{cluster}"]).long().to(outputs.device)
        down: torch.Tensor = module.weight.T[ids].to(outputs)
        bias: torch.Tensor | None = None if module.bias is None else module.bias.to(outputs)
        if (bits := arrays.get(f"{name}.down.{cluster}")) is not None:
            down = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(outputs)
            bias = torch.from_numpy(arrays[f"{name}.bias.{cluster}"]).to(outputs)
        if inputs.rounding:
            down = inputs.rounding.down(inputs.loaded, layer, down, arrays[f"{name}.ids.{cluster}"])
        product = tokens.activations[rows][:, ids] @ down
        outputs[rows] = product if bias is None else product + bias
    return outputs


def _move(
    inputs: NarrowInputs,
    layer: int,
    part: _Part,
    entering: torch.Tensor,
    own: torch.Tensor,
    without_ffn: torch.Tensor,
    outputs: torch.Tensor,
) -> torch.Tensor:
    """A stream's hidden states behind the narrow layer: (tokens that are read narrow, hidden size)."""
    narrow = outputs[part.rows]
    if inputs.loaded.family.adds_ffn_output:
        return (without_ffn.float() + narrow.float()).to(without_ffn.dtype)
    hidden = _put(entering, part.places, own)
    ffn_output = _put(torch.zeros_like(hidden), part.places, narrow)
    nowhere = torch.zeros_like(part.places)
    return run_partly(inputs.loaded, layer, part.batch, hidden, nowhere, ffn_output).output[part.places]


def _collect(inputs: NarrowInputs, name: str, results: Sequence[dict[str, Any]]) -> NarrowModel:
    scores = inputs.choices[name].scores
    clusters = range(len(scores))
    ridges = [float(arrays[f"{name}.ridge"][0]) for arrays in results]
    has_bias = inputs.loaded.record.ffn_bias
    return NarrowModel(
        choice=Choice(
            scores=scores,
            neuron_ids=[[arrays[f"{name}.ids.{cluster}"] for arrays in results] for cluster in clusters],
        ),
        downs=[[arrays.get(f"{name}.down.{cluster}") for cluster in clusters] for arrays in results],
        biases=[
            [arrays.get(f"{name}.bias.{cluster}") if has_bias else None for cluster in clusters] for arrays in results
        ],
        ridges=tuple(None if np.isnan(ridge) else ridge for ridge in ridges),
    )
