"""What the repair of single layers sums over the text, kept in files while the same text is narrowed again and again.

Without carrying, it does not depend on how much any layer keeps: a search for a quality runs the text once.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from coreinfer.bundles.writer import existing_parent
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import SUMS_BYTES
from coreinfer.compiler.team.adding import add_up
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker

from .dealt import DealtText, Find, LayerTokens, PlaceText, Seen, TokenCounts, find_dense
from .means import Moments, add_moments, ask_parts, mean_moments, weighted_sum
from .narrow import Assignment
from .rows import Rows
from .triangle import num_packed

__all__ = ["KeptSums", "Sums", "find_kept", "has_sums", "keep_sums", "known_moments", "sums_fit"]

_FREE_SHARE = 0.5
"""Of the disk's free space, what sums may take."""
_PARTS = ("upper", "cross", "mean_activation", "mean_target")


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Where sums are kept.

    Attributes:
        cache: on the scratch folder's disk.
        key: of the text, the model and the assignments.
    """

    cache: Cache
    key: str


def sums_fit(loaded: LoadedModel, assignments: Sequence[Assignment], sums: Sums) -> bool:
    """Whether there is room for all layers' sums on the disk of the scratch folder."""
    record, folder = loaded.record, sums.cache.folder
    if folder is None:
        return False
    num_sums = sum(len(_numbers(item.num_clusters)) for item in assignments)
    num_values = num_packed(record.ffn_dim) + record.ffn_dim * record.hidden_size
    needed = 4 * record.num_layers * num_sums * num_values
    return needed <= min(SUMS_BYTES, _FREE_SHARE * shutil.disk_usage(existing_parent(folder)).free)


@dataclass(frozen=True, kw_only=True)
class KeptSums:
    """Sums that are made and kept while the text runs through the layers: of all assignments, and validation tokens."""

    sums: Sums
    text: DealtText
    centred: bool

    def keep(self, team: Team, stage: str, layer: int) -> Callable[[], list[Pending[Any]]]:
        """Ask the places, which are to come to a layer next, for what each keeps of its own text.

        Returns:
            What asks them to add up and keep the rest, for which they need not be at the layer any more, and returns
            what has to be waited for until it is all there.
        """
        asked = [
            team.call(place, stage, _keep_validation, self.sums, text, layer) for place, text in self.text.texts.items()
        ]
        added = [
            self._keep_assignment(team, stage, name, layer, counts)
            for name, counts in self.text.calibration_tokens.items()
        ]
        return lambda: [*asked, *(waiting for add in added for waiting in add())]

    def _keep_assignment(
        self, team: Team, stage: str, name: str, layer: int, counts: TokenCounts
    ) -> Callable[[], list[Pending[Any]]]:
        """What is cut between places is added up later, and so are the places' sums over all of their text."""
        finds: dict[int, Find] = {
            place: partial(find_dense, text=text, name=name, layer=layer) for place, text in self.text.texts.items()
        }
        cut: dict[int | None, Mapping[int, Pending[Any]]] = {
            cluster: ask_parts(team, stage, finds, counts, cluster, centred=self.centred)
            for cluster, places in enumerate(counts)
            if len(places) > 1
        }
        own = {}
        for place in sorted({place for places in counts for place in places}):
            parts = {cluster: asked[place] for cluster, asked in cut.items() if place in asked}
            share = _share_of(counts, place, [*parts], centred=self.centred)
            own[place] = team.call(
                place, stage, _keep_own, self.sums, name, layer, finds[place], share, *parts.values()
            )

        def add() -> list[Pending[Any]]:
            asked = [*own.values()] if len(counts) == 1 else []
            for number, places in (cut if len(counts) == 1 else {**cut, None: own}).items():
                total = add_up(team, stage, add_moments, places)
                asked.append(team.call(next(iter(places)), stage, _keep_moments, self.sums, name, layer, number, total))
            return asked

        return add


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one place has of an assignment's text.

    Attributes:
        whole: clusters that are there alone -> their tokens.
        cut: clusters of which other places have text too.
        weights: of these clusters in the moments of all text.
    """

    whole: Mapping[int, int]
    cut: Sequence[int | None]
    weights: Sequence[float]
    centred: bool


def _share_of(counts: TokenCounts, place: int, cut: Sequence[int | None], *, centred: bool) -> _Share:
    totals = [sum(places.values()) for places in counts]
    whole = {cluster: totals[cluster] for cluster, places in enumerate(counts) if [*places] == [place]}
    weights = [totals[cluster] / sum(totals) for cluster in (*whole, *cut) if cluster is not None]
    return _Share(whole=whole, cut=cut, weights=weights, centred=centred)


def keep_sums(sums: Sums, text: DealtText, loaded: LoadedModel) -> KeptSums:
    """Prepare to sum and keep what narrowing needs of a text."""
    return KeptSums(sums=sums, text=text, centred=loaded.projection(0, "down").bias is not None)


def _numbers(num_clusters: int) -> list[int | None]:
    """Clusters, and None for all text, whose sums are those of the one cluster where there is no other."""
    return [*range(num_clusters), *([None] if num_clusters > 1 else [])]


def _key(sums: Sums, name: str, layer: int, number: int | None) -> str:
    return stage_key("sums", upstream=sums.key, of=name, layer=layer, cluster=number)


def _validation_key(sums: Sums, place: int, layer: int) -> str:
    return stage_key("sums", upstream=sums.key, validation=place, layer=layer)


@torch.inference_mode()
def _keep_validation(worker: Worker, sums: Sums, text: Shared[PlaceText], layer: int) -> None:
    seen = {name: find_dense(worker, text, name, layer) for name in text.value().labels}
    tokens, rows = next(iter(seen.values())).tokens, {name: own.rows.validation for name, own in seen.items()}
    chosen = torch.cat([*next(iter(rows.values()))]).sort().values
    arrays = {"activations": _array(tokens.activations[chosen]), "targets": _array(tokens.targets[chosen])}
    for name, clusters in rows.items():
        for cluster, own in enumerate(clusters):
            arrays[f"{name}.{cluster}"] = torch.searchsorted(chosen, own).cpu().numpy()
    sums.cache.store(_validation_key(sums, worker.place, layer), arrays)


@torch.inference_mode()
def _keep_own(
    worker: Worker, sums: Sums, name: str, layer: int, find: Find, share: _Share, *parts: Moments
) -> Moments | None:
    """Keep the moments of clusters that are at this place alone.

    Args:
        parts: this place's, of the clusters that are cut.
    Returns:
        This place's part of the moments of all text; None where there is one cluster.
    """
    seen, weights, overall = find(worker), iter(share.weights), None
    for cluster, total in share.whole.items():
        moments = mean_moments(seen.tokens, seen.rows.calibration[cluster], total, centred=share.centred)
        _keep_moments(worker, sums, name, layer, cluster, moments)
        overall = _mix(overall, moments, next(weights))
    for part in parts:
        overall = _mix(overall, part, next(weights))
    return overall if len(seen.rows.calibration) > 1 else None


def _mix(overall: Moments | None, moments: Moments, weight: float) -> Moments:
    if overall is None:
        return weighted_sum([moments], [weight])
    for total, part in zip(overall.parts(), moments.parts(), strict=True):
        total.add_(part, alpha=weight)
    return overall


def _keep_moments(_worker: Worker, sums: Sums, name: str, layer: int, number: int | None, moments: Moments) -> None:
    sums.cache.store(_key(sums, name, layer, number), {part: _array(getattr(moments, part)) for part in _PARTS})


def _array(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Values in float32, which holds those of any dtype."""
    return values.float().cpu().numpy()


