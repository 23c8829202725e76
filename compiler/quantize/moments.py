"""Second moments of the inputs of every linear layer: the weights of its rounding errors."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

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
from coreinfer.compiler.team.adding import Arrays, add_arrays, add_up
from coreinfer.compiler.team.dealing import Stepwise, deal, overlapped
from coreinfer.compiler.team.passage import WALK, lengths_of, without_text
from coreinfer.compiler.team.team import Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import Document, spread_sample
from coreinfer.runtime.engines.torch.mixture import ExpertRun
from torch import nn

__all__ = ["Moments", "ffn_moments", "input_moments"]

Moments = dict[str, torch.Tensor]
"""Path of a linear module -> (inputs,) float32 E[x^2]."""

_STAGE = "moments"
_COUNT = "tokens of "
"""Before an expert's path, in the name of its number of tokens among the sums."""
_LEAST_TOKENS = 32
"""Of an expert, to weigh its rounding by what was routed to it."""
_BATCH_TOKENS = 1024
"""Few documents that are far apart in length would be padded much in larger batches."""


def input_moments(team: Team, documents: Sequence[Document], cache: Cache, key: str, progress: Progress) -> Moments:
    """Run some calibration text and average the squared inputs of the linear modules of all layers."""

    def compute() -> dict[str, Any]:
        return {
            path: moment.numpy()
            for path, moment in _sums(team, spread_sample(documents, MOMENT_TOKENS), progress).items()
        }

    return {path: torch.from_numpy(values) for path, values in cache.arrays(key, compute).items()}


def ffn_moments(
    moments: Moments, family: Family, layer: int, role: str, neuron_ids: npt.NDArray[np.int32] | None
) -> torch.Tensor | None:
    """Look up the moments of one FFN matrix's inputs.

    Args:
        neuron_ids: the neurons that are the inputs of a narrow down projection; None for all.
    """
    path = role if family.experts is not None else family.projections[role]
    found = moments.get(f"{family.layers}.{layer}.{path}")
    if found is None or role.rpartition(".")[2] != "down" or neuron_ids is None:
        return found
    return found[torch.from_numpy(neuron_ids).long()]


def _sums(team: Team, documents: Sequence[Document], progress: Progress) -> Moments:
    dealt = deal(lengths_of(documents), team)
    texts = {
        place: team.share(_Text(key=uuid4().hex, documents=without_text([documents[index] for index in ids])))
        for place, ids in dealt.items()
    }

    def sum_layer(layer: int) -> Stepwise[Arrays]:
        parts = {place: team.call(place, _STAGE, _layer_sums, text, layer) for place, text in texts.items()}
        yield
        total = add_up(team, _STAGE, add_arrays, parts)
        yield
        return total.result()

    found: Arrays = {}
    with progress.stage(_STAGE, team.loaded.record.num_layers) as advance:
        for _, total in overlapped(team, range(team.loaded.record.num_layers), sum_layer):
            found |= total
            advance()
        forget(team, _STAGE, WALK)
    # Of few tokens the moments say little; without, all inputs of a matrix count alike.
    counts = {name.removeprefix(_COUNT): count for name, count in found.items() if name.startswith(_COUNT)}
    few = {path for path, count in counts.items() if count < _LEAST_TOKENS}
    num_tokens = sum(len(document.token_ids) for document in documents)
    # An expert's are too small by the same factor in all of its inputs, which changes nothing.
    return {
        path: total.cpu() / num_tokens
        for path, total in found.items()
        if path not in few and not path.startswith(_COUNT)
    }


@dataclass(frozen=True, kw_only=True)
class _Text:
    """One place's documents; no other text has its key."""

    key: str
    documents: Sequence[Document]


class _Walk:
    """Documents before a layer."""

    def __init__(self, loaded: LoadedModel, documents: Sequence[Document]) -> None:
        self.layer = 0
        self.batches = prepare_batches(loaded, documents, document_starts(documents), batch_tokens=_BATCH_TOKENS)


@torch.inference_mode()
def _layer_sums(worker: Worker, shared: Shared[_Text], layer: int) -> Arrays:
    """Sums of a layer's squared inputs, and counts of each expert's tokens; the text moves on past the layer."""
    loaded, text = worker.loaded, shared.value()
    begin = partial(_Walk, loaded, text.documents)
    walk = worker.recall(WALK, text.key, begin)
    if walk.layer > layer:
        worker.forget(WALK)
        walk = worker.recall(WALK, text.key, begin)
    sums: Moments = {}
    num_tokens: Counter[str] = Counter()
    while walk.layer <= layer:
        # Of layers that are only passed, by a worker that replaces another, nothing is kept.
        sums, num_tokens = {}, Counter()
        for batch in walk.batches:
            with _watch(loaded, walk.layer, batch, sums, num_tokens):
                batch.hidden = layer_output(loaded, walk.layer, batch, batch.hidden)
        walk.layer += 1
    return {**sums, **{f"{_COUNT}{path}": count for path, count in num_tokens.items()}}


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
