"""What the repair of single layers sums over the text, kept in files while the same text is narrowed again and again.

Without carrying, it does not depend on how much any layer keeps: a search for a quality runs the text once.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from coreinfer.bundles.writer import existing_parent
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.models.layerwise import LayerActivations
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import SUMS_BYTES

from .narrow import Assignment
from .profile import Watch
from .repair import LayerTokens, Moments, mean_moments
from .rows import Rows, rows_of

__all__ = ["AssignmentSums", "Sums", "find_sums", "find_validation", "sums_fit", "watch_sums"]

_FREE_SHARE = 0.5
"""Of the disk's free space, what sums may take."""
_PARTS = ("gram", "cross", "mean_activation", "mean_target")

_Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Where sums are kept.

    Attributes:
        cache: on the scratch folder's disk.
        key: of the text, the model and the assignments.
    """

    cache: Cache
    key: str


@dataclass(frozen=True, kw_only=True)
class AssignmentSums:
    """One layer's sums for one assignment.

    Attributes:
        moments: of each cluster.
        counts: tokens of each cluster.
        validation: of each cluster, rows of the tokens of `find_validation`.
    """

    moments: Sequence[Moments]
    counts: Sequence[int]
    validation: Sequence[torch.Tensor]


def sums_fit(loaded: LoadedModel, assignments: Sequence[Assignment], sums: Sums) -> bool:
    """Whether there is room for all layers' sums on the disk of the scratch folder."""
    record, folder = loaded.record, sums.cache.folder
    if folder is None:
        return False
    num_clusters = sum(int(item.calibration.max()) + 1 for item in assignments)
    needed = 4 * record.num_layers * num_clusters * record.ffn_dim * (record.ffn_dim + record.hidden_size)
    return needed <= min(SUMS_BYTES, _FREE_SHARE * shutil.disk_usage(existing_parent(folder)).free)


def watch_sums(sums: Sums, loaded: LoadedModel, assignments: Sequence[Assignment]) -> Watch:
    """Sum and keep each layer that the text runs through, calibration text first, then validation text."""
    return partial(_keep_layer, sums, loaded, assignments)


def _keep_layer(sums: Sums, loaded: LoadedModel, assignments: Sequence[Assignment], layer: LayerActivations) -> None:
    assert layer.ffn_outputs is not None
    tokens = LayerTokens(activations=layer.activations, targets=layer.ffn_outputs)
    rows = {item.name: rows_of(item, layer.starts, loaded.device) for item in assignments}
    chosen = torch.cat([*rows[assignments[0].name].validation]).sort().values
    validation = {"activations": _array(tokens.activations[chosen]), "targets": _array(tokens.targets[chosen])}
    sums.cache.store(_key(sums, "validation", layer.layer), validation)
    centred = loaded.projection(layer.layer, "down").bias is not None
    for name, own in rows.items():
        sums.cache.store(_key(sums, name, layer.layer), _arrays(tokens, own, chosen, centred=centred))


def _key(sums: Sums, name: str, layer: int) -> str:
    return stage_key("sums", upstream=sums.key, of=name, layer=layer)


def _arrays(tokens: LayerTokens, rows: Rows, chosen: torch.Tensor, *, centred: bool) -> _Arrays:
    arrays: dict[str, np.ndarray[Any, Any]] = {"counts": np.array([len(own) for own in rows.calibration])}
    for cluster, own in enumerate(rows.calibration):
        moments = mean_moments(tokens, own, centred=centred)
        arrays |= {f"{part}.{cluster}": _array(getattr(moments, part)) for part in _PARTS}
        arrays[f"validation.{cluster}"] = torch.searchsorted(chosen, rows.validation[cluster]).cpu().numpy()
    return arrays


def _array(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Values in float32, which holds those of any dtype."""
    return values.float().cpu().numpy()


def find_sums(sums: Sums, name: str, layer: int, device: torch.device) -> AssignmentSums | None:
    """Look up one layer's sums for an assignment; None if they were not kept."""
    arrays = sums.cache.find_arrays(_key(sums, name, layer))
    if arrays is None:
        return None
    clusters = range(len(arrays["counts"]))
    return AssignmentSums(
        moments=[
            Moments(**{part: _tensor(arrays[f"{part}.{number}"], device) for part in _PARTS}) for number in clusters
        ],
        counts=arrays["counts"].tolist(),
        validation=[_tensor(arrays[f"validation.{number}"], device) for number in clusters],
    )


def find_validation(sums: Sums, layer: int, device: torch.device) -> LayerTokens | None:
    """Look up what a layer's FFN sees of the validation text; None if it was not kept."""
    arrays = sums.cache.find_arrays(_key(sums, "validation", layer))
    if arrays is None:
        return None
    return LayerTokens(activations=_tensor(arrays["activations"], device), targets=_tensor(arrays["targets"], device))


def _tensor(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
