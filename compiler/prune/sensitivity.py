"""Stage `sensitivity`: what an error in an FFN's output costs the model, and so how many neurons each layer needs.

To second order, an error d_t in a layer's FFN output at token t costs KL = 1/2 d_t^T F d_t with the Fisher matrix
F = E[g g^T], g the gradient of -log p(y) with respect to that output, y drawn from the model itself. Gradients
count what an error does to later tokens through attention too. As in K-FAC (arXiv 1503.05671) and LLM Surgeon
(arXiv 2312.17244), F is averaged apart from the errors; unlike energies it compares one layer with another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import weighs_errors
from coreinfer.compiler.models.gradients import draw_tokens, parameters_fixed
from coreinfer.compiler.models.layerwise import (
    Batch,
    document_starts,
    head_logits,
    layer_output,
    prepare_batches,
)
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.samples import curve_tokens, fisher_tokens
from coreinfer.compiler.team.adding import add_up
from coreinfer.compiler.team.dealing import Stepwise, deal, home, in_turn, overlapped
from coreinfer.compiler.team.passage import WALK, Passage, begin_passages, layer_of, lengths_of, without_text
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import SAMPLING, Document, spread_sample
from torch import nn

from .products import packed_gram
from .removal import BLOCK, Removal, System, remove_neurons
from .triangle import num_packed, unpack_upper

__all__ = ["RemovalCurves", "fisher_matrices", "output_metrics", "removal_curves"]

Floats = npt.NDArray[np.float32]

_STAGE, _CURVES = "sensitivity", "curves"
_BATCH_TOKENS = 1024
"""Of which the hidden states between all layers are in memory."""
_CURVE_RIDGE = 1e-2
# A share of the mean diagonal, so that no direction of the output counts for nothing.
_DAMPING = 0.05


def fisher_matrices(
    team: Team, documents: Sequence[Document], cache: Cache, key: str, progress: Progress, *, seed: int
) -> torch.Tensor:
    """Fisher matrices of the FFN outputs, damped.

    Args:
        documents: calibration text, of which a sample is run forward and backward.
        seed: of the tokens that are drawn.
    Returns:
        (layers, hidden size, hidden size) float32 on the CPU.
    """
    sample = spread_sample(documents, fisher_tokens(team.loaded.record.hidden_size))

    def compute() -> dict[str, Any]:
        packed, size = _fisher_sums(team, sample, progress, seed=seed), team.loaded.record.hidden_size
        return {"fisher": torch.stack([unpack_upper(layer, size) for layer in packed]).cpu().numpy()}

    fisher = torch.from_numpy(cache.arrays(key, compute)["fisher"])
    damping = _DAMPING * fisher.diagonal(dim1=1, dim2=2).mean(dim=1)
    return fisher + damping.clamp_min(1e-20)[:, None, None] * torch.eye(fisher.shape[1])


def output_metrics(
    config: CompileConfig,
    keep: float,
    team: Team,
    documents: Sequence[Document],
    cache: Cache,
    key: str,
    progress: Progress,
) -> torch.Tensor:
    """What errors in the FFN outputs cost: Fisher matrices where anything asks for them, else identities."""
    if keep < 1 and weighs_errors(config):
        fisher_key = stage_key("fisher", upstream=key, sampling=SAMPLING, draw="sums", kept="triangles")
        return fisher_matrices(team, documents, cache, fisher_key, progress, seed=config.seed)
    record = team.loaded.record
    return torch.eye(record.hidden_size).expand(record.num_layers, -1, -1)


def _fisher_sums(team: Team, documents: Sequence[Document], progress: Progress, *, seed: int) -> torch.Tensor:
    """Mean g g^T of each layer, packed: (layers, `num_packed(hidden size)`)."""
    chances, dealt = _chances(documents, team.loaded.device, seed), deal(lengths_of(documents), team)
    with progress.stage(_STAGE, len(documents)) as advance:
        parts, steps = {}, Steps(advance)
        for place, ids in dealt.items():
            own = without_text([documents[index] for index in ids])
            parts[place] = team.call(place, _STAGE, _place_sums, own, [chances[index] for index in ids], steps)
        sums, num_tokens = add_up(team, _STAGE, _add_sums, parts).result()
        steps.reach(len(documents))
    return sums / max(1, num_tokens)


def _chances(documents: Sequence[Document], device: torch.device, seed: int) -> list[torch.Tensor]:
    """Draw what decides on each token: (tokens, 1) of each document, whoever runs it and with which others.

    Documents take their turn by length, as `prepare_batches` has them.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    lengths = [len(document.token_ids) for document in documents]
    drawn = {
        index: torch.rand((lengths[index], 1), generator=generator, device=device)
        for index in sorted(range(len(documents)), key=lengths.__getitem__)
    }
    return [drawn[index] for index in range(len(documents))]