def has_sums(sums: Sums, assignments: Sequence[Assignment], layer: int) -> bool:
    """Whether one layer's sums are kept for some assignments."""
    return all(
        sums.cache.find_arrays(_key(sums, item.name, layer, number)) is not None
        for item in assignments
        for number in _numbers(item.num_clusters)
    )


def known_moments(sums: Sums, name: str, layer: int, number: int | None) -> Callable[[Worker], Moments]:
    """What reads a layer's moments of a cluster, or with None those of all text, where they are used."""
    return partial(_find_moments, sums=sums, name=name, layer=layer, number=number)


def _find_moments(worker: Worker, sums: Sums, name: str, layer: int, number: int | None) -> Moments:
    arrays, device = _found(sums, _key(sums, name, layer, number)), worker.loaded.device
    return Moments(**{part: _tensor(arrays[part], device) for part in _PARTS})


def find_kept(sums: Sums, text: DealtText, name: str, layer: int) -> Mapping[int, Find]:
    """Find what each place has kept of the validation text."""
    num_clusters = len(text.validation_tokens[name])
    return {
        place: partial(_find_validation, sums=sums, name=name, layer=layer, num_clusters=num_clusters)
        for place in text.texts
    }


def _find_validation(worker: Worker, sums: Sums, name: str, layer: int, num_clusters: int) -> Seen:
    arrays, device = _found(sums, _validation_key(sums, worker.place, layer)), worker.loaded.device
    return Seen(
        tokens=LayerTokens(
            activations=_tensor(arrays["activations"], device), targets=_tensor(arrays["targets"], device)
        ),
        rows=Rows(validation=[_tensor(arrays[f"{name}.{cluster}"], device) for cluster in range(num_clusters)]),
    )


def _found(sums: Sums, key: str) -> Mapping[str, np.ndarray[Any, Any]]:
    arrays = sums.cache.find_arrays(key)
    if arrays is None:
        raise FileNotFoundError(f"sums over the text in {sums.cache.folder} went away while they were in use")
    return arrays


def _tensor(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
