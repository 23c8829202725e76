"""Second moments of the inputs of every linear layer: the weights of its rounding errors."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import Family
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.layerwise import Batch, document_starts, layer_output, prepare_batches
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.samples import MOMENT_TOKENS
from coreinfer.compiler.text.corpus import Document, spread_sample
from coreinfer.runtime.engines.torch.mixture import ExpertRun
from torch import nn

__all__ = ["Moments", "ffn_moments", "input_moments"]

Moments = dict[str, torch.Tensor]
"""Path of a linear module -> (inputs,) float32 E[x^2]."""

_LEAST_TOKENS = 32
"""Of an expert, to weigh its rounding by what was routed to it."""
_BATCH_TOKENS = 1024
"""Few documents that are far apart in length would be padded much in larger batches."""


def input_moments(
    loaded: LoadedModel, documents: Sequence[Document], cache: Cache, key: str, progress: Progress
) -> Moments:
    """Run some calibration text and average the squared inputs of the linear modules of all layers."""

    def compute() -> dict[str, Any]:
        return {
            path: moment.numpy()
            for path, moment in _sums(loaded, spread_sample(documents, MOMENT_TOKENS), progress).items()
        }

    return {path: torch.from_numpy(values) for path, values in cache.arrays(key, compute).items()}


def ffn_moments(
    moments: Moments, family: Family, layer: int, role: str, neuron_ids: npt.NDArray[np.int32] | None
) -> torch.Tensor | None:
    """Look up the moments of one FFN matrix's inputs.

    Args:
        neuron_ids: the neurons that are the inputs of a narrow down projection; None for all.
    """
    if family.experts is not None:
        return moments.get(f"{family.layers}.{layer}.{role}")
    found = moments.get(f"{family.layers}.{layer}.{family.projections[role]}")
    if found is None or role != "down" or neuron_ids is None:
        return found
    return found[torch.from_numpy(neuron_ids).long()]


def _sums(loaded: LoadedModel, documents: Sequence[Document], progress: Progress) -> Moments:
    sums: Moments = {}
    num_tokens: Counter[str] = Counter()
    starts = document_starts(documents)
    with progress.stage("moments", loaded.record.num_layers) as advance, torch.inference_mode():
        batches = prepare_batches(loaded, documents, starts, batch_tokens=_BATCH_TOKENS)
        for layer in range(loaded.record.num_layers):
            for batch in batches:
                with _watch(loaded, layer, batch, sums, num_tokens):
                    batch.hidden = layer_output(loaded, layer, batch, batch.hidden)
            advance()
    # Of few tokens the moments say little; without, all inputs of a matrix count alike.
    few = {path for path, count in num_tokens.items() if count < _LEAST_TOKENS}
    # An expert's are too small by the same factor in all of its inputs, which changes nothing.
    return {path: total.cpu() / int(starts[-1]) for path, total in sums.items() if path not in few}


@contextmanager
def _watch(loaded: LoadedModel, layer: int, batch: Batch, sums: Moments, num_tokens: Counter[str]) -> Iterator[None]:
    """Sum a layer's inputs while the block runs, and count the tokens of each expert."""
    handles = []
    for path, module in loaded.layers[layer].named_modules(prefix=f"{loaded.family.layers}.{layer}"):
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(partial(_add, sums, path, batch)))
    mixture = None if loaded.family.experts is None else loaded.mixture(layer)
    if mixture is not None:
        mixture.watch = partial(_add_expert, sums, num_tokens, f"{loaded.family.layers}.{layer}", batch)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if mixture is not None:
            mixture.watch = None


def _add_expert(sums: Moments, num_tokens: Counter[str], layer: str, batch: Batch, run: ExpertRun) -> None:
    real = batch.mask.reshape(-1)[run.rows]
    inputs, activations = (values[real].float().square().sum(dim=0) for values in (run.inputs, run.activations))
    for role, squares in (("gate", inputs), ("up", inputs), ("down", activations)):
        path = f"{layer}.{expert_role(run.expert, role)}"
        sums[path] = squares if path not in sums else sums[path] + squares
        num_tokens[path] += int(real.sum())


def _add(sums: Moments, path: str, batch: Batch, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    squares = batch.real(inputs[0]).float().square().sum(dim=0)
    sums[path] = squares if path not in sums else sums[path] + squares