def _place_sums(
    worker: Worker, documents: Sequence[Document], chances: Sequence[torch.Tensor], advance: Advance
) -> tuple[torch.Tensor, int]:
    """Sums of g g^T over a place's documents, packed: (layers, `num_packed(hidden size)`), and over how many tokens."""
    loaded = worker.loaded
    num_values = num_packed(loaded.record.hidden_size)
    sums = torch.zeros((loaded.record.num_layers, num_values), device=loaded.device)
    starts, num_tokens = document_starts(documents), 0
    order = iter(sorted(range(len(documents)), key=lambda index: len(documents[index].token_ids)))
    with parameters_fixed(loaded), torch.no_grad():
        for batch in prepare_batches(loaded, documents, starts, batch_tokens=_BATCH_TOKENS):
            # The first token, which often only serves as an attention sink, would hide all others.
            counted = batch.mask.clone()
            counted[:, 0] = False
            own = [chances[next(order)] for _ in range(len(batch.mask))]
            for layer, gradient in _output_gradients(loaded, batch, own):
                sums[layer] += packed_gram(gradient[counted])
            num_tokens += int(counted.sum())
            advance(len(batch.mask))
    return sums, num_tokens


def _add_sums(
    _worker: Worker, first: tuple[torch.Tensor, int], second: tuple[torch.Tensor, int]
) -> tuple[torch.Tensor, int]:
    return first[0] + second[0], first[1] + second[1]


