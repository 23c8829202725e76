"""Stages `profile` and `select` of a mixture of experts: which experts of a layer a cluster hardly uses.

An expert is kept or left out as a whole. Its statistic is what it adds to the residual stream: the squared norm of its
weighted output, divided token by token by that of the hidden state that leaves the layer. Expert by expert is run, so
that of activations no more than one expert's of one batch are in memory.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.layerwise import Batch, document_starts, layer_output, prepare_batches
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .profile import Profile

__all__ = ["expert_budgets", "profile_experts"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def profile_experts(
    loaded: LoadedModel,
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
        A profile whose neurons are the experts.
    """
    lengths = np.array([len(document.token_ids) for document in documents])

    def compute() -> dict[str, Any]:
        return _sums(loaded, documents, {name: np.repeat(own, lengths) for name, own in assignments.items()}, progress)

    arrays = cache.arrays(key, compute)
    return Profile(
        statistics={name: arrays[f"statistic.{name}"] for name in assignments},
        num_tokens={
            name: np.bincount(labels, weights=lengths, minlength=int(labels.max()) + 1).astype(np.int64)
            for name, labels in assignments.items()
        },
        relative_energies=arrays["relative_energies"],
    )


def _sums(
    loaded: LoadedModel, documents: Sequence[Document], labels: Mapping[str, Labels], progress: Progress
) -> dict[str, Any]:
    """Sum over tokens; `labels` are of each token."""
    starts, num_layers = document_starts(documents), loaded.record.num_layers
    found: dict[str, list[Floats]] = {name: [] for name in labels}
    means: list[Floats] = []
    with progress.stage("profile", num_layers) as advance, torch.inference_mode():
        batches = prepare_batches(loaded, documents, starts)
        for layer in range(num_layers):
            shares = _layer_shares(loaded, layer, batches, int(starts[-1]))
            means.append(shares.mean(axis=0))
            for name, own in labels.items():
                clusters = range(int(own.max()) + 1)
                found[name].append(np.stack([shares[own == cluster].sum(axis=0) for cluster in clusters]))
            advance()
    statistics = {f"statistic.{name}": np.stack(sums, axis=1) for name, sums in found.items()}
    return {**statistics, "relative_energies": np.stack(means)}


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
