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
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import SUMS_BYTES
from coreinfer.compiler.team.dealing import homes_of
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker

from .dealt import DealtText, Find, LayerTokens, PlaceText, Seen, find_dense
from .means import Moments, ask_moments
from .narrow import Assignment
from .rows import Rows

__all__ = ["KeptSums", "Sums", "find_kept", "has_sums", "keep_sums", "known_moments", "sums_fit"]

_FREE_SHARE = 0.5
"""Of the disk's free space, what sums may take."""
_PARTS = ("gram", "cross", "mean_activation", "mean_target")
_STAGE = "reconstruct"


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
    num_clusters = sum(item.num_clusters for item in assignments)
    needed = 4 * record.num_layers * num_clusters * record.ffn_dim * (record.ffn_dim + record.hidden_size)
    return needed <= min(SUMS_BYTES, _FREE_SHARE * shutil.disk_usage(existing_parent(folder)).free)


@dataclass(frozen=True, kw_only=True)
class KeptSums:
    """Sums that are made and kept while the text runs through the layers: of all assignments, and validation tokens."""

    sums: Sums
    text: DealtText
    centred: bool

    def keep(self, team: Team, stage: str, layer: int) -> list[Pending[None]]:
        """Ask the places, which are to come to a layer next, to sum and keep it.

        Returns:
            What has to be waited for until it is all there.
        """
        asked = []
        for place, text in self.text.texts.items():
            asked.append(team.call(place, stage, _keep_validation, self.sums, text, layer))
        for name, counts in self.text.calibration_tokens.items():
            finds = {
                place: partial(find_dense, text=text, name=name, layer=layer) for place, text in self.text.texts.items()
            }
            for cluster, place in homes_of(counts, team).items():
                own = ask_moments(team, stage, finds, counts, cluster, centred=self.centred)
                asked.append(team.call(place, stage, _keep_moments, self.sums, name, layer, cluster, own))
        return asked


def keep_sums(sums: Sums, text: DealtText, loaded: LoadedModel) -> KeptSums:
    """Prepare to sum and keep what narrowing needs of a text."""
    return KeptSums(sums=sums, text=text, centred=loaded.projection(0, "down").bias is not None)


def _key(sums: Sums, name: str, layer: int, cluster: int) -> str:
    return stage_key("sums", upstream=sums.key, of=name, layer=layer, cluster=cluster)


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


def _keep_moments(_worker: Worker, sums: Sums, name: str, layer: int, cluster: int, moments: Moments) -> None:
    sums.cache.store(_key(sums, name, layer, cluster), {part: _array(getattr(moments, part)) for part in _PARTS})


def _array(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Values in float32, which holds those of any dtype."""
    return values.float().cpu().numpy()


def has_sums(sums: Sums, assignments: Sequence[Assignment], layer: int) -> bool:
    """Whether one layer's sums are kept for some assignments."""
    return all(
        sums.cache.find_arrays(_key(sums, item.name, layer, cluster)) is not None
        for item in assignments
        for cluster in range(item.num_clusters)
    )


def known_moments(team: Team, sums: Sums, name: str, layer: int, cluster: int, place: int) -> Pending[Moments]:
    """Ask for a layer's moments of one of an assignment's clusters that are kept, at the place that will use them."""
    return team.call(place, _STAGE, _find_moments, sums, name, layer, cluster)


def _find_moments(worker: Worker, sums: Sums, name: str, layer: int, cluster: int) -> Moments:
    arrays, device = _found(sums, _key(sums, name, layer, cluster)), worker.loaded.device
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