def _output_gradients(
    loaded: LoadedModel, batch: Batch, chances: Sequence[torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Go back through the layers one at a time, so that no more than one layer's weights are wanted at once.

    Yields:
        Each layer, the last first, and the gradient of its FFN output: (batch, length, hidden size).
    """
    entering = [batch.hidden]
    for layer in range(loaded.record.num_layers):
        entering.append(layer_output(loaded, layer, batch, entering[-1]))
    gradient = _head_gradient(loaded, batch, entering.pop(), chances)
    for layer in reversed(range(loaded.record.num_layers)):
        of_output, gradient = _layer_gradients(loaded, layer, batch, entering.pop(), gradient)
        yield layer, of_output


def _head_gradient(
    loaded: LoadedModel, batch: Batch, hidden: torch.Tensor, chances: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Gradient of -log p(y), y drawn from the model, by what leaves the layers; one document after another."""
    gradient = torch.zeros_like(hidden)
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        leaf = hidden[row : row + 1, :length].detach().requires_grad_()
        with torch.enable_grad():
            log_p = head_logits(loaded, batch.token_ids[row : row + 1, :length], leaf)[0].float().log_softmax(dim=-1)
            drawn = draw_tokens(log_p.detach(), chances[row])
            (gradient[row : row + 1, :length],) = torch.autograd.grad(-log_p.gather(1, drawn).sum(), leaf)
    return gradient


def _layer_gradients(
    loaded: LoadedModel, layer: int, batch: Batch, entering: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the FFN's output and by what enters the layer, of the gradient by what leaves it."""
    outputs: list[torch.Tensor] = []

    def look(_module: nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    is_mixture = loaded.record.experts is not None
    hook = (loaded.mixture(layer) if is_mixture else loaded.projection(layer, "down")).register_forward_hook(look)
    try:
        with torch.enable_grad():
            leaf = entering.detach().requires_grad_()
            leaving = layer_output(loaded, layer, batch, leaf)
            of_output, of_entering = torch.autograd.grad(leaving, (outputs[0], leaf), gradient)
    finally:
        hook.remove()
    return of_output.reshape(*entering.shape[:2], -1), of_entering


@dataclass(frozen=True, kw_only=True)
class RemovalCurves:
    """What it costs to remove more and more neurons from each layer, with repair.

    Attributes:
        costs: (layers, removed blocks of 32 neurons + 1) nats per token, from no block removed to all but one.
        order: (layers, ffn_dim) int32, each layer's neurons as they went; those of the last block, which stayed, at
            the end.
    """

    costs: Floats
    order: npt.NDArray[np.int32]


def removal_curves(
    team: Team,
    documents: Sequence[Document],
    fisher: torch.Tensor,
    cache: Cache,
    key: str,
    progress: Progress,
) -> RemovalCurves:
    """Estimate what it costs to remove more and more neurons from each layer, on text of all clusters."""
    sample = spread_sample(documents, curve_tokens(team.loaded.record.ffn_dim))

    def compute() -> dict[str, Any]:
        found = _curves(team, sample, fisher, progress)
        return {
            "curves": np.stack([0.5 * layer.losses for layer in found]).astype(np.float32),
            "order": np.stack([np.concatenate([layer.removed_ids, layer.neuron_ids]) for layer in found]),
        }

    arrays = cache.arrays(key, compute)
    return RemovalCurves(costs=arrays["curves"], order=arrays["order"])


def _curves(team: Team, sample: Sequence[Document], fisher: torch.Tensor, progress: Progress) -> list[Removal]:
    num_layers, num_tokens = team.loaded.record.num_layers, sum(len(document.token_ids) for document in sample)
    dealt = deal(lengths_of(sample), team)
    passages = begin_passages(team, {place: [sample[index] for index in ids] for place, ids in dealt.items()})

    def measure(layer: int) -> Stepwise[Pending[Any]]:
        parts = {place: team.call(place, _CURVES, _gram, own, layer, num_tokens) for place, own in passages.items()}
        yield
        total = add_up(team, _CURVES, _add, parts)
        return team.call(home(team, layer), _CURVES, _curve, layer, total, fisher[layer])

    with progress.stage(_CURVES, num_layers) as advance:
        curves = []
        # As many layers are on their way as keep all places at work: one removes while others do.
        for (_, curve), _ in in_turn(team, overlapped(team, range(num_layers), measure), lambda found: found):
            curves.append(curve.result())
            advance()
        forget(team, _CURVES, WALK)
    return curves


@torch.inference_mode()
def _gram(worker: Worker, passage: Shared[Passage], layer: int, num_tokens: int) -> torch.Tensor:
    """A place's part of a layer's mean Gram matrix, packed."""
    return packed_gram(layer_of(worker, passage, layer).activations).div_(max(1, num_tokens))


@torch.inference_mode()
def _add(_worker: Worker, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + second


@torch.inference_mode()
def _curve(worker: Worker, layer: int, packed: torch.Tensor, fisher: torch.Tensor) -> Removal:
    """Remove more and more of a layer's neurons, all but a block."""
    weights = worker.loaded.projection(layer, "down").weight.detach().float().T.contiguous()
    gram = unpack_upper(packed, len(weights))
    system = System(gram=gram, cross=gram @ weights, own=weights, ridge=_CURVE_RIDGE)
    metric = fisher.to(weights.device)
    return remove_neurons(system, metric, keep=min(BLOCK, len(gram)), step=BLOCK)
