"""Stages `profile` and `select` of a mixture of experts: which experts of a layer a cluster hardly uses.

Where experts are narrowed, `expert_neurons` says what is summed. Otherwise an expert is kept or left out as a whole,
and its statistic is what it adds to the residual stream: the squared norm of its weighted output, divided token by
token by that of the hidden state that leaves the layer. Expert by expert is run, so
that of activations no more than one expert's of one batch are in memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.layerwise import Batch, layer_output
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.team.adding import Arrays, add_arrays, add_up
from coreinfer.compiler.team.dealing import deal, in_turn
from coreinfer.compiler.team.passage import WALK, lengths_of, without_text
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .expert_neurons import neuron_sums
from .text_walk import TextWalk, walk_of

__all__ = ["expert_budgets", "profile_experts"]

_STAGE = "profile"
_ENERGIES = "relative_energies"

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def profile_experts(
    config: CompileConfig,
    team: Team,
    documents: Sequence[Document],
    assignments: Mapping[str, Labels],
    cache: Cache,
    key: str,
    progress: Progress,
) -> Profile:
    """Sum up what experts contribute to the tokens of each cluster.

    Args:
        documents: calibration text only.
        assignments: name -> (documents,) cluster ids.
    Returns:
        A profile whose neurons are the experts; where these are narrowed, all experts' neurons, with relative energies
        (layers, 1) of all of a layer's together.
    """
    lengths = np.array([len(document.token_ids) for document in documents])

    def compute() -> dict[str, Any]:
        return _sums(config, team, documents, assignments, progress)

    arrays = cache.arrays(key, compute)
    return Profile(
        statistics={name: arrays[f"statistic.{name}"] for name in assignments},
        num_tokens={
            name: np.bincount(labels, weights=lengths, minlength=int(labels.max()) + 1).astype(np.int64)
            for name, labels in assignments.items()
        },
        relative_energies=arrays[_ENERGIES],
        expert_tokens={name: arrays[f"tokens.{name}"] for name in assignments if config.experts != "whole"},
        expert_weights={name: arrays[f"weights.{name}"] for name in assignments if config.experts != "whole"},
    )


def _sums(
    config: CompileConfig,
    team: Team,
    documents: Sequence[Document],
    assignments: Mapping[str, Labels],
    progress: Progress,
) -> dict[str, Any]:
    """Sum over tokens; the first assignment's clusters stay together where they can."""
    num_layers, num_clusters = team.loaded.record.num_layers, {n: int(ids.max()) + 1 for n, ids in assignments.items()}
    texts = {
        place: team.share(
            _Text(
                key=uuid4().hex,
                documents=without_text([documents[index] for index in ids]),
                labels={name: labels[ids] for name, labels in assignments.items()},
                num_clusters=num_clusters,
                narrows=config.experts != "whole",
            )
        )
        for place, ids in deal(lengths_of(documents), team, next(iter(assignments.values()))).items()
    }

    def ask(layer: int) -> Pending[Arrays]:
        parts = {place: team.call(place, _STAGE, _layer_sums, text, layer) for place, text in texts.items()}
        return add_up(team, _STAGE, add_arrays, parts)

    found: list[Arrays] = []
    with progress.stage(_STAGE, num_layers) as advance:
        for _, total in in_turn(team, range(num_layers), ask):
            found.append(total.result())
            advance()
        forget(team, _STAGE, WALK)
    sums = {name: np.stack([layer[name] for layer in found], axis=-2) for name in found[0]}
    sums[_ENERGIES] /= sum(len(document.token_ids) for document in documents)
    return sums


@dataclass(frozen=True, kw_only=True)
class _Text:
    """One place's documents, and their clusters by each assignment; no other text has its key.

    Attributes:
        narrows: whether neurons are looked at, not experts.
    """

    key: str
    documents: Sequence[Document]
    labels: Mapping[str, Labels]
    num_clusters: Mapping[str, int]
    narrows: bool


