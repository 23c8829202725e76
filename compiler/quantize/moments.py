"""Second moments of the inputs of every linear layer: the weights of its rounding errors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import Family
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.text.corpus import Document, spread_sample
from torch import nn

__all__ = ["Moments", "ffn_moments", "input_moments"]

Moments = dict[str, torch.Tensor]
"""Path of a linear module -> (inputs,) float32 E[x^2]."""

_NUM_TOKENS = 8192
"""Means of squares settle soon: more tokens change nothing that rounding could see."""


def input_moments(
    loaded: LoadedModel, documents: Sequence[Document], cache: Cache, key: str, progress: Progress
) -> Moments:
    """Run some calibration text and average the squared inputs of the linear modules of all layers."""

    def compute() -> dict[str, Any]:
        return {
            path: moment.numpy()
            for path, moment in _sums(loaded, spread_sample(documents, _NUM_TOKENS), progress).items()
        }

    return {path: torch.from_numpy(values) for path, values in cache.arrays(key, compute).items()}


def ffn_moments(
    moments: Moments, family: Family, layer: int, role: str, neuron_ids: npt.NDArray[np.int32] | None
) -> torch.Tensor | None:
    """Look up the moments of one FFN matrix's inputs.

    Args:
        neuron_ids: the neurons that are the inputs of a narrow down projection; None for all.
    """
    found = moments.get(f"{family.layers}.{layer}.{family.projections[role]}")
    if found is None or role != "down" or neuron_ids is None:
        return found
    return found[torch.from_numpy(neuron_ids).long()]


def _sums(loaded: LoadedModel, documents: Sequence[Document], progress: Progress) -> Moments:
    sums: Moments = {}
    num_tokens = sum(len(document.token_ids) for document in documents)
    with progress.stage("moments", len(documents)) as advance, _watch(loaded, sums), torch.inference_mode():
        for document in documents:
            ids = torch.tensor([list(document.token_ids)], device=loaded.device)
            loaded.model(ids, use_cache=False, logits_to_keep=1)
            advance()
    return {path: total.cpu() / num_tokens for path, total in sums.items()}


@contextmanager
def _watch(loaded: LoadedModel, sums: Moments) -> Iterator[None]:
    handles = []
    for path, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and path.startswith(f"{loaded.family.layers}."):
            handles.append(module.register_forward_pre_hook(partial(_add, sums, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: Moments, path: str, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
    squares = flat.square().sum(dim=0)
    sums[path] = squares if path not in sums else sums[path] + squares
