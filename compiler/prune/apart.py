"""Stage `reconstruct` without carrying: each layer is narrowed for itself, on the hidden states of the dense model.

What a layer's repair sums over the text then does not depend on how much any layer keeps. A search for a quality
narrows several times: the sums of stage `sums` are kept in files meanwhile, where they are small enough.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from coreinfer.bundles.writer import existing_parent
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.progress import Progress

from .layer_repair import NarrowInputs, Results, Sums, find_results, repair_assignment, store_results
from .narrow import CLUSTERS
from .repair import LayerTokens, MixedMoments, Moments, mean_moments, overall_moments
from .streams import Stream, begin_stream, begin_text, read_dense

__all__ = ["narrow_apart"]

_SUMS_BYTES = 6 << 30
_FREE_SHARE = 0.5
"""Of the disk's free space, what sums may take."""

_Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of each cluster's tokens; without calibration text where its sums are known."""

    calibration: Sequence[torch.Tensor]
    validation: Sequence[torch.Tensor]


def narrow_apart(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow all layers; each one's result is kept in the cache under its key as soon as it is computed."""
    if inputs.sums is None or not _fit(inputs, inputs.sums):
        return _narrow_once(inputs, cache, keys, progress)
    sums = _sums(inputs, inputs.sums, progress)
    results = []
    with progress.stage("reconstruct", len(keys)) as advance, torch.inference_mode():
        for layer, key in enumerate(keys):
            found = find_results(inputs, cache, key)
            results.append(found or store_results(cache, key, _narrow_by(inputs, layer, sums[layer])))
            advance()
    return results


def _narrow_once(inputs: NarrowInputs, cache: Cache, keys: Sequence[str], progress: Progress) -> list[Results]:
    """Narrow each layer as soon as the text has run through it, and keep nothing of what was summed."""
    results = []
    with progress.stage("reconstruct", len(keys)) as advance:
        for layer, (tokens, streams) in enumerate(_walk(inputs)):
            found: Results = {}
            for stream in streams:
                name = stream.item.name
                found[name] = repair_assignment(inputs, layer, name, stream, tokens, found.get(CLUSTERS))
            results.append(store_results(cache, keys[layer], found))
            advance()
    return results


def _walk(inputs: NarrowInputs) -> Iterator[tuple[LayerTokens, Sequence[Stream]]]:
    """Run the text through the dense layers: each one's tokens, and the assignments' rows among them."""
    loaded = inputs.loaded
    with torch.inference_mode():
        text = begin_text(loaded, [*inputs.calibration, *inputs.validation], carries=False)
        tokens = text.empty_tokens(loaded)
        streams = [begin_stream(item, text) for item in inputs.assignments]
        for layer in range(loaded.record.num_layers):
            for part in text.parts:
                read_dense(loaded, layer, part, tokens, carries=False, begins=False)
            yield tokens, streams


def _fit(inputs: NarrowInputs, sums: Sums) -> bool:
    """Whether there is room for the sums on the disk of the scratch folder."""
    record, folder = inputs.loaded.record, sums.cache.folder
    num_clusters = sum(int(item.calibration.max()) + 1 for item in inputs.assignments)
    needed = 4 * record.num_layers * num_clusters * record.ffn_dim * (record.ffn_dim + record.hidden_size)
    return folder is not None and needed <= min(
        _SUMS_BYTES, _FREE_SHARE * shutil.disk_usage(existing_parent(folder)).free
    )


def _sums(inputs: NarrowInputs, sums: Sums, progress: Progress) -> list[_Arrays]:
    """Sum over the text, or find each layer's sums of an earlier time."""
    names = [item.name for item in inputs.assignments]
    num_layers = inputs.loaded.record.num_layers
    keys = [stage_key("sums", upstream=sums.key, assignments=names, layer=layer) for layer in range(num_layers)]
    found = [sums.cache.find_arrays(key) for key in keys]
    if all(arrays is not None for arrays in found):
        return [arrays for arrays in found if arrays is not None]
    summed: list[_Arrays] = []
    with progress.stage("sums", num_layers) as advance:
        for key, (tokens, streams) in zip(keys, _walk(inputs), strict=True):
            arrays = _validation_arrays(tokens, streams)
            for stream in streams:
                arrays |= _moment_arrays(tokens, stream)
            sums.cache.store(key, arrays)
            stored = sums.cache.find_arrays(key)
            assert stored is not None
            summed.append(stored)
            advance()
    return summed


def _validation_arrays(tokens: LayerTokens, streams: Sequence[Stream]) -> dict[str, np.ndarray[Any, Any]]:
    """The tokens of the validation text in float32, which holds any dtype's values, and where each cluster's are."""
    chosen = torch.cat(streams[0].validation).sort().values
    arrays = {"activations": _array(tokens.activations[chosen]), "targets": _array(tokens.targets[chosen])}
    for stream in streams:
        for cluster, rows in enumerate(stream.validation):
            arrays[f"{stream.item.name}.validation.{cluster}"] = torch.searchsorted(chosen, rows).cpu().numpy()
    return arrays


def _moment_arrays(tokens: LayerTokens, stream: Stream) -> dict[str, np.ndarray[Any, Any]]:
    """Moments of an assignment's clusters: (clusters, ...) each, and how many tokens they are of."""
    own = [mean_moments(tokens, rows) for rows in stream.calibration]
    name = stream.item.name
    return {
        **{f"{name}.{part}": _array(torch.stack([getattr(item, part) for item in own])) for part in _PARTS},
        f"{name}.counts": np.array([len(rows) for rows in stream.calibration]),
    }


_PARTS = ("gram", "cross", "mean_activation", "mean_target")


def _array(values: torch.Tensor) -> np.ndarray[Any, Any]:
    return values.float().cpu().numpy()


def _narrow_by(inputs: NarrowInputs, layer: int, sums: _Arrays) -> Results:
    """Narrow one layer for every assignment by its sums."""
    device, results = inputs.loaded.device, Results()
    tokens = LayerTokens(activations=_tensor(sums["activations"], device), targets=_tensor(sums["targets"], device))
    for item in inputs.assignments:
        clusters = range(int(item.calibration.max()) + 1)
        rows = _Rows(
            calibration=(),
            validation=[_tensor(sums[f"{item.name}.validation.{number}"], device) for number in clusters],
        )
        moments = _mixed_moments(sums, item.name, device)
        results[item.name] = repair_assignment(inputs, layer, item.name, rows, tokens, results.get(CLUSTERS), moments)
    return results


def _mixed_moments(sums: _Arrays, name: str, device: torch.device) -> Iterator[MixedMoments]:
    counts = sums[f"{name}.counts"].tolist()
    own = [
        Moments(**{part: _tensor(sums[f"{name}.{part}"][cluster], device) for part in _PARTS})
        for cluster in range(len(counts))
    ]
    overall = overall_moments(own, counts)
    for item in own:
        yield item, overall


def _tensor(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