@torch.inference_mode()
def _layer_sums(worker: Worker, shared: "Shared[_Text]", layer: int) -> Arrays:
    """One layer's sums over a place's tokens: of each assignment (clusters, units), and energies (units,) or (1,)."""
    loaded, text = worker.loaded, shared.value()
    walk = walk_of(worker, text.key, text.documents, layer)
    labels = {name: np.repeat(own, np.diff(walk.starts)) for name, own in text.labels.items()}
    sums: Arrays = {}
    while walk.layer <= layer:
        sums = (_neuron_sums if text.narrows else _expert_sums)(loaded, walk, labels, text.num_clusters)
        walk.layer += 1
    return sums


def _expert_sums(
    loaded: LoadedModel, walk: TextWalk, labels: Mapping[str, Labels], num_clusters: Mapping[str, int]
) -> Arrays:
    shares = _layer_shares(loaded, walk.layer, walk.batches, int(walk.starts[-1]))
    sums: Arrays = {_ENERGIES: shares.sum(axis=0)}
    for name, own in labels.items():
        clusters = range(num_clusters[name])
        sums[f"statistic.{name}"] = np.stack([shares[own == cluster].sum(axis=0) for cluster in clusters])
    return sums


def _neuron_sums(
    loaded: LoadedModel, walk: TextWalk, labels: Mapping[str, Labels], num_clusters: Mapping[str, int]
) -> Arrays:
    found = neuron_sums(loaded, walk.layer, walk.batches, labels, num_clusters)
    statistics = {f"statistic.{name}": values for name, values in found.statistics.items()}
    tokens = {f"tokens.{name}": values for name, values in found.tokens.items()}
    weights = {f"weights.{name}": values for name, values in found.weights.items()}
    return {_ENERGIES: np.array([found.energy], dtype=np.float32), **statistics, **tokens, **weights}


def _layer_shares(loaded: LoadedModel, layer: int, batches: Sequence[Batch], num_tokens: int) -> Floats:
    """Run all text through a layer: (tokens, experts) squared outputs relative to the residual stream."""
    assert loaded.record.experts is not None
    shares = torch.zeros((num_tokens, loaded.record.experts.num_experts))
    mixture = loaded.mixture(layer)
    for batch in batches:
        energies = torch.zeros((batch.mask.numel(), shares.shape[1]), device=loaded.device)
        mixture.watch = partial(_add_energies, energies)
        try:
            batch.hidden = layer_output(loaded, layer, batch, batch.hidden)
        finally:
            mixture.watch = None
        stream = batch.real(batch.hidden).float().square().sum(dim=-1, keepdim=True)
        real = energies[batch.mask.reshape(-1)]
        shares[batch.rows.cpu()] = (real / stream.clamp_min(1e-30)).cpu()
    values: Floats = shares.numpy()
    return values


def _add_energies(energies: torch.Tensor, run: ExpertRun) -> None:
    energies[run.rows, run.expert] = run.outputs.float().square().sum(dim=-1)


def expert_budgets(config: CompileConfig, keep: float, energies: Floats, experts: ExpertsRecord) -> list[int]:
    """Decide how many experts each layer keeps: those that contribute least go, in whichever layer they are.

    Args:
        keep: kept experts / all experts.
        energies: (layers, experts) mean contributions.
    Raises:
        ConfigError: a layer would be left with fewer experts than a token uses.
    """
    num_layers, num_experts = energies.shape
    least = max(experts.num_chosen, math.ceil(config.min_layer_keep * num_experts - 1e-9))
    total = round(keep * num_layers * num_experts)
    if total < num_layers * experts.num_chosen:
        lowest = math.ceil(experts.num_chosen / num_experts * 1e4) / 1e4
        raise ConfigError(
            f"--keep {keep:g}: expected at least {lowest:g}, as each token uses {experts.num_chosen} of {num_experts} "
            "experts"
        )
    if config.effective_budgets == "uniform":
        return [max(least, round(keep * num_experts))] * num_layers
    # Within a layer the largest come first, so that a layer's budget is a number.
    ranked = -np.sort(-energies.astype(np.float64), axis=1)[:, least:]
    order = np.argsort(-ranked, axis=None, kind="stable")[: max(0, total - num_layers * least)]
    more = np.bincount(order // max(1, ranked.shape[1]), minlength=num_layers)
    return [least + int(count) for count in more]
